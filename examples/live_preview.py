"""Shows in a terminal how an image comes about: python -m examples.live_preview "a red circle on a blue background"

A `for` over the generator of latents is all it takes: after each step, `predicted` is what the model takes for the
image by now, and `preview_decoder` shows it without the autoencoder. A character is two pixels, one above the other, so
any terminal with 24-bit colours will do, also at the other end of a network.
"""

import argparse
import sys

import mlx.core as mx
from PIL import Image

from stable_diffusion import StableDiffusion, to_images
from stable_diffusion.app.preview import preview_decoder


def characters(image: Image.Image, columns: int) -> list[str]:
    """Lines of half blocks: the upper pixel is the colour of the character, the lower one that behind it."""
    rows = max(1, round(columns * image.height / image.width / 2))
    small = image.resize((columns, 2 * rows))
    lines = []
    for y in range(0, 2 * rows, 2):
        line = ""
        for x in range(columns):
            (r, g, b), (red, green, blue) = small.getpixel((x, y)), small.getpixel((x, y + 1))
            line += f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{red};{green};{blue}m▀"
        lines.append(line + "\x1b[0m")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="tiny", help="alias, Hub id, folder or file (tiny)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="sampler steps (the model's own)")
    parser.add_argument("--columns", type=int, default=48, help="width in characters (48)")
    parser.add_argument("--output", default="live.png", help="where the image goes in the end (live.png)")
    args = parser.parse_args(argv)

    sd = StableDiffusion(args.model)
    decode = preview_decoder(sd)
    latents = sd.generate_latents(args.prompt, num_steps=args.steps, seed=args.seed)
    for step, x_t in enumerate(latents, start=1):
        mx.eval(x_t)
        lines = [*characters(to_images(decode(latents.predicted))[0], args.columns), f"step {step}"]
        if step > 1:
            sys.stdout.write(f"\x1b[{len(lines)}A")  # up, over the picture before
        print("\n".join(lines), flush=True)

    image = to_images(sd.decode(x_t))[0]
    image.save(args.output)
    print(f"\x1b[{len(lines)}A" + "\n".join([*characters(image, args.columns), args.output]))


if __name__ == "__main__":
    main()
