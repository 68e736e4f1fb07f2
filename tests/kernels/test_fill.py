"""What a decode step of ShadowKV writes: test_rebuild.py and test_pages.py look at keys and values of chunks alone."""

import pytest
import torch

from kvcompress.kernels.fill import EMPTY, FoldedChunks, Rotation, fill_buffer, fill_buffer_reference
from kvcompress.kernels.pages import SLAB
from tests.kernels.inputs import DEVICE, DTYPES, heads, needs_triton, tolerance

SLOTS, CHUNKS, TAIL = 5, 12, 4


def scene(chunk, head_dim, dtype=torch.float32, value_dim=None, slots=SLOTS):
    """A buffer of slots, a tail with room for some tokens, and what comes: arguments of fill_buffer."""
    torch.manual_seed(0)
    value_dim, first = value_dim or head_dim, slots * chunk + 3
    keys, values = (torch.randn(2, 3, first + TAIL, dim, device=DEVICE).to(dtype) for dim in (head_dim, value_dim))
    positions = torch.full((2, 3, first + TAIL), EMPTY, dtype=torch.int32, device=DEVICE)
    # tokens, those before the tail, and one more column
    marks = torch.tensor([[40, 40, 9], [33, 31, 9]], device=DEVICE)
    held = torch.rand(2, 3, CHUNKS, device=DEVICE).argsort(-1)[..., :slots].contiguous()
    is_new = torch.rand(2, 3, slots, device=DEVICE) < 0.5
    slabs = [torch.randn(size, 3, chunk, value_dim).to(dtype) for size in (7, 5)]
    slabs = [slab.pin_memory() for slab in slabs] if DEVICE.type == "cuda" else slabs
    pages = torch.cat([torch.arange(7), SLAB + torch.arange(5)]).expand(2, -1).contiguous().to(DEVICE)
    addresses = torch.tensor([slab.data_ptr() for slab in slabs], device=DEVICE)
    low_rank = (torch.randn(2, CHUNKS * chunk, 20, device=DEVICE), torch.randn(2, 20, 3 * head_dim, device=DEVICE))
    folded = FoldedChunks(*(part.to(dtype) for part in low_rank), pages, addresses, slabs)
    rotation = Rotation(1.0 / 100 ** (torch.arange(8, device=DEVICE) / 8), 1.2, False)
    token = heads(2, 3, 1, head_dim, dtype), heads(2, 3, 1, value_dim, dtype)
    return [keys, values, positions, marks, held, is_new, folded, rotation, chunk, first, *token]


def cloned(arguments):
    return [argument.clone() if isinstance(argument, torch.Tensor) else argument for argument in arguments]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("chunk", "head_dim", "value_dim"), [(8, 64, 64), (5, 80, 40), (1, 129, 129)])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_all_that_is_written_agrees_with_the_reference(chunk, head_dim, value_dim, dtype, padded):
    ours = scene(chunk, head_dim, dtype, value_dim)
    theirs = cloned(ours)
    visible = torch.tensor([[True], [False]], device=DEVICE) if padded else None
    fill_buffer(*ours, visible=visible)
    fill_buffer_reference(*theirs, visible=visible)
    # the reference may write to slots that are not new what belongs there, which here is not there
    is_new = ours[5].repeat_interleave(chunk, 2)
    for found, expected in zip(ours[:2], theirs[:2], strict=True):
        slots = slice(None, SLOTS * chunk)
        torch.testing.assert_close(found[:, :, slots][is_new], expected[:, :, slots][is_new], **tolerance(dtype))
        assert torch.equal(found[:, :, SLOTS * chunk :], expected[:, :, SLOTS * chunk :])
    for found, expected in zip(ours[2:4], theirs[2:4], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("slots", [0, SLOTS])
def test_a_token_goes_to_the_end_of_its_rows_tail(slots):
    arguments = scene(2, 64, slots=slots)
    keys, values, positions, marks, _, is_new, *_, first, key, value = arguments
    is_new[:] = False
    before = keys.clone()
    fill_buffer(*arguments)
    # the first row's tail was empty, the second's had two tokens
    for row, (slot, place) in enumerate(((first, 40), (first + 2, 33))):
        assert torch.equal(keys[row, :, slot], key[row, :, 0])
        assert torch.equal(values[row, :, slot], value[row, :, 0])
        assert (positions[row, :, slot] == place).all()
        keys[row, :, slot] = before[row, :, slot]
        positions[row, :, slot] = EMPTY
    # and nowhere else
    torch.testing.assert_close(keys, before)
    assert (positions == EMPTY).all()
    assert marks.tolist() == [[41, 40, 9], [34, 31, 9]]


def test_padding_leaves_nothing_behind():
    arguments = scene(2, 64)
    fill_buffer(*arguments, visible=torch.tensor([[False], [False]], device=DEVICE))
    assert (arguments[2] == EMPTY).all()
    assert arguments[3].tolist() == [[40, 40, 9], [33, 31, 9]]


def test_without_a_token_only_chunks_are_written():
    arguments = scene(2, 64)
    _, values, positions, marks, held, is_new, folded, *_ = arguments
    before = values.clone()
    fill_buffer(*arguments[:-2])
    assert torch.equal(values[:, :, SLOTS * 2 :], before[:, :, SLOTS * 2 :])
    assert (positions == EMPTY).all()
    assert marks.tolist() == [[40, 40, 9], [33, 31, 9]]
    whole = torch.cat([slab.to(DEVICE) for slab in folded.slabs])
    for row, head, slot in is_new.nonzero().tolist():
        assert torch.equal(values[row, head, 2 * slot : 2 * slot + 2], whole[held[row, head, slot], head])


@needs_triton
def test_a_token_without_room_makes_its_rows_answers_nan():
    arguments = scene(2, 64)
    arguments[3][1, 0] = 31 + TAIL
    arguments[5][:] = False
    fill_buffer(*arguments)
    is_nan = arguments[0].isnan().any(-1)
    assert not is_nan[0].any()
    assert is_nan[1].sum(-1).tolist() == [1, 1, 1]
    assert is_nan[1, :, -1].all()
    assert (arguments[2][1, :, -1] == 31 + TAIL).all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU says so by NaN")
def test_a_token_without_room_is_refused_on_a_cpu():
    arguments = scene(2, 64)
    arguments[3][1, 0] = 31 + TAIL
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        fill_buffer_reference(*arguments)


def test_a_buffer_without_places_for_its_slots_is_refused():
    arguments = scene(8, 64)
    arguments[0] = arguments[0][:, :, : SLOTS * 8 - 1]
    with pytest.raises(ValueError, match="places for 5 slots of 8 tokens"):
        fill_buffer(*arguments)


def test_what_is_written_to_must_be_contiguous():
    arguments = scene(8, 64)
    arguments[2] = arguments[2][:, :, :-1]
    with pytest.raises(ValueError, match="positions and marks, which must be contiguous"):
        fill_buffer(*arguments)
