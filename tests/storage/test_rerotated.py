"""Rolled positions: kept tokens stand at their index among those kept."""

import sys

import pytest
import torch

from kvcompress import EvictingCache, H2OCache, StreamingLLMCache
from kvcompress.caches.evicting_layer import RerotatedLayer
from kvcompress.hf import cache_argument
from kvcompress.policies.expected_attention import ExpectedAttention
from kvcompress.policies.h2o import H2O
from kvcompress.policies.keydiff import KeyDiff
from kvcompress.policies.snapkv import SnapKV
from tests.contract.models import build, left_padded, places, prompt, tiny
from tests.replay import record


@torch.no_grad()
def feed_all(model, cache, ids, pieces, shift=0, mask=None):
    """Logits of the ids, fed in pieces at position ids moved by a constant."""
    position_ids = (torch.arange(ids.shape[1])[None] if mask is None else places(mask)) + shift
    logits, start = [], 0
    for size in pieces:
        stop = start + size
        seen = None if mask is None else mask[:, :stop]
        at = position_ids[:, start:stop].expand(ids.shape[0], -1)
        logits.append(
            model(ids[:, start:stop], attention_mask=seen, position_ids=at, **cache_argument(model, cache)).logits
        )
        start = stop
    assert start == ids.shape[1]
    return torch.cat(logits, 1)


PIECES = [14, *[1] * 10, 5, *[1] * 7]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "gemma3"])
def test_while_nothing_is_evicted_it_changes_nothing(family):
    model, ids = tiny(family), prompt(36, batch=2)
    plain = feed_all(model, H2OCache(model, budget=64), ids, PIECES)
    rolled = feed_all(model, H2OCache(model, budget=64, rerotated=True), ids, PIECES)
    torch.testing.assert_close(rolled, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", [H2O(), SnapKV(window=3, recent=3), KeyDiff(), ExpectedAttention(sinks=2, future=9)])
def test_moving_all_positions_by_a_constant_changes_nothing(policy):
    model, ids = tiny("llama"), prompt(36, batch=2)
    here, there = (
        feed_all(model, EvictingCache(model, policy=policy, budget=10, rerotated=True), ids, PIECES, shift)
        for shift in (0, 100)
    )
    torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)


def test_moving_the_positions_in_store_changes_nothing():
    model, ids = tiny("llama"), prompt(36, batch=2)
    cache = H2OCache(model, budget=10, rerotated=True)
    feed_all(model, cache, ids, PIECES)
    moved = cache.clone()
    for layer in moved.layers:
        layer.slots.positions[layer.slots.positions >= 0] += 1000
        layer.lengths += 1000
    # as if the model had fed them there
    moved.padding.shift = moved.padding.last_position = None
    more = prompt(5, batch=2, seed=3)
    expected = feed_all(model, cache, more, [3, 1, 1], shift=36)
    torch.testing.assert_close(feed_all(model, moved, more, [3, 1, 1], shift=1036), expected, atol=1e-4, rtol=1e-4)


