import pytest

from kvcompress.evals.sweep.proxies import make_predictions
from tests.evals.sweep.reported import row

TEXT = {"task": "text", "protocol": "continuation"}


def both(scores, kls, **more):
    """The same methods on a text with these divergences, and on a task with these scores."""
    methods = [f"m{index}" for index in range(len(scores))]
    texts = [row(method, 0.5, 1 - kl, kl=kl, **TEXT) for method, kl in zip(methods, kls, strict=True)]
    tasks = [row(method, 0.5, score, **more) for method, score in zip(methods, scores, strict=True)]
    return [*texts, *tasks]


# docs: order methods as a task does, by Spearman's rank correlation
def test_a_text_that_orders_methods_as_a_task_does_predicts_it():
    (found,) = make_predictions(both([0.9, 0.7, 0.4, 0.1], [0.01, 0.02, 0.5, 3.0]))
    assert (found.text, found.task, found.protocol) == ("text, 512 tokens", "needle, 512 tokens", "question-aware")
    assert found.correlations == {"score": (pytest.approx(1.0), 4), "kl": (pytest.approx(1.0), 4)}


def test_one_that_turns_the_order_round_counts_as_minus_1():
    (found,) = make_predictions(both([0.1, 0.4, 0.7, 0.9], [0.01, 0.02, 0.5, 3.0]))
    assert found.correlations["kl"] == (pytest.approx(-1.0), 4)


def test_ties_are_ranked_in_the_middle():
    (found,) = make_predictions(both([0.5, 0.5, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]))
    # ranks 1.5, 1.5, 3, 4 and 1, 2, 3, 4
    assert found.correlations["kl"][0] == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_the_full_cache_takes_no_part_and_budgets_are_matched():
    made = both([0.9, 0.7, 0.4, 0.1], [0.1, 0.2, 0.5, 3.0])
    made += [row("none", None, 1.0, kl=0.0, **TEXT), row("none", None, 1.0), row("m0", 0.2, 0.0)]
    assert make_predictions(made)[0].correlations["kl"][1] == 4


def test_too_few_points_or_equal_scores_predict_nothing():
    assert make_predictions(both([0.9, 0.7, 0.4], [0.1, 0.2, 0.5])) == []
    assert make_predictions(both([0.0] * 5, [0.1, 0.2, 0.3, 0.4, 0.5])) == []


def test_a_text_speaks_of_tasks_of_its_own_length_and_of_those_without():
    scores, kls = [0.9, 0.7, 0.4, 0.1], [0.1, 0.2, 0.5, 3.0]
    assert make_predictions(both(scores, kls, length=1024)) == []
    assert len(make_predictions(both(scores, kls, length=None, task="local_piqa"))) == 1
    assert make_predictions(both(scores, kls, model="other")) == []


def test_where_less_is_better_the_task_is_turned_round():
    less = {"higher_is_better": False, "metric": "word_perplexity"}
    (found,) = make_predictions(both([10.0, 11.0, 12.0, 13.0], [0.1, 0.2, 0.5, 3.0], **less))
    assert found.correlations["kl"][0] == pytest.approx(1.0)
