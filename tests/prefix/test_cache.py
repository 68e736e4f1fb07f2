"""HydragenCache: what sequences share is run, stored and read once, and nothing else changes."""

import pytest
import torch

from kvcompress import DenseCache, H2OCache, HydragenCache, PrefixStore
from kvcompress.hf import cache_argument
from tests.contract.drive import feed, full, generate
from tests.contract.models import IN_NODES, build, left_padded, places, prompt, tiny
from tests.contract.test_memory import storages
from tests.prefix.rows import (
    PATHS,
    PREFIX,
    ROWS,
    SUFFIXES,
    TREE,
    WHOLE,
    A,
    B,
    C,
    D,
    alone,
    assert_rows_equal_singles,
    pointers,
)

# a prefix


@pytest.mark.parametrize("family", IN_NODES)
@pytest.mark.parametrize("layout", ["whole prompts", "suffixes"])
def test_rows_of_ragged_suffixes_equal_singles(family, layout):
    """Invariants 1 and 10, in every family: windows shorter than the prefix, softcap, sinks, learned positions."""
    model = tiny(family)
    cache = HydragenCache.from_prefix(model, PREFIX)
    assert cache.get_seq_length() == 40
    if layout == "suffixes":
        ids, mask = left_padded(SUFFIXES)
        mask = cache.cover(mask)
        assert_rows_equal_singles(model, cache, WHOLE, ids, mask)
    else:
        ids, mask = left_padded(WHOLE)
        feed(model, cache, ids[:, 40:-1], mask[:, :-1])
        assert_rows_equal_singles(model, cache, WHOLE, ids[:, -1:], mask)
    # and on, by steps and by chunks
    rows = WHOLE
    for tokens in (1, 1, 3, 1):
        more = prompt(tokens, len(rows), seed=tokens)
        rows = [torch.cat([row, own]) for row, own in zip(rows, more, strict=True)]
        mask = torch.cat([mask, torch.ones_like(more)], 1)
        assert_rows_equal_singles(model, cache, rows, more, mask)


# README: one more attention and a merge per level; exact | 2402.05099 |
@pytest.mark.parametrize("way", ["given", "found", "prefix and suffixes"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_generation_is_that_of_the_full_cache(way, settings, run_through):
    model = tiny()
    ids, mask = left_padded(WHOLE)
    torch.manual_seed(5)
    wanted = full(model, ids, mask, **settings)[:, ids.shape[1] :]
    tokens = run_through(model)
    cache = HydragenCache(model, ids, mask) if way == "found" else HydragenCache.from_prefix(model, PREFIX)
    if way == "prefix and suffixes":
        ids, mask = left_padded(SUFFIXES)
        mask = cache.cover(mask)
    torch.manual_seed(5)
    out = generate(model, cache, ids, mask, **settings)[:, ids.shape[1] :]
    assert torch.equal(out, wanted)
    assert tokens[0] == 40, "the prefix goes through the model once"
    assert cache.memory().total_bytes == sum(storages(cache).values())


def test_the_prefix_is_read_from_one_tensor_whatever_happens_to_rows():
    """Invariant 9: reordering, selecting and repeating touch suffixes and maps only."""
    model = tiny()
    cache = HydragenCache.from_prefix(model, PREFIX)
    before = pointers(cache)
    ids, mask = left_padded(SUFFIXES)
    mask = cache.cover(mask)
    feed(model, cache, ids, mask)
    rows = torch.tensor([2, 0, 0, 3])
    cache.reorder_cache(rows)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 7]))
    rows = rows.repeat_interleave(2)[[5, 0, 7]]
    assert pointers(cache) == before
    step = prompt(1, 3, seed=4)
    whole = [torch.cat([WHOLE[row], token]) for row, token in zip(rows, step, strict=True)]
    mask = torch.cat([mask[rows], torch.ones_like(step)], 1)
    assert_rows_equal_singles(model, cache, whole, step, mask)
    generate(model, cache, torch.cat([step, prompt(1, 3, seed=9)], 1)[:, -1:], cache.cover(step * 0 + 1), num_beams=1)
    assert pointers(cache) == before


