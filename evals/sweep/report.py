"""A sweep's rows as a table for a spreadsheet, a plot and a self-contained page.

Tables and plot mark the Pareto front; for each plot, a table says how far each method is above sinks + recent tokens.
"""

import base64
import csv
import html
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompress import registry
from kvcompress.evals.sweep import baselines
from kvcompress.evals.sweep.compare import Row, over_floor, pareto_front
from kvcompress.evals.sweep.points import Point
from kvcompress.evals.sweep.rows import read_rows

_COLUMNS = [
    name
    for line in (
        "task length protocol method budget budget_tokens status metric score stderr",
        "pareto over_floor over_floor_stderr kl kl_stderr attention_error attention_error_stderr perplexity",
        "full_perplexity bytes full_bytes ratio device_bytes host_bytes fetched_bytes tokens_kept least_kept most_kept",
        "tokens_seen compressed samples seed",
        "num_fewshot limit hold_back chunk continuation model dtype device seconds error key",
    )
    for name in line.split()
]
# what tells a row from others, if two texts of its method do not
_PLACE = (
    *("task", "length", "protocol", "method", "budget", "model", "dtype", "device", "seed", "samples", "hold_back"),
    *("continuation", "chunk", "num_fewshot", "limit"),
)
_NEEDED = {"status", "task", "length", "protocol", "method", "budget", "model", "provenance"}
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#a5732a")
_MARKERS = "osD^vPX*"
_FLOOR_COLOR = "#666666"
_CEILING: dict[str, Any] = {"color": "black", "linewidth": 0.9, "linestyle": ":", "zorder": 1}
_BARS = {"markerfacecolor": "none", "linewidth": 1.4, "elinewidth": 0.8, "capsize": 2, "alpha": 0.9}
_RING = {"s": 190, "facecolors": "none", "edgecolors": "black", "linewidths": 1.1, "zorder": 4}
# what rows of text have in addition to their score; less is better
_PROXIES = {"kl": "KL from the full cache, nats", "attention_error": "relative error of attention's outputs"}
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
            rises = members[0].get("higher_is_better", True)
            line.append(Panel(tuple(members), "score", "stderr", members[0]["metric"], rises))
            for value, label in _PROXIES.items():
                # rows of older sweeps may lack one
                having = tuple(row for row in members if value in row)
                if having:
                    line.append(Panel(having, value, f"{value}_stderr", label, False))
        lines.append(line)
    return lines


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """The rows' plain figures, one line each."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        marks = {id(row): mark for line in make_panels(rows) for panel in line[:1] for row, mark in _marks(panel)}
        writer.writerows(row | marks.get(id(row), {}) for row in rows)
    partial.replace(path)


def _marks(panel: Panel) -> list[tuple[Row, Row]]:
    """What the table for a spreadsheet has in addition to a row's own figures."""
    front = {id(row) for row in pareto_front(panel.rows, panel.value, panel.rises)}
    marks = []
    for row in panel.rows:
        over = over_floor(row, panel.rows, panel.value, panel.error, panel.rises)
        more = {} if over is None else {"over_floor": round(over[0], 6), "over_floor_stderr": round(over[1], 6)}
        marks.append((row, {"pareto": id(row) in front, **more}))
    return marks


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Plots every panel into one PNG; if no row succeeded, writes nothing and returns False."""
    # needs no display, and leaves the caller's choice of one alone
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = make_panels(rows)
    if not lines:
        return False
    width = max(len(line) for line in lines)
    figure = Figure(figsize=(5.4 * width, 3.9 * len(lines) + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), width, squeeze=False)
    methods = sorted({row["method"] for row in rows}, key=_rank)
    handles: dict[str, Any] = {}
    for line, places in zip(lines, axes, strict=True):
        for index, place in enumerate(places):
            if index < len(line):
                _draw_panel(place, line[index], methods, handles)
            else:
                place.set_visible(False)
    first = rows[0]
    figure.suptitle(
        f"{Path(first['model']).name}, {first['dtype']}: quality against measured cache memory "
        f"({_samples(rows)} samples per point, bars are standard errors)",
        fontsize=11,
    )
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)), fontsize=9)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, dpi=130, format="png")
    partial.replace(path)
    return True


def _draw_panel(place: Any, panel: Panel, methods: Sequence[str], handles: dict[str, Any]) -> None:
    for method in methods:
        rows = sorted((row for row in panel.rows if row["method"] == method), key=lambda row: row["bytes"])
        if rows and method == registry.FULL:
            # what is almost 0 has no place on a logarithmic axis
            if panel.value == "score":
                place.axhline(rows[0][panel.value], **_CEILING)
            handles.setdefault("full cache (ceiling)", place.axvline(_mebibytes(rows)[0], **_CEILING))
        elif rows:
            floor = method == registry.FLOOR
            color, marker = _style(method, methods)
            bars = place.errorbar(
                _mebibytes(rows),
                [row[panel.value] for row in rows],
                yerr=[row[panel.error] or 0.0 for row in rows],
                color=color,
                marker=marker,
                # hollow and of decreasing size, so that methods at the same place can all be seen
                markersize=11 - 7 * methods.index(method) / len(methods),
                linestyle="--" if floor else "-",
                zorder=2 if floor else 3,
                **_BARS,
            )
            handles.setdefault(f"{method} (floor)" if floor else method, bars)
    front = pareto_front(panel.rows, panel.value, panel.rises)
    if front:
        ring = place.scatter(_mebibytes(front), [row[panel.value] for row in front], **_RING)
        handles.setdefault("Pareto front", ring)
    place.set_title(panel.title, fontsize=10)
    _scale_axes(place, panel)


def _scale_axes(place: Any, panel: Panel) -> None:
    place.set_xlabel("cache, MiB per sequence (measured)", fontsize=9)
    place.set_ylabel(panel.label, fontsize=9)
    place.set_xscale("log")
    _plain_ticks(place.xaxis, _mebibytes(panel.rows))
    values = [row[panel.value] for row in panel.rows]
    if panel.rises and all(0 <= value <= 1 for value in values):
        place.set_ylim(-0.05, 1.05)
    elif not panel.rises and any(value > 0 for value in values):
        place.set_yscale("log")
        # exact caches would stretch the axis down to float32's rounding error
        place.set_ylim(bottom=max(min(value for value in values if value > 0) / 1.5, max(values) * 1e-4))
    place.grid(True, color="#dddddd", linewidth=0.6)
    place.set_axisbelow(True)
    place.tick_params(labelsize=8)


def _mebibytes(rows: Sequence[Row]) -> list[float]:
    return [row["bytes"] / 1024**2 for row in rows]


def _plain_ticks(axis: Any, sizes: Sequence[float]) -> None:
    """Ticks at round numbers; matplotlib would label a logarithmic axis only at powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(sizes) / 1.15, max(sizes) * 1.15
    steps = [factor * 10.0**power for power in range(-4, 7) for factor in (1, 2, 5)]
    axis.set_major_locator(FixedLocator([step for step in steps if low <= step <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.axes.set_xlim(low, high)


def _style(method: str, methods: Sequence[str]) -> tuple[str, str]:
    if method == registry.FLOOR:
        return _FLOOR_COLOR, "x"
    others = [name for name in methods if name not in (registry.FULL, registry.FLOOR)]
    index = others.index(method)
    return _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]


def _rank(method: str) -> tuple[int, str]:
    name = method.partition(":")[0]
    # a peer's methods come after ours
    return _ORDER.index(name) if name in _ORDER else len(_ORDER), method


@dataclass(frozen=True)
class Table:
    """One task, length and protocol: a line for each method, a column for each budget."""

    title: str
    budgets: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def make_tables(rows: Sequence[Row]) -> list[Table]:
    """The scores for people to read, with the bytes held and the failures."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((subject(row), row["protocol"]), []).append(row)
    tables = []
    for (title, protocol), members in groups.items():
        done = [row for row in members if row["status"] == "ok"]
        front = {id(row) for row in pareto_front(done, rises=all(row.get("higher_is_better", True) for row in done))}
        metric = done[0]["metric"] if done else "score"
        if any("kl" in row for row in members):
            metric += " / KL"

        def cell(row: Row | None, front: set[int] = front) -> str:
            return "" if row is None else _cell(row) + " *" * (id(row) in front)

        tables.append(_table(f"{title}, {protocol}: {metric}", members, cell))
    return tables


def make_comparisons(rows: Sequence[Row]) -> list[Table]:
    """How far each method is above sinks + recent tokens of equal bytes, a table for each plot."""
    tables = []
    for panel in (panel for line in make_panels(rows) for panel in line):

        def cell(row: Row | None, panel: Panel = panel) -> str:
            over = row and over_floor(row, panel.rows, panel.value, panel.error, panel.rises)
            return f"{over[0]:+.3f} ±{over[1]:.3f}" if over else ""

        title = f"{panel.title}: {panel.label}, gained over the floor at equal bytes".replace("\n", ", ")
        table = _table(title, panel.rows, cell, (registry.FULL, registry.FLOOR))
        if table.lines:
            tables.append(table)
    return tables


def _table(title: str, rows: Sequence[Row], cell: Callable[[Row | None], str], but: Sequence[str] = ()) -> Table:
    """A line for each method except some, a column for each budget; cell gets the row, None if there is none."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["method"] != registry.FULL))
    names = {registry.FULL: "full cache (ceiling)", registry.FLOOR: f"{registry.FLOOR} (floor)"}
    lines = []
    for method in sorted({row["method"] for row in rows}.difference(but), key=_rank):
        own = {row["budget"]: row for row in rows if row["method"] == method}
        # the full cache has one row, which is shown at every budget
        found = [own[None] if method == registry.FULL else own.get(budget) for budget in budgets]
        lines.append((names.get(method, method), *map(cell, found)))
    return Table(title, tuple(map(_head, budgets)), tuple(lines))


def _head(budget: int | float | None) -> str:
    if budget is None:
        return "all tokens"
    return f"{budget:.0%}" if isinstance(budget, float) else f"{budget} tokens"


def _cell(row: Row) -> str:
    if row["status"] != "ok":
        return "failed"
    score = f"{row['score']:.2f}"
    if "kl" in row:
        # both errors would not fit a terminal; they are in the plot and in the rows
        score += f" / {row['kl']:.3f}"
    elif row["stderr"]:
        score += f" ±{row['stderr']:.2f}"
    return f"{score} ({row['bytes'] / 1024**2:.1f} MiB)"


def _samples(rows: Sequence[Row]) -> str:
    counts = sorted({row["samples"] for row in rows if "samples" in row})
    return " to ".join(dict.fromkeys(map(str, counts[:1] + counts[-1:])))


_PAGE = string.Template("""<!doctype html><html lang="en"><meta charset="utf-8"><title>kvcompress sweep</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em}img{max-width:100%}
table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}
</style><body><h1>kvcompress sweep: $model</h1>
$picture
<p>Each cell: score ± standard error, and the bytes that the cache held per sequence when the question came (all live
storages). The context is compressed before the question is read (question-agnostic), or after all but its last tokens
(question-aware); every answer token comes from the compressed cache. The full cache is the ceiling, sinks and recent
tokens are the floor. * is on the Pareto front: no other is as good in fewer bytes, or better in as few. A method's gain
over the floor is taken at its own bytes, with straight lines between the floor's points and up to the full cache; more
than 0 is better.</p>
$tables
$failed
<h2>How it was measured</h2>$facts</body></html>
""")


def _html_table(lines: Iterable[Iterable[str]], heads: Iterable[str] = ()) -> str:
    """A table of cells, which are escaped."""
    rows = [("th", heads), *(("td", line) for line in lines)]
    cells = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) for tag, line in rows)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells if line)}</table>"


