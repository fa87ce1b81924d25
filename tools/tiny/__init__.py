"""Makes the bundled tiny model, the small Stable Diffusion in stable_diffusion/tiny.

    pip install torch diffusers transformers               # development dependencies; not needed to use the model
    python -m tools.tiny.train --out stable_diffusion/tiny      # data, tokenizer, VAE, UNet, export; resumable
    python -m tools.tiny.evaluate stable_diffusion/tiny         # what 200 held-out captions get right
    python -m tools.tiny.contact_sheet sheet.png                # captions x seeds, rendered by this library
    python -m tools.tiny.train_control stable_diffusion/tiny    # its ControlNet for edges
    python -m tools.tiny.evaluate_control stable_diffusion/tiny     # how well that is followed
    python -m tools.tiny.new_thing draw FOLDER                  # pictures from which a LoRA learns a new shape
    python -m tools.tiny.new_thing measure LORA                 # how well it has learned it

data.py draws the captioned images, score.py reads images back, models.py holds the sizes of the networks, bpe.py
learns the tokenizer, autoencoder.py and train.py the networks, optimize.py is the optimizer and the checkpoints,
export.py writes diffusers' layout in float16; train_control.py and evaluate_control.py are the ControlNet's.
new_thing.py is for the LoRA in stable_diffusion/tiny/lora, which docs/training.md trains.
"""
