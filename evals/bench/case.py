"""What a row of kvcompress bench kernels measures."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcompress.evals.timing import Call


class Shape(NamedTuple):
    """Attention of a model: batch, heads, kv_heads, tokens (or kept slots) and head_dim."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.heads}/{self.kv_heads} heads of {self.head_dim}, {self.tokens} tokens"


@dataclass
class Case:
    """What a row measures: the same result by several ways. variants: how, by name; oracle: the one that is right."""

    kernel: str
    shape: Shape
    variants: dict[str, Call]
    oracle: str
    bytes: int = 0
    flops: int = 0
    # what of the result is compared
    compared: Callable[[Any], Any] = field(default=lambda result: result)


# the cases of a shape, in this type, on this device
MakeCases = Callable[[Shape, torch.dtype, torch.device], Iterator[Case]]


def beside_reference(
    kernel: str, shape: Shape, op: Callable[..., Any], reference: Callable[..., Any], *given: Any, **settings: Any
) -> Case:
    """An op beside its reference on the same arguments. settings: the case's (bytes, flops, compared) and the op's."""
    of_case = {name: settings.pop(name) for name in ("bytes", "flops", "compared") if name in settings}
    variants: dict[str, Call] = {
        "ours": functools.partial(op, *given, **settings),
        "reference": functools.partial(reference, *given, **settings),
    }
    return Case(kernel, shape, variants, "reference", **of_case)


def make_random(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """Random numbers of a shape."""
    return functools.partial(_random, dtype=dtype, device=device)


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device)
