"""How well figures of plain text, which are cheap, predict the scores of tasks, which are not.

Spearman's rank correlation over methods and budgets, between a figure of the task `text` and the score of another task.
KL and error are negated, so that 1 always means that both put the methods in one order. The full cache takes no part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvcompress import registry
from kvcompress.evals.sweep.intervals import Row
from kvcompress.evals.sweep.panels import PROXIES, Panel, score_panels, subject
from kvcompress.evals.sweep.points import CONTINUATION

# the figures of text, and whether more of it is better
_FIGURES = {"score": 1.0, **dict.fromkeys(PROXIES, -1.0)}
_FEWEST = 4


@dataclass(frozen=True)
class Prediction:
    """What one text says about one task. correlations: by figure, with how many points each has."""

    text: str
    task: str
    protocol: str
    correlations: dict[str, tuple[float, int]]


def make_predictions(rows: Sequence[Row]) -> list[Prediction]:
    """Of every text about every task of as many tokens, or without a length; from four points on.

    Args:
        rows: each point once.
    """
    panels = score_panels(rows)
    texts = [panel for panel in panels if panel.rows[0]["protocol"] == CONTINUATION]
    others = [panel for panel in panels if panel not in texts]
    found = [_predict(text, task) for text in texts for task in others if _go_together(text, task)]
    return [one for one in found if one.correlations]


def _go_together(text: Panel, task: Panel) -> bool:
    one, other = text.rows[0], task.rows[0]
    return one["model"] == other["model"] and other["length"] in (one["length"], None)


def _predict(text: Panel, task: Panel) -> Prediction:
    known = {(row["method"], row["budget"]): row for row in text.rows if row["method"] != registry.FULL}
    pairs = [(known[place], row) for row in task.rows if (place := (row["method"], row["budget"])) in known]
    correlations = {}
    for figure, sign in _FIGURES.items():
        points = [(sign * one[figure], _goodness(row, task)) for one, row in pairs if figure in one]
        if len(points) >= _FEWEST and not math.isnan(correlation := _spearman(points)):
            correlations[figure] = correlation, len(points)
    return Prediction(subject(text.rows[0]), subject(task.rows[0]), task.rows[0]["protocol"], correlations)


def _goodness(row: Row, panel: Panel) -> float:
    return row["score"] if panel.rises else -row["score"]


def _spearman(points: Sequence[tuple[float, float]]) -> float:
    """NaN if one side is the same everywhere."""
    from scipy.stats import spearmanr

    one, other = zip(*points, strict=True)
    if len(set(one)) == 1 or len(set(other)) == 1:
        return math.nan
    return float(spearmanr(one, other).statistic)
