"""Prompts given to a HydragenCache: those that begin with what it holds, however they end, and those that do not."""

import pytest
import torch

from kvcompress import DenseCache, H2OCache, HydragenCache
from kvcompress.hf import cache_argument, decoder_of
from kvcompress.prefix.prompts import tree_of_prompts
from kvcompress.prefix.store import PrefixStore
from kvcompress.prefix.tree import ROOT, Shared
from tests.contract.drive import feed, full, generate
from tests.contract.models import IN_NODES, build, left_padded, places, prompt, tiny
from tests.contract.test_generation import few_words

PREFIX = prompt(40, seed=3)[0]
LONGER = torch.cat([PREFIX, prompt(5, seed=11)[0]])


@torch.no_grad()
def logits_of(model, ids, mask):
    """Of each column, without any cache."""
    return model(ids, attention_mask=mask, position_ids=places(mask), use_cache=False).logits


@pytest.fixture
def widths():
    """Gives a function that notes, from then on, how many columns each forward of a model is fed."""
    hooks = []

    def note(model):
        fed = []
        hook = decoder_of(model).register_forward_pre_hook(
            lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        hooks.append(hook)
        return fed

    yield note
    for hook in hooks:
        hook.remove()


# what prompts have in common


def test_an_odd_prompt_has_a_node_of_its_own_as_far_as_the_others_prefix_reaches():
    rows = [LONGER, torch.cat([PREFIX, prompt(3, seed=12)[0]]), prompt(44, seed=9)[0]]
    tree = tree_of_prompts(rows, columns=45, copies=1, least=32)
    # the shorter of the two is fed two tokens of the prefix again, which costs less than a node for the other's two
    assert tree.seen == 40
    assert tree.shared == [Shared(ROOT, 0, 40, (0, 1)), Shared(ROOT, 0, 39, (2,))]
    assert tree.ends == [0, 0, 1]
    assert torch.equal(tree.pieces(rows)[1], rows[2][:39])


def test_prompts_with_too_little_in_common_have_no_node():
    assert tree_of_prompts([PREFIX[:20], prompt(20, seed=9)[0]], columns=20, copies=1, least=1).shared == []
    assert [node.stop for node in tree_of_prompts([PREFIX[:20]] * 2, columns=20, copies=2, least=32).shared] == [19, 19]


# tokens that are fed again


@pytest.mark.parametrize("family", IN_NODES)
def test_tokens_fed_again_have_the_logits_of_their_own_places(family):
    model = tiny(family)
    own = torch.cat([PREFIX, prompt(60, seed=1)[0]])
    rows = [own, torch.cat([own, prompt(9, seed=2)[0]])]
    ids, mask = left_padded(rows)
    cache = HydragenCache(model, ids, mask)
    seen = cache.get_seq_length()
    assert cache.tree.lengths()[0] > int(mask[0, :seen].sum()), "nothing is fed again"
    fresh = mask[:, seen:].bool()
    wanted = logits_of(model, ids, mask)[:, seen:][fresh]
    torch.testing.assert_close(feed(model, cache, ids[:, seen:], mask)[fresh], wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("chunk", [45, 7])
def test_whole_prompts_may_be_fed_from_their_beginning(family, chunk):
    model = tiny(family)
    ids, mask = left_padded([LONGER, PREFIX[:38]])
    cache = HydragenCache.from_prefix(model, PREFIX)
    with torch.no_grad():
        found = [
            model(
                ids[:, start : start + chunk],
                attention_mask=mask[:, : start + chunk],
                position_ids=places(mask)[:, start : start + chunk],
                **cache_argument(model, cache),
            ).logits
            for start in range(0, 45, chunk)
        ]
    shown = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[shown], logits_of(model, ids, mask)[shown], rtol=1e-4, atol=2e-4)
    assert cache.memory().tokens_kept[0][:, 0].tolist() == [45, 40]


def test_what_has_left_a_window_cannot_be_fed_again():
    model = tiny("mistral")
    long = prompt(400)
    cache = HydragenCache.from_prefix(model, long)
    ids = torch.cat([long, prompt(3, seed=5)], 1)
    with pytest.raises(ValueError, match=r"token 0 of a row.*window of 12"):
        model(ids, position_ids=places(torch.ones_like(ids)), **cache_argument(model, cache))
    assert cache.get_seq_length() == 400
    assert torch.equal(generate(model, cache, ids), full(model, ids))


@pytest.mark.parametrize("equal", [False, True])
def test_the_tree_may_hold_what_no_column_reports(equal):
    """Few shared tokens beside a long row that shares none: all rows are fed from their first tokens on."""
    model = tiny()
    rows = [torch.cat([PREFIX[:9], prompt(5, seed=5 if equal else seed)[0]]) for seed in (5, 6)]
    ids, mask = left_padded([*rows, prompt(14, seed=7)[0]])
    cache = HydragenCache(model, ids, mask, min_tokens=1)
    assert cache.tree.nodes
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, cache, ids, mask), full(model, ids, mask))


