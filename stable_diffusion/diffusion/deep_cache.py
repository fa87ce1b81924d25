"""DeepCache (Ma, Fang & Wang 2023, CVPR 2024): deep feature maps change little from step to step and are reused.

The steps of a cycle have equal distance, and the branch is the outermost of the paper's. In the first step of a cycle
all of the UNet runs. In the others only its last resnet does, with its transformer: on the map that came into it in the
first step, and on the output of the first convolution at the step's own latents.

``python -m benchmarks.approximations`` measures the time that this saves and the change of the images.
"""

import mlx.core as mx


class DeepCache:
    """Hold the deep feature map of some rows of a run for ``every`` steps; at 1 nothing is cached."""

    def __init__(self, every: int):
        self._every = every
        self._cycle: int | None = None
        self._maps: list[mx.array] = []

    def at(self, step: int) -> list[mx.array] | None:
        """Return the UNet's ``cache`` for a step, counted from the first with these rows; a cycle begins empty."""
        if self._every == 1:
            return None
        if step // self._every != self._cycle:
            self._cycle, self._maps = step // self._every, []
        return self._maps
