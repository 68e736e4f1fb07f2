"""Bytes reported are bytes alive, and what was let go is gone."""

import dataclasses
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from kvcompress.hf import cache_argument
from tests.contract.caches import by_name, every_cache, those
from tests.contract.drive import feed, generate
from tests.contract.models import DEVICE, build, families, left_padded, prompt, tiny

# longer than any matrix of the tiny models is large
LONG = 400


def storages(root):
    """Bytes of every storage that an object holds on to, by address; models are only referred to, not held."""
    found, visited, queue = {}, set(), [root]
    while queue:
        thing = queue.pop()
        if id(thing) in visited or isinstance(thing, type | torch.nn.Module | weakref.ref):
            continue
        visited.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            queue.extend(thing.values())
        elif isinstance(thing, list | tuple | set):
            queue.extend(thing)
        elif hasattr(thing, "__dict__") and not callable(thing):
            queue.extend(vars(thing).values())
    return found


@every_cache
@families("llama", slow=("gemma2", "gemma4", "opt"))
def test_the_bytes_reported_are_those_of_the_live_storages(entry, family):
    model = tiny(family)
    cache = entry.build(model)
    assert cache.memory().total_bytes == 0
    ids, whole = left_padded([prompt(27)[0], prompt(20, seed=2)[0]])
    for start, stop in ((0, 20), (20, 21), (21, 26), (26, 27)):
        feed(model, cache, ids[:, start:stop], whole[:, :stop])
        assert cache.memory().total_bytes == sum(storages(cache).values())
    report = cache.memory()
    assert report.total_bytes == sum(report.by_component.values()) == sum(report.by_device.values())
    assert report.total_bytes == report.device_bytes + report.host_bytes + report.disk_bytes
    assert report.device_bytes > 0
    if DEVICE == "cpu":
        assert report.host_bytes == report.offloaded.get("host", 0)
    assert report.ratio == report.total_bytes / report.full_bytes
    assert report.tokens_seen == 27
    assert f"tokens seen {report.tokens_seen}" in str(report)
    for name in report.by_component:
        assert name in str(report)


@every_cache
def test_what_is_hidden_cropped_or_moved_leaves_nothing_behind(entry):
    model = tiny()
    # two rows begin alike, for caches that store that once
    ids = prompt(20, 3)
    ids[2, :6] = ids[0, :6]
    mask = torch.ones(3, 25, dtype=torch.long, device=DEVICE)
    mask[1, 3] = 0
    cache = entry.build(model)

    def assert_all_reported():
        assert cache.memory().total_bytes == sum(storages(cache).values())

    feed(model, cache, ids, mask[:, :20])
    mask[1, 15:20] = 0
    feed(model, cache, prompt(5, 3, seed=3), mask)
    assert_all_reported()
    if entry.croppable:
        cache.crop(-2)
        assert_all_reported()
        assert cache.memory().by_component["padding"] == 3 * 23
    cache.reorder_cache(torch.tensor([2, 0, 1], device=DEVICE))
    assert_all_reported()
    cache.batch_select_indices(torch.tensor([1], device=DEVICE))
    assert_all_reported()


@every_cache
def test_what_a_generation_leaves_is_reported(entry):
    model = tiny()
    cache = entry.build(model)
    generate(model, cache, *left_padded([prompt(20)[0], prompt(13, seed=2)[0]]), num_beams=2)
    assert cache.memory().total_bytes == sum(storages(cache).values())
    cache.batch_select_indices(torch.tensor([0], device=DEVICE))
    assert cache.memory().total_bytes == sum(storages(cache).values())


@every_cache
@families("mistral", slow=("llama", "gemma2"))
def test_the_full_cache_it_is_compared_with_is_transformers_own(entry, family):
    model = tiny(family)
    cache, full = entry.build(model), DynamicCache(config=model.config)
    for each in (cache, full):
        feed(model, each, prompt(20, 2))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    # transformers' own windows hold one token less, and get it back from the next forward
    windows = sum(layer.window is not None for layer in cache.layers)
    assert cache.memory().full_bytes == held + windows * 2 * full.layers[0].keys[:, :, 0].nbytes