# prompts that end within a node


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "opt"])
@pytest.mark.parametrize("length", [1, 20, 38, 39, 40])
@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 6}, {"num_beams": 2}], ids=str)
def test_a_prompt_shorter_than_the_prefix_beside_a_longer_one(family, length, settings):
    model = tiny(family)
    ids, mask = left_padded([PREFIX[:length], LONGER])
    wanted = full(model, ids, mask, **settings)
    assert torch.equal(generate(model, HydragenCache.from_prefix(model, PREFIX), ids, mask, **settings), wanted)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("length", [1, 30, 39, 40])
def test_a_prompt_that_is_wholly_in_the_prefix_runs_one_token(family, length, widths):
    model = tiny(family)
    ids = PREFIX[None, :length]
    wanted = full(model, ids)
    cache = HydragenCache.from_prefix(model, PREFIX)
    fed = widths(model)
    assert torch.equal(generate(model, cache, ids), wanted)
    assert set(fed) == {1}
    # what is shared with others stays theirs
    assert cache.get_seq_length() == length + 11


def test_the_same_request_is_answered_twice_from_a_store(widths):
    model = tiny()
    store = PrefixStore(model)
    wanted = full(model, PREFIX[None])
    store.prefix(PREFIX)
    fed = widths(model)
    for _ in range(2):
        assert torch.equal(generate(model, store.prefix(PREFIX), PREFIX[None]), wanted)
    assert set(fed) == {1}


@pytest.mark.parametrize("length", [39, 40])
def test_a_node_in_slots_is_cut_nowhere_but_at_its_end(length):
    model = tiny()
    evicted = H2OCache(model, budget=60)
    feed(model, evicted, PREFIX[None])
    cache, ids = HydragenCache.from_cache(evicted), PREFIX[None, :length]
    if length == 40:
        assert torch.equal(generate(model, cache, ids), full(model, ids))
    else:
        with pytest.raises(ValueError, match=r"row 0 ends after 39 tokens.*SlotSegment.*whole prefix"):
            generate(model, cache, ids)


# prompts that do not begin with what is held


def refused(model, cache, ids, mask=None, message="does not match", **settings):
    """The cache refuses these prompts, and stays as it was."""
    before = cache.get_seq_length(), cache.batch_size, cache.tree.lengths(), cache.memory().total_bytes
    with pytest.raises(ValueError, match=message):
        generate(model, cache, ids, mask, **settings)
    assert (cache.get_seq_length(), cache.batch_size, cache.tree.lengths(), cache.memory().total_bytes) == before


