"""Inputs of the kernel tests. Run plainly these tests check the PyTorch paths, under TRITON_INTERPRET=1 the kernels."""

import pytest
import torch
from torch import Tensor

from kvcompress.kernels.runtime import runs_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(
    not runs_triton(torch.empty(0, device=DEVICE)), reason="needs a GPU, or TRITON_INTERPRET=1"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def heads(batch: int, count: int, tokens: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[batch, count, tokens, dim], laid out as a model's projections leave it: not contiguous."""
    return torch.randn(batch, tokens, count, dim, device=DEVICE).to(dtype).transpose(1, 2)


def slot_positions(batch: int, kv_heads: int, slots: int, filled: float = 0.7) -> Tensor:
    """Distinct positions below 2 * slots in no order, with empty slots between; one head is all empty."""
    order = torch.rand(batch, kv_heads, 2 * slots).argsort(-1)[..., :slots].int()
    order[torch.rand(batch, kv_heads, slots) > filled] = -1
    order[-1, -1] = -1
    return order.to(DEVICE)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """The defaults; in 16 bits the weights are rounded before they meet the values, which sums near 0 show."""
    return {} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 1e-2 if dtype == torch.bfloat16 else 2e-3}
