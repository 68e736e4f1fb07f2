"""Rows of kvcompress bench kernels for ShadowKV: a decode step at a context of `tokens`, with the paper's sizes.

Chunks of 8, 2048 tokens selected (or a quarter of the context) of which 60 % were there before, rank 15.6 % of
kv_heads * head_dim. Values that fill_buffer fetches cross the bus, so that beside the device's own bandwidth it looks
slow: PCIe generation 5 has 63 GB/s at best.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvcompress.evals.bench.case import Case, Shape, beside_reference, make_random
from kvcompress.evals.timing import Call
from kvcompress.kernels.chunk_scores import chunk_scores, chunk_scores_reference
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.fill import FoldedChunks, Rotation, fill_buffer, fill_buffer_reference
from kvcompress.kernels.selection import chunk_positions, reuse_slots, select_chunks, select_chunks_reference
from kvcompress.policies.shadowkv import ShadowKV

# Llama-3.1-8B on a GPU, SmolLM2-135M on a CPU
CONTEXTS = {
    "cuda": [Shape(batch, 32, 8, tokens, 128) for batch, tokens in ((1, 32768), (1, 122880), (8, 32768), (24, 122880))],
    "cpu": [Shape(1, 9, 3, 2048, 64), Shape(1, 9, 3, 8192, 64), Shape(8, 9, 3, 8192, 64)],
}
_CHUNK = 8
_HIT_RATE = 0.6


def shadow_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Scores of the chunks; their selection, scores included; keys rebuilt, values fetched and a token added."""
    batch, heads, kv_heads, tokens, head_dim = shape
    chunks, size = tokens // _CHUNK, dtype.itemsize
    slots = max(1, min(2048, tokens // 4) // _CHUNK)

    random = make_random(dtype, device)
    query, landmarks = random(batch, heads, 1, head_dim), random(batch, kv_heads, chunks, head_dim)
    is_open, spec = torch.rand(batch, kv_heads, chunks, device=device) < 0.99, LogitSpec(head_dim**-0.5)
    yield beside_reference(
        "chunk_scores", shape, chunk_scores, chunk_scores_reference, query, landmarks, is_open, spec,
        bytes=landmarks.numel() * size + 8 * batch * heads * chunks,
        # in 16 bits the reference rounds its logits: shares of a few percent
        compared=lambda scores: scores.exp(),
    )  # fmt: skip

    limits, scores = torch.full((batch,), slots, device=device), chunk_scores_reference(query, landmarks, is_open, spec)
    order = scores.argsort(-1, descending=True)
    moved = max(1, round((1 - _HIT_RATE) * slots))
    before = order[..., moved : moved + slots].contiguous()

    def selecting(select: Callable[..., Tensor]) -> Call:
        held, fetched = before.clone(), torch.zeros(2, dtype=torch.int64, device=device)
        positions = chunk_positions(held, _CHUNK, None)

        def call() -> Tensor:
            held.copy_(before)
            select(query, landmarks, is_open, held, positions, limits, fetched, spec, _CHUNK)
            return held

        return call

    yield Case(
        "select_chunks", shape, {"ours": selecting(select_chunks), "reference": selecting(select_chunks_reference)},
        "reference", bytes=landmarks.numel() * size + 12 * (heads + kv_heads) * batch * chunks,
        # in 16 bits the reference rounds its logits, and may choose another chunk of about the same score
        compared=lambda held: scores.gather(2, held).sum(-1),
    )  # fmt: skip

    yield _fill_case(shape, dtype, device, before, order[..., :slots].contiguous())


def _fill_case(shape: Shape, dtype: torch.dtype, device: torch.device, before: Tensor, chosen: Tensor) -> Case:
    """A step's keys rebuilt and values fetched; chunks held before and chosen now, [batch, kv_heads, slots] int64."""
    batch, _, kv_heads, tokens, head_dim = shape
    chunks, slots, random = tokens // _CHUNK, before.shape[2], make_random(dtype, device)
    now, is_new = reuse_slots(before, chosen, chunks)
    new_tokens = int(is_new.sum()) * _CHUNK
    rank = ShadowKV().rank_of(kv_heads * head_dim)
    coefficients, basis = random(batch, chunks * _CHUNK, rank), random(batch, rank, kv_heads * head_dim) / rank**0.5
    rotation = Rotation(1.0 / 500000 ** (torch.arange(head_dim // 2, device=device) * 2 / head_dim))

    # as many pages as the context has, whatever the batch: sequences share them, and the bus is crossed all the same
    slab = torch.randn(chunks, kv_heads, _CHUNK, head_dim).to(dtype)
    slab = slab.pin_memory() if device.type == "cuda" else slab
    pages = torch.arange(chunks, device=device).expand(batch, -1).contiguous()
    addresses = torch.tensor([slab.data_ptr()], device=device)
    token = random(batch, kv_heads, 1, head_dim)

    def filling(fill: Callable[..., None], slabs: list[Tensor]) -> Call:
        first = slots * _CHUNK
        keys, values = (random(batch, kv_heads, first + 1, head_dim) for _ in range(2))
        positions = torch.full((batch, kv_heads, first + 1), -1, dtype=torch.int32, device=device)
        marks = torch.zeros(batch, 3, dtype=torch.int64, device=device)
        folded = FoldedChunks(coefficients, basis, pages, addresses, slabs)

        def call() -> Tensor:
            marks.zero_()
            fill(keys, values, positions, marks, now, is_new, folded, rotation, _CHUNK, first, token, token)
            return torch.cat([_of_new(buffer[:, :, :first], is_new) for buffer in (keys, values)], -1)

        return call

    by_address = [] if device.type == "cuda" else [slab]
    return Case(
        "fill_buffer", shape,
        {"ours": filling(fill_buffer, by_address), "one copy": filling(fill_buffer_reference, [slab])}, "one copy",
        bytes=new_tokens * (rank + 2 * head_dim) * dtype.itemsize,
    )  # fmt: skip


def _of_new(buffer: Tensor, is_new: Tensor) -> Tensor:
    """A little of what was written: the first token of each new slot, the others 0."""
    first = buffer.unflatten(2, (-1, _CHUNK))[:, :, :, 0]
    return first * is_new[..., None]
