"""Rows on the nodes of a tree: taken back, hidden, repeated and counted."""

import pytest
import torch

from kvcompress import DenseCache, HydragenCache
from kvcompress.caches import dense
from kvcompress.prefix import layer as prefix_layer
from kvcompress.prefix.segments import NodeSegment
from tests.contract.caches import everything
from tests.contract.drive import feed
from tests.contract.models import DEVICE, left_padded, prompt, tiny
from tests.contract.oracle import assert_equals_oracle, recording
from tests.contract.test_memory import storages
from tests.prefix.rows import (
    PREFIX,
    ROWS,
    SUFFIXES,
    TREE,
    WHOLE,
    A,
    B,
    alone,
    assert_rows_equal_singles,
    nodes,
)


def test_permuting_rows_permutes_outputs():
    """Invariant 8."""
    model = tiny()
    order = torch.tensor([3, 1, 0, 2])
    ids, mask = left_padded(SUFFIXES)
    plain, moved = HydragenCache.from_prefix(model, PREFIX), HydragenCache.from_prefix(model, PREFIX)
    ours = feed(model, plain, ids, plain.cover(mask))[order]
    theirs = feed(model, moved, ids[order], moved.cover(mask[order]))
    shown = mask[order].bool()
    torch.testing.assert_close(ours[shown], theirs[shown], rtol=1e-5, atol=1e-5)


def test_nodes_that_no_row_passes_through_are_freed():
    model = tiny()
    cache = HydragenCache.from_tree(model, *TREE, rows=ROWS)
    cache.batch_select_indices(torch.tensor([1, 0]))
    assert cache.memory().by_component["prefix_keys"] * 2 == 37 * 768
    assert cache.memory().total_bytes == sum(storages(cache).values())


# taking back and forgetting


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("tokens", [2, 7, 9, 20])
def test_crop_goes_back_into_the_nodes(family, tokens):
    model = tiny(family)
    cache = HydragenCache.from_prefix(model, PREFIX)
    suffix = prompt(7, 3)
    feed(model, cache, suffix, cache.cover(torch.ones_like(suffix)))
    cache.crop(-tokens)
    assert cache.get_seq_length() == 47 - tokens
    assert bool(nodes(cache)) == (tokens <= 7)
    step = prompt(1, 3, seed=5)
    rows = [
        torch.cat([torch.cat([PREFIX, own])[: 47 - tokens], token]) for own, token in zip(suffix, step, strict=True)
    ]
    assert_rows_equal_singles(model, cache, rows, step, torch.ones(3, 48 - tokens, dtype=torch.long))
    with pytest.raises(ValueError, match="can take back"):
        cache.crop(-100)


def test_a_row_may_forget_shared_tokens():
    model = tiny()
    cache = HydragenCache.from_tree(model, [A, B], [-1, 0], rows=[0, 1])
    token = prompt(1, 2)
    mask = cache.cover(torch.ones_like(token))
    feed(model, cache, token, mask)
    mask = torch.cat([mask, torch.ones_like(token)], 1)
    mask[0, 5:12] = 0  # of A, five columns of padding before it
    mask[1, :3] = 0
    step = prompt(1, 2, seed=3)
    logits = feed(model, cache, step, mask)
    # what stays keeps what it saw when it was stored: only keys move
    assert not nodes(cache)
    plain = DenseCache(model)
    ids, whole = left_padded([A, torch.cat([A, B])])
    feed(model, plain, ids, whole)
    feed(model, plain, token, torch.cat([whole, torch.ones_like(token)], 1))
    torch.testing.assert_close(logits, feed(model, plain, step, mask), rtol=1e-4, atol=2e-4)


def test_a_sliding_layer_keeps_little_more_of_a_node_than_its_window():
    model = tiny("mistral", sliding_window=32)
    prefix = prompt(400)
    cache = HydragenCache.from_prefix(model, prefix)
    assert {node.tokens for node in nodes(cache) if isinstance(node, NodeSegment)} == {32 + 256}
    suffix = prompt(5, 2, seed=3)
    rows = [torch.cat([prefix[0], own]) for own in suffix]
    assert_rows_equal_singles(model, cache, rows, suffix, cache.cover(torch.ones_like(suffix)))


