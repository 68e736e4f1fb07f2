"""PrefixStore: documents are run once, found by their tokens, and let go when there is no room."""

import json
import pickle
import random
import threading
import warnings

import pytest
import torch
from safetensors.torch import save_file

import kvcompress.prefix.store
from kvcompress import DenseCache, HydragenCache, PrefixStore, TransformCodec, measure_basis
from kvcompress.hf import layer_heads
from kvcompress.storage.tensor_file import TensorFile
from tests.contract.drive import feed, full, generate
from tests.contract.models import build, left_padded, prompt, tiny
from tests.prefix.rows import alone, pointers

DOCUMENT = prompt(60, seed=3)[0]
OTHER = torch.cat([DOCUMENT[:50], prompt(20, seed=8)[0]])
# keys and values, layers, KV heads, head_dim, bytes
TOKEN = 2 * 3 * 2 * 16 * 4


def check(model, cache, prefix):
    suffix = prompt(5, 2, seed=7)
    ids = torch.cat([prefix.expand(2, -1), suffix], 1)
    assert cache.get_seq_length() == len(prefix)
    assert torch.equal(generate(model, cache, ids), full(model, ids))


# README: `PrefixStore` keeps documents for `HydragenCache` from call to call
# docs: keeps documents from call to call
def test_a_document_is_run_once(run_through):
    model = tiny()
    counted = run_through(model)
    store = PrefixStore(model)
    first = store.prefix(DOCUMENT)
    assert sum(counted) == 60
    second = store.prefix(DOCUMENT)
    assert sum(counted) == 60
    assert pointers(first) == pointers(second)
    for cache in (first, second, store.prefix(DOCUMENT)):
        check(model, cache, DOCUMENT)
    assert store.nbytes() == 60 * TOKEN


# docs: and runs only what is not stored yet
# docs: `get` looks for the longest stored beginning of a document or of prompts, without running anything
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma4"])
def test_the_longest_beginning_is_taken_and_the_rest_run(family, run_through):
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
    before = sum(counted)
    found = store.get(DOCUMENT[:45])
    assert sum(counted) == before
    check(model, found, DOCUMENT[:45])
    token = 4 * sum(each.token for each in layer_heads(model.config))
    assert store.nbytes() == 80 * token, "what two have in common is stored once"
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


@pytest.mark.parametrize("ids", [torch.rand(5), torch.tensor([3, -1]), torch.tensor([True, False])])
def test_what_is_no_token_is_refused(ids):
    store = PrefixStore(tiny())
    for take in (store.prefix, store.get):
        with pytest.raises(ValueError, match="expected token ids, which are integers of at least 0, got"):
            take(ids)
    for take in (store.prefix, store.get):
        with pytest.raises(ValueError, match="expected token ids, which are integers of at least 0, got torch.float32"):
            take(torch.rand(2, 5))
    assert len(store) == 0


def test_a_cache_that_was_filled_with_other_tokens_is_not_put():
    model = tiny()
    store = PrefixStore(model)
    cache = store.prefix(DOCUMENT)
    question = prompt(6, seed=4)
    feed(model, cache, question)
    whole = torch.cat([DOCUMENT, question[0]])
    for at in (3, len(DOCUMENT) + 2):
        other = whole.clone()
        other[at] = (other[at] + 1) % 500
        with pytest.raises(ValueError, match=f"at {at} it saw {int(whole[at])}, and input_ids say {int(other[at])}"):
            store.put(other, cache)
    assert len(store) == 1
    store.put(whole, cache)
    check(model, store.get(whole), whole)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma4"])
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
    with pytest.raises(ValueError, match="not a saved PrefixStore"):
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
    with pytest.raises(ValueError, match="needs at least one token"):
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


# prompts

ANSWERED = [DOCUMENT, torch.cat([DOCUMENT, prompt(5, seed=11)[0]]), torch.cat([DOCUMENT, prompt(9, seed=12)[0]])]


def check_prompts(model, cache, rows, held):
    ids, mask = left_padded(rows)
    assert cache.tree.lengths()[0] == held
    assert torch.equal(generate(model, cache, ids, mask), full(model, ids, mask))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma4"])