def test_beams_reorder_suffixes_only():
    model = tiny()
    cache = HydragenCache.from_prefix(model, PREFIX)
    before = pointers(cache)
    ids, mask = left_padded(WHOLE)
    generate(model, cache, ids, mask, num_beams=4)
    assert pointers(cache) == before
    assert cache.batch_size == 16


# README: | `HydragenCache` | every token; shared ones (prefixes, trees) once |
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_bytes_are_the_prefix_once_and_the_suffixes(batch):
    """Invariant 6: the closed formula, and the live storages."""
    model = tiny()
    cache = HydragenCache.from_prefix(model, PREFIX)
    token = 2 * 3 * 2 * 16 * 4  # keys and values, layers, KV heads, head_dim, bytes
    # the ids of the tokens are remembered, 4 bytes each
    assert cache.memory().total_bytes == 40 * (token + 4)
    feed(model, cache, prompt(6, batch), cache.cover(torch.ones(batch, 6, dtype=torch.long)))
    assert cache.memory().total_bytes == (40 + batch * 6) * (token + 4)
    report = cache.memory()
    assert report.by_component["prefix_keys"] + report.by_component["prefix_values"] == 40 * token
    assert report.total_bytes == sum(storages(cache).values())
    assert report.full_bytes == batch * 46 * token
    assert all((kept == 46).all() for kept in report.tokens_kept)


def test_the_first_suffix_token_stands_behind_all_ancestors():
    """Invariant 7, as `generate` tells the model."""
    model = build("llama")
    told = []
    model.register_forward_pre_hook(lambda module, args, kwargs: told.append(kwargs["position_ids"]), with_kwargs=True)
    ids, mask = left_padded(WHOLE)
    cache = HydragenCache.from_tree(model, [PREFIX[:30], PREFIX[30:]], [-1, 0])
    generate(model, cache, ids, mask, max_new_tokens=2)
    for row, suffix in enumerate(SUFFIXES):
        assert told[0][row, -len(suffix)] == 40
        assert told[1][row, 0] == 40 + len(suffix)


def test_a_row_may_end_with_the_prefix():
    """An empty suffix: its columns hold prefix only, and its next token is right."""
    model = tiny()
    rows = [PREFIX, WHOLE[0]]
    ids, mask = left_padded(rows)
    wanted = full(model, ids, mask)
    assert torch.equal(generate(model, HydragenCache.from_prefix(model, PREFIX), ids, mask), wanted)


def test_chunked_prefill_drops_what_is_held_across_chunks():
    model = tiny()
    ids, mask = left_padded(WHOLE)
    cache = HydragenCache.from_prefix(model, PREFIX)
    for start in range(40, ids.shape[1], 2):
        stop = min(start + 2, ids.shape[1])
        logits = feed(model, cache, ids[:, start:stop], mask[:, :stop])
    for row, whole in enumerate(WHOLE):
        torch.testing.assert_close(logits[row, -1], alone(model, whole)[-1], rtol=1e-4, atol=2e-4)
    assert [int(kept[0]) for kept in cache.memory().tokens_kept[0]] == [len(whole) for whole in WHOLE]


@pytest.mark.slow
def test_32_questions_about_one_document_are_answered_as_by_the_full_cache(smollm2):
    """Invariant 5, on the real model."""
    model, tokenizer = smollm2
    text = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 12
    document = tokenizer(text, return_tensors="pt").input_ids[0]
    words = ["fox", "dog", "colour", "reason", "season", "number", "name", "place"]
    asks = ["What is the {}?", "Who saw the {} and why?", "{}!", "In one word, the {} of the story is"]
    questions = [ask.format(word) for word in words for ask in asks]
    rows = [torch.cat([document, tokenizer(text, return_tensors="pt").input_ids[0]]) for text in questions]
    ids, mask = left_padded(rows)
    wanted = full(model, ids, mask)
    cache = HydragenCache(model, ids, mask)
    assert torch.equal(generate(model, cache, ids, mask), wanted)
    assert cache.memory().ratio < 0.25


# trees