# README: `rerotated=True` re-rotates kept keys to their place in the cache
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_keys_stand_at_their_index_and_queries_behind_them(family):
    # against keys and queries before rotation, rotated by the model's own function
    model, ids = tiny(family), prompt(36)
    heads, kv_heads = 4, 4 if family == "gpt_neox" else 2
    cache = H2OCache(model, budget=10, rerotated=True)
    steps = record(cache)
    seen, handles = [], []
    for layer in model.base_model.layers:
        attention = getattr(layer, "self_attn", None) or layer.attention
        raw = {"query": [], "key": []}
        seen.append(raw)
        for name in ("qkv_proj", "query_key_value", "q_proj", "k_proj"):
            if not hasattr(attention, name):
                continue

            def keep(module, args, output, name=name, raw=raw):
                if name == "query_key_value":
                    query, key, _ = output.unflatten(-1, (heads, 3, -1)).unbind(-2)
                elif name == "qkv_proj":
                    query, key, _ = output.unflatten(-1, (heads + 2 * kv_heads, -1)).split(
                        [heads, kv_heads, kv_heads], 2
                    )
                else:
                    query = key = output.unflatten(-1, (heads if name == "q_proj" else kv_heads, -1))
                if name != "k_proj":
                    raw["query"].append(query[0].transpose(0, 1))
                if name != "q_proj":
                    raw["key"].append(key[0].transpose(0, 1))

            handles.append(getattr(attention, name).register_forward_hook(keep))
    feed_all(model, cache, ids, PIECES)
    for handle in handles:
        handle.remove()

    apply = sys.modules[type(model).__module__].apply_rotary_pos_emb
    for raw, layer_steps in zip(seen, steps, strict=True):
        keys = torch.cat(raw["key"], 1)
        values = torch.cat([step.value[0] for step in layer_steps], 1)
        fed, held = 0, [[] for _ in range(kv_heads)]
        for query, step in zip(raw["query"], layer_steps, strict=True):
            tokens = query.shape[1]
            for head in range(heads):
                kept = held[head // (heads // kv_heads)]
                everyone = kept + list(range(fed, fed + tokens))
                index = torch.arange(len(everyone))[None]
                cos, sin = model.base_model.rotary_emb(keys, index)
                own = keys[head // (heads // kv_heads), everyone][None, None]
                padded = torch.zeros_like(own)
                padded[0, 0, len(kept) :] = query[head]
                turned_query, turned_key = apply(padded, own, cos, sin)
                logits = turned_query[0, 0, len(kept) :] @ turned_key[0, 0].mT * own.shape[-1] ** -0.5
                later = index[0][None] > (len(kept) + torch.arange(tokens))[:, None]
                out = logits.masked_fill(later, -torch.inf).softmax(-1) @ values[head // (heads // kv_heads), everyone]
                torch.testing.assert_close(step.out[0, head], out, atol=2e-5, rtol=1e-4)
            fed += tokens
            held = [sorted(p for p in row.tolist() if p >= 0) for row in step.positions[0]]


# README: for streaming past the trained context
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_far_past_the_trained_length_it_sees_what_a_short_text_would_show(family):
    # with one layer, what a step says follows from the tokens kept alone: here 2 sinks and the 13 before the newest
    model = build(family, num_hidden_layers=1, max_position_embeddings=32)
    ids = prompt(400)
    cache = StreamingLLMCache(model, budget=16, sinks=2, rerotated=True)
    long = feed_all(model, cache, ids, [16] * 20 + [1] * 80)
    for end in (340, 371, 400):
        # a step attends to a whole budget and to its own token
        short = torch.cat([ids[:, :2], ids[:, end - 15 : end]], 1)
        expected = feed_all(model, EvictingCache(model, policy=H2O(), budget=64), short, [short.shape[1]])
        torch.testing.assert_close(long[:, end - 1], expected[:, -1], atol=5e-5, rtol=1e-4)
    assert cache.get_seq_length() == 400
    assert cache.memory().tokens_kept[0].tolist() == [[16] * cache.layers[0].kv_shape[1]]


def test_a_row_of_a_padded_batch_is_treated_as_if_alone():
    model = tiny("llama")
    rows = [prompt(length, seed=length)[0] for length in (8, 21)]
    ids, mask = left_padded(rows)
    more = prompt(12, batch=2, seed=9)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    pieces = [*[1] * 6, 4, 1, 1]
    together = feed_all(model, H2OCache(model, budget=10, rerotated=True), ids, [21, *pieces], mask=mask)
    for index, row in enumerate(rows):
        own = torch.cat([row, more[index]])[None]
        alone = feed_all(model, H2OCache(model, budget=10, rerotated=True), own, [len(row), *pieces])
        torch.testing.assert_close(together[index, 21 - len(row) :], alone[0], atol=5e-5, rtol=1e-4)


def test_a_saved_cache_goes_on_where_it_was(tmp_path):
    model, ids = tiny("llama"), prompt(36, batch=2)
    cache = H2OCache(model, budget=10, rerotated=True)
    feed_all(model, cache, ids, PIECES)
    cache.save(tmp_path / "cache.safetensors")
    loaded = H2OCache.load(tmp_path / "cache.safetensors", model)
    copied = cache.clone()
    more = prompt(6, batch=2, seed=3)
    expected = feed_all(model, cache, more, [4, 1, 1], shift=36)
    for other in (loaded, copied):
        assert isinstance(other.layers[0], RerotatedLayer)
        torch.testing.assert_close(feed_all(model, other, more, [4, 1, 1], shift=36), expected)


def test_sliding_layers_keep_their_positions():
    model = tiny("gemma3")
    cache = H2OCache(model, budget=10, rerotated=True)
    expected = EvictingCache(model, policy=ExpectedAttention(sinks=1), budget=10, rerotated=True)
    for made in (cache, expected):
        assert [isinstance(layer, RerotatedLayer) for layer in made.layers] == [False, True, False]
    assert not any(isinstance(layer, RerotatedLayer) for layer in H2OCache(model, budget=10).layers)


def test_a_model_whose_positions_cannot_roll_is_refused_by_name():
    with pytest.raises(ValueError, match="rerotated closes gaps between rotary positions, and OPTForCausalLM has none"):
        H2OCache(tiny("opt"), budget=10, rerotated=True)
    dynamic = build("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match="RoPE of type 'dynamic', whose frequencies change"):
        H2OCache(dynamic, budget=10, rerotated=True)
    # and served where positions do not roll
    H2OCache(dynamic, budget=10)


def test_generate_runs_past_the_trained_length():
    model = build("llama", max_position_embeddings=32)
    cache = H2OCache(model, budget=12, rerotated=True)
    out = model.generate(
        prompt(10), **cache_argument(model, cache), max_new_tokens=60, do_sample=False, disable_compile=True
    )
    assert out.shape[1] == 70
    assert cache.get_seq_length() == 69
