"""The plot of a sweep as one PNG: quality against measured bytes, a panel for each task, length and protocol."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcompress import registry
from kvcompress.evals.sweep.compare import pareto_front
from kvcompress.evals.sweep.intervals import Row, estimate
from kvcompress.evals.sweep.panels import Panel, make_panels, method_name, model_name, rank, samples, share
from kvcompress.evals.sweep.styles import Style, make_styles

_CEILING: dict[str, Any] = {"color": "black", "linewidth": 0.9, "linestyle": ":", "zorder": 1}
_BARS = {"markerfacecolor": "none", "linewidth": 1.3, "elinewidth": 0.6, "capsize": 1.5, "alpha": 0.9}
_RING = {"s": 190, "facecolors": "none", "edgecolors": "black", "linewidths": 1.1, "zorder": 4}


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Plots every panel into one PNG; if no row succeeded, writes nothing and returns False."""
    # needs no display, and leaves the caller's choice of one alone
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _arranged([[panel for panel in map(_placed, line) if panel.rows] for line in make_panels(rows)])
    if not lines:
        return False
    width = max(len(line) for line in lines)
    methods = sorted({row["method"] for line in lines for panel in line for row in panel.rows}, key=rank)
    columns = max(2, min(6, 2 * width))
    legend = 0.22 * (len(methods) // columns + 1)
    figure = Figure(figsize=(5.4 * width, 3.9 * len(lines) + 0.8 + legend), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), width, squeeze=False)
    handles: dict[str, Any] = {}
    for line, places in zip(lines, axes, strict=True):
        for index, place in enumerate(places):
            if index < len(line):
                _draw_panel(place, line[index], methods, handles)
            else:
                place.set_visible(False)
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in rows if row.get("dtype")))
    figure.suptitle(
        f"{model_name(rows)}{', ' * bool(dtypes)}{dtypes}: quality against measured cache memory\n"
        f"{samples(rows) or 'unknown number of'} samples per point, bars are 95 % intervals",
        fontsize=11,
    )
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, dpi=130, format="png")
    partial.replace(path)
    return True


def _placed(panel: Panel) -> Panel:
    """The panel without rows that have no place on the axis of bytes."""
    rows = tuple(row for row in panel.rows if share(row) is not None)
    return Panel(rows, panel.value, panel.error, panel.label, panel.rises)


def _arranged(lines: Sequence[Sequence[Panel]]) -> list[list[Panel]]:
    """Lines of equally many panels as they are; others are filled one after another: the last alone has holes."""
    found = [list(line) for line in lines if line]
    if len({len(line) for line in found}) <= 1:
        return found
    width = min(3, max(len(line) for line in found))
    panels = [panel for line in found for panel in line]
    return [panels[start : start + width] for start in range(0, len(panels), width)]


def _draw_panel(place: Any, panel: Panel, methods: Sequence[str], handles: dict[str, Any]) -> None:
    styles = make_styles(methods)
    drawn = _drawn(panel)
    for method in methods:
        rows = sorted((row for row in drawn if row["method"] == method), key=lambda row: row["bytes"])
        if rows and method == registry.FULL:
            if panel.value == "score":
                place.axhline(rows[0][panel.value], **_CEILING)
            handles.setdefault(method_name(method), place.axvline(_percent(rows)[0], **_CEILING))
        elif rows:
            size = 11 - 7 * methods.index(method) / len(methods)
            bars = _draw_method(place, panel, rows, styles[method], size, method == registry.FLOOR)
            handles.setdefault(method_name(method), bars)
    front = [row for row in pareto_front(panel.rows, panel.value, panel.rises) if any(row is one for one in drawn)]
    if front:
        ring = place.scatter(_percent(front), [row[panel.value] for row in front], **_RING)
        handles.setdefault("Pareto front", ring)
    place.set_title(f"{panel.title}: {panel.label}", fontsize=10)
    if hidden := len(panel.rows) - len(drawn):
        said = f"{hidden} point{'s' * (hidden != 1)} at or near 0 not drawn"
        place.text(0.99, 0.01, said, fontsize=7, ha="right", va="bottom", transform=place.transAxes)
    _scale_axes(place, panel, drawn)


def _is_logarithmic(panel: Panel) -> bool:
    return not panel.rises and any(row[panel.value] > 0 for row in panel.rows)


def _drawn(panel: Panel) -> list[Row]:
    """The rows that have a place in a plot: what is almost 0, as of exact caches, has none on a logarithmic axis."""
    if not _is_logarithmic(panel):
        return list(panel.rows)
    least = 1e-4 * max(row[panel.value] for row in panel.rows)
    return [row for row in panel.rows if row[panel.value] >= least or _is_line(row, panel)]


def _is_line(row: Row, panel: Panel) -> bool:
    """True of the full cache where only its bytes are drawn."""
    return row["method"] == registry.FULL and panel.value != "score"


def _draw_method(place: Any, panel: Panel, rows: Sequence[Row], style: Style, size: float, is_floor: bool) -> Any:
    """size: of the markers, which are hollow and of different sizes so that methods at one place can all be seen."""
    found = [estimate(row, panel.value, panel.error) for row in rows]
    downs = [0.0 if one.low is None else max(0.0, one.value - one.low) for one in found]
    ups = [0.0 if one.high is None else max(0.0, one.high - one.value) for one in found]
    return place.errorbar(
        _percent(rows),
        [one.value for one in found],
        yerr=[downs, ups],
        color=style.color,
        marker=style.marker[0],
        linestyle=style.line[0],
        markersize=size,
        zorder=2 if is_floor else 3,
        **_BARS,
    )


def _scale_axes(place: Any, panel: Panel, drawn: Sequence[Row]) -> None:
    place.set_xlabel("cache, % of the full cache's bytes (measured)", fontsize=9)
    place.set_ylabel(panel.label, fontsize=9)
    place.set_xscale("log")
    _plain_ticks(place.xaxis, _percent(drawn))
    values = [row[panel.value] for row in drawn if not _is_line(row, panel)]
    if panel.rises and all(0 <= value <= 1 for value in values):
        place.set_ylim(-0.06, 1.06)
    elif _is_logarithmic(panel) and values:
        place.set_yscale("log")
        place.set_ylim(*_log_ends(values))
    place.grid(True, color="#dddddd", linewidth=0.6)
    place.set_axisbelow(True)
    place.tick_params(labelsize=8)


def _percent(rows: Sequence[Row]) -> list[float]:
    return [100 * (share(row) or 0.0) for row in rows]


def _log_ends(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis, so far from the outer values that their markers are whole."""
    room = max(1.15, (max(values) / min(values)) ** 0.08)
    return min(values) / room, max(values) * room


def round_steps(low: float, high: float) -> list[float]:
    """The round numbers of a logarithmic axis between two values."""
    steps = [factor * 10.0**power for power in range(-4, 7) for factor in (1, 2, 5)]
    return [step for step in steps if low <= step <= high]


def _plain_ticks(axis: Any, sizes: Sequence[float]) -> None:
    """Ticks at round numbers; matplotlib would label a logarithmic axis only at powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = _log_ends(sizes)
    axis.set_major_locator(FixedLocator(round_steps(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.axes.set_xlim(low, high)
