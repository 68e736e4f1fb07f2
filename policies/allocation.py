"""How a cache's budget is shared out between its layers.

`pyramid` follows PyramidKV (arXiv:2406.02069): early layers attend broadly and get more, late layers less, on a
straight line whose mean is the budget.
"""

from typing import Literal

Allocation = Literal["uniform", "pyramid"]
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "pyramid")

# the paper's beta: the last layer gets 1 / 20 of the budget, the first 39 / 20
_STEEPNESS = 20


def shares(allocation: Allocation, layers: int) -> list[float]:
    """Each layer's budget as a multiple of the mean budget; the multiples average 1.

    Raises:
        ValueError: an unknown allocation.
    """
    if allocation == "uniform" or layers == 1:
        return [1.0] * layers
    if allocation == "pyramid":
        last = 1.0 / _STEEPNESS
        step = (2.0 - 2.0 * last) / (layers - 1)
        return [2.0 - last - step * index for index in range(layers)]
    raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
