"""A sweep's report as one HTML page that needs no network: means, an interactive plot, tables that sort on a click.

page.html is its template; plotly draws the plot, and its code stands in the page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompress import registry
from kvcompress.evals.sweep import interactive
from kvcompress.evals.sweep.compare import below_floor, make_rankings, over_floor, pareto_front
from kvcompress.evals.sweep.interactive import told
from kvcompress.evals.sweep.intervals import Estimate, Row, estimate, interval
from kvcompress.evals.sweep.panels import (
    Panel,
    absent,
    budget_name,
    count_of,
    describe,
    in_order,
    make_panels,
    method_name,
    model_name,
    one_each,
    rank,
    reason,
    samples,
    score_panels,
    share,
    stopped,
    usual_count,
)
from kvcompress.evals.sweep.proxies import make_predictions
from kvcompress.evals.sweep.summary import Means, make_means
from kvcompress.evals.sweep.tables import BELOW_FLOOR, Tie, grouped, make_grid, make_ties

# fewer points say little about a rank correlation
_FEW_POINTS = 8
_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Cell:
    """One cell of a sheet.

    small: stands below the text. order: what the column is sorted by; None comes last. note: appears where the pointer
    rests. level: from 0 to 1, the length of a bar behind the text.
    """

    text: str = ""
    small: str = ""
    order: float | str | None = None
    note: str = ""
    level: float | None = None
    strong: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table of the page. groups: what stands above the columns, each with how many of them it spans."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]
    groups: tuple[tuple[str, int], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, an explanation and sheets."""

    name: str
    title: str
    about: str
    sheets: tuple[Sheet, ...]


def write_page(rows: Sequence[Row], path: Path, planned: int | None = None) -> None:
    """Writes the page with means, plot, tables, the failures and how it was measured.

    Args:
        planned: how many points there would be, of a sweep that may not be finished.
    """
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    shown = in_order(one_each(rows))
    lacking = max(0, (planned or 0) - len(rows))
    charts = interactive.make_charts(shown)
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = template.from_string(_TEMPLATE.read_text("utf-8")).render(
        model=model_name(rows),
        lead=_lead(rows, shown, planned if lacking else None),
        charts=charts,
        figures=interactive.to_json(charts) if charts else "",
        plotly=get_plotlyjs() if charts else "",
        sections=[section for section in _sections(shown, lacking) if section.sheets],
        measured=_facts(shown, len(rows) - len(shown)),
    )
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _lead(rows: Sequence[Row], shown: Sequence[Row], planned: int | None) -> str:
    """planned: of a sweep that lacks points."""
    methods = {row["method"] for row in shown}
    failed = sum(row["status"] != "ok" for row in rows)
    parts = [
        f"{len(methods)} method{'s' * (len(methods) != 1)}",
        f"{len(shown)} point{'s' * (len(shown) != 1)}{f' of {planned} planned' if planned else ''}",
        f"{samples(shown)} samples per point" if samples(shown) else "",
        f"{stopped(shown)} stopped early, before all of their samples" if stopped(shown) else "",
        f"{failed} failed" if failed else "",
        ", ".join(
            dict.fromkeys(f"{row['dtype']} on {row['device']}" for row in shown if {"dtype", "device"} <= row.keys())
        ),
    ]
    return " · ".join(part for part in parts if part)


def _sections(rows: Sequence[Row], lacking: int) -> list[Section]:
    """The parts below the plot's place: the first stands above it.

    Args:
        rows: each point once.
        lacking: how many planned points have no row.
    """
    return [
        Section("summary", "Means over tasks", _ABOUT_MEANS, tuple(_means_sheet(make_means(rows)))),
        Section("scores", "Scores", _ABOUT_SCORES, tuple(map(_scores_sheet, grouped(rows)))),
        Section("ties", "Not told apart", _ABOUT_TIES, tuple(_ties_sheet(rows))),
        Section("floor", "Gained over the floor", _ABOUT_FLOOR, tuple(_floor_sheets(rows))),
        Section("proxies", "What plain text predicts", _ABOUT_PROXIES, tuple(_proxies_sheet(rows))),
        Section("turns", "Turn by turn", _ABOUT_TURNS, tuple(_turns_sheets(rows))),
        Section("spans", "What is kept of each span", _ABOUT_SPANS, tuple(_spans_sheets(rows))),
        Section("failed", "Failed", "", tuple(_failed_sheet(rows))),
        Section("unfinished", "Not finished", _ABOUT_UNFINISHED, tuple(_unfinished_sheets(rows, lacking))),
    ]


