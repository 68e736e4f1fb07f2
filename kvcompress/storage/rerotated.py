"""Slots whose tokens close up: a token's position is its index among the tokens kept, not its place in the text.

So distances never exceed what is held, and a stream may go past the length that the model was trained for, as in the
streaming modes of H2O (arXiv:2306.14048) and StreamingLLM (arXiv:2309.17453). Keys are stored without rotation; in
every forward they are rotated to their index, 0 for the oldest token kept, and the queries to the indices that follow.
Indices are counted per head, as heads keep different tokens. A chunk's own length is added: feed a long text in chunks
that, together with the budget, stay within the trained length.
"""

from typing import Any

import torch
from torch import Tensor

from kvcompress.storage.ragged import RaggedSlots
from kvcompress.storage.rope import Rope
from kvcompress.storage.slots import SlotSegment


class RerotatedSlots(SlotSegment):
    """Slots with keys that are not rotated. Keys come in at their true positions; `rotated_keys` returns them at their
    indexes."""

    rope: Rope

    def __init__(self, key: Tensor, value: Tensor, slots: int, rope: Rope) -> None:
        """Empty slots for tokens like these, [batch, kv_heads, any, head_dim], rotated by this rotary embedding."""
        super().__init__(key, value, slots)
        self.rope = rope

    def rotated_keys(self) -> Tensor:
        return self._turned(self._indices())

    def _turned(self, index: Tensor) -> Tensor:
        """The keys rotated to these indices, one for each."""
        # few distinct angles: one table, from which every slot takes its row
        cos, sin = self.rope.turns(torch.arange(self.slots, device=self.keys.device))
        return self.rope.turn(self.keys, cos[index], sin[index])

    def _indices(self) -> Tensor:
        """Each slot's index among those kept, [batch, kv_heads, slots] int64; the newest has the same in every head."""
        order = self.positions.argsort(-1)
        rank = torch.arange(self.slots, device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, rank)
        # empty slots come first in the order
        return (rank - self.slots + self.held()[:, None, None]).clamp(min=0)

    def held(self) -> Tensor:
        """How many tokens each sequence's fullest head holds, [batch] int64: the index of the next token."""
        return self.kept().amax(1)

    def put(self, key: Tensor, value: Tensor, positions: Tensor) -> None:
        super().put(self.rope.unrotate(key, positions[:, None, None]), value, positions)

    def replace(self, key: Tensor, value: Tensor, positions: Tensor, scores: Tensor, kept: Tensor) -> None:
        super().replace(self.rope.unrotate(key, positions), value, positions, scores, kept)


class RaggedRerotatedSlots(RerotatedSlots, RaggedSlots):
    """Such slots whose number differs from head to head; the newest token has the same index in every head."""

    def rotated_keys(self) -> Tensor:
        return RaggedSlots.rotated_keys(self)

    def _rotated_rows(self) -> Tensor:
        return self._turned(self._by_row(self._indices()))

    def replace(self, *args: Any, **options: Any) -> None:
        RaggedSlots.replace(self, *args, **options)

    def refill(self, key: Tensor, value: Tensor, positions: Tensor, *args: Any, **options: Any) -> None:
        super().refill(self.rope.unrotate(key, positions), value, positions, *args, **options)
