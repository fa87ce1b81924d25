"""This library beside mlx-examples and diffusers: ``python -m benchmarks.compare``."""
