"""Compares the rows of a sweep: the Pareto front, each method against sinks + recent at equal bytes and against the
full cache, and which methods of one budget cannot be told apart.

    over_floor = value - floor(bytes)        negated if less is better, so that more than 0 is always better

`floor(bytes)` interpolates the floor's own points for the same task and protocol, linearly in measured bytes; it ends
at the full cache, which is what the floor becomes with a budget of every token. Below the floor's smallest point there
is nothing to compare with. Where the rows have scores of the same prompts, differences are taken prompt by prompt
(intervals.py); else the two are held to be independent, which makes their error an upper estimate.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from kvcompress import registry
from kvcompress.evals.sweep.intervals import Estimate, Row, difference


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
) -> Estimate | None:
    """How much better a row is than sinks + recent tokens in as many bytes.

    Args:
        rows: of the same task, length and protocol.

    Returns:
        None if the floor has no point in as few bytes.
    """
    line = sorted(
        (other for other in rows if other["method"] in (registry.FLOOR, registry.FULL)),
        key=lambda other: (other["bytes"], other[value]),
    )
    sizes = [other["bytes"] for other in line]
    if not line or row["bytes"] < sizes[0]:
        return None
    after = bisect_left(sizes, row["bytes"])
    if after == len(line) or sizes[after] == row["bytes"]:
        floor = [(1.0, line[min(after, len(line) - 1)])]
    else:
        share = (row["bytes"] - sizes[after - 1]) / (sizes[after] - sizes[after - 1])
        parts = [(1.0 - share, line[after - 1]), (share, line[after])]
        floor = [(weight, other) for weight, other in parts if weight]
    return _better(difference(row, floor, value, error), rises)


def below_floor(row: Row, rows: Sequence[Row]) -> bool:
    """True if a row holds fewer bytes than the floor's smallest point, so that there is nothing to compare it with."""
    sizes = [other["bytes"] for other in rows if other["method"] == registry.FLOOR and other["status"] == "ok"]
    return row["status"] == "ok" and bool(sizes) and row["bytes"] < min(sizes)


def over_full(
    row: Row, rows: Sequence[Row], value: str = "score", error: str = "stderr", rises: bool = True
) -> Estimate | None:
    """How much better a row is than the full cache; None if that has no row among those of the same place."""
    full = _full_cache(rows)
    return None if full is None else _better(difference(row, [(1.0, full)], value, error), rises)


@dataclass(frozen=True)
class Ranking:
    """The rows of one task, length, protocol and budget, and which of them chance may have put in their order.

    best: the row with the best score; of equal ones, that of the fewest bytes; None if no row found anything.
    like_best, like_full: those that cannot be told apart from it and from the full cache, as the 95 % interval of the
    difference contains 0. count: of rows.
    """

    budget: int | float | None
    best: Row | None
    full: Row | None
    like_best: tuple[Row, ...]
    like_full: tuple[Row, ...]
    count: int


def make_rankings(rows: Sequence[Row], rises: bool = True) -> list[Ranking]:
    """A ranking for each budget among rows of one task, length and protocol, which all succeeded."""
    full = _full_cache(rows)
    compressed = [row for row in rows if row["method"] != registry.FULL]
    sign = -1 if rises else 1
    rankings = []
    for budget in dict.fromkeys(row["budget"] for row in compressed):
        members = [row for row in compressed if row["budget"] == budget]
        # as on the Pareto front, a row that found nothing is not the best
        eligible = [row for row in members if not (rises and row["score"] <= 0)]
        best = min(eligible, key=lambda row: (sign * row["score"], row["bytes"]), default=None)
        like_best = tuple(row for row in members if best and row is not best and not _apart(row, best))
        like_full = tuple(row for row in members if full is not None and not _apart(row, full))
        rankings.append(Ranking(budget, best, full, like_best, like_full, len(members)))
    return rankings


def _apart(row: Row, other: Row) -> bool:
    return difference(row, [(1.0, other)]).is_apart


def _full_cache(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row["method"] == registry.FULL), None)


def _better(found: Estimate, rises: bool) -> Estimate:
    return found if rises else -found
