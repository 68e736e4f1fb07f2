"""Every token, in order, in buffers that grow by blocks."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.storage.segment import EMPTY, NO_FACTS, Segment


class DenseSegment(Segment):
    """Every token, in order, in buffers that grow by blocks.

    keys, values: [batch, kv_heads, room, head_dim]. visible: [batch, room] bool, False for padding, or None while
    nothing is padded. length: tokens held, at most `room`.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("keys", "values", "visible")
    # the least room that is added when it runs out
    growth: ClassVar[int] = 256

    keys: Tensor
    values: Tensor
    visible: Tensor | None
    length: int

    def __init__(self, key: Tensor, value: Tensor) -> None:
        """An empty segment for tokens like these, [batch, kv_heads, any, head_dim]."""
        self.keys, self.values = key[:, :, :0].clone(), value[:, :, :0].clone()
        self.visible = None
        self.length = 0

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.tensors(), {"length": self.length}

    @classmethod
    def load(cls, tensors: dict[str, Tensor], facts: Mapping[str, Any] = NO_FACTS, **built_with: Any) -> Self:
        return super().load(tensors, length=facts["length"], **built_with)

    def kept(self) -> Tensor:
        batch, kv_heads = self.keys.shape[:2]
        _, _, visible = self.held()
        kept = self.keys.new_full((batch,), self.length) if visible is None else visible.sum(-1)
        return kept.long()[:, None].expand(batch, kv_heads)

    @staticmethod
    def nbytes_for(batch: int, kv_heads: int, head_dim: int, itemsize: int, tokens: int) -> int:
        """Bytes of so many tokens without padding, and without room for more."""
        return batch * kv_heads * tokens * 2 * head_dim * itemsize

    def append(self, key: Tensor, value: Tensor, visible: Tensor | None) -> None:
        """Adds tokens [batch, kv_heads, tokens, head_dim]; visible [batch, tokens] bool marks padding by False."""
        stop = self.length + key.shape[2]
        self._grow(stop)
        for held, fresh in ((self.keys, key), (self.values, value)):
            place = held[:, :, self.length : stop]
            # what was written to `room` is already there
            if fresh.data_ptr() != place.data_ptr() or fresh.stride() != place.stride():
                place.copy_(fresh)
        if visible is not None and self.visible is None:
            self.visible = torch.ones(key.shape[0], self.keys.shape[2], dtype=torch.bool, device=key.device)
        if self.visible is not None:
            self.visible[:, self.length : stop] = True if visible is None else visible
        self.length = stop

    def room(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Where `append` will put the keys and values of the next tokens, [batch, kv_heads, tokens, head_dim]."""
        stop = self.length + tokens
        self._grow(stop)
        return self.keys[:, :, self.length : stop], self.values[:, :, self.length : stop]

    def take_room(self, tokens: int) -> None:
        """Takes room for so many more tokens, and no more than that."""
        self._reallocate(0, self.length + tokens)

    def held(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views of the tokens held: keys, values [batch, kv_heads, length, head_dim], visible [batch, length]."""
        visible = None if self.visible is None else self.visible[:, : self.length]
        return self.keys[:, :, : self.length], self.values[:, :, : self.length], visible

    def attend(self, query: Tensor, query_positions: Tensor, spec: LogitSpec) -> tuple[Tensor, Tensor]:
        key, value, _ = self.held()
        positions = self.positions()[:, None].expand(key.shape[:3])
        return slot_attention(query, key, value, positions, query_positions, spec)

    def positions(self) -> Tensor:
        """Positions of the tokens held, [batch or 1, length] int32, EMPTY for padding; 0 is the first that is held."""
        _, _, visible = self.held()
        if visible is None:
            return torch.arange(self.length, dtype=torch.int32, device=self.keys.device)[None]
        return (visible.cumsum(-1, dtype=torch.int32) - 1).masked_fill(~visible, EMPTY)

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """What changes from step to step, counted: each column's position [batch, room] int32, EMPTY for padding and
        room; each row's real tokens [batch] int32; the column that comes next [1] int64."""
        batch, room, device = self.keys.shape[0], self.keys.shape[2], self.keys.device
        _, _, visible = self.held()
        if visible is None:
            visible = torch.ones(batch, self.length, dtype=torch.bool, device=device)
        positions = torch.full((batch, room), EMPTY, dtype=torch.int32, device=device)
        counted = visible.cumsum(-1, dtype=torch.int32) - 1
        positions[:, : self.length] = counted.masked_fill(~visible, EMPTY)
        column = torch.full((1,), self.length, dtype=torch.int64, device=device)
        return positions, visible.sum(-1, dtype=torch.int32), column

    def show(self, visible: Tensor) -> None:
        """Sets which tokens are visible, [batch, length] bool."""
        if self.visible is None:
            self.visible = torch.ones(visible.shape[0], self.keys.shape[2], dtype=torch.bool, device=visible.device)
        self.visible[:, : self.length] = visible

    def hide(self, remap: Tensor, before: Tensor) -> Tensor:
        """Hides what a change of padding drops, and returns what stays, [batch, length] bool.

        Args:
            remap: [batch, past tokens] int32, EMPTY for what goes. before: real tokens of each row so far, [batch].
        """
        _, _, held = self.held()
        held = remap.new_ones(len(remap), self.length, dtype=torch.bool) if held is None else held
        # columns may have been reordered, and hold the last tokens of their rows
        place = before.to(remap.device)[:, None] - held.flip(-1).cumsum(-1).flip(-1)
        stays = held & (remap.gather(1, place.clamp(0, remap.shape[1] - 1)) >= 0)
        self.show(stays)
        return stays

    def reorder(self, order: Tensor) -> None:
        """Puts the first tokens in another order, [batch, first tokens] int64."""
        self._reorder((self.keys, self.values), order)

    def _reorder(self, tensors: tuple[Tensor, ...], order: Tensor) -> None:
        tokens = order.shape[1]
        for held in tensors:
            index = order[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
            held[:, :, :tokens] = held[:, :, :tokens].gather(2, index)
        if self.visible is not None:
            self.visible[:, :tokens] = self.visible[:, :tokens].gather(1, order)

    def write(self, column: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores a token per row, [batch, kv_heads, 1, head_dim], in a column of the room, [1] int64."""
        self.keys.index_copy_(2, column, key)
        self.values.index_copy_(2, column, value)

    def drop_first(self, tokens: int) -> None:
        """Drops the oldest tokens, and frees their memory."""
        self._reallocate(tokens, self.length - tokens)

    def drop_last(self, tokens: int) -> None:
        """Drops the newest tokens; the room stays."""
        self.length -= tokens

    @classmethod
    def room_after(cls, tokens: int, fed: int) -> int:
        """For how many tokens there is room when so many have come, so many at a time."""
        room = 0
        while room < tokens:
            # the forward that finds no more room
            length = min(room // fed * fed, tokens - 1)
            room = cls._room(length, min(length + fed, tokens))
        return room

    @classmethod
    def _room(cls, length: int, tokens: int) -> int:
        """The room that is taken where there was none for so many tokens, after the first `length`."""
        return tokens if length == 0 else tokens + max(cls.growth, length // 8)

    def _grow(self, tokens: int) -> None:
        if tokens > self.keys.shape[2]:
            self._reallocate(0, self._room(self.length, tokens))

    def _reallocate(self, first: int, room: int) -> None:
        held = self.length - first
        for name, tensor in self.tensors().items():
            dim = 1 if name == "visible" else 2
            shape = list(tensor.shape)
            shape[dim] = room
            grown = tensor.new_zeros(shape)
            grown.narrow(dim, 0, held).copy_(tensor.narrow(dim, first, held))
            setattr(self, name, grown)
        self.length = held
