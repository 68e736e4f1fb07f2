"""Biases by distance (Inkling): each query makes its own, and those of tokens that stay are of their own distances."""

import copy
import functools
import math

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache

from kvcompress import (
    DenseCache,
    EvictingCache,
    ExpectedAttention,
    GEARCache,
    H2OCache,
    KVzipCache,
    ShadowKVCache,
    SnapKVCache,
    release,
)
from kvcompress.check.check import check
from kvcompress.check.typical import TYPICAL
from kvcompress.hf import cache_argument
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.policies.gear import GEAR
from kvcompress.storage.distances import attend_by_distance, sums_by_distance
from tests.contract.drive import feed, full, generate
from tests.contract.models import left_padded, prompt

every_type = pytest.mark.parametrize("kind", ["inkling_text", "inkling2_text"])
# nothing is packed yet
WAITS = {"bits": 4, "buffer": 128, "tail_bits": None}
CACHES = {
    "dense": DenseCache,
    "h2o": lambda model: H2OCache(model, budget=400),
    "heads": lambda model: H2OCache(model, budget=400, allocation="heads"),
    "snapkv": lambda model: SnapKVCache(model, budget=400, window=3, kernel=3),
    "gear": lambda model: GEARCache(model, **WAITS),
}


@functools.cache
def made(kind):
    """A tiny model, shared by the tests, whose windows, biases and scaling by log end within 60 tokens."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    sizes = {"sliding_window_size": 12, "rel_extent": 20, "log_scaling_n_floor": 16, "log_scaling_alpha": 0.5}
    config = AutoConfig.for_model(kind, **TYPICAL[kind] | sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 4.0 if name.endswith(".proj") else 1.2
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * scale / parameter.shape[-1] ** 0.5)
    model.generation_config.eos_token_id = None
    return model


def padded():
    """Three rows, of which one begins later, and one has padding between its turns: ids and mask."""
    ids, mask = prompt(64, batch=3, seed=4), torch.ones(3, 64, dtype=torch.long)
    mask[1, :11] = 0
    mask[2, :3] = mask[2, 42:49] = 0
    return ids, mask


PIECES = (40, 41, 42, 55, 56, 64)


def turns(model, cache, first=0, stop=None):
    """Logits of a prompt, two tokens, a second turn and so on, of what is no padding."""
    ids, mask = padded()
    found, start = [], 0
    for end in PIECES:
        shown = mask[:, :end]
        if first <= start and (stop is None or end <= stop):
            at = (shown.cumsum(-1) - 1).clamp(min=0)[:, start:]
            found.append(feed(model, cache, ids[:, start:end], shown, at)[shown[:, start:].bool()])
        start = end
    return torch.cat(found)


@functools.cache
def wanted_of(kind):
    return turns(made(kind), DynamicCache(config=made(kind).config))


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)


@every_type
def test_biases_decide_what_is_said_here(kind):
    model = copy.deepcopy(made(kind))
    wanted = model(prompt(60), use_cache=False).logits
    for name, parameter in model.named_parameters():
        if name.endswith(".proj"):
            parameter.data.zero_()
    assert float((model(prompt(60), use_cache=False).logits - wanted).abs().max()) > 0.1 * float(wanted.abs().max())


@pytest.mark.parametrize("name", CACHES)
@every_type
def test_with_room_for_all_turns_equal_those_of_transformers_cache(kind, name):
    """Also of rows with padding between their turns, which such models count among distances."""
    model = made(kind)
    close(turns(model, CACHES[name](model)), wanted_of(kind))


@pytest.mark.parametrize("name", ["dense", "h2o"])
def test_layers_that_run_several_times_fill_layers_of_their_own(name):
    """Two layers of six run three times; the last of these is filled before the fifth."""
    model = made("inkling2_loop_text")
    cache = CACHES[name](model)
    close(turns(model, cache), wanted_of("inkling2_loop_text"))
    assert cache.attending == [0, 1, 2, 3, 6, 7, 8, 9, 4, 5]
    assert len(cache.layers) == len(cache.memory().tokens_kept) == 10


@pytest.mark.parametrize("name", ["dense", "h2o", "gear"])
@every_type
def test_generation_of_beams_and_what_comes_of_a_file(kind, name, tmp_path):
    model = made(kind)
    ids, mask = left_padded([prompt(30, seed=5)[0], prompt(17, seed=6)[0]])
    wanted = full(model, ids, mask, max_new_tokens=6, num_beams=2)
    assert torch.equal(generate(model, CACHES[name](model), ids, mask, max_new_tokens=6, num_beams=2), wanted)
    cache = CACHES[name](model)
    turns(model, cache, stop=42)
    cache.save(tmp_path / "cache")
    wanted = turns(model, cache.clone(), first=42)
    close(turns(model, type(cache).load(tmp_path / "cache", model), first=42), wanted)


def test_what_stays_is_attended_to_at_its_own_distance():
    """The oracle is masked full attention, which biases and sinks of every query are part of."""
    model = made("inkling2_text")
    rows = check(model, ("h2o:allocation=heads",))
    assert [(row.cache, row.outcome, row.reason) for row in rows if row.outcome != "OK"] == []


def test_packed_slots_lose_little():
    """A step's own token takes part unpacked, the others as codes say."""
    model = made("inkling_text")
    wanted = turns(model, DenseCache(model))
    cache = EvictingCache(model, policy=H2OCache(model, budget=400).policy, budget=400, packed=GEAR(bits=8))
    lost = (turns(model, cache) - wanted).abs()[-20:].max(-1).values / wanted.abs().max()
    assert 0 < float(lost.median()) < 0.02


