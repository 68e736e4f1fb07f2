"""JetMoE: query heads are those of the experts of a token, and all KV heads are given to each expert, after the cache
has taken them once."""

import pytest
import torch

from kvcompress import (
    DenseCache,
    GEARCache,
    H2OCache,
    HydragenCache,
    KVzipCache,
    ShadowKVCache,
    SnapKVCache,
    release,
)
from kvcompress.check.check import check
from kvcompress.check.models import small_model
from kvcompress.hf.judge import judge_of
from tests.contract.caches import LARGE
from tests.contract.drive import feed, full, generate
from tests.contract.models import left_padded, prompt
from tests.swiftkv.test_model import CLOSE

ROOMY = {
    "dense": DenseCache,
    "hydragen": HydragenCache,
    "h2o": lambda model: H2OCache(model, budget=LARGE),
    "snapkv_heads": lambda model: SnapKVCache(model, budget=LARGE, window=3, allocation="heads"),
    "kvzip": lambda model: KVzipCache(model, budget=LARGE),
    "gear": lambda model: GEARCache(model, buffer=256, tail_bits=None),
    "shadowkv": lambda model: ShadowKVCache(model, budget=LARGE),
}


@pytest.fixture(scope="module")
def jetmoe():
    model = small_model("jetmoe")
    yield model
    release(model)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("name", ROOMY)
def test_it_generates_what_it_does_with_transformers_cache(name, settings, jetmoe):
    ids, mask = left_padded([prompt(30, seed=5)[0], prompt(17, seed=6)[0]])
    wanted = full(jetmoe, ids, mask, **settings)
    assert torch.equal(generate(jetmoe, ROOMY[name](jetmoe), ids, mask, **settings), wanted)


def test_attention_counts_for_the_kv_head_that_received_it(jetmoe):
    """Of the steps after a prompt too; a query head h attends to KV head h modulo their number."""
    ids = prompt(31)
    with torch.no_grad():
        weights = judge_of(jetmoe)(ids, use_cache=False, output_attentions=True).attentions
    cache = H2OCache(jetmoe, budget=LARGE)
    feed(jetmoe, cache, ids[:, :30])
    feed(jetmoe, cache, ids[:, 30:])
    kv_heads = cache.layers[0].kv_shape[1]
    assert kv_heads == 2
    for layer, of_layer in zip(cache.layers, weights, strict=True):
        assert of_layer.shape[1] == 4
        slots = layer.slots
        sums = of_layer[0].unflatten(0, (-1, kv_heads)).sum((0, 2))
        held = slots.positions[0] >= 0
        at = slots.positions[0].clamp(min=0).long()
        torch.testing.assert_close(slots.scores[0][held], sums.gather(1, at)[held], **CLOSE)


@pytest.mark.parametrize("method", ["h2o", "snapkv", "gear"])
def test_what_is_kept_is_what_later_queries_see(method, jetmoe):
    for row in check(jetmoe, [method]):
        assert row.outcome == "OK", row.reason


def test_a_compiled_model_runs_it_uncompiled(jetmoe):
    cache = DenseCache(jetmoe)
    feed(jetmoe, cache, prompt(20))
    assert not cache.is_traceable(1)