def test_crop_in_the_midst_of_what_is_fed_twice():
    """A row's path reaches further than the columns seen: what is ahead has no column, and is fed again."""
    model = tiny()
    ids, mask = left_padded(WHOLE)
    cache = HydragenCache.from_prefix(model, PREFIX)
    feed(model, cache, ids[:, 40:41], mask[:, :41])
    assert cache.tree.overlap is not None
    cache.crop(-2)
    logits = feed(model, cache, ids[:, 39:], mask)
    for row, whole in enumerate(WHOLE):
        torch.testing.assert_close(logits[row, -1], alone(model, whole)[-1], rtol=1e-4, atol=2e-4)


def test_a_prompt_longer_than_windows_reach_shares_what_is_left():
    model = tiny("mistral", max_position_embeddings=1024)
    rows = [torch.cat([PREFIX, prompt(500, seed=seed)[0], prompt(80, seed=seed + 1)[0]]) for seed in (5, 7)]
    cache = HydragenCache(model, min_tokens=8)
    feed(model, cache, torch.stack(rows))
    assert {node.tokens for node in nodes(cache)} == {0}
    step = prompt(1, 2, seed=9)
    rows = [torch.cat([row, token]) for row, token in zip(rows, step, strict=True)]
    assert_rows_equal_singles(model, cache, rows, step, torch.ones(2, 621, dtype=torch.long))


@pytest.mark.parametrize("way", ["equal rows", "repeated row"])
def test_a_token_hidden_in_a_node_that_is_all_there_is_does_not_come_again(way):
    """The mask shows fewer tokens than the node holds; the next one is new all the same."""
    model = tiny()
    cache = HydragenCache(model, min_tokens=1)
    ids = prompt(12).expand(2, 12)
    with recording(model, cache, everything) as transcript:
        if way == "equal rows":
            feed(model, cache, ids)
        else:
            feed(model, cache, ids[:1])
            cache.batch_repeat_interleave(2)
        assert cache.own_lengths() == [0, 0]
        mask = torch.ones(2, 17, dtype=torch.long, device=DEVICE)
        mask[0, 9:12] = 0
        feed(model, cache, prompt(5, 2, seed=3), mask)
    assert_equals_oracle(model, transcript)


def test_a_window_reaches_back_into_a_node_when_newer_tokens_are_hidden():
    """Found by tests/fuzz: seed 3960."""
    model = tiny("gemma2")
    cache, ids = HydragenCache(model, min_tokens=3), prompt(21, batch=2)
    ids[1, :10] = ids[0, :10]
    shown = torch.ones(2, 22, dtype=torch.long, device=DEVICE)
    with recording(model, cache, everything) as transcript:
        feed(model, cache, ids, shown[:, :21])
        assert len(cache.tree.nodes) == 1
        shown[0, 14:20] = 0
        feed(model, cache, prompt(1, batch=2, seed=3), shown)
    assert_equals_oracle(model, transcript)


def test_memory_counts_what_a_fork_leaves_of_the_rows_of_nodes():
    model = tiny()
    cache = HydragenCache(model, min_tokens=1)
    ids = prompt(12, 4)
    # the first and the last begin alike: a node of rows that do not lie side by side
    ids[3, :6] = ids[0, :6]
    feed(model, cache, ids)
    feed(model, cache, prompt(3, 4, seed=5))
    for each in (cache, cache.fork()):
        assert each.memory().total_bytes == sum(storages(each).values())


def test_a_window_is_told_to_be_short_where_shared_tokens_are_hidden_too_late():
    model = tiny("mistral", max_position_embeddings=1024)
    cache = HydragenCache(model)
    feed(model, cache, prompt(400, 2))
    cache.fork()
    feed(model, cache, prompt(2, 2, seed=5))
    shown = torch.ones(2, 404, dtype=torch.long, device=DEVICE)
    shown[0, 20:400] = 0
    with pytest.warns(UserWarning, match="older ones of a sliding window of 12.* missing in 1 of 2 sequences"):
        feed(model, cache, prompt(2, 2, seed=6), shown)


