"""A rotation that spreads what stands out in a vector over all of its numbers, which few bits then lose less of.

    rotate(x) = x R        R = diag(signs) (H kron C)

H is the Hadamard matrix of the largest power of two in head_dim, C the cosine transform (DCT-II) of the rest, 1 for
most models, both orthonormal; the signs are fixed ones that look random (QuaRot, arXiv:2404.00456). R is orthogonal, so
values that are stored rotated need to be rotated back only once, after attention has summed them:

    out = p V = (p rotate(V)) R'

Flops 2 * head_dim per number. Bytes: each vector read and written once, and R: bound by bandwidth.
"""

import functools
import math

import torch
from torch import Tensor

from kvcompress.kernels.common.runtime import op


@op(fake=lambda x, **_: x.new_empty(x.shape))
def rotate(x: Tensor, back: bool = False) -> Tensor:
    """Rotates vectors [..., head_dim] of any floating dtype; back: takes a rotation back. Computed in float32 or more.

    Returns:
        As x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    matrix = _matrix(x.shape[-1], dtype, x.device)
    return (x.to(dtype) @ (matrix.mT if back else matrix)).to(x.dtype).contiguous()


def rotate_reference(x: Tensor, back: bool = False) -> Tensor:
    """What rotate means: the fast transform, step by step."""
    dim = x.shape[-1]
    power, signs = dim & -dim, _signs(dim).to(x.device)
    cosines = _cosines(dim // power).to(x.device)
    y = x.double() * (1 if back else signs)
    # the last part of an index counts the cosines
    y = (y.unflatten(-1, (power, -1)) @ (cosines.mT if back else cosines)).transpose(-1, -2)
    half = 1
    while half < power:
        pairs = y.unflatten(-1, (-1, 2, half))
        y = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).flatten(-3)
        half *= 2
    y = y.transpose(-1, -2).flatten(-2) / math.sqrt(power)
    return (y * (signs if back else 1)).to(x.dtype)


@functools.cache
def _matrix(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """R, [dim, dim]."""
    # shared by all that comes
    with torch.inference_mode(False), torch.no_grad():
        power = dim & -dim
        hadamard = torch.ones(1, 1, dtype=torch.float64)
        while len(hadamard) < power:
            hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
        whole = torch.kron(hadamard / math.sqrt(power), _cosines(dim // power))
        return (_signs(dim)[:, None] * whole).to(device, dtype)


def _signs(dim: int) -> Tensor:
    """1 and -1 in an order that looks random, [dim]: saved files rely on it."""
    state, signs = 1, []
    for _ in range(dim):
        state = (state * 1103515245 + 12345) % 2**31
        signs.append(1.0 if state & 2**16 else -1.0)
    return torch.tensor(signs, dtype=torch.float64)


def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, [size, size]."""
    time, frequency = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    basis = ((2 * time + 1) * frequency * (math.pi / (2 * size))).cos() * math.sqrt(2 / size)
    basis[:, 0] = 1 / math.sqrt(size)
    return basis
