"""A sweep's rows as tables for people: scores, what methods gain over the floor, and what cannot be told apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcompress import registry
from kvcompress.evals.sweep.compare import below_floor, make_rankings, over_floor, pareto_front
from kvcompress.evals.sweep.intervals import Row, estimate, interval
from kvcompress.evals.sweep.panels import (
    Panel,
    budget_name,
    count_of,
    make_panels,
    method_name,
    one_each,
    rank,
    score_panels,
    subject,
    usual_count,
)

BELOW_FLOOR = "fewer bytes than the floor's least"
# what stands below the tables in a terminal
LEGEND = (
    "[low,high]: 95 % interval; n: samples, in a cell where it is not the table's; "
    "*: on the Pareto front, none is better in as few bytes; (floor): sinks + recent tokens"
)


@dataclass(frozen=True)
class Table:
    """One task, length and protocol: a line for each method, a column for each budget."""

    title: str
    budgets: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Grid:
    """Rows of one task, length and protocol by method, each with the row or None for every budget."""

    budgets: tuple[int | float | None, ...]
    lines: tuple[tuple[str, tuple[Row | None, ...]], ...]


def make_grid(rows: Sequence[Row], but: Sequence[str] = ()) -> Grid:
    """The rows of one task, length and protocol, without some methods."""
    rows = one_each(rows)
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["method"] != registry.FULL)) or [None]
    lines = []
    for method in sorted({row["method"] for row in rows}.difference(but), key=rank):
        own = {row["budget"]: row for row in rows if row["method"] == method}
        # the full cache has one row, which is shown at every budget
        found = [own.get(None) if method == registry.FULL else own.get(budget) for budget in budgets]
        lines.append((method, tuple(found)))
    return Grid(tuple(budgets), tuple(lines))


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each task, length and protocol, failed ones included."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((subject(row), row["protocol"]), []).append(row)
    return list(groups.values())


def make_tables(rows: Sequence[Row]) -> list[Table]:
    """The scores, with the bytes held and the failures."""
    tables = []
    for members in grouped(rows):
        done = [row for row in one_each(members) if row["status"] == "ok"]
        front = {id(row) for row in pareto_front(done, rises=all(row.get("higher_is_better", True) for row in done))}
        metric = done[0]["metric"] if done else "score"
        if any("kl" in row for row in members):
            metric += " / KL"

        usual = usual_count(members)

        def cell(row: Row | None, front: set[int] = front, usual: str = usual) -> str:
            return "" if row is None else _cell(row, usual) + " *" * (id(row) in front)

        title = f"{subject(members[0])}, {members[0]['protocol']}: {metric}{', ' * bool(usual)}{usual}"
        tables.append(_table(title, members, cell))
    return tables


def make_comparisons(rows: Sequence[Row]) -> list[Table]:
    """How far each method is above sinks + recent tokens of equal bytes, a table for each plot."""
    tables = []
    for panel in (panel for line in make_panels(rows) for panel in line):
        members = one_each(panel.rows)

        def cell(row: Row | None, panel: Panel = panel, members: Sequence[Row] = members) -> str:
            if row is None:
                return ""
            over = over_floor(row, members, panel.value, panel.error, panel.rises)
            if over is None:
                return BELOW_FLOOR * below_floor(row, members)
            return f"{over.value:+.3f} {_unbroken(interval(over, '+.2f'))}".strip()

        title = f"{panel.title}: {panel.label}, gained over the floor at equal bytes".replace("\n", ", ")
        table = _table(title, members, cell, (registry.FULL, registry.FLOOR))
        if table.lines:
            tables.append(table)
    return tables


# samples below which that nothing was found is no proof
_FEW = 20


@dataclass(frozen=True)
class Tie:
    """Which methods of a task, length, protocol and budget chance may have put in their order, by name.

    best: None if none found anything. like_best: not told apart from it. like_full: not told apart from the full cache;
    None if that has no row. samples: the fewest of those like the full cache.
    """

    place: str
    budget: str
    best: str | None
    score: float
    like_best: tuple[str, ...]
    like_full: tuple[str, ...] | None
    methods: int
    samples: int | None = None

    @property
    def is_undecided(self) -> bool:
        """True if nothing was found, and in so few samples that this does not tell it from the full cache."""
        return self.best is None and bool(self.like_full) and self.samples is not None and self.samples < _FEW

    def __str__(self) -> str:
        said = f"{self.place}, {self.budget}: "
        if self.best:
            said += f"best is {self.best}" if self.methods > 1 else f"{self.best} alone was measured,"
            said += f" with {self.score:.2f}"
        else:
            said += "nothing was found"
        if self.best and self.methods > 1:
            others = f"not told apart from {', '.join(self.like_best)}"
            said += f", {others if self.like_best else 'told apart from all others'}"
        if self.is_undecided:
            said += f"; too few samples ({self.samples}) to tell from the full cache"
        elif self.like_full is not None:
            said += f"; not told apart from the full cache: {', '.join(self.like_full) or 'no method'}"
        return said


def make_ties(rows: Sequence[Row]) -> list[Tie]:
    """A tie for each task, length, protocol and budget, though nothing may be tied in it."""
    ties = []
    for panel in score_panels(one_each(rows)):
        for ranking in make_rankings(panel.rows, panel.rises):
            like_full = tuple(row["method"] for row in ranking.like_full) if ranking.full else None
            tie = Tie(
                place=panel.title.replace("\n", ", "),
                budget=budget_name(ranking.budget),
                best=ranking.best["method"] if ranking.best else None,
                score=ranking.best["score"] if ranking.best else 0.0,
                like_best=tuple(row["method"] for row in ranking.like_best),
                like_full=like_full,
                methods=ranking.count,
                samples=min((row["samples"] for row in ranking.like_full if row.get("samples")), default=None),
            )
            ties.append(tie)
    return ties


def _table(title: str, rows: Sequence[Row], cell: Callable[[Row | None], str], but: Sequence[str] = ()) -> Table:
    """A line for each method except some, a column for each budget; cell gets the row, None if there is none."""
    grid = make_grid(rows, but)
    lines = tuple((method_name(method), *map(cell, found)) for method, found in grid.lines)
    return Table(title, tuple(map(budget_name, grid.budgets)), lines)


def _cell(row: Row, usual: str) -> str:
    if row["status"] != "ok":
        return "failed"
    score = f"{row['score']:.2f}"
    if "kl" in row:
        # both intervals would not fit a terminal; they are in the page
        score += f" / {row['kl']:.3f}"
    else:
        score += f" {_unbroken(interval(estimate(row)))}".rstrip()
    count = count_of(row)
    held = f"{row['bytes'] / 1024**2:.1f} MiB"
    return f"{score} ({held}{f', {count}' * (count != usual)})"


def _unbroken(text: str) -> str:
    """Without a space at which a terminal would break it."""
    return text.replace(" ", "")
