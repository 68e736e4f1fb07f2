"""Keys of chunks from their low-rank coefficients, rotated to where they stand (ShadowKV, arXiv:2410.21465)."""

from typing import Protocol

import torch
from torch import Tensor


class Rotary(Protocol):
    def rotate(self, x: Tensor, positions: Tensor) -> Tensor: ...


def rebuild_keys(coefficients: Tensor, basis: Tensor, chunks: Tensor, chunk: int, rope: Rotary | None) -> Tensor:
    batch, kv_heads, count = chunks.shape
    places = (chunks[..., None] * chunk + torch.arange(chunk, device=chunks.device)).flatten(2)
    row = torch.arange(batch, device=chunks.device)[:, None, None]
    rank = basis.shape[1]
    each = basis.view(batch, rank, kv_heads, -1).transpose(1, 2)
    keys = (coefficients[row, places].float() @ each.float()).to(coefficients.dtype)
    if rope is not None:
        keys = rope.rotate(keys, places)
    return keys.unflatten(2, (count, chunk))
