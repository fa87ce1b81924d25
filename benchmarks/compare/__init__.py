"""This library beside mlx-examples, diffusers and stable-diffusion.cpp: ``python -m benchmarks.compare``."""
