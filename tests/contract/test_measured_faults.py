"""Faults that were measured in other libraries, each kept out by a test of its name.

They were found in caches that mutate transformers' DynamicCache, and in transformers' own quantized cache.
"""

import pytest
import torch

from tests.contract.caches import all_those, every_cache, those
from tests.contract.drive import feed, generate, recorded, tokens_kept
from tests.contract.models import DEVICE, build, left_padded, prompt, tiny
from tests.contract.oracle import assert_equals_oracle, recording


@every_cache
def test_a_left_padded_row_is_not_off_by_seven_logits(entry):
    """Half of 40 tokens kept, 13 of them padding: the padded row was off by 7.2, 8.8, 9.7, 7.8 and 11.8."""
    model = tiny("llama", initializer_range=0.6, dtype=entry.dtype)
    rows = [prompt(40)[0], prompt(27, seed=2)[0]]
    ids, mask = left_padded(rows)
    cache, alone = entry.build(model), entry.build(model)
    feed(model, cache, ids, mask)
    feed(model, alone, rows[1][None])
    for step in range(5):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        token = prompt(1, 2, seed=10 + step)
        together, by_itself = feed(model, cache, token, mask)[1], feed(model, alone, token[1:])[0]
        assert (together - by_itself).abs().max() < 1e-2, f"step {step}"


@every_cache
def test_a_second_turn_feeds_six_tokens_and_not_twenty_six(entry):
    """get_seq_length told the kept length, and generate fed the difference again."""
    model = tiny()
    fed = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    cache = entry.build(model)
    first = generate(model, cache, prompt(40), max_new_tokens=5)
    assert cache.get_seq_length() == 44
    assert cache.get_mask_sizes(1, 0) == (45, 0)
    fed.clear()
    generate(model, cache, torch.cat([first, prompt(5, seed=3)], 1), max_new_tokens=3)
    hook.remove()
    assert fed == [6, 1, 1]


# README: `allocation="pyramid"` gives early layers more
@those(lambda entry: entry.name == "h2o_pyramid")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_of_different_length_do_not_crash(entry, attention):
    """One mask a layer type: sdpa crashed with more than one query, eager always."""
    model = build("llama", attention=attention)
    cache = entry.build(model)
    with recording(model, cache, entry.kept) as transcript:
        for chunk in prompt(40, 2).split([20, 1, 7, 1, 11], 1):
            feed(model, cache, chunk)
    assert [kept.max().item() for kept in tokens_kept(cache)] == [14, 8, 2]
    assert_equals_oracle(model, transcript)


# README: per sequence, layer and KV head; tokens keep their true positions
@every_cache
def test_heads_may_keep_different_tokens(entry):
    """Masks with one row for all heads cannot say so."""
    model = tiny()
    _, cache, transcript = recorded(entry, model, prompt(40, 2))
    assert_equals_oracle(model, transcript)
    if entry.name in ("h2o", "snapkv", "keydiff", "knorm"):
        assert any((kept[:, 0] != kept[:, 1]).any() for kept in entry.kept(cache))


@every_cache
def test_crop_works_or_says_that_it_does_not(entry):
    """transformers' fp8 cache says is_croppable and then raises IndexError, which breaks prompt lookup."""
    model = tiny()
    cache = entry.build(model)
    feed(model, cache, prompt(20, 2))
    assert cache.is_croppable == entry.croppable
    if entry.croppable:
        cache.crop(-5)
        assert cache.get_seq_length() == 15
        assert all(layer.get_seq_length() == 15 for layer in cache.layers)
    else:
        with pytest.raises(ValueError, match="DenseCache"):
            cache.crop(-5)
        assert all(layer.get_seq_length() == 20 for layer in cache.layers)


@every_cache
def test_repeating_the_batch_repeats_everything_stored(entry):
    """A quantized store stayed at batch 1, and nothing said so."""
    model = tiny()
    cache = entry.build(model)
    feed(model, cache, *left_padded([prompt(20)[0][:13]], 20))
    cache.batch_repeat_interleave(2)
    for layer in cache.layers:
        for segment in layer.segments():
            for name, tensor in segment.tensors().items():
                flat = name.split(".")[0] in ("keys", "values", "log_weights", "order")
                if entry.competes and flat and not name.endswith((".centre", ".spread")):
                    # all heads of all sequences, one after another
                    continue
                assert tensor.shape[0] == (1 if entry.shares and name.startswith("prefix_") else 2), name
    assert cache.batch_size == 2
    mask = torch.ones(2, 21, dtype=torch.long, device=DEVICE)
    mask[:, :7] = 0
    logits = feed(model, cache, prompt(1).expand(2, 1), mask)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


@all_those(lambda entry: entry.budget)
def test_scores_of_half_precision_do_not_saturate(entry):
    """A running sum in 16 bit stops growing at 2048."""
    model = tiny("llama", dtype=torch.float16)
    cache = entry.build(model)
    feed(model, cache, prompt(20))
    for layer in cache.layers:
        (segment,) = layer.segments()
        assert segment.tensors()["scores"].dtype == torch.float32
        segment.scores.fill_(4096.0)
    feed(model, cache, prompt(1, seed=2))
    if entry.name in ("h2o", "h2o_fraction", "h2o_pyramid", "h2o_packed", "h2o_rolled"):
        for layer in cache.layers:
            held = layer.slots.positions >= 0
            # all but the new token's began at 4096, and the heads of a group share out one each
            grown = (layer.slots.scores - 4096.0)[held]
            assert (grown[grown > -2048] > 0).any()


# README: Eviction frees memory
@those(lambda entry: entry.budget)
def test_what_is_evicted_is_freed_and_not_masked(entry):
    """Half of a leaderboard keeps every key and masks it."""
    model = tiny()
    short, long = entry.build(model), entry.build(model)
    feed(model, short, prompt(50))
    feed(model, long, prompt(400))
    if entry.name == "h2o_fraction":
        assert long.memory().ratio < 0.8
    elif entry.competes:
        # positions and scores are as wide as the longest head
        assert abs(long.memory().total_bytes - short.memory().total_bytes) < 0.2 * short.memory().total_bytes
    else:
        assert long.memory().total_bytes == short.memory().total_bytes


@every_cache
def test_kv_heads_are_not_stored_once_a_query_head(entry):
    """A cache that is filled after repeat_kv is four times as large on Llama 3."""
    model = tiny("llama", num_attention_heads=4, num_key_value_heads=1)
    cache = entry.build(model)
    feed(model, cache, prompt(20))
    for layer in cache.layers:
        tensors = layer.segments()[0].tensors().items()
        keys = next(tensor for name, tensor in tensors if name.startswith("keys"))
        assert len(keys) <= 21 if entry.competes else keys.shape[1] == 1
