"""A short soak, and one that leaks is caught. The long one is `make soak`."""

import mmap

import pytest
import torch

from tests.contract.models import tiny
from tests.fuzz.soak import CACHES, soak


@pytest.mark.parametrize("name", CACHES)
def test_many_steps_leave_the_memory_as_it_was(name):
    model = tiny(num_hidden_layers=1)
    soak(model, CACHES[name](model), 200, every=50)


def test_a_cache_that_grows_is_caught():
    model = tiny(num_hidden_layers=1)
    cache = CACHES["h2o"](model)
    layer = cache.layers[0]
    append, layer.state = layer.clock.advance, {"all": torch.zeros(0)}

    def grow(tokens):
        append(tokens)
        layer.state["all"] = torch.zeros(layer.get_seq_length())

    layer.clock.advance = grow
    with pytest.raises(AssertionError, match="bytes of"):
        soak(model, cache, 100, every=50)


def test_a_process_that_grows_is_caught():
    model, hoard = tiny(num_hidden_layers=1), []

    def leak(*_):
        # straight from the system: what an allocator has in hand from earlier tests would hide the growth
        hoard.append(mmap.mmap(-1, 1 << 20))
        hoard[-1].write(b"1" * (1 << 20))

    hook = model.register_forward_hook(leak)
    with pytest.raises(AssertionError, match="process grew"):
        soak(model, CACHES["h2o"](model), 100, every=10)
    hook.remove()


def test_a_logit_that_is_not_a_number_is_caught():
    model = tiny(num_hidden_layers=1)

    def spoil(module, args, output):
        output.logits[0, -1, 3] = torch.nan

    hook = model.register_forward_hook(spoil)
    try:
        with pytest.raises(AssertionError, match="not a number"):
            soak(model, CACHES["h2o"](model), 20)
    finally:
        hook.remove()
