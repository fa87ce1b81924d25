"""Change an image towards a prompt: ``python image2image.py photo.jpg "a lit fireplace" --strength 0.5``."""

import sys

from stable_diffusion.cli import image2image

if __name__ == "__main__":
    sys.exit(image2image())