@every_type
def test_heavy_hitters_are_those_that_attention_with_biases_hits(kind):
    """Scores of a prompt, a step and a second turn, against attention's weights in one forward."""
    model, ids = copy.deepcopy(made(kind)), prompt(50, seed=3)
    cache = H2OCache(model, budget=400)
    for piece in (ids[:, :30], ids[:, 30:31], ids[:, 31:]):
        feed(model, cache, piece)
    release(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, use_cache=False, output_attentions=True).attentions
    for layer, weights in zip(cache.layers, attentions, strict=True):
        slots = layer.slots
        of_heads = weights.unflatten(1, (slots.positions.shape[1], -1)).sum((2, 3))
        held = slots.positions >= 0
        assert held.sum() > 0
        received = of_heads.gather(2, slots.positions.clamp(min=0).long())
        torch.testing.assert_close(slots.scores[held], received[held], atol=1e-4, rtol=1e-3)


def test_column_sums_have_biases_in_them():
    """Against a matrix of all logits, in several blocks of queries, with slots in no order and empty ones."""
    torch.manual_seed(0)
    batch, kv_heads, group, queries, tokens, extent, window = 2, 2, 2, 300, 700, 40, 90
    spec = LogitSpec(0.3, window)
    query = torch.randn(batch, kv_heads * group, queries, 8)
    key, value = torch.randn(batch, kv_heads, tokens, 8), torch.randn(batch, kv_heads, tokens, 5)
    biases = 2 * torch.randn(batch, kv_heads * group, queries, extent)
    columns = torch.stack([torch.randperm(tokens) for _ in range(batch * kv_heads)]).view(batch, kv_heads, -1).int()
    columns[0, 1, :50] = -1
    own = torch.arange(tokens - queries, tokens, dtype=torch.int32)[None]
    distance = (own[:, None, :, None] - columns[:, :, None]).repeat_interleave(group, 1).long()
    logits = query @ key.repeat_interleave(group, 1).mT * spec.scale
    far = torch.zeros(()).expand_as(logits)
    logits = logits + torch.where(distance < extent, biases.gather(-1, distance.clamp(0, extent - 1)), far)
    seen = (distance >= 0) & (distance < window) & (columns >= 0).repeat_interleave(group, 1)[:, :, None]
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
    out, lse = attend_by_distance(query, key, value, columns, own, spec, biases)
    torch.testing.assert_close(out, weights @ value.repeat_interleave(group, 1))
    sums = sums_by_distance(query, key, columns, own, lse, spec, biases)
    torch.testing.assert_close(sums, weights.unflatten(1, (kv_heads, group)).sum((2, 3)))


@every_type
def test_other_caches_get_a_bias_for_each_key_as_before(kind):
    model = copy.deepcopy(made(kind))
    with torch.no_grad():
        wanted = model(prompt(50), use_cache=False).logits
        DenseCache(model)
        close(model(prompt(50), use_cache=False).logits, wanted)
        close(turns(model, DynamicCache(config=model.config)), turns(model, DenseCache(model)))
        release(model)
        assert not any(module._forward_pre_hooks for module in model.modules())
        close(model(prompt(50), use_cache=False).logits, wanted)


REFUSED = {
    "ShadowKVCache does not serve": ShadowKVCache,
    "KVzip, which reads tokens twice": lambda model: KVzipCache(model, budget=8),
    "ExpectedAttention, which undoes": lambda model: EvictingCache(model, policy=ExpectedAttention(), budget=40),
    "rerotated, which closes gaps": lambda model: H2OCache(model, budget=8, rerotated=True),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_knows_nothing_of_biases_is_refused(why):
    with pytest.raises(ValueError, match=why):
        REFUSED[why](made("inkling_text"))


def test_a_layer_alone_gets_no_biases_by_distance():
    model = made("inkling_text")
    cache, layer = DenseCache(model), model.model.layers[0].self_attn
    with torch.no_grad(), pytest.raises(RuntimeError, match="attends outside of a forward of its model"):
        layer(torch.randn(1, 5, 64), None, **cache_argument(layer, cache))


@pytest.mark.parametrize("name", CACHES)
def test_generate_compiles_no_steps(name):
    """On a GPU it would, where a cache says that it can be compiled for."""
    model = made("inkling_text")
    ids = prompt(30, seed=5)
    cache = CACHES[name](model)
    assert not cache.is_compileable
    generate(model, cache, ids)
    cache.reserve(2)
    assert not cache.is_compileable