_ABOUT_MEANS = (
    "The mean over tasks, with its 95 % interval below, and the bytes held when the question came, in % of the full "
    "cache's keys and values: all live storages, measured, with masks and padding, so the full cache may hold 101 % "
    "and more. Each mean is over the tasks that every method of the column has; the best of a column and budget is "
    "bold. A click on a column's head sorts."
)
_ABOUT_SCORES = (
    "The score, and below it its 95 % interval and the bytes held in % of the full cache. The context is compressed "
    "before the question is read (question-agnostic), or after all but its last tokens (question-aware); every answer "
    "token comes from the compressed cache. Bold: the best of its budget. ≈: not told apart from that. °: not told "
    "apart from the full cache. *: on the Pareto front of what compresses and found anything: no other is as good in "
    "fewer bytes, or better in as few."
)
_ABOUT_TIES = (
    "Two methods are not told apart if the 95 % interval of their difference contains 0. Where both read the same "
    "prompts, the difference is taken prompt by prompt. The intervals are not corrected for how many there are: of "
    "twenty methods that are equally good, chance will tell about one apart."
)
_ABOUT_FLOOR = (
    "How much better a method is than sinks + recent tokens in as many bytes, with the 95 % interval. Between the "
    "floor's points, and from the last up to the full cache, straight lines are drawn. More than 0 is better; bold: "
    "the interval leaves out 0, by 0.005 or more."
)
_ABOUT_PROXIES = (
    "Spearman's rank correlation, over methods and budgets, between figures of the task text and the score of another "
    "task; KL and error count negated, so 1 means that both put the methods in one order. Behind it, the number of "
    "points. All budgets are taken together, so a part of it is only that more bytes are better for both."
)
_ABOUT_TURNS = "The score of each question that was put to one compressed cache, in the order of the questions."
_ABOUT_SPANS = "The share of its tokens that the cache still held of each part of the context."


_ABOUT_UNFINISHED = (
    "Points that stopped before they had read all of their samples, as time was up or the precision that was asked for "
    "was reached, and planned points that have no row at all."
)


def _means_sheet(everything: Sequence[Means]) -> list[Sheet]:
    found = [means for means in everything if means.entries]
    places = dict.fromkeys(place for means in found for place in means.entries)
    ordered = sorted(places, key=lambda place: (rank(place[0]), isinstance(place[1], int), place[1] or 0.0))
    best = {
        id(entry)
        for means in found
        for budget in {budget for _, budget in means.entries}
        for entry in _best_entries(means, budget)
    }
    lines = []
    for method, budget in ordered:
        line = [Cell(method_name(method)), Cell(budget_name(budget), order=_budget_order(budget))]
        for means in found:
            entry = means.entries.get((method, budget))
            if entry is None:
                line += [Cell(), Cell()]
                continue
            count = f"n = {entry.samples}" if entry.samples != means.samples else ""
            line.append(_figure(entry.score, count, strong=id(entry) in best))
            line.append(_percent(entry.share))
        lines.append(tuple(line))
    groups = (("", 2), *((_means_head(means), 2) for means in found))
    notes = [
        f"{means.title}: {f'without {names}' if means.tasks else f'no mean, {names} are left out'}: {why}."
        for means in everything
        for why, tasks in _left_out(means)
        for names in [", ".join(tasks)]
    ]
    columns = ("method", "budget", *(name for _ in found for name in ("mean", "bytes")))
    return [Sheet("", columns, tuple(lines), groups, " ".join(notes))] if lines or notes else []


def _means_head(means: Means) -> str:
    count = f"; n = {means.samples} of each" if means.samples else ""
    return f"{means.title}: {', '.join(means.tasks)}{count}"


def _left_out(means: Means) -> list[tuple[str, list[str]]]:
    """Why tasks are not in a mean, each reason with all of its tasks."""
    reasons: dict[str, list[str]] = {}
    for task, why in means.left_out.items():
        reasons.setdefault(why, []).append(task)
    return [*reasons.items()]


def _best_entries(means: Means, budget: int | float | None) -> list[Any]:
    entries = [entry for (method, own), entry in means.entries.items() if own == budget and method != registry.FULL]
    most = max((entry.score.value for entry in entries), default=None)
    return [entry for entry in entries if entry.score.value == most and most > 0]


