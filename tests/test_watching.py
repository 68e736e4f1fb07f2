"""watch_memory: the bytes of each cache that a model uses, as its forwards begin and end."""

import pytest
import torch
from transformers import DynamicCache

from kvcompress import H2OCache, KVzipCache, watch_memory
from kvcompress.hf import cache_argument
from tests.contract.drive import feed, generate
from tests.contract.models import prompt, tiny


# docs: There is a reading as each forward begins and as it ends, of transformers' own caches too
def test_two_readings_a_forward_and_a_last_one():
    model = tiny()
    cache = H2OCache(model, budget=16)
    with watch_memory(model) as readings:
        generate(model, cache, prompt(40), max_new_tokens=5, num_beams=1)
    assert [one.tokens for one in readings] == [0, 40, 40, 41, 41, 42, 42, 43, 43, 44, 44]
    assert readings[0].bytes == 0
    assert readings[-1].bytes == cache.memory().total_bytes
    seconds = [one.seconds for one in readings]
    assert seconds == sorted(seconds)


def test_transformers_own_cache_is_counted_too():
    model = tiny()
    cache = DynamicCache(config=model.config)
    with watch_memory(model) as readings:
        generate(model, cache, prompt(40), max_new_tokens=5, num_beams=1)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert readings[-1].bytes == held > 0


@pytest.mark.parametrize("fresh_hooks", [True, False])
def test_a_cache_that_reads_twice_holds_all_until_then(fresh_hooks):
    model = tiny()
    if not fresh_hooks:
        H2OCache(model, budget=16)
    with watch_memory(model) as readings:
        cache = KVzipCache(model, budget=8, sinks=1, chunk=7)
        feed(model, cache, prompt(40))
    full = cache.memory().full_bytes
    assert [one.bytes >= full for one in readings[1:-1]] == [True] * (len(readings) - 2)
    assert len(readings) > 4
    assert readings[-1].bytes == cache.memory().total_bytes < full / 2
    assert {one.tokens for one in readings} == {0, 40}


def test_nothing_is_left_on_the_model_and_forwards_without_cache_leave_nothing():
    model = tiny()
    before = len(model.model._forward_hooks), len(model.model._forward_pre_hooks)
    with watch_memory(model) as readings, torch.no_grad():
        model(prompt(4), use_cache=False)
    assert readings == []
    with pytest.raises(RuntimeError, match="stop"), watch_memory(model) as readings:
        raise RuntimeError("stop")
    assert (len(model.model._forward_hooks), len(model.model._forward_pre_hooks)) == before
    with torch.no_grad():
        model(prompt(4), **cache_argument(model, H2OCache(model, budget=4)))
    assert readings == []
