"""How a cache's budget is shared out between its layers.

`pyramid` follows PyramidKV (arXiv:2406.02069): early layers attend broadly and get more, late layers less. What the
policy keeps in any case (sinks, recent tokens) every layer gets; the rest of the budget falls on a straight line from
the first layer to the last, whose mean is the budget and whose end is a twentieth of it. A sliding layer keeps no more
than its window; what it cannot use of its share is not given to others.
"""

from typing import Literal

Allocation = Literal["uniform", "pyramid"]
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "pyramid")

# the paper's beta: the last layer gets 1 / 20 of the mean, the first 39 / 20
_STEEPNESS = 20


def layer_budgets(allocation: Allocation, budget: int | float, layers: int, least: int = 1) -> list[int] | list[float]:
    """Each layer's budget; their mean is the budget, to within the rounding of token counts.

    Args:
        allocation: "uniform" or "pyramid".
        budget: mean over the layers: a count of tokens, or a fraction of those seen.
        layers: how many.
        least: tokens that every layer gets, at most a budget that is a count. Fractions have no such floor here.

    Raises:
        ValueError: an unknown allocation.
    """
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
    if allocation == "uniform" or layers == 1:
        return [budget] * layers
    if isinstance(budget, int):
        shared = budget - least
        line = _line(2 * shared - shared / _STEEPNESS, shared / _STEEPNESS, layers)
        return [least + round(share) for share in line]
    # nobody keeps more than the whole prompt; what the first layers cannot use, the last ones get
    most = min(1.0, 2 * budget - budget / _STEEPNESS)
    return _line(most, 2 * budget - most, layers)


def _line(first: float, last: float, layers: int) -> list[float]:
    return [first + (last - first) * index / (layers - 1) for index in range(layers)]
