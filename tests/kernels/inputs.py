"""Inputs of the kernel tests, and which of their combinations run.

Run plainly these tests check the PyTorch paths, under TRITON_INTERPRET=1 the kernels.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.kernels.common.quantized import QuantizedTensor, QuantScheme
from kvcompress.kernels.common.runtime import INTERPRETED, runs_triton
from kvcompress.kernels.low_rank import residual_factors_reference
from kvcompress.kernels.quantise import quantise_reference

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


def blocks(batch: int, kv_heads: int, count: int, block: int, head_dim: int, dtype: torch.dtype = torch.float32):
    """[batch, kv_heads, count, block, head_dim], not contiguous, with outliers and channels far from 0."""
    x = torch.randn(batch, count, block, kv_heads, head_dim, device=DEVICE)
    x = x + torch.randn(head_dim, device=DEVICE) * 2 + 6 * x * (torch.rand_like(x) < 0.02)
    return x.to(dtype).permute(0, 3, 1, 2, 4)


def packed_blocks(x: Tensor, coding: QuantScheme, spans: Tensor | None = None) -> QuantizedTensor:
    """Blocks of `blocks`, packed with the factors of their spans, [batch, blocks]; None: one span."""
    packed = quantise_reference(x, coding)
    if not coding.rank:
        return packed
    if spans is None:
        spans = torch.zeros(len(x), x.shape[2], dtype=torch.int32, device=x.device)
    left = torch.zeros(*x.shape[:4], coding.rank, dtype=torch.float16, device=x.device)
    right = []
    for span in range(int(spans.max()) + 1):
        found = residual_factors_reference(x, packed, coding, coding.rank, spans == span)
        left += found[0]
        right.append(found[1])
    return packed._replace(left=left, right=torch.stack(right, 2))


def some_of(parameters: dict[str, Sequence[Any]], at_once: int = 2) -> pytest.MarkDecorator:
    """All combinations of these parameters; in the interpreter, which takes seconds for each, so many by default that
    any values of `at_once` of them meet in one, and the others where slow tests run.

    parameters: the values of each, or of several that belong together, by the names a test has for them.
    """
    names = [name.strip() for each in parameters for name in each.split(",")]
    found = []
    chosen = covering([len(values) for values in parameters.values()], at_once) if INTERPRETED else None
    for index in itertools.product(*(range(len(values)) for values in parameters.values())):
        given: list[Any] = []
        for name, at in zip(parameters, index, strict=True):
            given += parameters[name][at] if "," in name else [parameters[name][at]]
        found.append(pytest.param(*given, marks=() if chosen is None or index in chosen else pytest.mark.slow))
    return pytest.mark.parametrize(names, found, ids=str)


def covering(sizes: list[int], at_once: int) -> set[tuple[int, ...]]:
    """Few combinations of as many numbers below these sizes, of which any values of `at_once` positions meet in one."""
    combinations = list(itertools.product(*map(range, sizes)))

    def meeting(combination: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(combination), at_once))

    missing = set().union(*map(meeting, combinations))
    used: Counter[tuple[int, int]] = Counter()
    chosen: set[tuple[int, ...]] = set()
    while missing:
        # of those that add as much the one whose values were met least
        best = max(
            combinations, key=lambda each: (len(meeting(each) & missing), -sum(used[at] for at in enumerate(each)))
        )
        chosen.add(best)
        used.update(enumerate(best))
        missing -= meeting(best)
    return chosen
