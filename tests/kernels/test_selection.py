import pytest
import torch

from kvcompress.kernels.selection import reuse_slots, reuse_slots_reference
from tests.kernels.inputs import DEVICE


def some(count, chunks, filled, seed):
    """Distinct chunks in no order, with gaps between, [2, 3, count]."""
    torch.manual_seed(seed)
    chosen = torch.rand(2, 3, chunks).argsort(-1)[..., :count]
    return chosen.masked_fill(torch.rand(2, 3, count) > filled, -1).to(DEVICE)


@pytest.mark.parametrize(("slots", "chunks"), [(1, 1), (1, 9), (7, 12), (16, 16), (33, 500), (100, 130)])
@pytest.mark.parametrize("filled", [0.0, 0.5, 1.0])
def test_slots_agree_with_the_reference(slots, chunks, filled):
    held, wanted = some(slots, chunks, 0.8, 0), some(slots, chunks, filled, 1)
    found = reuse_slots(held, wanted, chunks)
    for got, expected in zip(found, reuse_slots_reference(held, wanted, chunks), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("slots", "chunks"), [(7, 12), (33, 500), (100, 130)])
def test_hits_stay_where_they_are_and_hits_and_misses_are_the_selection(slots, chunks):
    held, wanted = some(slots, chunks, 0.8, 2), some(slots, chunks, 0.9, 3)
    now, is_new = reuse_slots(held, wanted, chunks)
    for row in range(2):
        for head in range(3):
            before, asked = held[row, head].tolist(), set(wanted[row, head].tolist()) - {-1}
            after, new = now[row, head].tolist(), is_new[row, head].tolist()
            occupied = [chunk for chunk in after if chunk >= 0]
            assert len(occupied) == len(set(occupied))
            assert set(occupied) == asked
            for slot, chunk in enumerate(before):
                if chunk in asked:
                    assert after[slot] == chunk
                    assert not new[slot]
            assert {chunk for chunk, fresh in zip(after, new, strict=True) if fresh} == asked - set(before)


def test_selecting_the_same_again_moves_nothing():
    held = some(40, 90, 0.7, 4)
    now, is_new = reuse_slots(held, held.flip(-1), 90)
    assert torch.equal(now, held)
    assert not is_new.any()


def test_more_slots_than_a_program_holds_take_the_other_path():
    held, wanted = some(2100, 4000, 0.9, 5), some(2100, 4000, 0.9, 6)
    now, is_new = reuse_slots(held, wanted, 4000)
    expected, expected_new = reuse_slots_reference(held, wanted, 4000)
    assert torch.equal(now, expected)
    assert torch.equal(is_new, expected_new)
