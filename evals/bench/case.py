"""What a row of kvcompress.evals.bench.kernels measures."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Call = Callable[[], Any]


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
    """What a row measures: the same result by several ways."""

    kernel: str
    shape: Shape
    variants: dict[str, Call]
    oracle: str
    bytes: int = 0
    flops: int = 0
    # what of the result is compared
    compared: Callable[[Any], Any] = field(default=lambda result: result)