def _scores_sheet(rows: Sequence[Row]) -> Sheet:
    done = [row for row in rows if row["status"] == "ok"]
    rises = all(row.get("higher_is_better", True) for row in done)
    marks: dict[int, str] = {}
    best: set[int] = set()
    for ranking in make_rankings(done, rises):
        best |= {id(ranking.best)} if ranking.best else set()
        for sign, tied in (("≈", ranking.like_best), ("°", ranking.like_full)):
            for row in tied:
                marks[id(row)] = marks.get(id(row), "") + sign
    for row in pareto_front(done, rises=rises):
        marks[id(row)] = marks.get(id(row), "") + "*"
    grid, usual = make_grid(rows), usual_count(rows)
    lines = [
        (
            Cell(method_name(method)),
            *(_score(row, marks.get(id(row), ""), id(row) in best, usual) for row in found),
        )
        for method, found in grid.lines
    ]
    metric = done[0]["metric"] if done else "score"
    title = f"{_title(rows)}: {metric}{', ' * bool(usual)}{usual}"
    return Sheet(title, ("method", *map(budget_name, grid.budgets)), tuple(lines))


def _score(row: Row | None, marks: str, strong: bool, usual: str) -> Cell:
    if row is None:
        return Cell()
    if row["status"] != "ok":
        return Cell("failed", note=reason(row))
    found, held = estimate(row), share(row)
    smalls = [interval(found), "" if held is None else f"{100 * held:.3g} %"]
    smalls += [f"KL {row['kl']:.3f}"] if "kl" in row else []
    smalls += [count_of(row)] if count_of(row) != usual else []
    return Cell(
        f"{found.value:.2f} {marks}".strip(),
        " · ".join(small for small in smalls if small),
        found.value,
        f"{told(found)}, {row['bytes'] / 1024**2:.2f} MiB",
        _level(found.value),
        strong,
    )


def _level(value: float) -> float | None:
    """The length of a bar, for figures from 0 to 1."""
    return value if 0.0 <= value <= 1.0 else None


def _ties_sheet(rows: Sequence[Row]) -> list[Sheet]:
    lines = [
        (
            Cell(tie.place),
            Cell(tie.budget),
            Cell(f"{tie.best} ({tie.score:.2f})", strong=tie.methods > 1) if tie.best else Cell("nothing found"),
            Cell(_like_best(tie), order=len(tie.like_best)),
            Cell(_like_full(tie), order=len(tie.like_full or ())),
        )
        for tie in make_ties(rows)
    ]
    columns = ("task, protocol", "budget", "best", "not told apart from the best", "not told apart from the full cache")
    return [Sheet("", columns, tuple(lines))] if lines else []


def _like_best(tie: Tie) -> str:
    if tie.best is None:
        return ""
    return _names(tie.like_best, tie.methods - 1) if tie.methods > 1 else "measured alone"


def _like_full(tie: Tie) -> str:
    if tie.is_undecided:
        return f"too few samples ({tie.samples})"
    return "" if tie.like_full is None else _names(tie.like_full, tie.methods)


def _names(names: Sequence[str], of: int) -> str:
    if not names:
        return "no method"
    return f"{', '.join(names)} ({len(names)} of {of})"


def _floor_sheets(rows: Sequence[Row]) -> list[Sheet]:
    sheets = []
    for panel in (panel for line in make_panels(rows) for panel in line):
        grid = make_grid(panel.rows, (registry.FULL, registry.FLOOR))
        lines = [(Cell(method_name(method)), *(_gain(row, panel) for row in found)) for method, found in grid.lines]
        if any(cell.text or cell.small for line in lines for cell in line[1:]):
            columns = ("method", *map(budget_name, grid.budgets))
            sheets.append(Sheet(f"{_title(panel.rows)}: {panel.label}", columns, tuple(lines)))
    return sheets


def _gain(row: Row | None, panel: Panel) -> Cell:
    if row is None:
        return Cell()
    over = over_floor(row, panel.rows, panel.value, panel.error, panel.rises)
    if over is None:
        return Cell(small=BELOW_FLOOR * below_floor(row, panel.rows))
    paired = "prompt by prompt" if over.paired else "as if independent"
    # just below the full cache's bytes, the line to it tells anything apart, by less than can be read
    strong = over.is_apart and abs(over.value) >= 0.005
    return Cell(f"{over.value:+.3f}", interval(over, "+.2f"), over.value, paired, strong=strong)


def _proxies_sheet(rows: Sequence[Row]) -> list[Sheet]:
    columns = ("text", "task", "protocol", "top-1 agreement", "KL", "attention error")
    lines = []
    for found in make_predictions(rows):
        line = [Cell(found.text), Cell(found.task), Cell(found.protocol)]
        for figure in ("score", "kl", "attention_error"):
            if figure not in found.correlations:
                line.append(Cell())
                continue
            value, points = found.correlations[figure]
            few = f"only {points} points, which chance may put in order" if points < _FEW_POINTS else f"{points} points"
            level = None if points < _FEW_POINTS else max(0.0, value)
            line.append(Cell(f"{value:+.2f}", few, value, level=level))
        lines.append(tuple(line))
    return [Sheet("", columns, tuple(lines))] if lines else []


