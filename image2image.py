# PYTHON_ARGCOMPLETE_OK
"""Change an image towards a prompt: ``python image2image.py photo.jpg "a lit fireplace" --strength 0.5``."""

import sys

try:
    from stable_diffusion.cli.main import image2image
except KeyboardInterrupt:  # it takes a moment
    print("image2image.py: error: interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(image2image())
