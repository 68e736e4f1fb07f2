"""A layer's count of the tokens it was fed."""

import torch

from kvcompress.storage.clock import TokenClock


def test_columns_are_counted_and_taken_back():
    clock = TokenClock()
    clock.advance(5)
    clock.advance(-2)
    assert clock.seen == 3
    clock.begin_at(7)
    assert clock.seen == 7


def test_a_tensor_counts_along_in_place():
    clock, tensor = TokenClock(), torch.tensor(4)
    clock.count_on(tensor)
    assert clock.seen == 4
    clock.advance(2)
    assert (clock.seen, int(tensor)) == (6, 6)
    assert clock.tensor is tensor


def test_a_number_that_is_known_is_not_read_from_the_tensor():
    clock = TokenClock()
    clock.count_on(torch.empty((), dtype=torch.int64, device="meta"), 4)
    clock.advance(2)
    assert clock.seen == 6


def test_a_compiled_step_counts_in_the_tensor_alone_and_the_host_asks_for_it():
    clock, tensor = TokenClock(), torch.tensor(4)
    clock.count_on(tensor, 4)

    @torch.compile(backend="eager", fullgraph=True)
    def step():
        clock.advance(1)
        return clock.seen + 0

    assert isinstance(step(), torch.Tensor)
    step()
    assert int(tensor) == clock.seen == 6