def test_a_prompt_that_is_stored_whole_is_generated_from(family, run_through):
    model = tiny(family)
    store = PrefixStore(model)
    wanted = full(model, DOCUMENT[None], max_new_tokens=1)
    counted = run_through(model)
    for _ in range(2):
        assert torch.equal(generate(model, store.prefix(DOCUMENT[None]), DOCUMENT[None], max_new_tokens=1), wanted)
    assert sum(counted) == 60 + 2, "the last token is run again each time, and nothing else"
    check_prompts(model, store.get(DOCUMENT[None]), [DOCUMENT], 60)


def test_after_prompts_that_are_stored_whole_a_level_follows_the_last_token():
    model = tiny()
    store = PrefixStore(model)
    cache = store.prefix(DOCUMENT[None])
    cache.push(prompt(6, seed=4))
    check(model, cache, torch.cat([DOCUMENT, prompt(6, seed=4)[0]]))


# docs: `store.prefix(ids)` takes a document, or a batch of prompts that begin with one
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma4"])
def test_prompts_of_one_document_share_it(family, run_through):
    model = tiny(family)
    store = PrefixStore(model)
    counted = run_through(model)
    ids, mask = left_padded(ANSWERED)
    for _ in range(2):
        cache = store.prefix(ids, mask)
        assert sum(counted) == 60
    check_prompts(model, cache, ANSWERED, 60)
    check_prompts(model, store.get(ids, mask), ANSWERED, 60)
    # a prompt within the document, beside a longer one
    rows = [DOCUMENT[:38], ANSWERED[1]]
    check_prompts(model, store.prefix(*left_padded(rows)), rows, 38)
    same = DOCUMENT.expand(3, -1)
    assert torch.equal(generate(model, store.prefix(same), same), full(model, same))
    assert len(store) == 1


def test_prompts_that_share_little_leave_the_store_as_it_is():
    model = tiny()
    store = PrefixStore(model)
    rows = [DOCUMENT, OTHER, prompt(70, seed=9)[0]]
    ids, mask = left_padded(rows)
    assert store.get(ids, mask) is None
    assert torch.equal(generate(model, store.prefix(ids, mask), ids, mask), full(model, ids, mask))
    assert len(store) == 0


def test_what_is_neither_a_document_nor_prompts_is_refused():
    store = PrefixStore(tiny())
    ids, mask = left_padded([DOCUMENT, OTHER])
    with pytest.raises(ValueError, match=r"one document, \[tokens\] or \[1, tokens\], got \[2, 70\]"):
        store.put(ids, HydragenCache.from_prefix(tiny(), DOCUMENT))
    with pytest.raises(ValueError, match=r"one shape \[batch, tokens\]; got \[2, 70\] and \[2, 69\]"):
        store.prefix(ids, mask[:, 1:])
    with pytest.raises(ValueError, match="padded on the left"):
        store.prefix(ids.flip(1), mask.flip(1))
    with pytest.raises(ValueError, match="so does each prompt"):
        store.get(ids, mask * torch.tensor([[1], [0]]))
    with pytest.raises(ValueError, match="min_tokens must be at least 1, got 0"):
        PrefixStore(tiny(), min_tokens=0)


# models


def test_what_another_model_holds_is_refused(tmp_path):
    model, other = tiny(), build("llama", seed=1)
    store = PrefixStore(model)
    with pytest.raises(ValueError, match=r"the prefix store was made with LlamaForCausalLM.*differ in weights"):
        store.put(DOCUMENT, HydragenCache.from_prefix(other, DOCUMENT))
    assert len(store) == 0
    store.prefix(DOCUMENT)
    store.save(tmp_path)
    with pytest.raises(ValueError, match="differ in weights"):
        PrefixStore.load(tmp_path, other)
    theirs = PrefixStore(other)
    theirs.prefix(OTHER)
    with pytest.raises(ValueError, match="differ in weights"):
        theirs.save(tmp_path)
    assert len(PrefixStore.load(tmp_path, model)) == 1
    # the same weights elsewhere are the same model
    twin = build("llama")
    store.put(OTHER, HydragenCache.from_prefix(twin, OTHER))
    del twin
    cache = store.get(OTHER)
    cache.push(prompt(6, seed=4))
    check(model, cache, torch.cat([OTHER, prompt(6, seed=4)[0]]))


