"""A rotation that spreads what stands out in a vector over all of its numbers, which few bits then lose less of.

    rotate(x) = x R        R = diag(signs) (H kron C)

H is the Hadamard matrix of the largest power of two in head_dim, C the cosine transform (DCT-II) of the rest, 1 for
most models, both orthonormal; the signs are fixed ones that look random (QuaRot, arXiv:2404.00456). R is orthogonal, so
values that are stored rotated need to be rotated back only once, after attention has summed them:

    out = p V = (p rotate(V)) R'

Operations per number: 2 * head_dim, as a product. Bytes: each vector read and written once, to rotate once in each
step: bound by bandwidth.
"""

import functools
import math

import torch
from torch import Tensor

from kvcompress.kernels.common.runtime import op


@op(fake=lambda x, **_: x.new_empty(x.shape))
def rotate(x: Tensor, back: bool = False, at_once: bool = False) -> Tensor:
    """Rotates vectors [..., head_dim] of any floating dtype; back: takes a rotation back.

    What a vector of 32 bits or fewer becomes does not depend on the others, bit by bit: a row is packed as it would be
    alone. In float64, sums of such numbers are exact in any order, if none is 2^20 times another. With `at_once` it is
    one product, in float32 or more, where that does not hold.

    Returns:
        As x.
    """
    dim = x.shape[-1]
    if at_once:
        dtype = torch.promote_types(x.dtype, torch.float32)
        matrix = _matrix(dim, dtype, x.device)
        return (x.to(dtype) @ (matrix.mT if back else matrix)).to(x.dtype).contiguous()
    power, (signs, hadamard, cosines) = dim & -dim, _factors(dim, x.device)
    if power == dim:
        rotated: Tensor = x.double() @ (hadamard.mT if back else hadamard)
    elif back:
        rotated = _combined(x.double().unflatten(-1, (power, -1)).mT @ hadamard, cosines.mT).mT.flatten(-2) * signs
    else:
        y = (x.double() * signs).unflatten(-1, (power, -1)).mT
        rotated = (_combined(y, cosines) @ hadamard).mT.flatten(-2)
    return rotated.mul(1 / math.sqrt(power)).to(x.dtype)


def _combined(y: Tensor, cosines: Tensor) -> Tensor:
    """The products of rows with a small matrix, [..., size, any], summed one by one."""
    return functools.reduce(torch.add, [y[..., [k], :] * cosines[k, :, None] for k in range(len(cosines))])


def rotate_reference(x: Tensor, back: bool = False, at_once: bool = False) -> Tensor:
    """What rotate means, in float64."""
    matrix = _matrix(x.shape[-1], torch.float64, x.device)
    return (x.double() @ (matrix.mT if back else matrix)).to(x.dtype)


@functools.cache
def _factors(dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The signs, [dim], H without its scale, with the signs where it is all, and C, as `_matrix` has them."""
    with torch.inference_mode(False), torch.no_grad():
        power, signs = dim & -dim, _signs(dim)
        hadamard = _ones(power) * signs[:, None] if power == dim else _ones(power)
        parts = signs, hadamard, _cosines(dim // power)
        return tuple(part.to(device) for part in parts)  # type: ignore[return-value]


@functools.cache
def _matrix(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """R, [dim, dim]."""
    # shared by all that comes
    with torch.inference_mode(False), torch.no_grad():
        power = dim & -dim
        whole = torch.kron(_ones(power) * power**-0.5, _cosines(dim // power))
        return (_signs(dim)[:, None] * whole).to(device, dtype)


def _ones(power: int) -> Tensor:
    """The Hadamard matrix of 1 and -1, [power, power]."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    return hadamard


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
