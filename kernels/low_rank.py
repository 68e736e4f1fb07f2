"""Low-rank factors of what quantisation loses.

GEAR (arXiv:2403.05527) adds to each quantised tensor the best few directions of its residual R = x - decoded, found
by power iteration. R is computed anew from x and its codes in every pass and never stored.

    P = uniform [head_dim, rank];  `loops` times:  P = orthonormal(R^T (R P))
    left = R P        right = P        R ~ left @ right^T = R P P^T

Departure from the paper: it projects on the column space, Q Q^T R with Q = orthonormal(R P), after one half step less.
Projecting on the row space takes as many passes, brings the better directions, orthonormalises only a small matrix, and
lets later blocks share a basis. Both are projections of R: the error never grows, whatever the basis.

Bytes: x and its packed form are read loops + 1 times, left is written once. Flops: (4 * loops + 2) * batch * kv_heads *
tokens * head_dim * rank and loops + 1 decodings.
"""

import torch
from torch import Tensor

from kvcompress.kernels.quantise import Coding, Packed, check_coding, dequantise

# residuals a piece of the CPU path may hold: 2 MB in float32, about one core's share of the cache
_PIECE = 2**19


def residual_factors(
    x: Tensor,
    packed: Packed,
    coding: Coding,
    rank: int,
    present: Tensor | None = None,
    *,
    loops: int = 3,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """Factors of the residual of one span of blocks, for each row and KV head by itself.

    Args:
        x: [batch, kv_heads, blocks, block, head_dim], what was packed.
        packed: its packed form; left and right are not looked at.
        coding: of the packed form.
        rank: at most head_dim.
        present: [batch, blocks] bool; the tokens of other blocks take no part, and their left is 0. None: all are.
        loops: of the power iteration, at least 1.
        dtype: of the factors.

    Returns:
        left [batch, kv_heads, blocks, block, rank] and right [batch, kv_heads, head_dim, rank].

    Raises:
        ValueError: for a rank that head_dim does not hold, or loops below 1.
    """
    check_coding(coding, x.shape[-2], x.shape[-1])
    if not 1 <= rank <= x.shape[-1]:
        raise ValueError(f"rank must be 1 to head_dim = {x.shape[-1]}, got {rank}")
    if loops < 1:
        raise ValueError(f"loops must be at least 1, got {loops}")
    batch, kv_heads, blocks, block, head_dim = x.shape
    left = x.new_empty(batch, kv_heads, blocks, block, rank, dtype=dtype)
    basis = first_basis(head_dim, rank, x.device).expand(batch, kv_heads, -1, -1)
    pieces = _pieces(x)
    for _ in range(loops):
        grown = x.new_zeros(batch, kv_heads, head_dim, rank, dtype=torch.float32)
        for piece in pieces:
            residual = _residual(x, packed, coding, present, piece)
            grown += residual.mT @ (residual @ basis)
        basis = torch.linalg.qr(grown).Q
    # the error is that of a projection on what is stored
    right = basis.to(dtype)
    for piece in pieces:
        residual = _residual(x, packed, coding, present, piece)
        left[:, :, piece] = (residual @ right.float()).unflatten(2, (-1, block)).to(dtype)
    return left, right


def residual_factors_reference(
    x: Tensor,
    packed: Packed,
    coding: Coding,
    rank: int,
    present: Tensor | None = None,
    *,
    loops: int = 3,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """What residual_factors means, in plain PyTorch."""
    residual = x.float() - dequantise(packed._replace(left=None, right=None), coding)
    if present is not None:
        residual = residual.masked_fill(~present[:, None, :, None, None], 0.0)
    tokens = residual.flatten(2, 3)
    right = first_basis(x.shape[-1], rank, x.device)
    for _ in range(loops):
        right = torch.linalg.qr(tokens.mT @ (tokens @ right)).Q
    right = right.to(dtype)
    return (residual @ right.float()[:, :, None]).to(dtype), right


def first_basis(head_dim: int, rank: int, device: torch.device) -> Tensor:
    """Where the power iteration starts, [head_dim, rank] float32: the same everywhere and always."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(head_dim, rank, generator=generator).to(device)


def _pieces(x: Tensor) -> list[slice]:
    batch, kv_heads, blocks, block, head_dim = x.shape
    step = max(1, _PIECE // max(1, batch * kv_heads * block * head_dim))
    return [slice(start, start + step) for start in range(0, blocks, step)]


def _residual(x: Tensor, packed: Packed, coding: Coding, present: Tensor | None, blocks: slice) -> Tensor:
    """[batch, kv_heads, tokens, head_dim] of these blocks."""
    parts = (None if part is None else part[:, :, blocks] for part in packed[:5])
    residual = x[:, :, blocks].float() - dequantise(Packed(*parts), coding)  # type: ignore[arg-type]
    if present is not None:
        residual.masked_fill_(~present[:, None, blocks, None, None], 0.0)
    return residual.flatten(2, 3)
