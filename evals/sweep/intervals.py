"""What the samples of a sweep say beyond their mean: 95 % intervals, and differences between rows of the same prompts.

    scores of 0 and 1    Wilson's interval
    other scores         bootstrap of the mean, percentiles; seeded, so that a report can be made again
    only a standard error, as in rows of older sweeps    value ± 1.96 standard errors

Methods that read the same prompts are compared prompt by prompt: most prompts are as hard for one as for the other, and
what they have in common cancels. The interval of a mean difference is Student's; where both rows hold only 0 and 1 it
is that of Bonett and Price (doi 10.3102/1076998609359785), which a few equal samples do not shrink to a point. No
interval is corrected for how many comparisons a report makes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvcompress.evals.sweep.rows import mean_of, standard_error

Row = dict[str, Any]

# Φ(1.96) = 0.975
_NORMAL = 1.959963984540054
_RESAMPLES = 2000
# two rows read the same prompts if none of these differs
_PROMPTS = (
    *("model", "task", "length", "protocol", "seed", "samples", "hold_back", "continuation", "chunk", "text"),
    *("text_version", "num_fewshot", "limit", "question", "prompts", "answers", "depths"),
)


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference of means.

    stderr, low, high: standard error and 95 % interval; None if there are too few samples to say.
    paired: of a difference, whether it was taken prompt by prompt.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    paired: bool = False

    @property
    def is_apart(self) -> bool:
        """True if the interval leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high

    def __neg__(self) -> "Estimate":
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return Estimate(-self.value, self.stderr, low, high, self.paired)


def estimate(row: Row, value: str = "score", error: str = "stderr") -> Estimate:
    """A figure of a row with its interval."""
    samples = per_sample(row) if value == "score" else None
    if samples is None:
        return _normal(row[value], row.get(error))
    if _is_binary(samples):
        return Estimate(row[value], row.get(error), *_wilson(samples))
    return Estimate(row[value], row.get(error), *(_bootstrap(samples) if len(samples) > 1 else (None, None)))


def difference(row: Row, others: Sequence[tuple[float, Row]], value: str = "score", error: str = "stderr") -> Estimate:
    """How much more a row has than the weighted sum of others: prompt by prompt, if all read the same prompts.

    Args:
        others: weights and rows.
    """
    gap = row[value] - sum(weight * other[value] for weight, other in others)
    pairs = [(per_sample(other), weight) for weight, other in others]
    own = per_sample(row)
    if value != "score" or own is None or not all(same_prompts(row, other) for _, other in others):
        return _unpaired(gap, row.get(error), [(weight, other.get(error)) for weight, other in others])
    gaps = [
        mine - sum(weight * samples[index] for samples, weight in pairs if samples) for index, mine in enumerate(own)
    ]
    spread = standard_error(gaps)
    if spread is None:
        return Estimate(gap, None, None, None, True)
    if len(others) == 1 and others[0][0] == 1.0 and _is_binary(own) and _is_binary(pairs[0][0] or []):
        return Estimate(gap, spread, *_bonett_price(gaps), True)
    from scipy.stats import t

    reach = float(t.ppf(0.975, len(gaps) - 1)) * spread
    return Estimate(gap, spread, gap - reach, gap + reach, True)


def mean(parts: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates; its interval from theirs (MOVER, doi 10.1002/sim.3095)."""
    value = mean_of([part.value for part in parts])
    count = len(parts)
    stderr = _independent([part.stderr for part in parts], [1.0 / count] * count)
    low = _independent([None if p.low is None else p.value - p.low for p in parts], [1.0 / count] * count)
    high = _independent([None if p.high is None else p.high - p.value for p in parts], [1.0 / count] * count)
    return Estimate(value, stderr, None if low is None else value - low, None if high is None else value + high)


def per_sample(row: Row) -> list[float] | None:
    """The scores of a row's samples, if it has them and their mean is its score."""
    scores = row.get("scores")
    if not isinstance(scores, list) or not scores or not all(isinstance(x, int | float) for x in scores):
        return None
    # of perplexity, the score is no mean
    close = math.isclose(mean_of(scores), row["score"], rel_tol=1e-6, abs_tol=1e-6)
    return [float(x) for x in scores] if close else None


def same_prompts(row: Row, other: Row) -> bool:
    """True if two rows have scores of the same prompts, in the same order."""
    one, two = per_sample(row), per_sample(other)
    if one is None or two is None or len(one) != len(two):
        return False
    return all(row.get(name) == other.get(name) for name in _PROMPTS)


def _is_binary(samples: Sequence[float]) -> bool:
    return all(sample in (0.0, 1.0) for sample in samples)


def _wilson(samples: Sequence[float]) -> tuple[float, float]:
    from scipy.stats import binomtest

    found = binomtest(round(sum(samples)), len(samples)).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def _bootstrap(samples: Sequence[float]) -> tuple[float, float]:
    import numpy
    from scipy.stats import bootstrap

    found = bootstrap((samples,), numpy.mean, n_resamples=_RESAMPLES, batch=100, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _bonett_price(gaps: Sequence[float]) -> tuple[float, float]:
    """The interval of a difference between two shares, from gaps of -1, 0 and 1: one of each sign is added."""
    more, less = ((sum(gap * sign > 0 for gap in gaps) + 1) / (len(gaps) + 2) for sign in (1, -1))
    reach = _NORMAL * math.sqrt((more + less - (more - less) ** 2) / (len(gaps) + 2))
    return max(-1.0, more - less - reach), min(1.0, more - less + reach)


def _unpaired(gap: float, own: float | None, others: Sequence[tuple[float, float | None]]) -> Estimate:
    """A difference between what is held to be independent; the others' errors are added up, as they go together."""
    stderr = math.hypot(own or 0.0, sum(weight * (error or 0.0) for weight, error in others))
    if own is None or any(error is None for _, error in others):
        return Estimate(gap, stderr, None, None)
    return _normal(gap, stderr)


def _normal(value: float, stderr: float | None) -> Estimate:
    if stderr is None:
        return Estimate(value, None, None, None)
    return Estimate(value, stderr, value - _NORMAL * stderr, value + _NORMAL * stderr)


def _independent(errors: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """The error of a weighted sum of what is independent; None if one of the errors is not known."""
    if any(error is None for error in errors):
        return None
    return math.sqrt(sum((weight * (error or 0.0)) ** 2 for error, weight in zip(errors, weights, strict=True)))
