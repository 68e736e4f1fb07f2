"""ShadowKV's settings, and what it computes from keys (arXiv:2410.21465).

Keys before their rotation lie close to a space of few dimensions, jointly over the KV heads; rotated keys of
neighbouring tokens are alike, so that a chunk's mean, its landmark, tells whether the chunk is relevant to a query.
With the keys of all heads of a token side by side, `keys [tokens, width]`, width = kv_heads * head_dim:

    gram = keys.T keys = V diag(e) V.T          basis = the eigenvectors of the `rank` largest e, [rank, width]
    coefficients = keys basis.T                 keys ~ coefficients basis, error the sum of the eigenvalues left out

The gram matrix adds up over pieces of a prompt, costs 2 * tokens * width^2 flops, and its truncation error is that of
an SVD of the keys. Outliers are the chunks whose keys are least alike; they stay as they were, on the device.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvcompress.policies.settings import settle

# the paper's rank is 160 of 8 KV heads * 128
_RANK_SHARE = 160 / 1024


@dataclass(frozen=True)
class ShadowKV:
    """Settings of ShadowKV.

    rank: dimensions of the space the keys are kept in; None: 15.6 % of kv_heads * head_dim.
    chunk: tokens per chunk, which are fetched together. outlier_chunks: chunks per KV head that stay exact on the
    device.
    local_chunks: newest chunks that stay exact. fold: tokens the exact tail may grow by before its oldest are folded
    into chunks. dense_below: sequences of at most so many tokens stay dense; None: as many as would be read anyway.
    select_queries: a forward of more queries than this reads every chunk, as they would choose most of them.
    drift: by what factor the old space's error may be larger for new keys than for those it was fitted to.
    group: how the query heads of a KV head agree on a chunk.
    """

    rank: int | None = None
    chunk: int = 8
    outlier_chunks: int = 48
    local_chunks: int = 4
    fold: int = 256
    dense_below: int | None = None
    select_queries: int = 64
    drift: float = 1.1
    group: Literal["max", "mean", "sum"] = "max"

    def __post_init__(self) -> None:
        settle(self)
        for name, least in (
            ("chunk", 1),
            ("outlier_chunks", 0),
            ("local_chunks", 1),
            ("fold", 1),
            ("select_queries", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("rank", "dense_below"):
            least = 1 if name == "rank" else 0
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be None or at least {least}, got {getattr(self, name)}")
        if self.drift < 1.0:
            raise ValueError(f"drift must be at least 1, or every fold would fit the space anew; got {self.drift}")

    def rank_of(self, width: int) -> int:
        """The rank for keys of kv_heads * head_dim = `width`.

        Raises:
            ValueError: the rank asked for is larger than the width.
        """
        rank = max(1, round(_RANK_SHARE * width)) if self.rank is None else self.rank
        if rank > width:
            raise ValueError(f"rank must be at most kv_heads * head_dim = {width}, got {rank}")
        return rank

    def dense_tokens(self, selected: Tensor) -> Tensor:
        """Up to how many tokens sequences that would select so many chunks stay dense, [batch] int64."""
        if self.dense_below is not None:
            return torch.full_like(selected, self.dense_below)
        return (selected + self.outlier_chunks + self.local_chunks) * self.chunk


def gram(keys: Tensor, largest: int = 8192) -> Tensor:
    """keys.T keys in float32, [batch, width, width], of [batch, tokens, width] in any dtype, a piece at a time."""
    total = torch.zeros(keys.shape[0], keys.shape[2], keys.shape[2], device=keys.device)
    for piece in keys.split(largest, 1):
        piece = piece.float()
        total.baddbmm_(piece.mT, piece)
    return total


def fit_basis(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The space that captures most of the keys with this gram matrix.

    Args:
        gram: [batch, width, width] float32.

    Returns:
        Orthonormal rows, [batch, rank, width] float32, and the share of the keys' squared norm that they miss, [batch].
        Both NaN where the keys are not all finite.
    """
    # LAPACK refuses numbers that are not finite
    known = gram.isfinite().all(-1).all(-1)[:, None]
    values, vectors = torch.linalg.eigh(gram.where(known[..., None], 0.0))
    values, vectors = values.where(known, torch.nan), vectors.where(known[..., None], torch.nan)
    values = values.clamp(min=0.0)
    missed = values[:, : values.shape[1] - rank].sum(1) / values.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    return vectors[:, :, -rank:].mT.contiguous(), missed


def project(keys: Tensor, basis: Tensor, length: float = 1.0) -> Tensor:
    """Coefficients of keys in a space, in the dtype of the keys, [batch, tokens, rank].

    Args:
        keys: [batch, tokens, width] in any dtype. basis: [batch, rank, width] float32, orthonormal rows.
        length: of the rows that the coefficients are for: coefficients (length basis) ~ keys.
    """
    return (keys.float() @ (basis.mT / length)).to(keys.dtype)


def measure(keys: Tensor, basis: Tensor, largest: int = 8192) -> tuple[Tensor, Tensor]:
    """The squared norm of keys [batch, tokens, width], and of the part that a basis misses, [batch] float32 each."""
    norm, missed = [], []
    for piece in keys.split(largest, 1):
        wide = piece.float()
        norm.append(wide.square().sum((1, 2)))
        # the difference of the two norms would drown a small error in rounding
        missed.append(torch.baddbmm(wide, wide @ basis.mT, basis, alpha=-1).square_().sum((1, 2)))
    return torch.stack(norm).sum(0), torch.stack(missed).sum(0)


def landmarks_of(keys: Tensor, largest: int = 1024) -> tuple[Tensor, Tensor]:
    """The mean of each chunk of rotated keys [batch, kv_heads, chunks, chunk, head_dim], [batch, kv_heads, chunks,
    head_dim] in their dtype, and the least cosine between it and its keys, [batch, kv_heads, chunks] float32."""
    means, cosines = [], []
    for piece in keys.split(largest, 2):
        wide = piece.float()
        mean = wide.mean(3)
        dots = torch.einsum("bhcd,bhctd->bhct", mean, wide)
        norms = mean.norm(dim=-1)[..., None] * wide.norm(dim=-1)
        means.append(mean.to(keys.dtype))
        cosines.append((dots / norms.clamp(min=torch.finfo(torch.float32).tiny)).amin(-1))
    return torch.cat(means, 2), torch.cat(cosines, 2)
