"""Values of chunks, fetched from pages off the device where they are new in a buffer (ShadowKV, arXiv:2410.21465).

A page holds the values of one chunk in all KV heads and lies in one of several slabs; a page number is
`slab * 2**32 + index within the slab`. From pinned memory a kernel reads by address: only what is new crosses the bus,
in one launch without a sync. From other memory (a file) the pages are gathered on the host and copied at once.

Bytes over the bus: new slots * chunk * head_dim * element size. Bound by PCIe: 63 GB/s at best in generation 5.
"""

import torch
from torch import Tensor

from kvcompress.kernels.common.runtime import AOT_DTYPES, core_count, launch, runs_triton, shaped, tl, triton
from kvcompress.kernels.common.tile import wide

SLAB = 2**32


def fetch_pages(
    values: Tensor, pages: Tensor, held: Tensor, is_new: Tensor, slabs: list[Tensor], addresses: Tensor
) -> None:
    """Writes the values of new chunks into their slots of a buffer.

    Not an op for torch.compile: the number of slabs grows with the cache.

    Args:
        values: [batch, kv_heads, slots * chunk, head_dim], written where a slot is new; a view of a larger buffer will
            do, whose tokens are contiguous.
        pages: [batch, chunks] int64, the page of each chunk.
        held: [batch, kv_heads, slots] int64, the chunk in each slot.
        is_new: [batch, kv_heads, slots] bool.
        slabs: each [pages, kv_heads, chunk, head_dim] in CPU memory.
        addresses: int64 on the device of `values`, of the slabs' memory, in order.
    """
    if not held.numel() or not slabs:
        return
    by_address = slabs[0].device == values.device or all(slab.is_pinned() for slab in slabs)
    if not by_address or not runs_triton(values):
        fetch_pages_reference(values, pages, held, is_new, slabs)
        return
    kv_heads, slots = held.shape[1:]
    chunk_stride, size = slabs[0].shape[2] * slabs[0].shape[3], values.element_size()
    aligned = 16 if not any(slab.data_ptr() % 16 for slab in slabs) else size
    programs = min(triton.cdiv(held.numel(), _SLOTS), _PROGRAMS * core_count(values.device))
    launch(
        _fetch_pages_kernel, (programs,),
        values, pages, held.contiguous(), is_new.contiguous().view(torch.uint8), addresses,
        values.stride(0), values.stride(1), pages.stride(0), chunk_stride, held.numel(), kv_heads, slots,
        ALIGNED=aligned, SLOTS=_SLOTS, BLOCK=_BLOCK // size,
    )  # fmt: skip


def fetch_pages_reference(values: Tensor, pages: Tensor, held: Tensor, is_new: Tensor, slabs: list[Tensor]) -> None:
    """What fetch_pages means, in plain PyTorch: the oracle of its test, and its path on a CPU and from files."""
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
# programs per multiprocessor: enough reads in flight to fill the bus, and room for other kernels
_PROGRAMS = 2


@triton.jit(do_not_specialize=["count", "kv_heads", "slots"])
def _fetch_pages_kernel(
    values_ptr, pages_ptr, held_ptr, new_ptr, addresses_ptr,
    value_batch_stride, value_head_stride, pages_stride, chunk_stride,
    count, kv_heads, slots,
    ALIGNED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # programs take turns at some slots of all rows and KV heads; where none is new there is nothing to do. Chunks lie
    # chunk_stride apart, in pages and in slots
    for first in range(tl.program_id(0) * SLOTS, count, tl.num_programs(0) * SLOTS):
        at = first + tl.arange(0, SLOTS)
        is_new = tl.load(new_ptr + at, mask=at < count, other=0) != 0
        if tl.sum(is_new.to(tl.int32), 0) > 0:
            slot = at % slots
            kv_head = at // slots % kv_heads
            batch = wide(at // slots // kv_heads)
            chunk = tl.load(held_ptr + at, mask=is_new, other=0)
            page = tl.load(pages_ptr + batch * pages_stride + chunk, mask=is_new, other=0)
            slab = tl.load(addresses_ptr + (page >> 32), mask=is_new, other=0)
            # the compiler cannot know the alignment of an address read from memory; the launch has checked it
            source_ptr = slab.to(tl.pointer_type(values_ptr.dtype.element_ty), bitcast=True)
            source_ptr = tl.multiple_of(source_ptr, [ALIGNED])
            source_ptr += ((page & 4294967295) * kv_heads + kv_head) * chunk_stride
            to_ptr = values_ptr + batch * value_batch_stride + wide(kv_head) * value_head_stride
            to_ptr += wide(slot) * chunk_stride
            for start in range(0, chunk_stride, BLOCK):
                element = start + tl.arange(0, BLOCK)
                ok = is_new[:, None] & (element < chunk_stride)[None, :]
                found = tl.load(source_ptr[:, None] + element[None, :], mask=ok)
                tl.store(to_ptr[:, None] + element[None, :], found, mask=ok)


def aot_calls() -> None:
    for dtype in AOT_DTYPES:
        values, slab = shaped(2, 8, 256, 64, dtype=dtype), shaped(100, 8, 8, 64, dtype=dtype)
        pages, held = shaped(2, 100, dtype=torch.int64), shaped(2, 8, 32, dtype=torch.int64)
        is_new = shaped(2, 8, 32, dtype=torch.bool)
        fetch_pages(values, pages, held, is_new, [slab], shaped(1, dtype=torch.int64))
