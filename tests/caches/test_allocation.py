import pytest

from kvcompress.caches.budget import Budget


def layer_budgets(allocation, budget, layers, least=1):
    return [each.amount for each in Budget(budget, least).per_layer(allocation, layers)]


@pytest.mark.parametrize("budget", [40, 0.3])
def test_uniform_gives_every_layer_the_budget(budget):
    assert layer_budgets("uniform", budget, 5, least=7) == [budget] * 5


@pytest.mark.parametrize("layers", [2, 3, 30, 80])
@pytest.mark.parametrize(("budget", "least"), [(512, 1), (512, 32), (40, 32), (64, 64), (3, 1)])
def test_a_pyramid_of_counts_has_the_budget_as_its_mean_and_the_floor_as_its_least(budget, least, layers):
    budgets = layer_budgets("pyramid", budget, layers, least=least)
    assert all(isinstance(share, int) for share in budgets)
    assert abs(sum(budgets) / layers - budget) <= 0.5
    assert min(budgets) >= least
    assert budgets == sorted(budgets, reverse=True)


# README: `allocation="pyramid"` gives early layers more of the budget
def test_a_pyramid_falls_to_a_twentieth_as_in_the_paper():
    # beta = 20: the last layer gets (budget - window) / 20 besides the window, the first what makes up for it
    assert layer_budgets("pyramid", 132, 3, least=32) == [32 + 195, 32 + 100, 32 + 5]


@pytest.mark.parametrize("layers", [2, 3, 30])
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.5, 0.52, 0.8, 1.0])
def test_a_pyramid_of_fractions_has_the_budget_as_its_mean_and_gives_nobody_more_than_all(budget, layers):
    budgets = layer_budgets("pyramid", budget, layers)
    assert sum(budgets) / layers == pytest.approx(budget)
    assert max(budgets) <= 1.0
    assert min(budgets) > 0.0


def test_one_layer_gets_the_budget():
    assert layer_budgets("pyramid", 40, 1) == [40]


def test_an_unknown_allocation_is_refused():
    with pytest.raises(ValueError, match="allocation must be one of uniform, pyramid, heads, global, got 'cone'"):
        layer_budgets("cone", 40, 3)
