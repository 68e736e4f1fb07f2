"""The plot of a sweep's page: figures of plotly, of which the page shows one at a time."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvcompress import registry
from kvcompress.evals.sweep.compare import pareto_front
from kvcompress.evals.sweep.intervals import Estimate, Row, estimate, interval
from kvcompress.evals.sweep.panels import Panel, budget_name, make_panels, method_name, rank, share, subject
from kvcompress.evals.sweep.plot import round_steps
from kvcompress.evals.sweep.styles import Style, make_styles
from kvcompress.evals.sweep.summary import Means, make_means

# with more methods than this, intervals would hide the points until somebody asks for them
_FEW = 6
_GRID = "#e4e7eb"


@dataclass(frozen=True)
class Dot:
    """One point of a plot. held: bytes, if it is of one row. share: of the full cache's bytes."""

    method: str
    budget: int | float | None
    share: float
    held: float | None
    figure: Estimate


@dataclass(frozen=True)
class Chart:
    """What the page may show. group, name: where it stands in the page's list."""

    group: str
    name: str
    label: str
    rises: bool
    dots: tuple[Dot, ...]
    full: Dot | None


def make_charts(rows: Sequence[Row]) -> list[Chart]:
    """Means over several tasks first, then a chart for each panel.

    Args:
        rows: each point once.
    """
    charts = [_chart_of_means(means) for means in make_means(rows) if len(means.tasks) > 1]
    charts += [_chart_of_panel(panel) for line in make_panels(rows) for panel in line]
    return [chart for chart in charts if chart.dots or chart.full]


def _chart_of_means(means: Means) -> Chart:
    dots = [
        Dot(method, budget, entry.share, None, entry.score)
        for (method, budget), entry in means.entries.items()
        if entry.share is not None
    ]
    return _chart("mean over tasks", means.title, f"mean of {', '.join(means.tasks)}", True, dots)


def _chart_of_panel(panel: Panel) -> Chart:
    dots = [
        Dot(row["method"], row["budget"], found, row["bytes"], estimate(row, panel.value, panel.error))
        for row in panel.rows
        if (found := share(row)) is not None
    ]
    name = f"{panel.rows[0]['protocol']}: {panel.label}"
    return _chart(subject(panel.rows[0]), name, panel.label, panel.rises, dots)


def _chart(group: str, name: str, label: str, rises: bool, dots: Iterable[Dot]) -> Chart:
    dots = sorted(dots, key=lambda dot: (rank(dot.method), dot.share))
    full = next((dot for dot in dots if dot.method == registry.FULL), None)
    return Chart(group, name, label, rises, tuple(dot for dot in dots if dot is not full), full)


def to_json(charts: Sequence[Chart]) -> str:
    """All figures as JSON that may stand in a page's script: a list of names, traces and layouts."""
    methods = sorted({dot.method for chart in charts for dot in chart.dots}, key=rank)
    styles = make_styles(methods)
    shown = [
        {"group": chart.group, "name": chart.name, **_figure(chart, styles, len(methods) <= _FEW)} for chart in charts
    ]
    return json.dumps(shown, allow_nan=False).replace("<", "\\u003c")


def _figure(chart: Chart, styles: dict[str, Style], bars: bool) -> dict[str, Any]:
    import plotly.graph_objects as go

    figure = go.Figure(layout=_layout(chart))
    if chart.full:
        line = {"color": "black", "width": 1, "dash": "dot"}
        figure.add_vline(x=100 * chart.full.share, line=line)
        if not _is_logarithmic(chart):
            figure.add_hline(y=chart.full.figure.value, line=line)
    for method in dict.fromkeys(dot.method for dot in chart.dots):
        dots = [dot for dot in chart.dots if dot.method == method]
        # of decreasing size, so that methods at one place can all be seen
        size = 14 - 7 * list(styles).index(method) / len(styles)
        figure.add_trace(_trace(method_name(method), dots, styles[method], size, bars))
    if chart.full and not _is_logarithmic(chart):
        full = Style("#000000", ("*", "star"), ("-", "solid"))
        figure.add_trace(_trace(method_name(registry.FULL), [chart.full], full, 11, bars))
    if front := _front(chart):
        figure.add_trace(_front_trace(front))
    found: dict[str, Any] = json.loads(figure.to_json())
    return {"data": found["data"], "layout": found["layout"]}


