"""Random: a uniform sample without replacement, that nothing but place and seed decides."""

import pytest
import torch

from kvcompress import EvictingCache, Random
from tests.contract.drive import feed
from tests.contract.models import prompt, tiny
from tests.policies.scene import scene


def scores(policy, tokens):
    made = scene(policy, 1).candidates
    made.positions = torch.arange(tokens, dtype=torch.int32).expand(2, 2, -1)
    return policy.score(made)


# README: | `EvictingCache(policy=Random())` | a random sample of all tokens |
@pytest.mark.parametrize("seed", [0, 1, -5, 2**40])
def test_every_place_is_kept_as_often_as_any_other(seed):
    tokens, budget = 50_000, 0.2
    (row,) = scores(Random(seed=seed), tokens)[0, :1]
    kept = (row >= row.quantile(1 - budget)).float()
    # 100 stretches of 500 tokens, of which 100 +- 9 would be kept by chance; and pairs of neighbours as often as any
    assert (kept.view(100, -1).sum(1) - 100).abs().max() < 40
    assert abs(float((kept[1:] * kept[:-1]).mean()) - budget**2) < 0.01
    assert len(row.unique()) > 0.99 * tokens


def test_different_seeds_choose_differently_and_one_seed_alike():
    one, other = scores(Random(), 1000)[0, 0], scores(Random(seed=1), 1000)[0, 0]
    assert torch.equal(one, scores(Random(seed=0), 1000)[1, 1])
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.1


# README: | nothing: the sanity baseline |
@pytest.mark.parametrize("pieces", [[60], [20] + [1] * 40, [31, 1, 28]])
def test_it_keeps_the_same_tokens_however_they_come(pieces):
    model = tiny()
    cache = EvictingCache(model, policy=Random(seed=3), budget=16)
    for piece in prompt(60, batch=2).split(pieces, 1):
        feed(model, cache, piece)
    order = scores(Random(seed=3), 60)[0, 0]
    expected = [*order[:-1].topk(15).indices.sort().values.tolist(), 59]
    for layer in cache.layers:
        for head in layer.slots.positions.flatten(0, 1).tolist():
            assert sorted(place for place in head if place >= 0) == expected
