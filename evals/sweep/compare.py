"""Rows of a sweep beside one another: the Pareto front, and each method against sinks + recent at equal bytes.

    over_floor = value - floor(bytes)        turned round where less is better, so that more than 0 is always better

`floor(bytes)` is the line through the floor's own points of the same task and protocol, linear in measured bytes; it
ends in the full cache, which is what the floor becomes with a budget of every token. Its standard error is
interpolated alike. Below the floor's smallest point there is nothing to compare with. The error of the difference
takes the two as independent; they read the same prompts, so it is on the safe side.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from kvcompress import registry

Row = dict[str, Any]


def pareto_front(rows: Sequence[Row], value: str = "score", rises: bool = True) -> list[Row]:
    """The rows, but for the full cache, that no other beats by being as good in fewer bytes or better in as few."""
    sign = 1 if rises else -1
    front: list[Row] = []
    # having found nothing is no point of a front
    compressed = [row for row in rows if row["method"] != registry.FULL and not (rises and row[value] <= 0)]
    for row in sorted(compressed, key=lambda row: (row["bytes"], -sign * row[value])):
        if not front or sign * row[value] > sign * front[-1][value]:
            front.append(row)
    return front


def over_floor(
    row: Row, rows: Sequence[Row], value: str = "score", error: str = "stderr", rises: bool = True
) -> tuple[float, float] | None:
    """How much better a row is than sinks + recent tokens in as many bytes, and the standard error of that.

    Args:
        rows: of the same task, length and protocol.

    Returns:
        None where the floor has no point in as few bytes.
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
