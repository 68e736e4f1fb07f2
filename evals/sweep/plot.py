"""The plot of a sweep as one PNG: quality against measured bytes, a panel for each task, length and protocol."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcompress import registry
from kvcompress.evals.sweep.compare import pareto_front
from kvcompress.evals.sweep.intervals import Row
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

    lines = [[panel for panel in map(_placed, line) if panel.rows] for line in make_panels(rows)]
    lines = [line for line in lines if line]
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
        f"{samples(rows) or 'unknown number of'} samples per point, bars are standard errors",
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


def _draw_panel(place: Any, panel: Panel, methods: Sequence[str], handles: dict[str, Any]) -> None:
    styles = make_styles(methods)
    for method in methods:
        rows = sorted((row for row in panel.rows if row["method"] == method), key=lambda row: row["bytes"])
        if rows and method == registry.FULL:
            # what is almost 0 has no place on a logarithmic axis
            if panel.value == "score":
                place.axhline(rows[0][panel.value], **_CEILING)
            handles.setdefault(method_name(method), place.axvline(_percent(rows)[0], **_CEILING))
        elif rows:
            size = 11 - 7 * methods.index(method) / len(methods)
            bars = _draw_method(place, panel, rows, styles[method], size, method == registry.FLOOR)
            handles.setdefault(method_name(method), bars)
    front = pareto_front(panel.rows, panel.value, panel.rises)
    if front:
        ring = place.scatter(_percent(front), [row[panel.value] for row in front], **_RING)
        handles.setdefault("Pareto front", ring)
    place.set_title(panel.title, fontsize=10)
    _scale_axes(place, panel)


def _draw_method(place: Any, panel: Panel, rows: Sequence[Row], style: Style, size: float, is_floor: bool) -> Any:
    """size: of the markers, which are hollow and of different sizes so that methods at one place can all be seen."""
    return place.errorbar(
        _percent(rows),
        [row[panel.value] for row in rows],
        yerr=[row.get(panel.error) or 0.0 for row in rows],
        color=style.color,
        marker=style.marker[0],
        linestyle=style.line[0],
        markersize=size,
        zorder=2 if is_floor else 3,
        **_BARS,
    )


def _scale_axes(place: Any, panel: Panel) -> None:
    place.set_xlabel("cache, % of the full cache's bytes (measured)", fontsize=9)
    place.set_ylabel(panel.label, fontsize=9)
    place.set_xscale("log")
    _plain_ticks(place.xaxis, _percent(panel.rows))
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


def _percent(rows: Sequence[Row]) -> list[float]:
    return [100 * (share(row) or 0.0) for row in rows]


def round_steps(low: float, high: float) -> list[float]:
    """The round numbers of a logarithmic axis between two values."""
    steps = [factor * 10.0**power for power in range(-4, 7) for factor in (1, 2, 5)]
    return [step for step in steps if low <= step <= high]


def _plain_ticks(axis: Any, sizes: Sequence[float]) -> None:
    """Ticks at round numbers; matplotlib would label a logarithmic axis only at powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(sizes) / 1.15, max(sizes) * 1.15
    axis.set_major_locator(FixedLocator(round_steps(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.axes.set_xlim(low, high)