def _trace(name: str, dots: Sequence[Dot], style: Style, size: float, bars: bool) -> dict[str, Any]:
    ups, downs = zip(*(_reach(dot.figure) for dot in dots), strict=True)
    return {
        "type": "scatter",
        "uid": name,
        "name": name,
        "mode": "lines+markers",
        "x": [100 * dot.share for dot in dots],
        "y": [dot.figure.value for dot in dots],
        "error_y": {
            "type": "data",
            "array": ups,
            "arrayminus": downs,
            "thickness": 0.9,
            "width": 3,
            "visible": bars,
        },
        "line": {"color": style.color, "dash": style.line[1], "width": 1.6},
        "marker": {"symbol": style.marker[1], "size": size, "color": style.color, "line": {"width": 1.8}},
        "text": [_told(dot) for dot in dots],
        "hovertemplate": "<b>%{fullData.name}</b><br>%{text}<extra></extra>",
    }


def _told(dot: Dot) -> str:
    """What a point says where the pointer rests."""
    held = "" if dot.held is None else f"{dot.held / 1024**2:.2f} MiB, "
    return f"budget {budget_name(dot.budget)}<br>{held}{100 * dot.share:.3g} % of the full cache<br>{told(dot.figure)}"


def told(found: Estimate) -> str:
    """An estimate for people."""
    return f"{found.value:.3f} {interval(found, '.3f')}".strip()


def _reach(found: Estimate) -> tuple[float, float]:
    if found.low is None or found.high is None:
        return 0.0, 0.0
    return max(0.0, found.high - found.value), max(0.0, found.value - found.low)


def _front(chart: Chart) -> list[Dot]:
    places = [{"method": dot.method, "bytes": dot.share, "score": dot.figure.value, "dot": dot} for dot in chart.dots]
    return [row["dot"] for row in pareto_front(places, rises=chart.rises)]


def _front_trace(dots: Sequence[Dot]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "uid": "Pareto front",
        "name": "Pareto front",
        "mode": "lines+markers",
        "x": [100 * dot.share for dot in dots],
        "y": [dot.figure.value for dot in dots],
        "line": {"color": "rgba(0,0,0,0.25)", "width": 6, "shape": "hv"},
        "marker": {"symbol": "circle-open", "size": 17, "color": "#000000", "line": {"width": 1.1}},
        "hoverinfo": "skip",
    }


def _is_logarithmic(chart: Chart) -> bool:
    return not chart.rises and any(dot.figure.value > 0 for dot in chart.dots)


def _layout(chart: Chart) -> dict[str, Any]:
    dots = [*chart.dots, *([chart.full] if chart.full else [])]
    shares = [100 * dot.share for dot in dots]
    low, high = min(shares) / 1.2, max(shares) * 1.2
    steps = round_steps(low, high)
    across = {
        "type": "log",
        "title": {"text": "bytes held, % of the full cache (measured)"},
        "tickvals": steps,
        "ticktext": [f"{step:g} %" for step in steps],
        "range": [math.log10(low), math.log10(high)],
    }
    up: dict[str, Any] = {"title": {"text": chart.label}}
    if _is_logarithmic(chart):
        # exact caches would stretch the axis down to float32's rounding error; the full cache is no point here
        most = max(dot.figure.value for dot in chart.dots)
        values = [dot.figure.value for dot in chart.dots if dot.figure.value >= 1e-4 * most]
        ends = min(values) / 1.5, most * 1.5
        up |= {"type": "log", "range": [math.log10(end) for end in ends]}
        up |= {"tickvals": (marks := round_steps(*ends)), "ticktext": [f"{mark:g}" for mark in marks]}
    elif chart.rises and all(0.0 <= dot.figure.value <= 1.0 for dot in dots):
        up |= {"range": [-0.04, 1.04]}
    axis = {"gridcolor": _GRID, "linecolor": "#333333", "mirror": True, "ticks": "outside", "zeroline": False}
    return {
        "template": "none",
        "xaxis": axis | across,
        "yaxis": axis | up,
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"},
        "hovermode": "closest",
        "uirevision": "kept",
    }
