"""PrefixStore: documents are run once, found by their tokens, and let go when there is no room."""

import pytest
import torch

from kvcompress import DenseCache, HydragenCache, PrefixStore
from tests.contract.drive import feed, full, generate
from tests.contract.models import left_padded, prompt, tiny
from tests.test_hydragen import alone, pointers, run_through  # noqa: F401

DOCUMENT = prompt(60, seed=3)[0]
OTHER = torch.cat([DOCUMENT[:50], prompt(20, seed=8)[0]])
# keys and values, layers, KV heads, head_dim, bytes
TOKEN = 2 * 3 * 2 * 16 * 4


def check(model, cache, prefix):
    suffix = prompt(5, 2, seed=7)
    ids = torch.cat([prefix.expand(2, -1), suffix], 1)
    assert cache.get_seq_length() == len(prefix)
    assert torch.equal(generate(model, cache, ids), full(model, ids))


def test_a_document_is_run_once(run_through):  # noqa: F811
    model = tiny()
    counted = run_through(model)
    store = PrefixStore(model)
    first = store.prefix(DOCUMENT)
    assert sum(counted) == 60
    second = store.prefix(DOCUMENT[None])
    assert sum(counted) == 60
    assert pointers(first) == pointers(second)
    for cache in (first, second, store.prefix(DOCUMENT)):
        check(model, cache, DOCUMENT)
    assert store.nbytes() == 60 * TOKEN


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_longest_beginning_is_taken_and_the_rest_run(family, run_through):  # noqa: F811
    model = tiny(family)
    counted = run_through(model)
    store = PrefixStore(model)
    store.prefix(DOCUMENT[:40])
    store.prefix(DOCUMENT)
    assert len(store) == 1, "the longer one serves for the shorter"
    before = sum(counted)
    cache = store.prefix(OTHER)
    assert sum(counted) - before == 20
    check(model, cache, OTHER)
    check(model, store.get(DOCUMENT[:45]), DOCUMENT[:45])
    assert store.nbytes() == 80 * TOKEN, "what two have in common is stored once"
    assert store.get(prompt(60, seed=9)[0]) is None


def test_too_short_a_match_is_none():
    model = tiny()
    store = PrefixStore(model)
    store.prefix(DOCUMENT)
    assert store.get(torch.cat([DOCUMENT[:31], prompt(9, seed=9)[0]])) is None
    assert store.get(torch.cat([DOCUMENT[:32], prompt(9, seed=9)[0]])).get_seq_length() == 32


def test_the_least_recently_used_goes_first():
    model = tiny()
    store = PrefixStore(model, max_bytes=130 * TOKEN)
    documents = [prompt(40, seed=seed)[0] for seed in range(10, 14)]
    for document in documents[:3]:
        store.prefix(document)
    assert store.get(documents[0]) is not None
    store.prefix(documents[3])
    assert [store.get(document) is not None for document in documents] == [True, False, True, True]
    assert store.nbytes() == 120 * TOKEN
    large = prompt(140, seed=20)[0]
    check(model, store.prefix(large), large)
    assert len(store) == 3, "what has no room is answered and not stored"
    with pytest.raises(ValueError, match="more than the store's max_bytes"):
        store.put(large, HydragenCache.from_prefix(model, large))


def test_a_conversation_is_put_back():
    model = tiny()
    store = PrefixStore(model)
    cache = store.prefix(DOCUMENT)
    question = prompt(6, seed=4)
    feed(model, cache, question)
    whole = torch.cat([DOCUMENT, question[0]])
    store.put(whole, cache)
    check(model, store.get(whole), whole)
    # the cache itself goes on
    step = prompt(1, seed=5)
    torch.testing.assert_close(
        feed(model, cache, step)[0, -1], alone(model, torch.cat([whole, step[0]]))[-1], rtol=1e-4, atol=2e-4
    )


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_saved_store_is_loaded(family, tmp_path):
    model = tiny(family)
    store = PrefixStore(model)
    for document in (DOCUMENT, OTHER, prompt(33, seed=1)[0]):
        store.prefix(document)
    store.save(tmp_path / "store")
    loaded = PrefixStore.load(tmp_path / "store", model)
    assert len(loaded) == 3
    for document in (OTHER, DOCUMENT, prompt(33, seed=1)[0]):
        check(model, loaded.get(document), document)
    with pytest.raises(ValueError, match="no saved PrefixStore"):
        PrefixStore.load(tmp_path, model)


def test_a_trimmed_window_is_matched_at_its_end_only():
    """A sliding layer has let go of what the beginning of a node would need."""
    model = tiny("mistral")
    document = prompt(400)[0]
    store = PrefixStore(model)
    store.prefix(document[:300])
    store.prefix(document)
    assert store.get(document[:350]).get_seq_length() == 300
    check(model, store.get(document), document)


def test_what_does_not_fit_is_refused():
    model = tiny()
    store = PrefixStore(model)
    with pytest.raises(ValueError, match="one path of 5 tokens"):
        store.put(DOCUMENT[:5], HydragenCache.from_prefix(model, DOCUMENT))
    with pytest.raises(ValueError, match="one path"):
        store.put(DOCUMENT, HydragenCache.from_tree(model, [DOCUMENT, OTHER], [-1, -1]))
    with pytest.raises(ValueError, match="needs a token"):
        store.get([])
    with pytest.raises(ValueError, match="at least 1"):
        PrefixStore(model, 0)


def test_other_kinds_of_nodes_are_stored_whole():
    model = tiny()
    dense = DenseCache(model)
    ids, _ = left_padded([DOCUMENT])
    feed(model, dense, ids)
    store = PrefixStore(model)
    store.put(DOCUMENT, HydragenCache.from_cache(dense))
    check(model, store.get(DOCUMENT), DOCUMENT)
