import math

import numpy
import pytest
from scipy import stats

from kvcompress.evals.sweep.intervals import difference, estimate, mean, per_sample, same_prompts
from tests.evals.sweep.reported import row, scored


# docs: so twelve needles found of twelve are 0.76 to 1.00
def test_scores_of_0_and_1_get_wilsons_interval():
    found = estimate(scored([1.0] * 9 + [0.0]))
    # the textbook formula
    share, count, z = 0.9, 10, 1.959963984540054
    middle = (share + z**2 / 2 / count) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / 4 / count**2)
    assert (found.low, found.high) == pytest.approx((middle - reach, middle + reach))
    # all right is not beyond doubt
    assert estimate(scored([1.0] * 12)).low == pytest.approx(0.76, abs=0.005)
    assert estimate(scored([1.0] * 4)).low == pytest.approx(4 / (4 + z**2))
    assert estimate(scored([1.0] * 4)).high == pytest.approx(1.0)


# docs: other means get Student's below twenty samples, and are bootstrapped from there on
def test_many_other_scores_are_bootstrapped_the_same_every_time():
    scores = [0.2, 0.25, 0.5, 0.75, 0.4, 0.9, 0.35, 0.6] * 3
    found = estimate(scored(scores))
    draws = numpy.random.default_rng(5).choice(scores, (20000, len(scores))).mean(1)
    assert (found.low, found.high) == pytest.approx(tuple(numpy.quantile(draws, [0.025, 0.975])), abs=0.01)
    assert estimate(scored(scores)) == found


