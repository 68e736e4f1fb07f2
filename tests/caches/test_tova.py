"""TOVA through a cache: what stays after a prompt is what the model's own attention weights say (arXiv:2401.06104)."""

import pytest
import torch

from kvcompress import EvictingCache
from kvcompress.policies.tova import TOVA
from tests.contract.drive import feed
from tests.contract.models import build, prompt

BUDGET, TOKENS = 9, 40


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_all_heads_keep_what_the_last_query_attends_to_averaged_over_the_layers_heads(family):
    model, ids = build(family), prompt(TOKENS, batch=2)
    cache = EvictingCache(model, policy=TOVA(), budget=BUDGET)
    feed(model, cache, ids)

    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    for layer, attention in zip(cache.layers, weights, strict=True):
        # [batch, tokens]; the newest token always stays
        wanted = attention[:, :, -1].mean(1)
        wanted[:, -1] = 2.0
        kept = wanted.topk(BUDGET).indices.sort(-1).values
        held = layer.slots.positions.sort(-1).values[..., 1:]
        assert torch.equal(held, kept[:, None].expand_as(held).to(held.dtype))
