"""Compares the rows of a sweep: the Pareto front, and each method against sinks + recent at equal bytes.

    over_floor = value - floor(bytes)        negated if less is better, so that more than 0 is always better

`floor(bytes)` interpolates the floor's own points for the same task and protocol, linearly in measured bytes; it ends
at the full cache, which is what the floor becomes with a budget of every token. Its standard error is interpolated in
the same way. Below the floor's smallest point there is nothing to compare with. The error of the difference assumes
that the two are independent; as they read the same prompts, it is an upper estimate.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from kvcompress import registry

Row = dict[str, Any]


def pareto_front(rows: Sequence[Row], value: str = "score", rises: bool = True) -> list[Row]:
    """The rows, except the full cache, that no other beats by being as good in fewer bytes or better in as few."""
    sign = 1 if rises else -1
    front: list[Row] = []
    # a row that found nothing is not on the front
    compressed = [row for row in rows if row["method"] != registry.FULL and not (rises and row[value] <= 0)]
    for row in sorted(compressed, key=lambda row: (row["bytes"], -sign * row[value])):
        if not front or sign * row[value] > sign * front[-1][value]:
            front.append(row)
    return front


def over_floor(
    row: Row, rows: Sequence[Row], value: str = "score", error: str = "stderr", rises: bool = True
) -> tuple[float, float] | None:
    """How much better a row is than sinks + recent tokens in as many bytes, and the standard error of the difference.

    Args:
        rows: of the same task, length and protocol.

    Returns:
        None if the floor has no point in as few bytes.
    """
    line = sorted(
        (other["bytes"], other[value], other[error] or 0.0)
        for other in rows
        if other["method"] in (registry.FLOOR, registry.FULL)
    )
    sizes = [size for size, *_ in line]
    if not line or row["bytes"] < sizes[0]:
        return None
    if row["bytes"] >= sizes[-1]:
        _, floor, floor_error = line[-1]
    else:
        after = max(1, bisect_left(sizes, row["bytes"]))
        (low, *before), (high, *behind) = line[after - 1], line[after]
        share = (row["bytes"] - low) / (high - low)
        floor, floor_error = (one + share * (other - one) for one, other in zip(before, behind, strict=True))
    difference = row[value] - floor
    return difference if rises else -difference, ((row[error] or 0.0) ** 2 + floor_error**2) ** 0.5
