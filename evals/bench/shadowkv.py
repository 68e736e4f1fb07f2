"""Rows of kvcompress bench kernels for ShadowKV: a decode step at a context of `tokens`, with the paper's sizes.

Chunks of 8, 2048 tokens selected (or a quarter of the context) of which 60 % were there before, rank 15.6 % of
kv_heads * head_dim. What fetch_pages moves crosses the bus, so that beside the device's own bandwidth it looks slow:
PCIe generation 5 has 63 GB/s at best.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvcompress.evals.bench.case import Case, Shape, beside_reference, make_random
from kvcompress.evals.timing import Call
from kvcompress.kernels.chunk_scores import chunk_scores, chunk_scores_reference
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.pages import fetch_pages, fetch_pages_reference
from kvcompress.kernels.rebuild import rebuild_keys, rebuild_keys_reference
from kvcompress.kernels.selection import reuse_slots, reuse_slots_reference
from kvcompress.policies.shadowkv import ShadowKV

# Llama-3.1-8B on a GPU, SmolLM2-135M on a CPU
CONTEXTS = {
    "cuda": [Shape(batch, 32, 8, tokens, 128) for batch, tokens in ((1, 32768), (1, 122880), (8, 32768), (24, 122880))],
    "cpu": [Shape(1, 9, 3, 2048, 64), Shape(1, 9, 3, 8192, 64), Shape(8, 9, 3, 8192, 64)],
}
_CHUNK = 8
_HIT_RATE = 0.6


def shadow_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Scores of the chunks, the plan of what stays, keys rebuilt, values fetched."""
    batch, heads, kv_heads, tokens, head_dim = shape
    chunks, size = tokens // _CHUNK, dtype.itemsize
    slots = max(1, min(2048, tokens // 4) // _CHUNK)

    random = make_random(dtype, device)
    query, landmarks = random(batch, heads, 1, head_dim), random(batch, kv_heads, chunks, head_dim)
    is_open = torch.rand(batch, kv_heads, chunks, device=device) < 0.99
    yield beside_reference(
        "chunk_scores", shape, chunk_scores, chunk_scores_reference,
        query, landmarks, is_open, LogitSpec(head_dim**-0.5),
        bytes=landmarks.numel() * size + 8 * batch * heads * chunks,
        # in 16 bits the reference rounds its logits: shares of a few percent
        compared=lambda scores: scores.exp(),
    )  # fmt: skip

    order = torch.rand(batch, kv_heads, chunks, device=device).argsort(-1)
    held = order[..., :slots].contiguous()
    moved = max(1, round((1 - _HIT_RATE) * slots))
    wanted = torch.cat([held[..., moved:], order[..., slots : slots + moved]], -1)[..., :slots].contiguous()
    yield beside_reference(
        "reuse_slots", shape, reuse_slots, reuse_slots_reference, held, wanted, chunks, bytes=25 * held.numel()
    )

    now, is_new = reuse_slots_reference(held, wanted, chunks)
    new_tokens = int(is_new.sum()) * _CHUNK
    rank = ShadowKV().rank_of(kv_heads * head_dim)
    coefficients, basis = random(batch, chunks * _CHUNK, rank), random(batch, rank, kv_heads * head_dim) / rank**0.5
    inv_freq = 1.0 / 500000 ** (torch.arange(head_dim // 2, device=device) * 2 / head_dim)

    def writing(write: Callable[[Tensor], None]) -> Call:
        buffer = random(batch, kv_heads, slots * _CHUNK, head_dim)

        def call() -> Tensor:
            write(buffer)
            return _of_new(buffer, is_new)

        return call

    given = (coefficients, basis, now, is_new, inv_freq)
    rebuilding: dict[str, Call] = {
        "ours": writing(lambda keys: rebuild_keys(keys, *given)),
        "reference": writing(lambda keys: rebuild_keys_reference(keys, *given)),
    }
    yield Case("rebuild_keys", shape, rebuilding, "reference", bytes=new_tokens * (rank + head_dim) * size)

    # as many pages as the context has, whatever the batch: sequences share them, and the bus is crossed all the same
    slab = torch.randn(chunks, kv_heads, _CHUNK, head_dim).to(dtype)
    slab = slab.pin_memory() if device.type == "cuda" else slab
    pages = torch.arange(chunks, device=device).expand(batch, -1).contiguous()
    addresses = torch.tensor([slab.data_ptr()], device=device)

    fetching: dict[str, Call] = {
        "ours": writing(lambda values: fetch_pages(values, pages, now, is_new, [slab], addresses)),
        "one copy": writing(lambda values: fetch_pages_reference(values, pages, now, is_new, [slab])),
    }
    yield Case("fetch_pages", shape, fetching, "one copy", bytes=new_tokens * head_dim * size)


def _of_new(buffer: Tensor, is_new: Tensor) -> Tensor:
    """A little of what was written: the first token of each new slot, the others 0."""
    first = buffer.unflatten(2, (-1, _CHUNK))[:, :, :, 0]
    return first * is_new[..., None]
