"""How plots tell methods apart: by colour, marker and line together, so that none of a hundred looks like another."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvcompress import registry

# also told apart by those who do not see all colours
_COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"),
    *("#56b4e9", "#7f3c8d", "#a5732a", "#5f8700", "#c2185b"),
)
# matplotlib's name of a marker, and plotly's
_MARKERS = (
    *(("o", "circle-open"), ("s", "square-open"), ("D", "diamond-open"), ("^", "triangle-up-open")),
    *(("v", "triangle-down-open"), ("P", "cross-open"), ("X", "x-open"), ("*", "star-open")),
    *(("p", "pentagon-open"), ("h", "hexagon-open")),
)
# matplotlib's pattern, and plotly's name
_LINES: tuple[tuple[str | tuple[int, tuple[int, ...]], str], ...] = (
    *(("-", "solid"), ((0, (5, 2)), "dash")),
    *(((0, (1, 2)), "dot"), ((0, (5, 2, 1, 2)), "dashdot")),
)


@dataclass(frozen=True)
class Style:
    """A method's look. Of marker and line: matplotlib's names, then plotly's."""

    color: str
    marker: tuple[str, str]
    line: tuple[str | tuple[int, tuple[int, ...]], str]


_FLOOR = Style("#555555", ("x", "x-thin-open"), ((0, (3, 2)), "dash"))


def make_styles(methods: Sequence[str]) -> dict[str, Style]:
    """A style for each method, without the full cache; that of the floor does not depend on the others."""
    others = [method for method in methods if method not in (registry.FULL, registry.FLOOR)]
    styles = {method: _style(index) for index, method in enumerate(others)}
    return styles | ({registry.FLOOR: _FLOOR} if registry.FLOOR in methods else {})


def _style(index: int) -> Style:
    # each round through the colours begins at another marker, so ten rounds differ
    turn, color = divmod(index, len(_COLORS))
    return Style(_COLORS[color], _MARKERS[(color + 3 * turn) % len(_MARKERS)], _LINES[turn % len(_LINES)])
