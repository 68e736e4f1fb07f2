"""What the samples of a sweep say beyond their mean: 95 % intervals, and differences between rows of the same prompts.

    scores of 0 and 1    Wilson's interval
    other scores         Student's t below 20 samples, where percentiles of a bootstrap are too narrow; from 20 on a
                         bootstrap of the mean, seeded, so that a report can be made again
    all scores equal     as below, since no spread is no certainty
    only a standard error, as in rows of older sweeps    value ± 1.96 standard errors

Of n equal scores, a share q of all prompts may still score otherwise without one of them being drawn:

    (1 - q)^n = 0.05, q about 3 / n    (the rule of three, doi 10.1001/jama.1983.03330370053031)

and these may have any score in the possible range. So the mean c of n equal scores is only known to lie between
(1 - q) c + q low and (1 - q) c + q high. Scores that are shares have the range from 0 to 1, differences of them that
from -1 to 1; no interval leaves the range. Where the range is open, equal scores have no interval.

Methods that read the same prompts are compared prompt by prompt: most prompts are as hard for one as for the other, and
what they have in common cancels. The interval of a mean difference is Student's, with equal differences as above; where
both rows hold only 0 and 1 it is that of Bonett and Price (doi 10.3102/1076998609359785). Where a row is compared with
what lies between two others, the ends are the weighted means of those of both differences. Other differences get theirs
from the two rows' intervals (MOVER, doi 10.1002/sim.3095). No interval is corrected for how many comparisons a report
makes. That a row is equal to itself is exact.

The full cache compared with itself, on KL and agreement, is exact: nothing was sampled there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvcompress import registry
from kvcompress.evals.sweep.rows import mean_of, standard_error

Row = dict[str, Any]
# low and high, if there are enough samples
_Ends = tuple[float | None, float | None]

# Φ(1.96) = 0.975
_NORMAL = 1.959963984540054
_RESAMPLES = 2000
# from so many samples on, the mean is bootstrapped
_MANY = 20
_SHARE, _NOT_NEGATIVE, _OPEN = (0.0, 1.0), (0.0, math.inf), (-math.inf, math.inf)
# two rows read the same prompts if none of these differs
_PROMPTS = (
    *("model", "task", "length", "protocol", "seed", "samples", "hold_back", "continuation", "chunk", "text"),
    *("turns", "transcript", "documents", "text_version", "num_fewshot", "limit", "question"),
    *("prompts", "answers", "depths"),
)


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference of means.

    stderr, low, high: standard error and 95 % interval; None if there are too few samples to say.
    paired: of a difference, whether it was taken prompt by prompt.
    exact: known without sampling, so that low and high are the value, and no interval needs to be shown.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    paired: bool = False
    exact: bool = False

    @property
    def is_apart(self) -> bool:
        """True if the interval leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high

    def __neg__(self) -> "Estimate":
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return Estimate(-self.value, self.stderr, low, high, self.paired, self.exact)


def estimate(row: Row, value: str = "score", error: str = "stderr") -> Estimate:
    """A figure of a row with its interval."""
    if is_exact(row, value):
        return Estimate(row[value], 0.0, row[value], row[value], exact=True)
    samples, stderr, span = per_sample(row) if value == "score" else None, row.get(error), _range(row, value)
    if samples is None:
        samples = _equal_samples(row, value, stderr)
    if samples is None:
        return _within(span, row[value], stderr, _normal(row[value], stderr))
    if _is_binary(samples):
        return Estimate(row[value], stderr, *_wilson(samples))
    if _is_constant(samples):
        return Estimate(row[value], stderr, *_rule_of_three(row[value], len(samples), span))
    found = _bootstrap(samples) if len(samples) >= _MANY else _student(row[value], samples)
    return _within(span, row[value], stderr, found)


def difference(row: Row, others: Sequence[tuple[float, Row]], value: str = "score", error: str = "stderr") -> Estimate:
    """How much more a row has than the weighted sum of others: prompt by prompt, if all read the same prompts.

    Args:
        others: weights of 0 or more, of which the sum is 1, and rows.
    """
    if all(row == other for _, other in others):
        return Estimate(0.0, 0.0, 0.0, 0.0, True, exact=True)
    gap = row[value] - sum(weight * other[value] for weight, other in others)
    shares = value == "score" and all(is_share(one) for one in (row, *(other for _, other in others)))
    span = (-1.0, 1.0) if shares else _OPEN
    pairs = [(per_sample(other) or [], weight) for weight, other in others]
    own = per_sample(row)
    if value != "score" or own is None or not all(same_prompts(row, other) for _, other in others):
        found = [(weight, estimate(other, value, error)) for weight, other in others]
        return _unpaired(gap, estimate(row, value, error), found, span)
    spread = standard_error(
        [mine - sum(weight * samples[index] for samples, weight in pairs) for index, mine in enumerate(own)]
    )
    ends = [(weight, *_paired(own, samples, span)) for samples, weight in pairs]
    if spread is None or any(low is None or high is None for _, low, high in ends):
        return Estimate(gap, spread, None, None, True)
    low, high = (sum(end[0] * (end[side] or 0.0) for end in ends) for side in (1, 2))
    return _within(span, gap, spread, (low, high), paired=True)


