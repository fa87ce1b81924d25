# PYTHON_ARGCOMPLETE_OK
"""Make images from a prompt: ``python txt2image.py "a photo of an astronaut riding a horse on mars"``."""

import sys

try:
    from stable_diffusion.cli.main import txt2image
except KeyboardInterrupt:  # it takes a moment
    print("txt2image.py: error: interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(txt2image())
