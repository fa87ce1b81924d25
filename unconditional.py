# PYTHON_ARGCOMPLETE_OK
"""Make images with a model that reads no prompt: ``python unconditional.py --model google/ddpm-cat-256``."""

import sys

try:
    from stable_diffusion.cli.main import unconditional
except KeyboardInterrupt:  # it takes a moment
    print("unconditional.py: error: interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(unconditional())