# docs: `from_prefix`, `from_tree`
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "opt"])
def test_an_irregular_tree_equals_dense(family, run_through):
    """Invariant 4: depth 3, two roots, paths of different lengths, rows of a node apart from each other."""
    model = tiny(family)
    tokens = run_through(model)
    cache = HydragenCache.from_tree(model, *TREE, rows=ROWS)
    assert sum(tokens) == 23 + 5 + 9 + 31 + 2
    suffixes = [prompt(size, seed=30 + size)[0] for size in (3, 1, 6, 2, 5, 4)]
    rows = [torch.cat([*path, suffix]) for path, suffix in zip(PATHS, suffixes, strict=True)]
    ids, mask = left_padded(suffixes)
    mask = cache.cover(mask)
    assert torch.equal(mask.sum(-1), torch.tensor([len(row) for row in rows]))
    assert_rows_equal_singles(model, cache, rows, ids, mask)
    for step in range(3):
        token = prompt(1, 6, seed=step)
        rows = [torch.cat([row, own]) for row, own in zip(rows, token, strict=True)]
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        assert_rows_equal_singles(model, cache, rows, token, mask)


def test_rows_go_on_from_the_leaves_where_nothing_else_is_said():
    model = tiny()
    cache = HydragenCache.from_tree(model, *TREE)
    assert cache.tree.lengths() == [32, 30, 31]


# docs: `push`, `pop` and `fork` you say by hand what is shared
def test_levels_are_pushed_and_popped(run_through):
    model = tiny()
    tokens = run_through(model)
    cache = HydragenCache.from_prefix(model, A)
    level = left_padded([B, C])
    cache.push(*level)
    cache.push(prompt(4, 4, seed=1))
    assert tokens == [23, 5 + 9, 16] or sum(tokens) == 23 + 14 + 16
    assert cache.tree.lengths() == [32, 32, 36, 36]
    cache.pop()
    cache.pop()
    assert cache.tree.lengths() == [23] * 4
    cache.pop()
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="no level"):
        cache.pop()


