import pytest

from kvcompress.evals.sweep.compare import over_floor, pareto_front
from tests.evals.sweep.test_report import row


def line(*points, method="streaming", **more):
    return [row(method, 0.1, score, size, stderr=error, **more) for size, score, error in points]


FLOOR = line((1000, 0.2, 0.1), (2000, 0.6, 0.2))
FULL = row("none", None, 1.0, 4000, stderr=0.0)


@pytest.mark.parametrize(
    ("size", "score", "difference", "error"),
    [
        (1000, 0.5, 0.3, (0.3**2 + 0.1**2) ** 0.5),
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
    assert found == pytest.approx((difference, error))


def test_below_the_floors_smallest_point_there_is_nothing_to_compare_with():
    assert over_floor(row(size=999), [*FLOOR, FULL]) is None
    assert over_floor(row(size=999), []) is None


def test_where_less_is_better_more_than_nothing_is_still_better():
    floor = [row("streaming", size=1000, kl=0.4, kl_stderr=None), row("none", None, size=3000, kl=0.0, kl_stderr=0.0)]
    better = row(size=2000, kl=0.05, kl_stderr=0.01)
    assert over_floor(better, floor, "kl", "kl_stderr", rises=False) == pytest.approx((0.15, 0.01))


def test_the_floor_is_above_itself_by_nothing():
    for point in FLOOR:
        assert over_floor(point, [*FLOOR, FULL])[0] == pytest.approx(0.0)


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
