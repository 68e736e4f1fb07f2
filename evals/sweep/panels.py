"""The rows of a sweep in groups: those of one task, length and protocol, which a plot or a table shows together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcompress import registry
from kvcompress.evals.sweep import baselines
from kvcompress.evals.sweep.intervals import Row
from kvcompress.evals.sweep.points import Point

# what rows of text have in addition to their score; less is better
PROXIES = {"kl": "KL from the full cache, nats", "attention_error": "relative error of attention's outputs"}
_ORDER = tuple(baselines.METHODS)


@dataclass(frozen=True)
class Panel:
    """One plot: rows of a task, length and protocol, and which of their figures it shows."""

    rows: tuple[Row, ...]
    value: str
    error: str
    label: str
    rises: bool

    @property
    def title(self) -> str:
        """Task, context length and protocol."""
        first = self.rows[0]
        return f"{subject(first)}\n{first['protocol']}"


def make_panels(rows: Sequence[Row]) -> list[list[Panel]]:
    """Panels in a grid: a line for each task and length, with the protocols (or for text, its figures) side by side."""
    grid: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row["status"] == "ok":
            grid.setdefault(subject(row), {}).setdefault(row["protocol"], []).append(row)
    lines = []
    for protocols in grid.values():
        line = []
        for members in protocols.values():
            rises = all(row.get("higher_is_better", True) for row in members)
            line.append(Panel(tuple(members), "score", "stderr", members[0]["metric"], rises))
            for value, label in PROXIES.items():
                # rows of older sweeps may lack one
                having = tuple(row for row in members if value in row)
                if having:
                    line.append(Panel(having, value, f"{value}_stderr", label, False))
        lines.append(line)
    return lines


def score_panels(rows: Sequence[Row]) -> list[Panel]:
    """The panels of scores alone, in one list."""
    return [panel for line in make_panels(rows) for panel in line if panel.value == "score"]


def one_each(rows: Sequence[Row]) -> list[Row]:
    """Of rows that differ in no column of a table, such as those of two seeds, the one to show.

    One that succeeded before one that failed, more samples before fewer, then the newer.
    """

    def rank_of(row: Row) -> tuple[bool, int, str]:
        return row["status"] == "ok", row.get("samples") or 0, str(row["provenance"].get("time", ""))

    shown: dict[tuple[object, ...], Row] = {}
    for row in rows:
        # 1 and 1.0 are two budgets
        place = (row["model"], subject(row), row["protocol"], row["method"], row["budget"], type(row["budget"]))
        if place not in shown or rank_of(row) > rank_of(shown[place]):
            shown[place] = row
    return list(shown.values())


# what else decides a score or its bytes, and how a name is told of it: a digest stands for a text
_DECIDING = ("dtype", "hold_back", "continuation", "chunk", "turns", "transcript", "text", "documents", "question")


def told_apart(rows: Sequence[Row]) -> list[Row]:
    """The rows, with the settings that differ between those of one table in the names of their tasks.

    What is measured in another dtype, or with other `turns`, is another task. Rows of older sweeps, which lack a
    setting, are named without it.
    """
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        tables.setdefault((subject(row), row["protocol"]), []).append(row)
    differ = {
        place: [name for name in _DECIDING if len({str(row[name]) for row in own if row.get(name) is not None}) > 1]
        for place, own in tables.items()
    }
    named = []
    for row in rows:
        settings = [name for name in differ[subject(row), row["protocol"]] if row.get(name) is not None]
        words = [str(row[name]) if name == "dtype" else f"{name} {str(row[name])[:8]}" for name in settings]
        named.append(row | {"task": f"{row['task']} ({', '.join(words)})"} if words else row)
    return named


def share(row: Row) -> float | None:
    """The bytes that a row's cache held over those of the full cache; None if nobody measured the latter."""
    return row["bytes"] / row["full_bytes"] if row.get("full_bytes") else None


def subject(row: Row) -> str:
    """What a row measures: the task, with the context's length or the number of examples."""
    if row["length"] is not None:
        return f"{row['task']}, {row['length']} tokens"
    return f"{row['task']}, {row['num_fewshot']}-shot" if row.get("num_fewshot") else str(row["task"])


def describe(row: Row) -> str:
    """Which point a row belongs to."""
    return Point(*(row[name] for name in ("task", "length", "protocol", "method", "budget"))).title


def reason(row: Row) -> str:
    """Why a row failed, in one line."""
    return next(iter((row.get("error") or "no message").splitlines()), "no message")


def budget_name(budget: int | float | None) -> str:
    """For people."""
    if budget is None:
        return "all tokens"
    return f"{100 * budget:g}%" if isinstance(budget, float) else f"{budget} tokens"


def method_name(method: str) -> str:
    """A method with the part that it has in every sweep."""
    roles = {registry.FULL: "full cache (ceiling)", registry.FLOOR: f"{registry.FLOOR} (floor)"}
    return roles.get(method, method)


def rank(method: str) -> tuple[int, str]:
    """Sorts methods: ceiling and floor where the registry has them; a peer's after ours."""
    name = method.partition(":")[0]
    return _ORDER.index(name) if name in _ORDER else len(_ORDER), method


def samples(rows: Sequence[Row]) -> str:
    """How many samples the rows have, from the fewest to the most."""
    counts = sorted({row["samples"] for row in rows if row.get("samples")})
    return " to ".join(dict.fromkeys(map(str, counts[:1] + counts[-1:])))


def count_of(row: Row) -> str:
    """How many samples a row has, and whether it stopped before it had all."""
    if row["status"] != "ok" or not row.get("samples"):
        return ""
    return f"n = {row['samples']}{', stopped early' * ('stopped_at' in row)}"


def usual_count(rows: Sequence[Row]) -> str:
    """What `count_of` says of the row with the most samples, which stands for all that are not said to differ."""
    return count_of(
        max(rows, key=lambda row: (row["status"] == "ok", row.get("samples") or 0, "stopped_at" not in row))
    )


def stopped(rows: Sequence[Row]) -> int:
    """How many rows stopped before they had all samples."""
    return sum(row["status"] == "ok" and "stopped_at" in row for row in rows)


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Rows as reports list them: tasks and protocols as they first come, methods in one order, budgets ascending."""
    places: dict[tuple[str, str], int] = {}
    for row in rows:
        places.setdefault((subject(row), row["protocol"]), len(places))

    def place_of(row: Row) -> tuple[int, tuple[int, str], bool, float]:
        budget = row["budget"]
        return places[subject(row), row["protocol"]], rank(row["method"]), isinstance(budget, int), budget or 0.0

    return sorted(rows, key=place_of)


def absent(rows: Sequence[Row]) -> list[str]:
    """Points without a row, though each task and each method with its budget has rows, for people."""
    budgets = dict.fromkeys((row["method"], row["budget"]) for row in rows)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((subject(row), row["protocol"]), []).append(row)
    return [
        describe(own[0] | {"method": method, "budget": budget})
        for own in groups.values()
        for method, budget in budgets
        if (method, budget) not in {(row["method"], row["budget"]) for row in own}
    ]


def model_name(rows: Sequence[Row]) -> str:
    """The names of the models, without their folders."""
    return ", ".join(dict.fromkeys(Path(row["model"]).name for row in rows))
