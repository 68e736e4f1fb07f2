"""A sweep's rows as a table for a spreadsheet, a plot and a self-contained page; several sweeps as one."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvcompress import registry
from kvcompress.evals.sweep.compare import make_rankings, over_floor, over_full, pareto_front
from kvcompress.evals.sweep.intervals import Estimate, Row, estimate
from kvcompress.evals.sweep.page import write_page
from kvcompress.evals.sweep.panels import (
    describe,
    in_order,
    make_panels,
    one_each,
    rank,
    reason,
    score_panels,
    stopped,
    subject,
    told_apart,
)
from kvcompress.evals.sweep.plot import draw
from kvcompress.evals.sweep.rows import read_rows
from kvcompress.evals.sweep.tables import LEGEND, make_comparisons, make_tables, make_ties

__all__ = [
    "LEGEND",
    "Row",
    "collect",
    "describe",
    "draw",
    "in_order",
    "make_comparisons",
    "make_panels",
    "make_tables",
    "make_ties",
    "one_each",
    "read",
    "reason",
    "stopped",
    "subject",
    "write_all",
    "write_csv",
    "write_page",
]

_COLUMNS = [
    name
    for line in (
        "task length protocol method budget budget_tokens status metric score stderr score_low score_high",
        "pareto over_floor over_floor_stderr over_floor_low over_floor_high",
        "over_full over_full_stderr over_full_low over_full_high paired best_of_budget like_best like_full",
        "kl kl_stderr attention_error attention_error_stderr perplexity",
        "full_perplexity bytes full_bytes ratio device_bytes host_bytes fetched_bytes tokens_kept least_kept most_kept",
        "tokens_seen compressed samples seed",
        "num_fewshot limit hold_back chunk continuation turns transcript text documents question",
        "shown model dtype device seconds error key",
    )
    for name in line.split()
]
# what tells a row from others, if two texts of its method do not
_PLACE = (
    *("task", "length", "protocol", "method", "budget", "model", "dtype", "device", "seed", "samples", "hold_back"),
    *("continuation", "chunk", "num_fewshot", "limit"),
)
_NEEDED = {"status", "task", "length", "protocol", "method", "budget", "model", "provenance"}
_MEASURED = {"score", "bytes"}
# what rows of older sweeps may lack
_DEFAULTS: Row = {"metric": "score", "stderr": None}


def read(folders: Sequence[Path]) -> list[Row]:
    """The rows of several sweeps, each point once.

    Raises:
        ValueError: a folder has no rows, or some that no sweep wrote.
    """
    found: dict[str, Row] = {}
    for folder in folders:
        own = read_rows(folder)
        if not own:
            raise ValueError(f"there are no rows of a sweep (results.jsonl) in {folder}")
        for key, row in own.items():
            succeeded = row.get("status") == "ok"
            lacking = sorted(_NEEDED - row.keys())
            if succeeded:
                lacking += sorted(name for name in _MEASURED if not isinstance(row.get(name), int | float))
            if lacking:
                raise ValueError(f"the row {key!r} in {folder} is none of a sweep: it lacks {', '.join(lacking)}")
            if key not in found or found[key]["status"] != "ok":
                found[key] = _DEFAULTS | ({} if succeeded else {"error": "no message"}) | row
    # of a class of somebody's own that has changed in between, the newest
    newest = {row["key"] if "source" not in row else tuple(map(row.get, _PLACE)): row for row in found.values()}
    return list(newest.values())


def collect(folders: Sequence[Path]) -> list[Row]:
    """The rows of several sweeps in one order; with several models, tasks get the model's name, and with several
    settings, such as the dtype, those that differ.

    Raises:
        ValueError: as `read`.
    """
    rows = read(folders)
    if len({row["model"] for row in rows}) > 1:
        rows = [row | {"task": f"{Path(row['model']).name}: {row['task']}"} for row in rows]
    rows = list(_with_full_bytes(told_apart(rows)))
    places: dict[str, int] = {}
    for row in rows:
        places.setdefault(subject(row), len(places))
    return sorted(rows, key=lambda row: (places[subject(row)], row["protocol"], rank(row["method"]), _size(row)))


def write_all(rows: Sequence[Row], folder: Path, *, planned: int | None = None) -> list[Path]:
    """Writes table, plot and page into a folder, and returns their paths.

    Args:
        planned: how many points there would be, of a sweep that may not be finished; the page says what is missing.
    """
    table, plot, page = folder / "results.csv", folder / "accuracy.png", folder / "report.html"
    write_csv(rows, table)
    drawn = draw(one_each(rows), plot)
    write_page(rows, page, planned)
    return [table, *([plot] if drawn else []), page]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """The rows' plain figures, one line each, with intervals and comparisons."""
    partial = path.with_suffix(".partial")
    marks = _marks(rows)
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(row | marks.get(id(row), {}) for row in rows)
    partial.replace(path)


def _marks(rows: Sequence[Row]) -> dict[int, Row]:
    """What the table for a spreadsheet has in addition to a row's own figures, by the row's id."""
    marks: dict[int, Row] = {}
    shown = {id(row) for row in one_each(rows)}
    for panel in score_panels(rows):
        members = [row for row in panel.rows if id(row) in shown]
        front = {id(row) for row in pareto_front(members, rises=panel.rises)}
        for row in panel.rows:
            own, over = estimate(row), over_full(row, members, rises=panel.rises)
            marks[id(row)] = {
                "shown": id(row) in shown,
                **_columns("score", own, "low high"),
                "pareto": id(row) in front,
                **_columns("over_floor", over_floor(row, members, rises=panel.rises), " stderr low high"),
                **_columns("over_full", over, " stderr low high"),
                "paired": bool(over and over.paired),
            }
        for ranking in make_rankings(members, panel.rises):
            for name, tied in (("like_best", ranking.like_best), ("like_full", ranking.like_full)):
                for row in tied:
                    marks[id(row)][name] = True
            if ranking.best:
                marks[id(ranking.best)] |= {"best_of_budget": True, "like_best": True}
    return marks


def _columns(name: str, found: Estimate | None, parts: str) -> Row:
    """Columns of an estimate: its value where a part is empty."""
    if found is None:
        return {}
    values = {part: found.value if not part else getattr(found, part) for part in parts.split(" ")}
    return {f"{name}_{part}" if part else name: round(value, 6) for part, value in values.items() if value is not None}


def _with_full_bytes(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows of older sweeps with the bytes of the full cache that stands beside them."""
    full = {_place(row): row["bytes"] for row in rows if row["method"] == registry.FULL and row["status"] == "ok"}
    for row in rows:
        known = row.get("full_bytes") or full.get(_place(row))
        yield row | {"full_bytes": known} if known else row


def _place(row: Row) -> tuple[str, str]:
    return subject(row), row["protocol"]


def _size(row: Row) -> tuple[bool, float]:
    """Sorts budgets, fractions first."""
    return isinstance(row["budget"], int), row["budget"] or 0.0
