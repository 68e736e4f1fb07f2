"""Segments: disjoint sets of cached tokens, each in one representation, that report attention with its log-sum-exp.

Softmax over the union of segments is exact: `kvcompress.kernels.merge` weights their outputs by log-sum-exp.
All tensors of a segment have the batch as their first dimension, so beam reordering, batch selection, cloning and
saving are one loop over them.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec

EMPTY = -1
NO_FACTS: Mapping[str, Any] = MappingProxyType({})


class Segment:
    """A set of cached tokens. Subclasses name their tensors, and define `attend` and `kept`.

    bias: [batch, kv_heads, tokens] float32, log-weights that attention adds to logits; None where tokens have none.
    """

    tensor_names: ClassVar[tuple[str, ...]]
    bias: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The segment's tensors by name, batch first."""
        return {name: tensor for name in self.tensor_names if (tensor := getattr(self, name)) is not None}

    def component(self, name: str) -> str:
        """The component that a tensor's bytes count toward."""
        return name

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces each tensor by `change(tensor)`."""
        self._set({name: change(tensor) for name, tensor in self.tensors().items()})

    def trim(self) -> None:
        """Frees room that no sequence needs any more, after others have left."""

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `load` needs: tensors by name, and facts that JSON can hold."""
        return self.tensors(), {}

    @classmethod
    def load(cls, tensors: dict[str, Tensor], facts: Mapping[str, Any] = NO_FACTS, **built_with: Any) -> Self:
        """A segment made of what `dump` returned.

        Args:
            facts: those of `dump`; others are ignored.
            built_with: what a segment of this class gets from its layer, and a file does not hold.
        """
        segment = cls.__new__(cls)
        for name, value in built_with.items():
            setattr(segment, name, value)
        segment._set(tensors)
        return segment

    def _set(self, tensors: dict[str, Tensor]) -> None:
        """Sets the tensors by name."""
        for name in self.tensor_names:
            setattr(self, name, tensors.get(name))

    def kept(self) -> Tensor:
        """Tokens held, padding not counted, [batch, kv_heads] int64."""
        raise NotImplementedError

    def offloaded(self) -> dict[str, tuple[str, list[Tensor]]]:
        """What the segment keeps off the model's device on purpose: by name, its tier ("host" or "disk") and tensors.

        These are not part of `tensors`: rows that are moved or copied share them.
        """
        return {}

    def attend(self, query: Tensor, query_positions: Tensor, spec: LogitSpec) -> tuple[Tensor, Tensor]:
        """Attention of queries to the segment's tokens, all of which precede them.

        Args:
            query: [batch, heads, queries, head_dim].
            query_positions: [batch, queries] int32.

        Returns:
            Output [batch, heads, queries, head_dim] and natural log-sum-exp [batch, heads, queries] float32.
        """
        raise NotImplementedError

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Everything that can be attended to, a piece at a time: keys, values [batch, kv_heads, tokens, head_dim], and
        positions [batch, 1 or kv_heads, tokens] int32, EMPTY where there is no token. Where there is a `bias`, it is
        that of the only piece."""
        raise NotImplementedError
