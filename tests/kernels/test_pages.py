import pytest
import torch

from kvcompress.kernels.fill import FoldedChunks, Rotation, fill_buffer
from kvcompress.kernels.pages import SLAB, fetch_pages_reference
from tests.kernels.inputs import DEVICE, DTYPES

SLOTS = 9


def scene(chunk, head_dim, sizes, dtype=torch.float32):
    """Pages in slabs of these sizes, and a table in which rows share some."""
    torch.manual_seed(0)
    slabs = [torch.randn(size, 3, chunk, head_dim).to(dtype) for size in sizes]
    if DEVICE.type == "cuda":
        slabs = [slab.pin_memory() for slab in slabs]
    numbers = torch.cat([slab * SLAB + torch.arange(size) for slab, size in enumerate(sizes)])
    pages = numbers[torch.randint(len(numbers), (2, 20))].to(DEVICE)
    held = torch.rand(2, 3, 20, device=DEVICE).argsort(-1)[..., :SLOTS]
    is_new = torch.rand(2, 3, SLOTS, device=DEVICE) < 0.5
    is_new[0, 0], is_new[1, 1] = False, True
    buffer = torch.full((2, 3, SLOTS * chunk + 4, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    return buffer, pages, held, is_new, slabs


def fetch(buffer, pages, held, is_new, slabs):
    addresses = torch.tensor([slab.data_ptr() for slab in slabs], device=DEVICE)
    batch, kv_heads, room, head_dim = buffer.shape
    chunk = slabs[0].shape[2]
    low_rank = buffer.new_zeros(batch, 20 * chunk, 1), buffer.new_zeros(batch, 1, kv_heads * head_dim)
    positions = torch.zeros(batch, kv_heads, room, dtype=torch.int32, device=DEVICE)
    marks = torch.zeros(batch, 3, dtype=torch.int64, device=DEVICE)
    folded = FoldedChunks(*low_rank, pages, addresses, slabs)
    fill_buffer(torch.empty_like(buffer), buffer, positions, marks, held, is_new, folded, Rotation(), chunk, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("chunk", "head_dim", "sizes"), [(8, 64, [30]), (8, 96, [5, 1, 17]), (1, 80, [7, 7]), (5, 129, [40]), (64, 64, [3])]
)
def test_fetched_values_are_those_of_the_page_bit_for_bit(chunk, head_dim, sizes, dtype):
    buffer, pages, held, is_new, slabs = scene(chunk, head_dim, sizes, dtype)
    fetch(buffer, pages, held, is_new, slabs)
    found = buffer[:, :, : SLOTS * chunk].unflatten(2, (SLOTS, chunk))
    for row, head, slot in is_new.nonzero().tolist():
        page = int(pages[row, held[row, head, slot]])
        assert torch.equal(found[row, head, slot].cpu(), slabs[page // SLAB][page % SLAB, head])
    assert buffer[:, :, SLOTS * chunk :].isnan().all()


def test_slots_that_are_not_new_are_not_written():
    buffer, *arguments = scene(8, 64, [30])
    fetch(buffer, *arguments)
    assert buffer[:, :, : SLOTS * 8][~arguments[2].repeat_interleave(8, 2)].isnan().all()


def test_the_reference_agrees():
    buffer, pages, held, is_new, slabs = scene(8, 64, [5, 1, 17])
    other = buffer.clone()
    fetch(buffer, pages, held, is_new, slabs)
    fetch_pages_reference(other[:, :, : SLOTS * 8], pages, held, is_new, slabs)
    new = is_new.repeat_interleave(8, 2)
    assert torch.equal(buffer[:, :, : SLOTS * 8][new], other[:, :, : SLOTS * 8][new])


def test_nothing_new_fetches_nothing():
    buffer, pages, held, is_new, slabs = scene(8, 64, [30])
    fetch(buffer, pages, held, torch.zeros_like(is_new), slabs)
    assert buffer.isnan().all()