@contextmanager
def what_comes():
    """Gives a function that finds the tensors made since, whose storage has at least so many bytes, by shape."""

    def large_tensors(least):
        gc.collect()
        return [
            list(thing.shape)
            for thing in gc.get_objects()
            if type(thing) is torch.Tensor and thing.untyped_storage().nbytes() >= least
        ]

    gc.collect()
    # what is there already is not looked at, which is most of the time
    gc.freeze()
    try:
        yield large_tensors
    finally:
        gc.unfreeze()


# README: that take less memory and read less of it per step
@those(lambda entry: entry.budget and entry.name != "h2o_fraction")
@families("llama", slow=("gemma2", "gpt_oss"))
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_no_full_length_tensor_is_alive_after_prefill(entry, family, padded):
    model = tiny(family)
    ids, mask = left_padded([prompt(LONG)[0], prompt(LONG - (37 if padded else 0), seed=2)[0]])
    cache = entry.build(model)
    with what_comes() as large_tensors:
        feed(model, cache, ids, mask)
        head_dim = cache.layers[0].kv_shape[2]
        # the keys of one row's one head are that large
        full_length = LONG * head_dim * 4
        assert not large_tensors(full_length)
        generate(model, cache, torch.cat([ids, ids[:, :1]], 1), torch.cat([mask, mask[:, -1:]], 1), max_new_tokens=3)
        assert not large_tensors(full_length)
    assert cache.memory().ratio < 0.5


class Largest(TorchDispatchMode):
    """The most numbers that a tensor has which some operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                # what is expanded takes no memory
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return made


# README: No queries x keys matrix is ever built, not even in prefill
@every_cache
@families("llama", slow=("gemma2", "gemma4"))
def test_nothing_of_size_queries_times_keys_is_built(entry, family):
    model, tokens = tiny(family), 1600
    cache = entry.build(model)
    for layer in cache.layers:
        if getattr(getattr(layer, "policy", None), "rereads", None) is not None:
            # few chunks to read again, and long ones
            layer.policy = cache.policy = dataclasses.replace(layer.policy, chunk=500)
    ids = prompt(LONG).repeat(1, tokens // LONG)
    if DEVICE == "cuda":
        # the autotuner of the kernels overwrites the L2 cache between two trials
        tuned = cache.clone()
        with torch.no_grad():
            for _ in range(2):
                model(ids, **cache_argument(model, tuned), logits_to_keep=1)
    with Largest() as largest, torch.no_grad():
        for _ in range(2):
            model(ids, **cache_argument(model, cache), logits_to_keep=1)
    # nor of the first forward's, whose keys are half of the second's
    heads = model.config.num_attention_heads
    assert tokens * model.config.hidden_size <= largest.numbers < heads * tokens * tokens


def test_a_full_length_tensor_that_stays_alive_is_found():
    model = tiny()
    cache = by_name["h2o"].build(model)
    update = cache.layers[1].update
    hidden = []

    def leak(key, value, *args, **kwargs):
        hidden.append(key[:, :1, :5])
        return update(key, value, *args, **kwargs)

    cache.layers[1].update = leak
    with what_comes() as large_tensors:
        feed(model, cache, prompt(LONG, 2))
        assert [2, 1, 5, 16] in large_tensors(LONG * 16 * 4)


@every_cache
def test_a_cache_that_is_dropped_frees_everything(entry):
    model = tiny()
    cache = entry.build(model)
    generate(model, cache, prompt(20, 2))
    tensors = [
        weakref.ref(tensor) for layer in cache.layers for s in layer.segments() for tensor in s.tensors().values()
    ]
    assert tensors
    del cache
    gc.collect()
    assert not any(tensor() is not None for tensor in tensors)


@every_cache
def test_a_cache_keeps_no_model_alive(entry):
    model = build("llama")
    cache = entry.build(model)
    generate(model, cache, prompt(20), max_new_tokens=2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert cache.memory().total_bytes > 0


# a fraction is of the tokens seen so far
# README: grow to the budget and no further
@those(lambda entry: entry.budget and not entry.keeps_answers and entry.name != "h2o_fraction")
def test_bytes_do_not_grow_while_decoding(entry):
    model = tiny()
    cache = entry.build(model)
    feed(model, cache, prompt(20, 2))
    before = cache.memory().total_bytes
    for step in range(30):
        feed(model, cache, prompt(1, 2, seed=step))
    assert cache.memory().total_bytes == before
