"""DeepCache: what the UNet sees in the large changes little from step to step, so it is kept for some steps.

After Ma, Fang & Wang 2023, "DeepCache: Accelerating Diffusion Models for Free" (CVPR 2024), with steps of equal
distance and the outermost of their branches: between two steps in which all of the UNet runs, its last resnet, with
its transformer, takes what came into it in the first of them. It sees the latents of its own step through the first
convolution alone, whose output it has always taken back.

What those steps cost is in ``python -m benchmarks.approximations``, as is what the images lose.
"""

import mlx.core as mx

from ..models.layers import Context


class DeepCache:
    """The deep maps of one run, each kept for ``every`` steps; at 1 there are none, and all is exact."""

    def __init__(self, every: int):
        self._every = every
        self._kept: dict[Context, tuple[int, list[mx.array]]] = {}

    def __call__(self, step: int, context: Context) -> dict[str, list[mx.array]]:
        """What the UNet is told of it in a step, counted from the first in which these questions are asked.

        The questions are known by their ``context``. Where they change, all of the UNet runs.
        """
        if self._every == 1:
            return {}
        number = step // self._every
        if self._kept.get(context, (None,))[0] != number:
            self._kept[context] = number, []
        return {"deep": self._kept[context][1]}