def _turns_sheets(rows: Sequence[Row]) -> list[Sheet]:
    sheets = []
    for panel in score_panels(rows):
        having = [row for row in panel.rows if isinstance(row.get("turn_scores"), list)]
        turns = max((len(row["turn_scores"]) for row in having), default=0)
        lines = [
            (
                *_who(row),
                *(_plain(value) for value in row["turn_scores"]),
                *[Cell()] * (turns - len(row["turn_scores"])),
            )
            for row in having
        ]
        columns = ("method", "budget", *(f"turn {turn + 1}" for turn in range(turns)))
        sheets += [Sheet(_title(having), columns, tuple(lines))] if lines else []
    return sheets


def _spans_sheets(rows: Sequence[Row]) -> list[Sheet]:
    sheets = []
    for panel in score_panels(rows):
        having = [row for row in panel.rows if isinstance(row.get("kept_by_span"), dict)]
        spans = tuple(dict.fromkeys(span for row in having for span in row["kept_by_span"]))
        lines = [(*_who(row), *(_plain(row["kept_by_span"].get(span)) for span in spans)) for row in having]
        sheets += [Sheet(_title(having), ("method", "budget", *spans), tuple(lines))] if lines else []
    return sheets


def _failed_sheet(rows: Sequence[Row]) -> list[Sheet]:
    lines = tuple((Cell(describe(row)), Cell(reason(row))) for row in rows if row["status"] != "ok")
    return [Sheet("", ("point", "error"), lines)] if lines else []


def _unfinished_sheets(rows: Sequence[Row], lacking: int) -> list[Sheet]:
    """lacking: how many planned points have no row; those of tasks without any row cannot be named."""
    sheets = []
    lines = tuple((Cell(describe(row)), Cell(count_of(row), order=row["samples"])) for row in rows if stopped([row]))
    if lines:
        sheets.append(Sheet("Stopped early", ("point", "samples"), lines))
    if lacking:
        named = absent(rows)[:lacking]
        rest = lacking - len(named)
        note = f"{'And ' * bool(named)}{rest} of tasks or methods that have no row." if rest else ""
        title = f"{lacking} planned point{'s' * (lacking != 1)} without a row"
        sheets.append(Sheet(title, ("point",), tuple((Cell(point),) for point in named), note=note))
    return sheets


def _facts(rows: Sequence[Row], hidden: int) -> dict[str, str]:
    """How it was measured: facts of the newest row that others may not share are said of it alone."""
    newest = max((row["provenance"] for row in rows), key=lambda source: str(source.get("time", "")))
    versions = [f"{name} {version}" for name, version in newest.get("versions", {}).items() if version]
    if newest.get("python"):
        versions.append(f"Python {newest['python']}")
    seeds = ", ".join(dict.fromkeys(str(row["seed"]) for row in rows if "seed" in row))
    threads = f", {newest['threads']} threads" if newest.get("threads") else ""
    facts = {
        "command": "\n".join(dict.fromkeys(str(row["provenance"].get("command", "")) for row in rows)),
        "commit of the newest row": str(newest.get("commit", "")),
        "machine": f"{newest.get('machine', '')}{threads}",
        "versions": ", ".join(versions),
        "model": ", ".join(dict.fromkeys(row["model"] for row in rows)),
        "samples per point": samples(rows),
        "seed": seeds,
        "time of the newest row": str(newest.get("time", "")),
        "seconds for all points": f"{sum(row.get('seconds') or 0.0 for row in rows):.0f}",
        "not shown": f"{hidden} rows of points that another row shows, with more samples or newer" if hidden else "",
    }
    return {name: fact for name, fact in facts.items() if fact}


def _title(rows: Sequence[Row]) -> str:
    return Panel(tuple(rows), "", "", "", True).title.replace("\n", ", ")


def _who(row: Row) -> tuple[Cell, Cell]:
    return Cell(method_name(row["method"])), Cell(budget_name(row["budget"]), order=_budget_order(row["budget"]))


def _budget_order(budget: int | float | None) -> float:
    """Fractions before tokens, and both before what keeps everything."""
    return float("inf") if budget is None else float(budget)


def _plain(value: Any) -> Cell:
    if not isinstance(value, int | float):
        return Cell()
    return Cell(f"{value:.2f}", order=value, level=_level(value))


def _figure(found: Estimate, count: str = "", strong: bool = False) -> Cell:
    small = " · ".join(part for part in (interval(found), count) if part)
    return Cell(f"{found.value:.3f}", small, found.value, level=found.value, strong=strong)


def _percent(part: float | None) -> Cell:
    return Cell() if part is None else Cell(f"{100 * part:.3g} %", order=part)