def test_what_was_pushed_is_attended_to():
    model = tiny()
    cache = HydragenCache.from_prefix(model, A)
    cache.push(*left_padded([B, C]))
    feed(model, cache, prompt(2, 2), cache.cover(torch.ones(2, 2, dtype=torch.long)))
    cache.push(prompt(3, 4, seed=6))
    token = prompt(1, 4, seed=7)
    heads = [torch.cat([A, path, own]) for path, own in zip([B, C], prompt(2, 2), strict=True)]
    rows = [
        torch.cat([heads[index // 2], pushed, own])
        for index, (pushed, own) in enumerate(zip(prompt(3, 4, seed=6), token, strict=True))
    ]
    assert_rows_equal_singles(model, cache, rows, token, cache.cover(torch.ones_like(token)))
    cache.pop()
    # the level before held the two tokens each row had for itself
    rows = [torch.cat([heads[index // 2], own]) for index, own in enumerate(token)]
    assert_rows_equal_singles(model, cache, rows, token, cache.cover(torch.ones_like(token)))


# docs: `fork` you say by hand what is shared
def test_a_fork_shares_everything_and_goes_its_own_way():
    model = tiny()
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    cache = HydragenCache(model)
    feed(model, cache, ids, mask)
    fork = cache.fork(3)
    assert fork.batch_size == 6
    assert set(pointers(fork)) == set(pointers(cache))
    heads = [prompt(20)[0], prompt(13, seed=2)[0]]
    for each, copies, seed in ((fork, 3, 1), (cache, 1, 2), (fork.fork(2), 6, 3)):
        token = prompt(1, 2 * copies, seed=seed)
        rows = [torch.cat([heads[index // copies], own]) for index, own in enumerate(token)]
        assert_rows_equal_singles(model, each, rows, token, each.cover(torch.ones_like(token)))


def test_a_clone_shares_the_nodes_and_nothing_else():
    model = tiny()
    cache = HydragenCache.from_prefix(model, PREFIX)
    copies = [cache.clone() for _ in range(2)]
    for copy in copies:
        assert pointers(copy) == pointers(cache)
    ids, mask = left_padded(WHOLE)
    wanted = full(model, ids, mask)
    for each in (*copies, cache):
        assert torch.equal(generate(model, each, ids, mask), wanted)


def check_found(model, rows, counted, **settings):
    """Builds a cache of these rows and generates with it; gives cache and tokens run while building and after."""
    ids, mask = left_padded(rows)
    wanted = full(model, ids, mask)
    before = len(counted)
    cache = HydragenCache(model, ids, mask, **settings)
    built = sum(counted[before:])
    before = len(counted)
    assert torch.equal(generate(model, cache, ids, mask, max_new_tokens=12), wanted)
    return cache, built, counted[before]


def test_an_odd_row_does_not_cost_the_others_their_prefix(run_through):
    model = tiny()
    counted = run_through(model)
    rows = [*WHOLE, prompt(46, seed=9)[0]]
    cache, built, fed = check_found(model, rows, counted)
    # the odd one is run alone as far as the others' prefix reaches, and what is fed then is what differs
    assert built < 40 + 46
    assert fed < 5 * 8
    assert len(cache.tree.nodes) == 2


# docs: finds the tree of prefixes that a batch of prompts shares, runs each part once and reports it as seen
def test_a_tree_is_found_and_every_node_runs_once(run_through):
    model = tiny()
    counted = run_through(model)
    long_a, long_b = torch.cat([PREFIX, D]), torch.cat([PREFIX, prompt(37, seed=5)[0]])
    rows = [torch.cat([head, suffix]) for head in (long_a, long_b) for suffix in SUFFIXES[:3]]
    cache, built, fed = check_found(model, rows, counted, min_tokens=8)
    assert len(cache.tree.nodes) >= 3
    assert built + fed <= 40 + 31 + 37 + sum(len(suffix) for suffix in SUFFIXES[:3]) * 2 + 6 * 12


# docs: Samples and beams share their prompt
@pytest.mark.parametrize("settings", [{"num_return_sequences": 3, "num_beams": 3}, {"num_beams": 2}])
def test_copies_share_the_whole_prompt(settings, run_through):
    model = tiny()
    rows = [prompt(20)[0], prompt(13, seed=2)[0]]
    ids, mask = left_padded(rows)
    wanted = full(model, ids, mask, **settings)
    counted = run_through(model)
    cache = HydragenCache(model, ids, mask, copies=settings["num_beams"])
    assert sum(counted) == 19 + 12
    assert cache.get_seq_length() == 19
    assert torch.equal(generate(model, cache, ids, mask, **settings), wanted)


# docs: Samples and beams share their prompt
def test_a_single_prompt_is_shared_by_its_samples(run_through):
    model = tiny()
    wanted = full(model, prompt(20), num_beams=4)
    counted = run_through(model)
    cache = HydragenCache(model, prompt(20))
    assert torch.equal(generate(model, cache, prompt(20), num_beams=4), wanted)
    assert counted[:2] == [19, 4]


def test_rows_that_turn_out_equal_are_stored_once():
    model = tiny()
    ids, mask = left_padded([WHOLE[0], WHOLE[0], WHOLE[3], WHOLE[1]])
    wanted = full(model, ids, mask)
    cache = HydragenCache(model)
    assert torch.equal(generate(model, cache, ids, mask), wanted)
    assert [node.tokens for node in cache.tree.nodes.values()] == [40]
    assert cache.memory().ratio < 0.7


def test_too_little_in_common_is_left_with_the_rows():
    model = tiny()
    cache = HydragenCache(model, prompt(20, 2))
    assert not cache.tree.nodes
    assert cache.get_seq_length() == 0
    ids = torch.cat([PREFIX[:31].expand(3, -1), prompt(5, 3)], 1)
    assert not HydragenCache(model, ids).tree.nodes
    assert HydragenCache(model, ids, min_tokens=31).tree.nodes


# nodes of another kind


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_prefix_may_lie_in_the_slots_of_an_evicting_cache(family):
    model = tiny(family)
    evicted = H2OCache(model, budget=16)
    feed(model, evicted, PREFIX[None])
    plain = evicted.clone()
    cache = HydragenCache.from_cache(evicted)
    assert all((kept <= 16).all() for kept in cache.memory().tokens_kept)
    suffix = prompt(5, 3)
    ours = feed(model, cache, suffix, cache.cover(torch.ones_like(suffix)))
    for row in range(3):
        # one forward: the evicting cache lets tokens go only behind it
        torch.testing.assert_close(ours[row], feed(model, plain.clone(), suffix[row][None])[0], rtol=1e-4, atol=2e-4)
    assert cache.memory().total_bytes == sum(storages(cache).values())
    with pytest.raises(ValueError, match="SlotSegment"):
        cache.crop(-9)


def test_a_full_cache_becomes_a_prefix():
    model = tiny()
    dense = DenseCache(model)
    feed(model, dense, PREFIX[None])
    ids, mask = left_padded(WHOLE)
    assert torch.equal(generate(model, HydragenCache.from_cache(dense), ids, mask), full(model, ids, mask))


def test_what_cannot_be_shared_is_refused():
    model = tiny()
    for cache, ids, message in (
        (DenseCache(model), prompt(5, 2), "one sequence"),
        (H2OCache(model, budget=8, rerotated=True), prompt(20), "RerotatedSlots"),
    ):
        feed(model, cache, ids)
        with pytest.raises(ValueError, match=message):
            HydragenCache.from_cache(cache)


def test_chunked_attention_is_refused_by_name():
    model = tiny("llama4")
    message = "Llama4ForCausalLM has layers of chunked attention, which HydragenCache does not serve; DenseCache does"
    with pytest.raises(ValueError, match=message):
        HydragenCache(model)
    with pytest.raises(ValueError, match=message):
        PrefixStore(model).prefix(PREFIX)
    cache = DenseCache(model)
    feed(model, cache, PREFIX[None])
    with pytest.raises(ValueError, match=message):
        HydragenCache.from_cache(cache)


# copies on disk


@pytest.mark.parametrize("kind", ["tree", "slots"])
def test_a_saved_cache_goes_on(kind, tmp_path):
    model = tiny("mistral")
    if kind == "tree":
        cache = HydragenCache.from_tree(model, *TREE, rows=ROWS)
    else:
        evicted = H2OCache(model, budget=16)
        feed(model, evicted, PREFIX[None])
        cache = HydragenCache.from_cache(evicted)
    for step in range(2):
        cache.save(tmp_path / "cache")
        loaded = HydragenCache.load(tmp_path / "cache", model)
        for part in ("prefix_keys", "keys", "padding"):
            assert loaded.memory().by_component.get(part) == cache.memory().by_component.get(part)
        ids = prompt(3, 6, seed=step)
        mask = cache.cover(torch.ones_like(ids))
        assert torch.equal(feed(model, loaded, ids, mask), feed(model, cache, ids, mask))


# errors


def test_what_is_wrong_is_said():
    model = tiny()
    cache = HydragenCache.from_prefix(model, PREFIX)
    suffix = prompt(4, 2)
    with pytest.raises(ValueError, match=r"row 0 does not match the tokens that the cache holds: its token 0 is"):
        model(suffix, position_ids=places(torch.ones_like(suffix)), **cache_argument(model, cache))
    tree = HydragenCache.from_tree(model, *TREE, rows=[1, 2])
    with pytest.raises(ValueError, match=r"shows 32 tokens of row 0.*holds 28"):
        feed(model, tree, suffix, torch.ones(2, 36, dtype=torch.long))
    with pytest.raises(ValueError, match="padded on the left"):
        HydragenCache(model, prompt(4, 2), torch.tensor([[1, 1, 1, 0]] * 2))
    with pytest.raises(ValueError, match="an earlier one"):
        HydragenCache.from_tree(model, [A, B], [1, -1])
    with pytest.raises(ValueError, match="needs at least one token"):
        HydragenCache.from_tree(model, [A, []], [-1, 0])
    with pytest.raises(ValueError, match="at least one copy"):
        cache.fork(0)
    with pytest.raises(ValueError, match="for each of 2 rows"):
        tree.push(prompt(3, 3))
    with pytest.raises(ValueError, match="one shape"):
        HydragenCache(model, prompt(4, 2), torch.ones(2, 5))
