"""Values of chunks, fetched from pages off the device where they are new in a buffer (ShadowKV, arXiv:2410.21465);
a part of kernels/fill.py.

A page holds the values of one chunk in all KV heads and lies in one of several slabs; a page number is
`slab * 2**32 + index within the slab`. From pinned memory a kernel reads by address: only what is new crosses the bus,
in one launch that waits for nobody. From other memory (a file) the pages are collected on the host and copied at once.

Bytes over the bus: new slots * chunk * head_dim * element size. PCIe bounds it: 63 GB/s at best for generation 5.
"""

import torch
from torch import Tensor

from kvcompress.kernels.common.runtime import core_count, tl, triton
from kvcompress.kernels.common.tile import wide

SLAB = 2**32


def fetch_pages_reference(values: Tensor, pages: Tensor, held: Tensor, is_new: Tensor, slabs: list[Tensor]) -> None:
    """Writes the values of new chunks into their slots of a buffer, in plain PyTorch: through the host's memory.

    Args:
        values: [batch, kv_heads, slots * chunk, head_dim], written where a slot is new; a view of a larger buffer will
            do, whose tokens are contiguous.
        pages: [batch, chunks] int64, the page of each chunk.
        held: [batch, kv_heads, slots] int64, the chunk in each slot.
        is_new: [batch, kv_heads, slots] bool.
        slabs: each [pages, kv_heads, chunk, head_dim] in CPU memory.
    """
    row, head, slots = is_new.nonzero(as_tuple=True)
    numbers = pages[row, held[row, head, slots]]
    found = collect_pages(numbers.cpu(), head.cpu(), slabs).to(values.device)
    values.unflatten(2, (-1, slabs[0].shape[2]))[row, head, slots] = found


def collect_pages(pages: Tensor, heads: Tensor, slabs: list[Tensor]) -> Tensor:
    """Values of pages in given KV heads, both int64 on the CPU and of one shape, [*shape, chunk, head_dim]."""
    slab, index = pages // SLAB, pages % SLAB
    if len(slabs) == 1:
        return slabs[0][index, heads]
    out = slabs[0].new_empty(*pages.shape, *slabs[0].shape[2:])
    for number in slab.unique().tolist():
        there = slab == number
        out[there] = slabs[number][index[there], heads[there]]
    return out


# slots that a program reads at a time, and bytes of each
_SLOTS, _BLOCK = 8, 2048
# programs a multiprocessor: enough reads under way to fill the bus, and room for others beside them
_PROGRAMS = 2


def fetch_programs(slots: int, device: torch.device) -> int:
    """How many programs take turns at so many slots."""
    blocks: int = triton.cdiv(slots, _SLOTS)
    return min(blocks, _PROGRAMS * core_count(device))


def fetch_sizes(slabs: list[Tensor], element_size: int) -> dict[str, int]:
    """Sides of a program's tile, and what the addresses of slabs are multiples of; torch pins memory at 16 bytes."""
    aligned = element_size if any(slab.data_ptr() % 16 for slab in slabs) else 16
    return {"ALIGNED": aligned, "FETCHED_SLOTS": _SLOTS, "FETCHED": _BLOCK // element_size}


@triton.jit
def fetch_slots(
    program, programs, values_ptr, pages_ptr, held_ptr, new_ptr, addresses_ptr,
    value_batch_stride, value_head_stride, pages_stride, chunk_stride,
    count, kv_heads, slots,
    ALIGNED: tl.constexpr,
    FETCHED_SLOTS: tl.constexpr,
    FETCHED: tl.constexpr,
):  # fmt: skip
    # programs take turns at some slots of all rows and KV heads; where none is new there is nothing to do. Chunks lie
    # chunk_stride apart, in pages and in slots
    for first in range(program * FETCHED_SLOTS, count, programs * FETCHED_SLOTS):
        at = first + tl.arange(0, FETCHED_SLOTS)
        is_new = tl.load(new_ptr + at, mask=at < count, other=0) != 0
        if tl.sum(is_new.to(tl.int32), 0) > 0:
            slot = at % slots
            kv_head = at // slots % kv_heads
            batch = wide(at // slots // kv_heads)
            chunk = tl.load(held_ptr + at, mask=is_new, other=0)
            page = tl.load(pages_ptr + batch * pages_stride + chunk, mask=is_new, other=0)
            slab = tl.load(addresses_ptr + (page >> 32), mask=is_new, other=0)
            # what is read from memory comes without the alignment that the launch has seen
            source_ptr = slab.to(tl.pointer_type(values_ptr.dtype.element_ty), bitcast=True)
            source_ptr = tl.multiple_of(source_ptr, [ALIGNED])
            source_ptr += ((page & 4294967295) * kv_heads + kv_head) * chunk_stride
            to_ptr = values_ptr + batch * value_batch_stride + wide(kv_head) * value_head_stride
            to_ptr += wide(slot) * chunk_stride
            for start in range(0, chunk_stride, FETCHED):
                element = start + tl.arange(0, FETCHED)
                ok = is_new[:, None] & (element < chunk_stride)[None, :]
                found = tl.load(source_ptr[:, None] + element[None, :], mask=ok)
                tl.store(to_ptr[:, None] + element[None, :], found, mask=ok)