# files


def documents(count, tokens=33):
    return [prompt(tokens, seed=seed)[0] for seed in range(30, 30 + count)]


def stored(model, *of, **settings):
    store = PrefixStore(model, **settings)
    for document in of:
        store.prefix(document)
    return store


def prefixes(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


# docs: and processes the folder that `store.save(folder)` writes
def test_stores_of_several_processes_add_up_in_one_folder(tmp_path):
    model = tiny()
    first, second, third = documents(3)
    ours, theirs = stored(model, first), stored(model, second)
    ours.save(tmp_path)
    theirs.save(tmp_path)
    ours.prefix(third)
    ours.save(tmp_path)
    loaded = PrefixStore.load(tmp_path, model)
    assert len(loaded) == 3
    for document in (first, second, third):
        check(model, loaded.get(document), document)
    # what a store lets go goes from the folder, and what it never had stays
    longer = torch.cat([first, prompt(5, seed=4)[0]])
    ours.prefix(longer)
    ours.save(tmp_path)
    assert len(prefixes(tmp_path)) == 3
    loaded = PrefixStore.load(tmp_path, model)
    check(model, loaded.get(longer), longer)
    check(model, loaded.get(second), second)


def test_what_lies_in_the_folder_already_is_not_written_again(tmp_path):
    model = tiny()
    store = stored(model, *documents(3))
    store.save(tmp_path)
    before = {path.name: path.stat().st_ino for path in tmp_path.glob("*.safetensors")}
    store.prefix(DOCUMENT)
    store.save(tmp_path)
    after = {path.name: path.stat().st_ino for path in tmp_path.glob("*.safetensors")}
    assert len(after) == 4
    assert before.items() <= after.items()
    loaded = PrefixStore.load(tmp_path, model)
    loaded.save(tmp_path)
    assert {path.name: path.stat().st_ino for path in tmp_path.glob("*.safetensors")} == after


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    """Whichever file it was interrupted before, the folder answers for every document it answered for."""
    model = tiny()
    first, second, third = documents(3)
    stored(model, first, second).save(tmp_path)
    whole = kvcompress.prefix.store_folder.write_whole

    for files in range(3):
        left = files

        def interrupted(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                (tmp_path / "prefix-0123456789abcdef.partial").write_bytes(b"half")
                raise KeyboardInterrupt
            return whole(*arguments)

        monkeypatch.setattr(kvcompress.prefix.store_folder, "write_whole", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stored(model, second, third).save(tmp_path)
        monkeypatch.undo()
        loaded = PrefixStore.load(tmp_path, model)
        assert len(loaded) == 2
        for document in (first, second):
            check(model, loaded.get(document), document)
    stored(model, third).save(tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    assert len(prefixes(tmp_path)) == len(PrefixStore.load(tmp_path, model)) == 3


def test_a_flipped_bit_gives_a_warning_or_an_error_and_never_another_text(tmp_path):
    model = tiny()
    store = stored(model, *documents(2))
    store.save(tmp_path)
    wanted = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".lock"}
    generator = random.Random(0)
    kept = {document: store.get(document) for document in documents(2)}
    for flip in range(60):
        name = sorted(wanted)[flip % 3]
        data = bytearray(wanted[name])
        # the headers, too, which are a small part
        at = generator.randrange(len(data) if flip % 2 else min(len(data), 2000))
        data[at] ^= 1 << generator.randrange(8)
        (tmp_path / name).write_bytes(data)
        with pytest.warns(UserWarning, match="damaged"):
            loaded = PrefixStore.load(tmp_path, model)
        assert len(loaded) == (2 if name == "prefixes.json" else 1)
        for document, cache in kept.items():
            found = loaded.get(document)
            if found is not None:
                for layer, own in zip(found.layers, cache.layers, strict=True):
                    for segment, same in zip(layer.segments(), own.segments(), strict=True):
                        for part, tensor in segment.tensors().items():
                            assert torch.equal(tensor, same.tensors()[part])
        (tmp_path / name).write_bytes(wanted[name])
    assert len(PrefixStore.load(tmp_path, model)) == 2


def test_a_file_under_the_name_of_another_is_left_out(tmp_path):
    model = tiny()
    stored(model, *documents(2)).save(tmp_path)
    one, other = sorted(tmp_path.glob("*.safetensors"))
    one.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match="its name does not match its content"):
        assert len(PrefixStore.load(tmp_path, model)) == 1
    one.unlink()
    with pytest.warns(UserWarning, match="1 of 2 prefixes.*missing"):
        assert len(PrefixStore.load(tmp_path, model)) == 1


def first_format(folder, entries, names=None):
    """A folder as it was written before files had fingerprints and checksums."""
    folder.mkdir()
    index = {}
    for at, (document, cache) in enumerate(entries.items()):
        name = (names or {}).get(at, f"prefix-{at}.safetensors")
        tensors, layers = {}, []
        for number, layer in enumerate(cache.layers):
            state, facts = layer.dump()
            tensors |= {f"layers.{number}.{key}": tensor.contiguous() for key, tensor in state.items()}
            layers.append(facts)
        facts = {"cache": "HydragenCache", "settings": cache._settings(), "layers": layers}
        metadata = {"format": "kvcompress-cache-1", "facts": json.dumps(facts)}
        save_file(tensors, folder / name, metadata=metadata)
        index[name] = document.tolist()
    (folder / "prefixes.json").write_text(json.dumps(index) + "\n")


def test_a_folder_of_the_first_format_is_loaded_and_becomes_one_of_the_second(tmp_path):
    model = tiny()
    folder = tmp_path / "store"
    first_format(folder, {document: HydragenCache.from_prefix(model, document) for document in (DOCUMENT, OTHER)})
    with pytest.warns(UserWarning, match="not checked") as told:
        loaded = PrefixStore.load(folder, model)
    assert len(told) == 1
    for document in (DOCUMENT, OTHER):
        check(model, loaded.get(document), document)
    with pytest.raises(ValueError, match="this store has not loaded"):
        stored(model, DOCUMENT).save(folder)
    loaded.save(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PrefixStore.load(folder, model)
    assert len(again) == 2
    assert len(prefixes(folder)) == 2


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/tmp/x.safetensors", "sub/prefix-0.safetensors", "x.safetensors"]
)
@pytest.mark.parametrize("form", [1, 2])
def test_a_list_that_names_other_files_is_refused(name, form, tmp_path):
    model = tiny()
    folder = tmp_path / "store"
    if form == 1:
        (tmp_path / "store" / "sub").mkdir(parents=True)
        (folder / "prefixes.json").write_text(json.dumps({name: DOCUMENT.tolist()}))
    else:
        stored(model, DOCUMENT).save(folder)
        told = json.loads((folder / "prefixes.json").read_text()) | {"files": [name]}
        (folder / "prefixes.json").write_text(json.dumps(told | {"sum": kvcompress.prefix.store_folder._sum(told)}))
    with pytest.raises(ValueError, match=rf"names '{name}', which no PrefixStore wrote"):
        PrefixStore.load(folder, model)


def test_what_does_not_fit_is_left_out_and_stays_in_the_folder(tmp_path):
    model = tiny()
    large, small, newest = prompt(200, seed=1)[0], *documents(2)
    stored(model, small, large, newest).save(tmp_path)
    with pytest.warns(UserWarning, match="2 of 3 prefixes.*max_bytes"):
        loaded = PrefixStore.load(tmp_path, model, max_bytes=100 * TOKEN)
    assert loaded.get(large) is None
    for document in (small, newest):
        check(model, loaded.get(document), document)
    with pytest.warns(UserWarning, match="1 of 3 prefixes"):
        assert PrefixStore.load(tmp_path, model, max_bytes=40 * TOKEN).get(newest) is not None
    loaded.save(tmp_path)
    check(model, PrefixStore.load(tmp_path, model).get(large), large)


def test_the_least_match_is_saved(tmp_path):
    model = tiny()
    store = stored(model, DOCUMENT, min_tokens=8)
    store.save(tmp_path)
    loaded = PrefixStore.load(tmp_path, model)
    assert loaded.min_tokens == 8
    assert loaded.get(torch.cat([DOCUMENT[:8], prompt(9, seed=9)[0]])).get_seq_length() == 8


def test_a_store_is_saved_and_not_pickled():
    with pytest.raises(TypeError, match=r"store\.save\(folder\)"):
        pickle.dumps(PrefixStore(tiny()))


# many


def test_the_bytes_of_a_storage_are_looked_at_once_an_entry(monkeypatch):
    """However many entries there are, one that comes or goes costs what it costs alone."""
    model = tiny()
    store = PrefixStore(model, max_bytes=33 * 40 * TOKEN)
    looked = []
    look = kvcompress.prefix.store._storages
    monkeypatch.setattr(kvcompress.prefix.store, "_storages", lambda cache: looked.append(cache) or look(cache))
    of_them = documents(80)
    for ids in of_them:
        store.put(ids, HydragenCache.from_prefix(model, ids))
    assert len(store) == 40
    assert store.nbytes() == 40 * 33 * TOKEN
    before = len(looked)
    for ids in of_them[40:]:
        assert store.get(ids) is not None
    assert len(looked) == before <= 80 * 2


# docs: Threads may share a store
def test_threads_share_a_store():
    model = tiny()
    store = PrefixStore(model, max_bytes=33 * 3 * TOKEN)
    all_of_them = documents(8)
    wanted = {number: HydragenCache.from_prefix(model, ids) for number, ids in enumerate(all_of_them)}
    errors = []

    def work(seed):
        generator = random.Random(seed)
        try:
            for _ in range(25):
                number = generator.randrange(8)
                cache = store.prefix(all_of_them[number])
                node, own = (each.layers[2].segments()[0].prefix_keys for each in (cache, wanted[number]))
                torch.testing.assert_close(node, own)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(store) == 3
    assert store.nbytes() == 3 * 33 * TOKEN


def test_a_least_length_of_another_library_can_be_held_by_a_file(tmp_path):
    model, least = tiny(), torch.tensor(5)
    HydragenCache(model, prompt(8).repeat(2, 1), min_tokens=least).save(tmp_path / "cache")
    assert HydragenCache.load(tmp_path / "cache", model).min_tokens == 5
    store = PrefixStore(model, min_tokens=least)
    store.prefix(prompt(8)[0])
    store.save(tmp_path / "store")
    assert PrefixStore.load(tmp_path / "store", model).min_tokens == 5


@pytest.fixture(scope="module")
def basis():
    return measure_basis(build("llama"), [prompt(200, 2, seed=9)])


def same_keys(ours, theirs):
    """Whether two caches hold the same in their first nodes."""
    pairs = [
        (next(iter(layer.held.values()))[0] for layer in pair) for pair in zip(ours.layers, theirs.layers, strict=True)
    ]
    return all(
        torch.equal(x.prefix_keys, y.prefix_keys) and torch.equal(x.prefix_values, y.prefix_values) for x, y in pairs
    )


# docs: a folder may hold prefixes of several codecs
def test_a_folder_may_hold_prefixes_of_several_codecs(basis, tmp_path):
    model = tiny()
    store = PrefixStore(model)
    documents = [prompt(300, seed=seed)[0] for seed in (3, 4, 5)]
    codecs = (None, "zstd", TransformCodec(basis, bits=4))
    for document, codec in zip(documents, codecs, strict=True):
        store.prefix(document)
        store.save(tmp_path, codec=codec)
    sizes = sorted(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert len(sizes) == 3
    assert sizes[0] < 0.25 * sizes[1] < 0.25 * sizes[2]
    again = PrefixStore.load(tmp_path, model, basis=basis)
    assert again.nbytes() == store.nbytes() == 900 * TOKEN
    for document, exact in zip(documents, (True, True, False), strict=True):
        assert same_keys(again.get(document), store.get(document)) == exact
    # nothing is written twice, whatever the codec
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    again.save(tmp_path, codec=TransformCodec(basis, bits=1))
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")} == before


# docs: what was loaded from a lossy file may be saved anew, or continued and saved: it loses next to nothing more
def test_what_was_loaded_from_a_lossy_file_loses_nothing_more(basis, tmp_path):
    model = tiny()
    store = PrefixStore(model)
    document, longer = prompt(200, seed=3)[0], prompt(300, seed=3)[0]
    store.prefix(document)
    store.save(tmp_path / "first", codec=TransformCodec(basis, bits=3))
    once = PrefixStore.load(tmp_path / "first", model, basis=basis)
    held = once.get(document)
    assert not same_keys(held, store.get(document))
    once.save(tmp_path / "second", codec=TransformCodec(basis, bits=1))
    assert same_keys(PrefixStore.load(tmp_path / "second", model, basis=basis).get(document), held)
    once.prefix(longer)
    once.save(tmp_path / "first", codec=TransformCodec(basis, bits=1))
    last = PrefixStore.load(tmp_path / "first", model, basis=basis)
    assert len(last) == 1
    assert same_keys(last.get(longer), held)


def test_room_is_for_what_prefixes_take_in_memory(basis, tmp_path):
    model = tiny()
    store = PrefixStore(model)
    for seed in (3, 4):
        store.prefix(prompt(300, seed=seed)[0])
    store.save(tmp_path, codec=TransformCodec(basis, bits=2))
    files = [*tmp_path.glob("*.safetensors")]
    assert sum(file.stat().st_size for file in files) < 300 * TOKEN
    assert len(PrefixStore.load(tmp_path, model, 600 * TOKEN, basis=basis)) == 2
    with pytest.warns(UserWarning, match="1 of 2 prefixes in .* are loaded"):
        assert len(PrefixStore.load(tmp_path, model, 599 * TOKEN, basis=basis)) == 1
    with pytest.warns(UserWarning, match="0 of 2 prefixes in .* are loaded"):
        assert len(PrefixStore.load(tmp_path, model, 299 * TOKEN, basis=basis)) == 0
    with TensorFile(files[0]) as file:
        assert file.nbytes("layers.") == 300 * TOKEN


def test_a_store_that_needs_a_basis_says_which(basis, tmp_path):
    # the same weights, of which the second was given no basis
    writer, model = build("llama"), build("llama")
    store = PrefixStore(writer)
    store.prefix(prompt(100, seed=3)[0])
    with pytest.raises(TypeError, match="codec must be 'zstd', a TransformCodec or None, got 'gzip'"):
        store.save(tmp_path / "store", codec="gzip")
    assert not (tmp_path / "store").exists()
    store.save(tmp_path / "store", codec=TransformCodec(basis))
    with pytest.raises(ValueError, match=f"coded in the basis {basis.digest}, .* given none"):
        PrefixStore.load(tmp_path / "store", model)
    file = next((tmp_path / "store").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="a prefix is skipped: .*does not match its checksum"):
        assert len(PrefixStore.load(tmp_path / "store", model, basis=basis)) == 0


# docs: `max_bytes` is written as a number of bytes or as `"8GiB"`
def test_a_limit_may_have_a_unit():
    assert PrefixStore(tiny(), max_bytes="8GiB").max_bytes == PrefixStore(tiny(), max_bytes=8 << 30).max_bytes


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PrefixStore("name"), TypeError, "a cache is built for a loaded model, got str: pass the model itself"),
        (
            lambda: PrefixStore(tiny(), max_byte=8),
            TypeError,
            "max_byte is no setting of PrefixStore; did you mean",
        ),
        (lambda: PrefixStore(tiny(), "8"), ValueError, "max_bytes must be a number of bytes"),
        (lambda: PrefixStore(tiny(), 0), ValueError, "max_bytes must be at least 1, got 0"),
    ],
    ids=["model", "setting", "unit", "nothing"],
)
def test_a_store_that_cannot_be_says_why(call, error, message):
    with pytest.raises(error, match=message):
        call()