def _paired(own: Sequence[float], others: Sequence[float], span: tuple[float, float]) -> _Ends:
    """The interval of a mean difference, prompt by prompt."""
    gaps = [mine - other for mine, other in zip(own, others, strict=True)]
    if len(gaps) < 2:
        return None, None
    if _is_binary(own) and _is_binary(others):
        return _bonett_price(gaps)
    gap = mean_of(gaps)
    return _rule_of_three(gap, len(gaps), span) if _is_constant(gaps) else _student(gap, gaps)


def mean(parts: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates; its interval from theirs (MOVER, doi 10.1002/sim.3095)."""
    value = mean_of([part.value for part in parts])
    count = len(parts)
    stderr = _independent([part.stderr for part in parts], [1.0 / count] * count)
    low = _independent([None if p.low is None else p.value - p.low for p in parts], [1.0 / count] * count)
    high = _independent([None if p.high is None else p.high - p.value for p in parts], [1.0 / count] * count)
    ends = None if low is None else value - low, None if high is None else value + high
    return Estimate(value, stderr, *ends, exact=all(part.exact for part in parts))


def interval(found: Estimate, form: str = ".2f") -> str:
    """An estimate's interval for people; nothing if it has none, or is exact."""
    if found.exact or found.low is None or found.high is None:
        return ""
    return f"[{found.low:{form}}, {found.high:{form}}]"


def is_share(row: Row) -> bool:
    """True if a row's score is a share from 0 to 1, of which more is better."""
    return bool(row.get("higher_is_better", True)) and 0.0 <= row["score"] <= 1.0


def is_exact(row: Row, value: str = "score") -> bool:
    """True of the full cache where a figure compares with the full cache itself: KL, agreement, error of attention."""
    # a sweep asks about points that have no row yet
    return row.get("method") == registry.FULL and (value != "score" or "kl" in row)


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


def _student(value: float, samples: Sequence[float]) -> tuple[float | None, float | None]:
    from scipy.stats import t

    spread = standard_error(samples)
    if spread is None:
        return None, None
    reach = float(t.ppf(0.975, len(samples) - 1)) * spread
    return value - reach, value + reach


def _rule_of_three(value: float, count: int, span: tuple[float, float]) -> tuple[float | None, float | None]:
    """The interval of a mean of equal samples."""
    if count < 2 or math.inf in span:
        return None, None
    other = 1.0 - 0.05 ** (1.0 / count)
    low, high = ((1.0 - other) * value + other * end for end in span)
    return low, high


def _equal_samples(row: Row, value: str, stderr: float | None) -> list[float] | None:
    """The samples of a row that does not have them, if its error says that they were equal."""
    if stderr != 0.0:
        return None
    return [float(row[value])] * max(1, row.get("samples") or 1)


def _is_constant(samples: Sequence[float]) -> bool:
    return max(samples) - min(samples) < 1e-9


def _range(row: Row, value: str) -> tuple[float, float]:
    """What a figure can be."""
    if value != "score":
        return _NOT_NEGATIVE
    return _SHARE if is_share(row) else _OPEN


def _within(
    span: tuple[float, float],
    value: float,
    stderr: float | None,
    ends: tuple[float | None, float | None],
    paired: bool = False,
) -> Estimate:
    """An estimate whose interval does not leave the possible range."""
    low, high = (None if end is None else min(max(end, span[0]), span[1]) for end in ends)
    return Estimate(value, stderr, low, high, paired)


def _unpaired(
    gap: float, own: Estimate, others: Sequence[tuple[float, Estimate]], span: tuple[float, float]
) -> Estimate:
    """A difference between what is held to be independent; the others' errors are added up, as they go together."""
    stderr = math.hypot(own.stderr or 0.0, sum(weight * (other.stderr or 0.0) for weight, other in others))
    downs = [own.value - own.low] if own.low is not None else []
    ups = [own.high - own.value] if own.high is not None else []
    if not downs or not ups or any(other.low is None or other.high is None for _, other in others):
        return Estimate(gap, stderr, None, None)
    downs.append(sum(weight * ((other.high or 0.0) - other.value) for weight, other in others))
    ups.append(sum(weight * (other.value - (other.low or 0.0)) for weight, other in others))
    return _within(span, gap, stderr, (gap - math.hypot(*downs), gap + math.hypot(*ups)))


def _normal(value: float, stderr: float | None) -> tuple[float | None, float | None]:
    if stderr is None:
        return None, None
    return value - _NORMAL * stderr, value + _NORMAL * stderr


def _independent(errors: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """The error of a weighted sum of what is independent; None if one of the errors is not known."""
    if any(error is None for error in errors):
        return None
    return math.sqrt(sum((weight * (error or 0.0)) ** 2 for error, weight in zip(errors, weights, strict=True)))
