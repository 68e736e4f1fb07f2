"""Every policy in a cache: a row of a padded batch keeps what it would keep alone, wherever its padding stands."""

from dataclasses import dataclass

import pytest
import torch

from kvcompress import EvictingCache
from kvcompress.hf import cache_argument
from kvcompress.policies.expected_attention import ExpectedAttention
from kvcompress.policies.h2o import H2O
from kvcompress.policies.policy import Policy
from kvcompress.policies.snapkv import SnapKV
from kvcompress.policies.tova import TOVA
from tests.contract.caches import POLICIES
from tests.contract.drive import feed
from tests.contract.models import PAD, places, prompt, tiny

# one that reads twice has a test of its own
SINGLE = [policy for policy in POLICIES.values() if policy.rereads is None]
SINGLE += [H2O(sinks=1), SnapKV(window=3, recent=2, pooling="max"), ExpectedAttention(sinks=2, future=16)]
# what each row is fed by each forward: tokens, and pads before (negative) or behind them
FORWARDS = [
    ((9, -12), (21, 0), (15, -6)),
    ((1, 0), (1, 0), (1, 0)),
    ((6, 0), (2, 4), (3, -3)),
    ((1, 0), (0, 1), (1, 0)),
    ((1, 0), (0, 1), (0, 1)),
    ((1, 0), (1, 0), (1, 0)),
    ((2, 3), (5, 0), (0, 5)),
    ((3, 0), (1, 2), (1, -2)),
    ((1, 0), (1, 0), (1, 0)),
    ((1, 0), (1, 0), (1, 0)),
]


def kept(cache, row):
    """Positions held in a row, by layer and KV head."""
    return [
        [sorted(place for place in head.tolist() if place >= 0) for head in layer.slots.positions[row]]
        for layer in cache.layers
    ]


@pytest.mark.parametrize("rolled", [False, True], ids=["", "rolled"])
@pytest.mark.parametrize("policy", SINGLE, ids=lambda policy: type(policy).__name__)
@torch.no_grad()
def test_a_row_of_a_padded_batch_is_treated_as_if_alone(policy, rolled):
    model = tiny("llama")
    text = prompt(60, batch=3)
    together = EvictingCache(model, policy=policy, budget=8, rerotated=rolled)
    alone = [EvictingCache(model, policy=policy, budget=8, rerotated=rolled) for _ in range(3)]
    mask, fed = torch.zeros(3, 0, dtype=torch.long), [0, 0, 0]
    for number, forward in enumerate(FORWARDS):
        width = forward[0][0] + abs(forward[0][1])
        ids, shown = torch.full((3, width), PAD), torch.zeros(3, width, dtype=torch.long)
        for row, (tokens, pads) in enumerate(forward):
            first = max(0, -pads)
            ids[row, first : first + tokens] = text[row, fed[row] : fed[row] + tokens]
            shown[row, first : first + tokens] = 1
        mask = torch.cat([mask, shown], 1)
        logits = model(
            ids, attention_mask=mask, position_ids=places(mask)[:, -width:], **cache_argument(model, together)
        ).logits
        for row, (tokens, _) in enumerate(forward):
            if tokens:
                own = model(
                    text[row : row + 1, fed[row] : fed[row] + tokens], **cache_argument(model, alone[row])
                ).logits
                torch.testing.assert_close(logits[row, shown[row].bool()], own[0], atol=5e-5, rtol=1e-4)
            fed[row] += tokens
            assert kept(together, row) == kept(alone[row], 0), f"row {row} after forward {number}"


@torch.no_grad()
def test_all_heads_of_a_layer_keep_the_same_tokens_by_tova():
    model = tiny("llama")
    cache = EvictingCache(model, policy=TOVA(), budget=8)
    for size in (15, 1, 1, 4, 1):
        model(prompt(size, batch=2, seed=size), **cache_argument(model, cache))
        for layer in cache.layers:
            assert torch.equal(layer.slots.positions[:, 0], layer.slots.positions[:, 1])


@dataclass(frozen=True, kw_only=True)
class Indifferent(Policy):
    """Every token is worth the same."""

    def score(self, candidates):
        return torch.zeros_like(candidates.scores)


def test_of_equal_scores_the_later_token_stays_whichever_slot_it_has():
    model = tiny()
    cache = EvictingCache(model, policy=Indifferent(recent=1), budget=7)
    feed(model, cache, prompt(20))
    for step in range(4):
        # one at a time they take the slots of those that went
        feed(model, cache, prompt(1, seed=step))
    assert any(not slots.positions.diff().gt(0).all() for slots in (layer.slots for layer in cache.layers))
    feed(model, cache, prompt(3))
    for layer in cache.layers:
        kept = layer.slots.positions.sort(-1).values[..., -7:]
        assert torch.equal(kept, torch.arange(20, 27, device=kept.device, dtype=kept.dtype).expand_as(kept))