def write_page(rows: Sequence[Row], path: Path, plot: Path | None) -> None:
    """Writes an HTML page with the plot inside, the tables, the failures and how it was measured."""
    first, newest = rows[0], max(rows, key=lambda row: row["provenance"]["time"])["provenance"]
    tables = [
        f"<h2>{html.escape(table.title)}</h2>{_html_table(table.lines, ('method', *table.budgets))}"
        for table in make_tables(rows) + make_comparisons(rows)
    ]
    failed = [(describe(row), row["error"].splitlines()[0]) for row in rows if row["status"] != "ok"]
    versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items() if version)
    facts = {
        "command": "; ".join(dict.fromkeys(row["provenance"]["command"] for row in rows)),
        "commit": str(newest["commit"]),
        "machine": f"{newest['machine']}, {newest['threads']} threads",
        "versions": f"{versions}, Python {newest['python']}",
        "model": f"{first['model']}, {first['dtype']} on {first['device']}",
        "samples, seed": f"{_samples(rows)} per point, seed {first['seed']}",
        "time": f"{newest['time']}; {sum(row['seconds'] for row in rows):.0f} s for all points",
    }
    picture = f"data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}" if plot else ""
    page = _PAGE.substitute(
        model=html.escape(Path(first["model"]).name),
        picture=f'<img alt="quality against measured bytes" src="{picture}">' if plot else "",
        tables="\n".join(tables),
        failed=f"<h2>Failed</h2>{_html_table(failed)}" if failed else "",
        facts=_html_table(facts.items()),
    )
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def subject(row: Row) -> str:
    """What a row measures: the task, with the context's length or the number of examples."""
    if row["length"] is not None:
        return f"{row['task']}, {row['length']} tokens"
    return f"{row['task']}, {row['num_fewshot']}-shot" if row.get("num_fewshot") else str(row["task"])