# docs: It remembers what it was fed and refuses prompts with another beginning
@pytest.mark.parametrize(
    "settings",
    [{}, {"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}],
    ids=str,
)
@pytest.mark.parametrize("change", [0, 20, 39])
def test_another_prompt_than_the_prefix_is_refused(change, settings):
    model = tiny()
    cache = HydragenCache.from_prefix(model, PREFIX)
    other = LONGER.clone()
    other[change] += 1
    refused(model, cache, other[None], message=f"row 0 .*token {change} .*clone", **settings)
    assert torch.equal(generate(model, cache, LONGER[None], **settings), full(model, LONGER[None], **settings))


def test_rows_in_another_order_are_refused():
    model = tiny()
    first, second = prompt(30, seed=5)[0], prompt(36, seed=6)[0]
    ids, mask = left_padded([torch.cat([first, LONGER[40:]]), torch.cat([first, LONGER[:3]]), second, second])
    cache = HydragenCache(model, ids, mask, min_tokens=8)
    order = torch.tensor([2, 1, 0, 3])
    refused(model, cache, ids[order], mask[order], "order of its rows")
    assert torch.equal(generate(model, cache, ids, mask), full(model, ids, mask))


def test_a_padded_batch_without_its_mask_is_refused():
    model = tiny()
    ids, mask = left_padded([LONGER, torch.cat([LONGER, LONGER[:4]]), torch.cat([LONGER, LONGER[7:9]])])
    cache = HydragenCache(model, ids, min_tokens=1, copies=2)
    refused(model, cache, ids, mask, "padded as in its attention_mask", num_beams=2)


def test_rows_that_are_fed_by_hand_are_compared_where_they_are_fed_again():
    model = tiny()
    cache = HydragenCache.from_prefix(model, PREFIX)
    ids, mask = left_padded([LONGER, LONGER[3:]])
    with pytest.raises(ValueError, match=r"row 1 does not match.*token 37"):
        feed(model, cache, ids[:, 40:], mask)
    assert cache.batch_size == 1
    assert cache.get_seq_length() == 40
    ids, mask = left_padded([LONGER] * 3)
    assert torch.equal(generate(model, cache, ids, mask), full(model, ids, mask))


@pytest.mark.parametrize("way", ["generated", "forked", "loaded", "repeated", "cropped"])
def test_a_second_turn_must_go_on_with_the_first(way, tmp_path):
    model = tiny()
    ids, mask = left_padded([LONGER, torch.cat([LONGER, LONGER[3:7]])])
    cache = HydragenCache(model, ids, mask)
    out = generate(model, cache, ids, mask, suppress_tokens=[0])
    mask = torch.cat([mask, torch.ones_like(out[:, 49:])], 1)
    if way == "forked":
        cache = cache.fork(2)
    elif way == "repeated":
        cache.batch_repeat_interleave(2)
    elif way == "cropped":
        cache.crop(-3)
    elif way == "loaded":
        cache.save(tmp_path / "cache")
        cache = HydragenCache.load(tmp_path / "cache", model)
    if way in ("forked", "repeated"):
        out, mask = out.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
    more = prompt(4, len(out), seed=8)
    ids, mask = torch.cat([out, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    wanted = full(model, ids, mask)
    for row, column in ((0, 9), (1, 50), (0, 56)):
        other = ids.clone()
        other[row, column] += 1
        refused(model, cache, other, mask, f"row {row} does not match")
    assert torch.equal(generate(model, cache, ids, mask), wanted)


# docs: `clone()` it before each call
@pytest.mark.parametrize("make", [DenseCache, HydragenCache, lambda model: H2OCache(model, budget=16)])
def test_a_second_call_with_the_same_prompt_says_to_clone(make):
    model = tiny()
    cache = make(model)
    generate(model, cache, LONGER[None])
    with pytest.raises(ValueError, match=r"has seen 56 tokens.*45.*clone\(\)"):
        generate(model, cache, LONGER[None])


def test_a_cache_that_answered_one_prompt_refuses_another():
    model = tiny()
    cache = HydragenCache.from_prefix(model, PREFIX)
    generate(model, cache, LONGER[None])
    refused(model, cache, torch.cat([PREFIX, prompt(30, seed=2)[0]])[None], message=r"token 40 .*clone\(\)")


def test_what_is_known_of_a_row_can_be_asked():
    model = tiny()
    cache = HydragenCache.from_prefix(model, PREFIX)
    out = generate(model, cache, LONGER[None])
    assert torch.equal(cache.known_ids().long(), out[0, :-1])
    with torch.no_grad():
        embedded = model.get_input_embeddings()(prompt(2))
        model(inputs_embeds=embedded, **cache_argument(model, cache))
    assert cache.known_ids()[-2:].tolist() == [-1, -1]


# drafts


# README: need a cache that keeps every token: Dense, Hydragen
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("length", [46, 40, 33])
def test_speculative_decoding_goes_on_from_a_prefix(family, way, length, widths):
    model = few_words(family)
    ids = prompt(46) % 12 + 2
    prefix, ids = ids[0, :40], ids[:, :length]
    how = {"prompt_lookup_num_tokens": 4}
    if way == "assistant":
        how = {"assistant_model": build("llama", vocab_size=14, num_hidden_layers=1)}
    wanted = full(model, ids, max_new_tokens=20)
    cache = HydragenCache.from_prefix(model, prefix)
    fed = widths(model)
    assert torch.equal(generate(model, cache, ids, max_new_tokens=20, **how), wanted)
    assert fed[0] <= max(1, length - 40) + 20, "what is held is fed again"


@pytest.mark.parametrize("make", [DenseCache, HydragenCache])
def test_speculative_decoding_goes_on_with_a_conversation(make):
    model = few_words("llama")
    ids = prompt(20) % 12 + 2
    cache = make(model)
    first = generate(model, cache, ids, prompt_lookup_num_tokens=4)
    ids = torch.cat([first, ids[:, :5]], 1)
    assert torch.equal(generate(model, cache, ids, prompt_lookup_num_tokens=4), full(model, ids))