def test_a_few_other_scores_get_students_interval():
    scores = [0.3, 0.45, 0.5]
    found = estimate(scored(scores))
    interval = stats.ttest_1samp(scores, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


# docs: Scores that are all equal are no proof
@pytest.mark.parametrize("count", [2, 4, 12])
def test_equal_scores_are_not_beyond_doubt(count):
    found = estimate(scored([0.5] * count))
    # of a share of prompts that is missed by as many draws in one of twenty cases, the score may be anything
    missed = 1 - 0.05 ** (1 / count)
    assert (found.low, found.high) == pytest.approx((0.5 - missed / 2, 0.5 + missed / 2))
    old = row(score=0.5, stderr=0.0, samples=count)
    assert (estimate(old).low, estimate(old).high) == pytest.approx((found.low, found.high))


def test_equal_differences_are_not_beyond_doubt():
    def gap(count):
        return difference(scored([0.25] * count), [(1.0, scored([0.75] * count))])

    missed = 1 - 0.05 ** (1 / 3)
    assert (gap(3).value, gap(3).paired, gap(3).is_apart) == (-0.5, True, False)
    assert (gap(3).low, gap(3).high) == pytest.approx((-0.5 * (1 - missed) - missed, -0.5 * (1 - missed) + missed))
    assert gap(12).is_apart
    # as little without the samples
    old = difference(row(score=0.25, stderr=0.0, samples=3), [(1.0, row(score=0.75, stderr=0.0, samples=3))])
    assert not old.is_apart
    # what has no bounds has no interval either
    assert estimate(row(score=9.0, stderr=0.0)).low is None
    assert estimate(row(kl=0.1, kl_stderr=0.0), "kl", "kl_stderr").low is None


# docs: No interval leaves what is possible
def test_no_interval_leaves_what_is_possible():
    few = estimate(scored([0.9, 1.0, 0.5]))
    assert (few.low < 0.5, few.high) == (True, 1.0)
    assert estimate(row(score=0.95, stderr=0.1)).high == 1.0
    assert estimate(row(score=9.0, stderr=1.0)).high > 10.0
    assert estimate(row(kl=0.1, kl_stderr=0.1), "kl", "kl_stderr").low == 0.0
    gap = difference(scored([0.1, 0.2]), [(1.0, scored([0.6, 0.95]))])
    assert gap.low == -1.0
    apart = difference(row(score=0.0, stderr=0.5), [(1.0, row(score=1.0, stderr=0.5))])
    assert apart.low == -1.0


# docs: The full cache on KL and agreement is exact
def test_the_full_cache_compared_with_itself_is_exact():
    text = {"kl": 0.0, "kl_stderr": 0.0}
    full = scored([1.0] * 4, "none", None, **text)
    for found in (estimate(full), estimate(full, "kl", "kl_stderr"), mean([estimate(full)])):
        assert found.exact
        assert found.low == found.high == found.value
    # of a task it is sampled as all others are
    assert not estimate(scored([1.0] * 4, "none", None)).exact
    assert not estimate(scored([1.0] * 4, "h2o", **text)).exact


# docs: Rows of older sweeps, which have no scores of single samples, get ± 1.96 standard errors
@pytest.mark.parametrize("scores", [None, [], ["a"], [0.0, 1.0]])
def test_without_scores_of_which_it_is_the_mean_a_score_has_what_its_error_gives(scores):
    old = row(score=0.7, stderr=0.1, scores=scores)
    assert per_sample(old) is None
    found = estimate(old)
    assert (found.low, found.high) == pytest.approx((0.7 - 0.196, 0.7 + 0.196), abs=1e-4)


def test_where_nothing_is_known_of_the_error_there_is_no_interval():
    assert estimate(row(stderr=None)).low is None
    assert estimate(scored([0.3])).high is None
    assert not difference(row(stderr=None), [(1.0, row(score=0.0))]).is_apart


def test_other_figures_than_the_score_have_no_samples():
    found = estimate(scored([0.0, 1.0], kl=0.5, kl_stderr=0.1), "kl", "kl_stderr")
    assert found.low == pytest.approx(0.5 - 0.196, abs=1e-4)


# docs: Methods that read the same prompts are compared prompt by prompt
def test_methods_of_the_same_prompts_are_compared_prompt_by_prompt():
    one, other = [0.1, 0.5, 0.9, 0.3, 0.7], [0.2, 0.6, 0.95, 0.4, 0.8]
    found = difference(scored(other), [(1.0, scored(one))])
    gaps = numpy.subtract(other, one)
    assert found.paired
    assert found.value == pytest.approx(gaps.mean())
    assert found.stderr == pytest.approx(gaps.std(ddof=1) / math.sqrt(5))
    interval = stats.ttest_rel(other, one).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    # 0.09 apart with scores that spread over 0.3: only the pairs tell
    assert found.is_apart
    apart = difference(scored(other, seed=1), [(1.0, scored(one))])
    assert not apart.paired
    assert not apart.is_apart


def test_scores_of_0_and_1_need_more_than_a_few_prompts_to_be_told_apart():
    def gap(wins, ties):
        return difference(scored([1.0] * wins + [0.0] * ties), [(1.0, scored([0.0] * (wins + ties)))])

    # all differences are equal, so a spread alone would be sure of two
    assert gap(2, 0).stderr == 0.0
    assert not gap(2, 0).is_apart
    assert not gap(3, 9).is_apart
    assert gap(8, 4).is_apart
    # Bonett and Price with 8 wins, 0 losses, 12 prompts
    reach = 1.959963984540054 * math.sqrt((9 / 14 + 1 / 14 - (8 / 14) ** 2) / 14)
    assert gap(8, 4).low == pytest.approx(8 / 14 - reach)
    assert gap(8, 4).high == pytest.approx(min(1.0, 8 / 14 + reach))


def test_a_method_is_not_told_apart_from_itself():
    for scores in ([1.0, 0.0, 1.0], [0.3, 0.4, 0.9]):
        found = difference(scored(scores), [(1.0, scored(scores))])
        assert (found.value, found.is_apart) == (0.0, False)


def test_between_two_rows_an_interval_is_between_those_of_both():
    own, low, high = scored([0.0] * 8), scored([0.0] * 8, "streaming"), scored([1.0] * 8, "none", None)
    at_low, at_high = (difference(own, [(1.0, other)]) for other in (low, high))
    assert not at_low.is_apart
    for share in (0.0, 0.001, 0.5, 0.9, 1.0):
        found = difference(own, [(1.0 - share, low), (share, high)])
        assert found.value == pytest.approx(-share)
        ends = [
            (1.0 - share) * one + share * other for one, other in zip(ends_of(at_low), ends_of(at_high), strict=True)
        ]
        assert ends_of(found) == pytest.approx(ends)
    # a hair above the floor's bytes tells nothing apart that is equal at them
    assert not difference(own, [(0.999, low), (0.001, high)]).is_apart
    assert difference(own, [(0.1, low), (0.9, high)]).is_apart


def ends_of(found):
    return found.low, found.high


def test_a_row_is_equal_to_itself_without_doubt():
    for one in (scored([0.0, 1.0, 1.0]), scored([0.2, 0.3]), row(kl=0.3, kl_stderr=0.1)):
        found = difference(one, [(1.0, dict(one))])
        assert (found.value, found.low, found.high, found.exact) == (0.0, 0.0, 0.0, True)
        other = difference(one, [(1.0, one | {"method": "tova"})])
        assert other.low is None or other.low < 0.0


def test_a_weighted_sum_is_taken_prompt_by_prompt_too():
    own, low, high = [0.5, 0.9, 0.2], [0.1, 0.3, 0.0], [0.6, 0.8, 0.4]
    found = difference(scored(own), [(0.25, scored(low)), (0.75, scored(high))])
    gaps = numpy.subtract(own, numpy.multiply(low, 0.25) + numpy.multiply(high, 0.75))
    assert found.paired
    assert found.value == pytest.approx(gaps.mean())
    assert found.stderr == pytest.approx(gaps.std(ddof=1) / math.sqrt(3))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"answers": [["a"], ["c"]]}, {"model": "x"}, {"num_fewshot": 5}, {"protocol": "other"}]
)
def test_other_prompts_are_told(change):
    one = scored([0.0, 1.0], answers=[["a"], ["b"]])
    assert same_prompts(one, one | {"method": "tova", "budget": 0.1})
    assert not same_prompts(one, one | change)
    assert not same_prompts(one, scored([0.0, 1.0, 1.0]))


def test_the_interval_of_a_mean_comes_from_those_of_its_parts():
    parts = [estimate(scored([1.0] * 6)), estimate(scored([0.0, 1.0, 1.0, 0.0, 1.0, 0.0]))]
    found = mean(parts)
    assert found.value == pytest.approx(0.75)
    assert found.value - found.low == pytest.approx(math.hypot(*(part.value - part.low for part in parts)) / 2)
    assert found.high - found.value == pytest.approx(math.hypot(*(part.high - part.value for part in parts)) / 2)
    assert mean(parts[:1]).low == pytest.approx(parts[0].low)
    assert mean([*parts, estimate(row(stderr=None))]).low is None
