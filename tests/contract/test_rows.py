"""Rows move, multiply and go, tokens are taken back, and whole caches are copied and saved."""

import pytest
import torch
from safetensors.torch import save_file

from kvcompress import DenseCache, EvictingCache, H2OCache
from kvcompress.policies.tova import TOVA
from tests.contract.caches import caches, every_cache, every_variant, every_variant_with, those
from tests.contract.drive import assert_same_state, feed, generate, recorded, tokens_kept
from tests.contract.models import DEVICE, FAMILIES, families, left_padded, prompt, tiny
from tests.contract.oracle import assert_equals_oracle

ROWS = [prompt(20)[0], prompt(13, seed=2)[0], prompt(9, seed=3)[0]]
BY_MASK = torch.tensor([True, False, True], device=DEVICE)


def index(*rows):
    return torch.tensor(rows, device=DEVICE)


@every_cache
@pytest.mark.parametrize(
    ("padded", "method", "argument", "rows"),
    [
        pytest.param(True, "reorder_cache", index(2, 0, 0), [2, 0, 0], id="padded-reorder"),
        pytest.param(True, "batch_select_indices", index(2, 1), [2, 1], id="padded-select"),
        pytest.param(
            True, "batch_select_indices", BY_MASK, [0, 2], id="padded-select by mask", marks=pytest.mark.variant
        ),
        pytest.param(True, "batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2], id="padded-repeat"),
        pytest.param(False, "reorder_cache", index(2, 0, 0), [2, 0, 0], id="reorder", marks=pytest.mark.variant),
        pytest.param(False, "batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2], id="repeat", marks=pytest.mark.variant),
        # which rows are chosen, and how they are named, has nothing to do with padding
        pytest.param(False, "batch_select_indices", index(2, 1), [2, 1], id="select", marks=pytest.mark.slow),
        pytest.param(False, "batch_select_indices", BY_MASK, [0, 2], id="select by mask", marks=pytest.mark.slow),
    ],
)
def test_rows_take_all_they_have_along(entry, padded, method, argument, rows):
    """The cache then goes on as one that was fed those rows from the beginning: scores, positions and padding moved."""
    model = tiny(dtype=entry.dtype)
    ids, mask = left_padded(ROWS) if padded else (prompt(20, 3), torch.ones(3, 20, dtype=torch.long, device=DEVICE))
    moved, straight = entry.build(model), entry.build(model)
    steps = prompt(20, len(rows), seed=8)
    with entry.recording(model, moved) as transcript:
        for cache, own in ((moved, index(0, 1, 2)), (straight, index(*rows))):
            feed(model, cache, ids[own], mask[own])
            feed(model, cache, prompt(1, 3, seed=5)[own], torch.cat([mask[own], mask[own, -1:]], 1))
        getattr(moved, method)(argument)
        mask = torch.cat([mask, mask[:, -1:]], 1)[rows]
        assert moved.batch_size == len(rows)
        assert_same_state(entry, moved, straight)
        # long enough for what was kept to change altogether
        for chunk in (*steps[:, :12].split(1, 1), steps[:, 12:17], *steps[:, 17:].split(1, 1)):
            mask = torch.cat([mask, torch.ones_like(chunk)], 1)
            logits = feed(model, moved, chunk, mask)
            # what is factored, or lies in a node here and in a suffix there, is rounded in another order
            close = 3e-5 if entry.decoded is None and not entry.shares else 1e-4
            torch.testing.assert_close(logits, feed(model, straight, chunk, mask), rtol=close, atol=close)
    assert_same_state(entry, moved, straight)
    assert_equals_oracle(model, transcript)
    for kept in tokens_kept(moved):
        assert kept.shape[0] == len(rows)


@every_variant
def test_one_prompt_is_fed_once_and_answered_many_times(entry):
    model = tiny()
    ids = prompt(20)
    cache = entry.build(model)
    with entry.recording(model, cache) as transcript:
        feed(model, cache, ids)
        cache.batch_repeat_interleave(3)
        for step in range(6):
            feed(model, cache, prompt(1, 3, seed=step))
    assert_equals_oracle(model, transcript)


@those(lambda entry: entry.croppable)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gemma4", "llama4", "opt"])
@pytest.mark.parametrize("tokens", [1, 4, 11])
def test_crop_takes_tokens_back_exactly(entry, family, tokens):
    model = tiny(family)
    ids, mask = left_padded(ROWS)
    cache, straight = entry.build(model), entry.build(model)
    assert cache.is_croppable
    more = prompt(11, 3, seed=6)
    with entry.recording(model, cache) as transcript:
        feed(model, cache, ids, mask)
        feed(model, cache, more, torch.cat([mask, torch.ones_like(more)], 1))
        cache.crop(-tokens)
        assert cache.get_seq_length() == 31 - tokens
        feed(model, straight, ids, mask)
        mask = torch.cat([mask, torch.ones_like(more[:, tokens:])], 1)
        if tokens < 11:
            feed(model, straight, more[:, :-tokens], mask)
        for step in range(4):
            mask = torch.cat([mask, torch.ones_like(more[:, :1])], 1)
            token = prompt(1, 3, seed=step)
            logits = feed(model, cache, token, mask)
            # a lossy cache may have packed for the tokens that were taken back
            if entry.exact:
                torch.testing.assert_close(logits, feed(model, straight, token, mask), rtol=1e-4, atol=1e-4)
    assert_equals_oracle(model, transcript)


@those(lambda entry: entry.croppable)
def test_crop_by_a_tensor_counts_as_by_a_number(entry):
    """transformers 5.17 crops by a tensor; a count kept as one is added to in place."""
    model = tiny()
    cache, straight = entry.build(model), entry.build(model)
    for each, tokens in ((cache, torch.tensor(-5)), (straight, -5)):
        feed(model, each, prompt(40, 2))
        feed(model, each, prompt(6, 2))
        each.crop(tokens)
    for step in range(12):
        token = prompt(3, 2, seed=step)
        assert torch.equal(feed(model, cache, token), feed(model, straight, token))
    assert cache.get_seq_length() == straight.get_seq_length() == 77


@those(lambda entry: entry.croppable)
def test_crop_may_take_padding_back(entry):
    model = tiny()
    cache, straight = entry.build(model), entry.build(model)
    mask = torch.ones(2, 12, dtype=torch.long, device=DEVICE)
    mask[0, 9:] = 0
    feed(model, cache, prompt(12, 2), mask)
    cache.crop(-4)
    feed(model, straight, prompt(8, 2))
    torch.testing.assert_close(feed(model, cache, prompt(3, 2)), feed(model, straight, prompt(3, 2)))


@those(lambda entry: entry.croppable)
def test_a_cropped_cache_of_padded_rows_can_be_saved(entry, tmp_path):
    model = tiny()
    cache = entry.build(model)
    ids, mask = left_padded(ROWS)
    feed(model, cache, ids, mask)
    cache.crop(-3)
    loaded = save_and_load(entry, model, cache, tmp_path)
    token = prompt(1, 3, seed=4)
    # to rounding: where a file's tensors lie in memory decides the order in which some processors sum
    torch.testing.assert_close(
        feed(model, loaded, token, mask[:, :18]), feed(model, cache, token, mask[:, :18]), rtol=1e-5, atol=1e-5
    )


@every_cache
def test_crop_of_nothing_changes_nothing(entry):
    model = tiny()
    cache, straight = entry.build(model), entry.build(model)
    cache.crop(0)
    for each in (cache, straight):
        feed(model, each, prompt(20, 2))
    cache.crop(0)
    assert torch.equal(feed(model, cache, prompt(1, 2)), feed(model, straight, prompt(1, 2)))


# README: Eviction is final: evicting caches refuse `crop`
@those(lambda entry: not entry.croppable)
def test_crop_is_refused_and_nothing_is_half_changed(entry):
    model = tiny()
    cache, straight = entry.build(model), entry.build(model)
    assert not cache.is_croppable
    for each in (cache, straight):
        feed(model, each, prompt(20, 2))
    with pytest.raises(ValueError, match=r"cannot take back 3 tokens.*DenseCache"):
        cache.crop(-3)
    assert_same_state(entry, cache, straight)
    for step in range(12):
        token = prompt(1, 2, seed=step)
        assert torch.equal(feed(model, cache, token), feed(model, straight, token))


@every_cache
def test_a_reset_cache_is_a_new_one(entry):
    model = tiny()
    cache = entry.build(model)
    generate(model, cache, *left_padded(ROWS))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory().total_bytes == 0
    # another batch, another length, no padding
    ids, fresh, _ = recorded(entry, model, prompt(25, 2))
    assert torch.equal(generate(model, cache, prompt(25, 2)), ids)
    assert_same_state(entry, cache, fresh)


@caches("dense", "h2o")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reset_cache_is_a_new_one_in_every_family(entry, family):
    model = tiny(family)
    cache = entry.build(model)
    wanted = generate(model, cache, *left_padded(ROWS), max_new_tokens=4)
    cache.reset()
    assert torch.equal(generate(model, cache, *left_padded(ROWS), max_new_tokens=4), wanted)


# copies


def fork(entry, model, cache, path):
    return {"clone": cache.clone, "file": lambda: save_and_load(entry, model, cache, path)}


def save_and_load(entry, model, cache, path):
    cache.save(path / "cache.safetensors")
    return type(cache).load(path / "cache.safetensors", model)


# docs: `cache.save(path)` writes it to disk, and `H2OCache.load(path, model)` reads it back
# of what a file holds, a clone is made too
@every_variant_with("way", "file", "clone")
@families("llama", slow=("gemma2", "gemma4", "gpt_oss"))
def test_a_copy_goes_on_as_the_original_and_apart_from_it(entry, way, family, tmp_path):
    model = tiny(family)
    ids, mask = left_padded(ROWS)
    cache = entry.build(model)
    ids = generate(model, cache, ids, mask, max_new_tokens=6)
    mask = torch.cat([mask, torch.ones_like(ids[:, 20:-1])], 1)
    copy = fork(entry, model, cache, tmp_path)[way]()
    assert type(copy) is type(cache)
    if model.device.type == "cuda":
        # generate took room for compiled steps, which a copy may lack
        assert copy.memory().total_bytes <= cache.memory().total_bytes
    else:
        assert copy.memory().total_bytes == cache.memory().total_bytes
        assert copy.memory().by_component == cache.memory().by_component
    assert_same_state(entry, copy, cache)

    def go_on(each, seed):
        so_far, logits = mask, []
        for chunk in prompt(16, 3, seed=seed).split([1, 4, 1, 1, 9], 1):
            so_far = torch.cat([so_far, torch.ones_like(chunk)], 1)
            logits.append(feed(model, each, chunk, so_far))
        return torch.cat(logits, 1)

    # the original goes another way first; the copy must not notice, nor what is copied from the copy
    second = copy.clone()
    other = go_on(cache, 1)
    ours = go_on(copy, 2)
    assert not torch.equal(other, ours)
    assert torch.equal(go_on(second, 2), ours)
    with entry.recording(model, reference := entry.build(model)):
        generate(model, reference, *left_padded(ROWS), max_new_tokens=6)
    torch.testing.assert_close(go_on(reference, 2), ours, rtol=1e-5, atol=1e-5)


@every_cache
def test_an_empty_cache_can_be_copied_and_saved(entry, tmp_path):
    model = tiny()
    wanted, _, _ = recorded(entry, model, prompt(20, 2))
    cache = entry.build(model)
    for copy in (cache.clone(), save_and_load(entry, model, cache, tmp_path)):
        assert copy.get_seq_length() == 0
        assert torch.equal(generate(model, copy, prompt(20, 2)), wanted)


@every_cache
def test_one_prefix_serves_many_forks(entry):
    """Fork after the shared context, answer each question, equal to feeding both in turn."""
    model = tiny()
    context = entry.build(model)
    feed(model, context, prompt(20))
    for seed in range(3):
        question = prompt(4, seed=seed)
        own = entry.build(model)
        feed(model, own, prompt(20))
        assert torch.equal(feed(model, context.clone(), question), feed(model, own, question))


def test_a_file_of_another_cache_is_refused(tmp_path):
    model = tiny()
    cache = DenseCache(model)
    feed(model, cache, prompt(5))
    cache.save(tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    with pytest.raises(ValueError, match=r"holds a DenseCache; load it with DenseCache.load"):
        H2OCache.load(tmp_path / "cache", model)
    with pytest.raises(ValueError, match=r"3 layers.*has 2"):
        DenseCache.load(tmp_path / "cache", tiny(num_hidden_layers=2))


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="not a saved kvcompress cache"):
        DenseCache.load(tmp_path / "weights", tiny())


def test_a_saved_cache_is_loaded_where_its_policy_was_not_imported(tmp_path, fresh):
    cache = EvictingCache(tiny(), policy=TOVA(), budget=12)
    feed(tiny(), cache, prompt(20))
    cache.save(tmp_path / "cache")
    program = (
        "import sys; from kvcompress import EvictingCache; from tests.contract.models import tiny; "
        "assert 'kvcompress.policies.tova' not in sys.modules; print(EvictingCache.load(sys.argv[1], tiny()).policy)"
    )
    run = fresh(program, str(tmp_path / "cache"))
    assert "TOVA(" in run.stdout, run.stderr
