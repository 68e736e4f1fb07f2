"""logprobs: what a model says of continuations of a cache, their first tokens too, as the full forward says it."""

import pytest
import torch
from transformers import DynamicCache

from kvcompress import (
    AttentionMatchingCache,
    DenseCache,
    GEARCache,
    H2OCache,
    HydragenCache,
    KVzipCache,
    PrefixStore,
    ShadowKVCache,
    logprobs,
)
from tests.contract.caches import SHADOW
from tests.contract.drive import feed, generate
from tests.contract.models import IN_NODES, build, left_padded, places, prompt, tiny

CONTEXT = prompt(40, seed=3)[0]
TEXTS = [prompt(count, seed=count)[0] for count in (5, 1, 9)]


def by_full_forward(model, context, text):
    """The log-probability of each token of a text after a context, both [tokens], without a cache."""
    with torch.no_grad():
        logits = model(torch.cat([context, text])[None], use_cache=False).logits[0].float()
    return logits.log_softmax(-1)[len(context) - 1 : -1].gather(-1, text[:, None].to(logits.device))[:, 0]


def assert_equal(found, model, contexts, texts):
    assert len(found) == len(texts)
    for one, context, text in zip(found, contexts, texts, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, by_full_forward(model, context, text), atol=2e-4, rtol=2e-4)


def last(model, cache, ids, mask=None):
    return feed(model, cache, ids, mask)[:, -1]


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("family", IN_NODES)
def test_texts_after_a_prefix_of_any_family(family, chunk_size):
    model = tiny(family)
    cache = HydragenCache.from_prefix(model, CONTEXT)
    assert_equal(logprobs(cache, TEXTS, chunk_size=chunk_size), model, [CONTEXT] * 3, TEXTS)
    # and the cache can still be used
    assert_equal(logprobs(cache, TEXTS[:1]), model, [CONTEXT], TEXTS[:1])
    torch.testing.assert_close(cache.known_ids().long(), CONTEXT.cpu())


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_texts_after_padded_rows_of_any_cache(chunk_size):
    model = tiny()
    rows = [CONTEXT, CONTEXT[:23], prompt(31, seed=8)[0]]
    ids, mask = left_padded(rows)
    texts = [prompt(count, seed=count)[0] for count in (5, 1, 9, 2, 2, 3)]
    contexts = [row for row in rows for _ in range(2)]
    for cache in (
        DenseCache(model),
        H2OCache(model, budget=64),
        HydragenCache(model, min_tokens=4),
    ):
        logits = last(model, cache, ids, mask)
        assert_equal(logprobs(cache, texts, last_logits=logits, chunk_size=chunk_size), model, contexts, texts)
        if isinstance(cache, HydragenCache):
            assert_equal(logprobs(cache, texts, chunk_size=chunk_size), model, contexts, texts)


def test_a_store_knows_the_last_token_of_what_it_holds(tmp_path):
    model = tiny()
    store = PrefixStore(model, min_tokens=4)
    assert_equal(logprobs(store.prefix(CONTEXT), TEXTS), model, [CONTEXT] * 3, TEXTS)
    # a shorter document, which begins like one that is stored, and one that was saved
    assert_equal(logprobs(store.prefix(CONTEXT[:21]), TEXTS), model, [CONTEXT[:21]] * 3, TEXTS)
    store.save(tmp_path)
    again = PrefixStore.load(tmp_path, model).get(CONTEXT)
    assert_equal(logprobs(again, TEXTS), model, [CONTEXT] * 3, TEXTS)


@pytest.mark.parametrize("budget", [64, 16])
def test_a_store_tells_a_compressed_prefix_its_tokens(budget):
    model = tiny()
    kept = H2OCache(model, budget=budget)
    feed(model, kept, CONTEXT[None])
    store = PrefixStore(model, min_tokens=4)
    store.put(CONTEXT, HydragenCache.from_cache(kept))
    cache = store.get(CONTEXT)
    assert torch.equal(cache.known_ids().long(), CONTEXT.cpu())
    if budget == 64:
        assert_equal(logprobs(cache, TEXTS), model, [CONTEXT] * 3, TEXTS)
        return
    # the last token is read again, by what is kept
    whole = [torch.cat([CONTEXT[-1:], text]) for text in TEXTS]
    for found, text in zip(logprobs(cache, TEXTS), whole, strict=True):
        cut = cache.clone()
        cut._step_back()
        said = feed(model, cut, text[None, :-1], cut.cover(torch.ones_like(text[None, :-1])))[0]
        want = said.float().log_softmax(-1).gather(-1, text[1:, None].to(said.device))[:, 0]
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    wrong = torch.cat([CONTEXT.flip(0), TEXTS[0]])[None]
    with pytest.raises(ValueError, match="does not match"):
        generate(model, cache, wrong, num_beams=1)