def test_a_crop_into_shared_tokens_whose_window_is_gone_is_refused():
    model = tiny("mistral", max_position_embeddings=1024)
    cache = HydragenCache(model)
    # what the longer row has let go hides behind the padding of the other
    ids, mask = left_padded([prompt(400)[0], prompt(20, seed=2)[0]])
    feed(model, cache, ids.flip(1), mask.flip(1))
    cache.fork()
    kept = cache.clone()
    with pytest.raises(ValueError, match="9 to 131 are gone"):
        cache.crop(-380)
    step = prompt(3, 2, seed=5)
    assert torch.equal(
        feed(model, cache, step, cache.cover(torch.ones_like(step))),
        feed(model, kept, step, kept.cover(torch.ones_like(step))),
    )


def test_a_crop_to_own_tokens_that_have_left_the_window_is_refused(monkeypatch):
    """The shared tokens are there, and those between them and what the window holds are not."""
    monkeypatch.setattr(dense, "SLACK", 5)
    model = tiny("mistral", sliding_window=3)
    cache = HydragenCache.from_prefix(model, prompt(5)[0])
    feed(model, cache, prompt(13, 2))
    kept, step = cache.clone(), prompt(3, 2, seed=5)
    with pytest.raises(ValueError, match="of the tokens in its window of 3, 7 to 8 are gone"):
        cache.crop(-9)
    assert torch.equal(feed(model, cache, step), feed(model, kept.clone(), step))
    # back in the shared tokens alone, nothing is missing
    kept.crop(-13)
    whole = feed(model, HydragenCache(model), torch.cat([prompt(5).expand(2, -1), step], 1))
    torch.testing.assert_close(feed(model, kept, step)[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


def test_a_crop_reaches_the_shared_tokens_of_a_row_whose_own_are_few():
    model = tiny()
    cache = HydragenCache(model, min_tokens=4)
    rows = [prompt(10)[0], prompt(5)[0], prompt(14, seed=2)[0]]
    ids, mask = left_padded(rows)
    with recording(model, cache, everything) as transcript:
        feed(model, cache, ids, mask)
        assert cache.tree.nodes
        cache.crop(-7)
        feed(model, cache, prompt(3, 3, seed=5), torch.cat([mask[:, :7], torch.ones_like(ids[:, :3])], 1))
    assert_equals_oracle(model, transcript)


def test_a_crop_of_nothing_is_never_refused(monkeypatch):
    """Where nodes hold what a window has let go of, the suffixes hold less than a window."""
    monkeypatch.setattr(dense, "SLACK", 5)
    monkeypatch.setattr(prefix_layer, "SLACK", 5)
    model = tiny("qwen2_windows")
    cache = HydragenCache(model, min_tokens=2)
    feed(model, cache, prompt(30).expand(2, -1))
    token = prompt(1, 2)
    feed(model, cache, token)
    layer = cache.layers[-1]
    assert layer.dropped
    assert layer.dense.length < layer.window - 1
    as_it_was = cache.clone()
    cache.crop(0)
    torch.testing.assert_close(feed(model, cache, token), feed(model, as_it_was, token))
    with pytest.raises(ValueError, match="can take back 0 tokens"):
        layer.check_crop(layer.dense.length)


@pytest.mark.parametrize("first", [0, 1])
def test_a_prompt_that_is_all_prefix_keeps_its_window_beside_a_longer_one(monkeypatch, first):
    """What a sliding layer has of a node is what the row has that goes least far beyond it."""
    monkeypatch.setattr(dense, "SLACK", 5)
    monkeypatch.setattr(prefix_layer, "SLACK", 5)
    model = tiny("qwen2_windows")
    long = prompt(40)[0]
    ids, mask = left_padded([long, long[:17]] if first == 0 else [long[:17], long])
    cache, full = HydragenCache(model, min_tokens=3), DenseCache(model)
    for each in (cache, full):
        feed(model, each, ids, mask)
    assert cache.tree.nodes
    mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    torch.testing.assert_close(*(feed(model, each, prompt(1, 2, seed=4), mask) for each in (cache, full)))