def describe(row: Row) -> str:
    """Which point a row belongs to."""
    return Point(*(row[name] for name in ("task", "length", "protocol", "method", "budget"))).title


def collect(folders: Sequence[Path]) -> list[Row]:
    """The rows of several sweeps in one order; with several models, tasks get the model's name.

    Raises:
        ValueError: a folder has no rows, or some that no sweep wrote.
    """
    found: dict[str, Row] = {}
    for folder in folders:
        own = read_rows(folder)
        if not own:
            raise ValueError(f"there are no rows of a sweep (results.jsonl) in {folder}")
        for key, row in own.items():
            lacking = sorted(_NEEDED - row.keys())
            if lacking:
                raise ValueError(f"the row {key!r} in {folder} is none of a sweep: it lacks {', '.join(lacking)}")
            if key not in found or found[key]["status"] != "ok":
                found[key] = row
    # of a class of somebody's own that has changed in between, the newest
    newest = {row["key"] if "source" not in row else tuple(map(row.get, _PLACE)): row for row in found.values()}
    rows = list(newest.values())
    if len({row["model"] for row in rows}) > 1:
        rows = [row | {"task": f"{Path(row['model']).name}: {row['task']}"} for row in rows]
    places: dict[str, int] = {}
    for row in rows:
        places.setdefault(subject(row), len(places))
    return sorted(rows, key=lambda row: (places[subject(row)], row["protocol"], _rank(row["method"]), _size(row)))


def _size(row: Row) -> tuple[bool, float]:
    """Sorts budgets, fractions first."""
    return isinstance(row["budget"], int), row["budget"] or 0.0


def write_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes table, plot and page into a folder, and returns their paths."""
    table, plot, page = folder / "results.csv", folder / "accuracy.png", folder / "report.html"
    write_csv(rows, table)
    drawn = draw(rows, plot)
    write_page(rows, page, plot if drawn else None)
    return [table, *([plot] if drawn else []), page]