def test_after_a_generation():
    model = tiny()
    cache = HydragenCache.from_prefix(model, CONTEXT)
    whole = generate(model, cache, torch.cat([CONTEXT, prompt(3, seed=2)[0]])[None], num_beams=1)[0]
    seen = whole[: int(cache.get_seq_length())]
    assert_equal(logprobs(cache, TEXTS), model, [seen] * 3, TEXTS)


def test_a_prefix_of_one_token():
    model = tiny()
    cache = HydragenCache.from_prefix(model, CONTEXT[:1])
    assert_equal(logprobs(cache, TEXTS), model, [CONTEXT[:1]] * 3, TEXTS)


def test_a_tree_whose_rows_end_at_different_places():
    model = tiny()
    cache = HydragenCache.from_tree(model, [CONTEXT[:8], CONTEXT[8:20], prompt(5, seed=6)[0]], [-1, 0, 0])
    contexts = [CONTEXT[:20], torch.cat([CONTEXT[:8], prompt(5, seed=6)[0]])]
    assert_equal(logprobs(cache, TEXTS[:2]), model, contexts, TEXTS[:2])


def test_the_shape_is_that_of_the_continuations():
    model = tiny()
    cache = HydragenCache.from_prefix(model, CONTEXT)
    text = TEXTS[2]
    flat, whole = logprobs(cache, text), logprobs(cache, torch.stack([text, text.flip(0)]))
    assert flat.shape == text.shape
    assert whole.shape == (2, len(text))
    torch.testing.assert_close(flat, whole[0])
    assert_equal(list(whole), model, [CONTEXT] * 2, [text, text.flip(0)])
    assert_equal(logprobs(cache, [text.tolist()]), model, [CONTEXT], [text])


@pytest.mark.parametrize(
    "build",
    [
        lambda model: H2OCache(model, budget=16),
        lambda model: KVzipCache(model, budget=16, chunk=7),
        lambda model: AttentionMatchingCache(model, budget=16, sinks=1, chunk=30, queries=20),
        lambda model: ShadowKVCache(model, **SHADOW),
        lambda model: GEARCache(model, bits=2, buffer=8, group_size=8),
    ],
)
def test_a_cache_that_compresses_says_what_its_own_forwards_say(build):
    model = tiny()
    cache = build(model)
    logits = last(model, cache, CONTEXT[None])
    text = TEXTS[2]
    held = str(cache.memory())
    found = logprobs(cache, text, last_logits=logits, chunk_size=1)
    assert str(cache.memory()) == held
    said = []
    for token in text:
        said.append(logits.float().log_softmax(-1)[0, token])
        logits = feed(model, cache, token[None, None])[:, -1]
    torch.testing.assert_close(found, torch.stack(said), atol=1e-5, rtol=1e-5)
    # it matters what is kept
    assert float((found - by_full_forward(model, CONTEXT, text)).abs().max()) > 1e-4


