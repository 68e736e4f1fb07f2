import pytest

from kvcompress.evals.sweep.compare import make_rankings, over_floor, over_full, pareto_front
from tests.evals.sweep.reported import row, scored


def line(*points, method="streaming", **more):
    return [row(method, 0.1, score, size, stderr=error, **more) for size, score, error in points]


FLOOR = line((1000, 0.2, 0.1), (2000, 0.6, 0.2))
FULL = row("none", None, 1.0, 4000, stderr=0.0)


@pytest.mark.parametrize(
    ("size", "score", "difference", "error"),
    [
        (1000, 0.5, 0.3, (0.3**2 + 0.1**2) ** 0.5),
        (1250, 0.5, 0.2, (0.3**2 + 0.125**2) ** 0.5),
        (1500, 0.5, 0.1, (0.3**2 + 0.15**2) ** 0.5),
        (2000, 0.5, -0.1, (0.3**2 + 0.2**2) ** 0.5),
        # from the floor's last point the line goes on to the full cache
        (3000, 0.9, 0.1, (0.3**2 + 0.1**2) ** 0.5),
        (4000, 0.9, -0.1, 0.3),
        (5000, 0.9, -0.1, 0.3),
    ],
)
def test_the_floor_is_taken_at_equal_bytes_on_the_line_through_its_points(size, score, difference, error):
    asked = row(score=score, size=size, stderr=0.3)
    found = over_floor(asked, [FULL, asked, *reversed(FLOOR)])
    assert (found.value, found.stderr) == pytest.approx((difference, error))


def test_below_the_floors_smallest_point_there_is_nothing_to_compare_with():
    assert over_floor(row(size=999), [*FLOOR, FULL]) is None
    assert over_floor(row(size=999), []) is None


def test_where_less_is_better_more_than_nothing_is_still_better():
    floor = [row("streaming", size=1000, kl=0.4, kl_stderr=None), row("none", None, size=3000, kl=0.0, kl_stderr=0.0)]
    better = row(size=2000, kl=0.05, kl_stderr=0.01)
    found = over_floor(better, floor, "kl", "kl_stderr", rises=False)
    assert (found.value, found.stderr) == pytest.approx((0.15, 0.01))


def test_the_floor_is_above_itself_by_nothing():
    for point in FLOOR:
        assert over_floor(point, [*FLOOR, FULL]).value == pytest.approx(0.0)


def test_of_two_points_of_the_floor_in_as_many_bytes_one_is_taken():
    twice = line((1000, 0.2, 0.1), (1000, 0.3, 0.1))
    assert over_floor(row(size=1000), [*twice, FULL]).value == pytest.approx(0.3)
    assert over_floor(row(size=1000, score=1.0), twice).value == pytest.approx(0.8)


def test_the_floor_at_equal_bytes_is_taken_prompt_by_prompt():
    low = scored([0.0, 0.2, 0.4], "streaming", 0.1, bytes=1000)
    high = scored([0.4, 0.4, 0.6], "streaming", 0.5, bytes=2000)
    own = scored([0.3, 0.5, 0.6], bytes=1500)
    found = over_floor(own, [low, high, own])
    # halfway between the two: 0.2, 0.3 and 0.5
    assert found.paired
    assert found.value == pytest.approx(0.4 / 3)
    assert found.stderr == pytest.approx(0.1 / 3)


def test_less_than_the_full_cache_is_less_than_0_whichever_is_better():
    full = scored([0.9, 0.8, 1.0], "none", None)
    worse = scored([0.5, 0.6, 0.7])
    found = over_full(worse, [worse, full])
    assert found.value == pytest.approx(-0.3)
    assert found.low < found.value < found.high < 0
    assert over_full(worse, [worse]) is None
    turned = over_full(full | {"method": "h2o"}, [worse | {"method": "none"}], rises=False)
    assert turned == found


def ranked(*methods, budget=0.5):
    full = scored([1.0] * 12, "none", None, size=4000)
    made = [scored([1.0] * right + [0.0] * (12 - right), name, budget) for name, right in methods]
    return make_rankings([full, *made])[0]


def test_chance_may_have_put_close_methods_in_their_order():
    found = ranked(("h2o", 10), ("tova", 12), ("knorm", 2), ("snapkv", 11))
    assert found.best["method"] == "tova"
    assert [row["method"] for row in found.like_best] == ["h2o", "snapkv"]
    assert [row["method"] for row in found.like_full] == ["h2o", "tova", "snapkv"]
    assert found.count == 4


def test_of_equal_scores_the_smaller_is_best_and_budgets_do_not_mix():
    made = [row("h2o", 0.5, 0.5, 1000), row("tova", 0.5, 0.5, 900), row("tova", 0.2, 0.9, 400), row("gear", None, 0.8)]
    found = make_rankings(made)
    assert [(one.budget, one.best["method"], one.count) for one in found] == [
        (0.5, "tova", 2),
        (0.2, "tova", 1),
        (None, "gear", 1),
    ]
    # without a row of the full cache, nothing is like it
    assert all(one.full is None and not one.like_full for one in found)


def test_where_less_is_better_the_least_is_best():
    made = [row("h2o", score=10.0, stderr=0.1), row("tova", score=12.0, stderr=0.1)]
    (found,) = make_rankings(made, rises=False)
    assert (found.best["method"], found.like_best) == ("h2o", ())


def test_the_front_is_what_no_other_beats():
    made = [row(score=s, size=b) for s, b in [(0.2, 100), (0.5, 200), (0.4, 250), (0.5, 300), (0.9, 400), (0.0, 50)]]
    full = row("none", None, 1.0, 1000)
    assert [(r["score"], r["bytes"] // 1024) for r in pareto_front([*made, full])] == [
        (0.2, 100),
        (0.5, 200),
        (0.9, 400),
    ]


def test_where_less_is_better_the_front_falls():
    made = [row(size=b, kl=k) for k, b in [(0.9, 100), (0.5, 200), (0.6, 250), (0.1, 400)]]
    assert [r["kl"] for r in pareto_front(made, "kl", rises=False)] == [0.9, 0.5, 0.1]


def test_of_equal_bytes_the_better_row_is_on_the_front():
    made = [row("h2o", score=0.4), row("knorm", score=0.6)]
    assert [r["method"] for r in pareto_front(made)] == ["knorm"]
