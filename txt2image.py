"""Make images from a prompt: ``python txt2image.py "a photo of an astronaut riding a horse on mars"``."""

import sys

from stable_diffusion.cli import txt2image

if __name__ == "__main__":
    sys.exit(txt2image())
