import pytest

from kvcompress.evals.sweep.summary import make_means
from tests.evals.sweep.reported import FAILED, row, scored


def test_a_mean_is_over_the_tasks_that_every_method_has():
    rows = [
        *(row(method, 0.5, score, 1000, task) for method, score in (("h2o", 0.2), ("tova", 0.4)) for task in "ab"),
        row("h2o", 0.5, 1.0, 1000, "c"),
    ]
    (means,) = make_means(rows)
    assert means.tasks == ("a", "b")
    assert means.left_out == {"c": "not measured with tova"}
    assert {place: entry.score.value for place, entry in means.entries.items()} == {
        ("h2o", 0.5): pytest.approx(0.2),
        ("tova", 0.5): pytest.approx(0.4),
    }


def test_a_budget_that_failed_at_a_task_has_no_mean_and_takes_the_task_from_nobody():
    rows = [row("h2o", budget, 0.5, task=task) for budget in (0.2, 0.5) for task in "ab"]
    rows[0] |= FAILED
    (means,) = make_means(rows)
    assert sorted(means.tasks) == ["a", "b"]
    assert [*means.entries] == [("h2o", 0.5)]


def test_protocols_and_lengths_are_not_mixed():
    rows = [row(), row(protocol="question-agnostic"), row(length=1024), row(length=None, task="local_piqa")]
    titles = [means.title for means in make_means(rows)]
    assert titles == [
        "question-aware, 512 tokens",
        "question-agnostic, 512 tokens",
        "question-aware, 1024 tokens",
        "question-aware",
    ]


def test_models_are_not_mixed():
    one, other = row(model="org/one", score=0.2), row(model="org/other", score=0.8)
    found = make_means([one, other])
    assert [means.title for means in found] == ["one: question-aware, 512 tokens", "other: question-aware, 512 tokens"]
    assert [means.entries["h2o", 0.5].score.value for means in found] == [0.2, 0.8]


def test_what_is_no_share_stays_out_of_the_mean():
    rows = [row(task="a"), row(task="b", score=7.0), row(task="c", higher_is_better=False)]
    (means,) = make_means(rows)
    assert means.tasks == ("a",)
    assert set(means.left_out) == {"b", "c"}
    (none,) = make_means(rows[1:])
    assert not none.tasks
    assert not none.entries


def test_the_bytes_are_a_mean_of_shares_and_may_be_unknown():
    rows = [row(size=1000, task="a"), row(size=3000, task="b")]
    assert make_means(rows)[0].entries["h2o", 0.5].share == pytest.approx(0.5)
    old = [{name: value for name, value in one.items() if name != "full_bytes"} for one in rows]
    assert make_means(old)[0].entries["h2o", 0.5].share is None


def test_the_interval_narrows_with_tasks():
    tasks = [scored([0.0, 1.0, 1.0, 0.0, 1.0, 0.0], task=task) for task in "abcd"]
    widths = [
        (lambda found: found.high - found.low)(make_means(tasks[:count])[0].entries["h2o", 0.5].score)
        for count in (1, 4)
    ]
    assert widths[1] == pytest.approx(widths[0] / 2)