def test_a_compressed_prefix():
    """What compressed a document before it became a prefix never told which tokens it was fed; a store was told."""
    model = tiny()
    kept = H2OCache(model, budget=16)
    logits = last(model, kept, CONTEXT[None])
    want = logprobs(kept, TEXTS, last_logits=logits)
    shared = HydragenCache.from_cache(kept)
    with pytest.raises(ValueError, match=r"last token of row 0.* pass last_logits"):
        logprobs(shared, TEXTS)
    for one, other in zip(logprobs(shared, TEXTS, last_logits=logits), want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_scored_is_refused_and_nothing_changes():
    model = tiny()
    empty = DenseCache(model)
    with pytest.raises(ValueError, match="empty"):
        logprobs(empty, TEXTS)
    cache = DenseCache(model)
    logits = last(model, cache, prompt(9, 2))
    pairs = TEXTS[:2]
    with pytest.raises(ValueError, match=r"DenseCache does not hold.* last_logits"):
        logprobs(cache, pairs)
    size = logits.shape[-1]
    for wrong, said in (
        ({"last_logits": logits[:1]}, rf"\[2, {size}\], got \[1, {size}\]"),
        ({"last_logits": logits, "chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            logprobs(cache, pairs, **wrong)
    with pytest.raises(TypeError, match="takes a kvcompress cache, such as HydragenCache, got DynamicCache"):
        logprobs(DynamicCache(), TEXTS)
    for texts, said in (
        ([[None]], "number 0 is .None."),
        (torch.empty(1, 0).long(), r"number 0 is \[0\]"),
        (TEXTS, "2 rows: logprobs needs one continuation or more of each, got 3"),
        ([], "got 0"),
        ([TEXTS[0], []], r"number 1 is \[0\]"),
        ([TEXTS[0], [size]], f"from 0 to {size - 1}; number 1"),
        ([TEXTS[0], [0.5]], "number 1 is torch.float32"),
        (TEXTS[0].reshape(1, 1, -1), r"got \[1, 1, 5\]"),
    ):
        with pytest.raises(ValueError, match=said):
            logprobs(cache, texts, last_logits=logits)
    assert cache.get_seq_length() == 9


def test_padded_rows_go_on_with_cover():
    """`cover` is every cache's: a second turn's mask from that of its new tokens."""
    model = tiny()
    rows = [CONTEXT, CONTEXT[:23]]
    ids, mask = left_padded(rows)
    cache = DenseCache(model)
    feed(model, cache, ids, mask)
    more = prompt(4, 2, seed=9)
    covered = cache.cover(torch.ones_like(more))
    assert torch.equal(covered.bool().cpu(), torch.cat([mask, torch.ones_like(more)], 1).bool().cpu())
    got = feed(model, cache, more, covered, position_ids=places(covered)[:, -4:])
    for row, own in enumerate(rows):
        with torch.no_grad():
            want = model(torch.cat([own, more[row]])[None], use_cache=False).logits[0, -4:]
        torch.testing.assert_close(got[row], want, atol=2e-4, rtol=2e-4)


# what a breaker found


def test_rows_that_were_repeated():
    model = tiny()
    cache = HydragenCache(model)
    feed(model, cache, CONTEXT[None])
    cache.batch_repeat_interleave(2)
    assert_equal(logprobs(cache, TEXTS[:2]), model, [CONTEXT] * 2, TEXTS[:2])


def test_rows_that_end_before_the_last_column():
    model = tiny()
    ids = torch.stack([CONTEXT[:10], torch.cat([CONTEXT[:6], CONTEXT.new_zeros(4)])])
    mask = (torch.arange(10)[None] < torch.tensor([[10], [6]])).long().to(ids.device)
    cache = HydragenCache(model)
    feed(model, cache, ids, mask)
    assert_equal(logprobs(cache, TEXTS[:2]), model, [CONTEXT[:10], CONTEXT[:6]], TEXTS[:2])


@pytest.mark.parametrize("way", ["built", "prefix", "get", "ragged"])
def test_a_cache_that_waits_for_whole_prompts_says_so(way):
    model = tiny()
    store = PrefixStore(model, min_tokens=4)
    store.prefix(CONTEXT)
    ids, mask = left_padded([CONTEXT, CONTEXT[:30], CONTEXT[:3]])
    cache = {
        "built": lambda: HydragenCache(model, CONTEXT[None]),
        "prefix": lambda: store.prefix(CONTEXT[None]),
        "get": lambda: store.get(CONTEXT[None]),
        "ragged": lambda: HydragenCache(model, ids, mask, min_tokens=4),
    }[way]()
    with pytest.raises(ValueError, match="made for whole prompts"):
        logprobs(cache, TEXTS)
    if way == "built":
        feed(model, cache, CONTEXT[None, -1:])
        assert_equal(logprobs(cache, TEXTS), model, [CONTEXT] * 3, TEXTS)


def test_the_cache_stays_as_it_is():
    model = tiny()
    cache = HydragenCache.from_prefix(model, CONTEXT)
    cache.push(prompt(6))
    feed(model, cache, prompt(4), cache.cover(torch.ones(1, 4, dtype=torch.long, device=CONTEXT.device)))
    before = str(cache.memory()), cache.own_lengths(), dict(cache.tree.nodes), cache.padding.columns_fixed
    logprobs(cache, TEXTS)
    assert (str(cache.memory()), cache.own_lengths(), dict(cache.tree.nodes), cache.padding.columns_fixed) == before
    cache.pop()
    assert cache.get_seq_length() == 40


def test_tokens_after_an_end_are_no_filler():
    model = build("llama")
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 9
    ids, mask = left_padded([CONTEXT, CONTEXT[:23]])
    cache = H2OCache(model, budget=64)
    logits = last(model, cache, ids, mask)
    texts = [CONTEXT.new_tensor([5, 9, 9, 7, 8])] * 2
    found = logprobs(cache, texts, last_logits=logits, chunk_size=1)
    assert_equal(found, model, [CONTEXT, CONTEXT[:23]], texts)
