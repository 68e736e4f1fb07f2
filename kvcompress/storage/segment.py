"""Segments: disjoint sets of cached tokens, each in one representation, that report attention with its log-sum-exp.

Softmax over the union of segments is exact: `kvcompress.kernels.merge` weighs their answers by log-sum-exp.
All tensors of a segment have the batch as their first dimension, which makes beam reordering, batch selection,
cloning and saving one loop over them.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.column_sums import slot_column_maxima, slot_column_sums
from kvcompress.kernels.decode import decode_attention
from kvcompress.kernels.decode_evict import decode_and_evict

EMPTY = -1
NO_FACTS: Mapping[str, Any] = MappingProxyType({})


class Segment:
    """A set of cached tokens. Subclasses name their tensors, and answer `attend` and `kept`."""

    tensor_names: ClassVar[tuple[str, ...]]

    def tensors(self) -> dict[str, Tensor]:
        """The segment's tensors by name, batch first."""
        return {name: tensor for name in self.tensor_names if (tensor := getattr(self, name)) is not None}

    def component(self, name: str) -> str:
        """What a tensor's bytes are counted as."""
        return name

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces each tensor by `change(tensor)`."""
        self._set({name: change(tensor) for name, tensor in self.tensors().items()})

    def trim(self) -> None:
        """Gives back the room that no sequence needs any more, as others have left."""

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `load` needs: tensors by name, and facts that JSON can carry."""
        return self.tensors(), {}

    @classmethod
    def load(cls, tensors: dict[str, Tensor], facts: Mapping[str, Any] = NO_FACTS, **built_with: Any) -> Self:
        """A segment of what `dump` gave.

        Args:
            facts: those of `dump`; others are of no interest.
            built_with: what a segment of this class takes from its layer, and no file holds.
        """
        segment = cls.__new__(cls)
        for name, value in built_with.items():
            setattr(segment, name, value)
        segment._set(tensors)
        return segment

    def _set(self, tensors: dict[str, Tensor]) -> None:
        """Takes on tensors by name."""
        for name in self.tensor_names:
            setattr(self, name, tensors.get(name))

    def kept(self) -> Tensor:
        """Tokens held, padding not counted, [batch, kv_heads] int64."""
        raise NotImplementedError

    def offloaded(self) -> dict[str, tuple[str, list[Tensor]]]:
        """What the segment keeps off the model's device on purpose: by name its tier ("host" or "disk") and tensors.

        These are no part of `tensors`: rows that are moved or copied share them.
        """
        return {}

    def attend(
        self, query: Tensor, query_positions: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of queries to the segment's tokens, all of which precede them.

        Args:
            query: [batch, heads, queries, head_dim].
            query_positions: [batch, queries] int32.

        Returns:
            Output [batch, heads, queries, head_dim] and natural log-sum-exp [batch, heads, queries] float32.
        """
        raise NotImplementedError

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All that may be attended to, some at a time: keys, values [batch, kv_heads, tokens, head_dim], and positions
        [batch, 1 or kv_heads, tokens] int32, EMPTY where there is no token."""
        raise NotImplementedError


class SlotSegment(Segment):
    """A fixed number of slots per KV head, in no order; a token that goes frees its slot for the next.

    keys, values: [batch, kv_heads, slots, head_dim]. positions: [batch, kv_heads, slots] int32, which of its
    sequence's tokens a slot holds, pads not counted, or EMPTY. scores: [batch, kv_heads, slots] float32, what the
    policy remembers of each token. spare: [batch, kv_heads] int64, the slot that the next token takes.
    """

    tensor_names = ("keys", "values", "positions", "scores", "spare")

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor
    spare: Tensor

    def __init__(self, key: Tensor, value: Tensor, slots: int) -> None:
        """Empty slots for tokens like these, [batch, kv_heads, any, head_dim]."""
        batch, kv_heads = key.shape[:2]
        self.keys = key.new_zeros(batch, kv_heads, slots, key.shape[-1])
        self.values = value.new_zeros(batch, kv_heads, slots, value.shape[-1])
        self.positions = torch.full((batch, kv_heads, slots), EMPTY, dtype=torch.int32, device=key.device)
        self.scores = torch.zeros(batch, kv_heads, slots, dtype=torch.float32, device=key.device)
        self.spare = torch.zeros(batch, kv_heads, dtype=torch.int64, device=key.device)

    @property
    def slots(self) -> int:
        """Slots per KV head, the spare one included."""
        return self.keys.shape[2]

    def grow(self, slots: int) -> None:
        """Makes it so many slots; what is held stays where it is."""
        more = slots - self.slots
        for name, value in (("keys", 0), ("values", 0), ("positions", EMPTY), ("scores", 0)):
            held = getattr(self, name)
            added = held.new_full((*held.shape[:2], more, *held.shape[3:]), value)
            setattr(self, name, torch.cat([held, added], 2))
        torch.argmin(self.positions, -1, out=self.spare)

    def rotated_keys(self) -> Tensor:
        """The keys as queries meet them, rotated to where they stand, [batch, kv_heads, slots, head_dim]."""
        return self.keys

    def contents(self) -> tuple[Tensor, Tensor]:
        """Keys, as queries meet them, and values, [batch, kv_heads, slots, head_dim]."""
        return self.rotated_keys(), self.values

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield (*self.contents(), self.positions)

    def like(self) -> tuple[Tensor, Tensor]:
        """Tensors of the type and, tokens aside, the shape of keys and of values."""
        return self.keys, self.values

    def decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        query_positions: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sink_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Takes in one token and answers its query.

        Args:
            query: [batch, heads, 1, head_dim], placed as `rotated_keys` will be.
            key, value, positions: as `put` takes them.
            query_positions: [batch, 1] int32.
            sink_logits: [heads], as in decode_attention.

        Returns:
            The output, [batch, heads, 1, head_dim], and what each slot received of the attention, summed over the
            query heads of a group, [batch, kv_heads, slots] float32.
        """
        self.put(key, value, positions)
        return decode_attention(
            query,
            self.rotated_keys(),
            self.values,
            self.positions,
            query_positions,
            scale=scale,
            window=window,
            softcap=softcap,
            sink_logits=sink_logits,
        )

    def decode_again(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        query_positions: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        """What another query of the token that `decode` has taken in sees, sinks apart, and its log-sum-exp."""
        return self.attend(query, query_positions, scale=scale, window=window, softcap=softcap)

    def decode_and_evict(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        limits: Tensor,
        recents: Tensor,
        **options: Any,
    ) -> Tensor:
        """Takes in one token, answers its query, scores every slot and frees the one that goes, by `decode_and_evict`.

        Args:
            query, key, value, positions: as in `decode`. limits, recents, options: as the op takes them.
        """
        return decode_and_evict(
            query, key, value, self.keys, self.values, self.positions, self.scores, self.spare,
            positions, limits, recents, **options,
        )  # fmt: skip

    def attend(
        self, query: Tensor, query_positions: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        return slot_attention(
            query,
            self.rotated_keys(),
            self.values,
            self.positions,
            query_positions,
            scale=scale,
            window=window,
            softcap=softcap,
        )

    def column_sums(
        self,
        query: Tensor,
        query_positions: Tensor,
        lse: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention each slot received, [batch, kv_heads, slots] float32, given the queries' whole log-sum-exp."""
        return slot_column_sums(
            query,
            self.rotated_keys(),
            self.positions,
            query_positions,
            lse,
            scale=scale,
            window=window,
            softcap=softcap,
        )

    def column_maxima(
        self,
        query: Tensor,
        query_positions: Tensor,
        lse: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """The most attention each slot received from one query and head, [batch, kv_heads, slots] float32."""
        return slot_column_maxima(
            query,
            self.rotated_keys(),
            self.positions,
            query_positions,
            lse,
            scale=scale,
            window=window,
            softcap=softcap,
        )

    def put(self, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Writes one token into the spare slots.

        Args:
            key, value: [batch, kv_heads, 1, head_dim].
            positions: [batch] int32; EMPTY for a sequence whose token is padding.
        """
        batch, kv_heads = self.spare.shape
        row = torch.arange(batch, device=key.device)[:, None]
        head = torch.arange(kv_heads, device=key.device)
        # by index, as a compiled scatter writes a new copy of all slots
        self._write(key, value)
        self.positions[row, head, self.spare] = positions[:, None].expand(-1, kv_heads)
        self.scores[row, head, self.spare] = 0.0

    def _write(self, key: Tensor, value: Tensor) -> None:
        """Writes one token, [batch, kv_heads, 1, head_dim], to the spare slots."""
        batch, kv_heads = self.spare.shape
        row = torch.arange(batch, device=key.device)[:, None]
        head = torch.arange(kv_heads, device=key.device)
        self.keys[row, head, self.spare] = key[:, :, 0]
        self.values[row, head, self.spare] = value[:, :, 0]

    def free(self, victims: Tensor, over: Tensor) -> None:
        """Empties the victim's slot where a head is over its budget, and finds the next spare slot.

        Args:
            victims: [batch, kv_heads] int64.
            over: [batch, kv_heads] bool.
        """
        slot = victims[..., None]
        freed = torch.where(over[..., None], EMPTY, self.positions.gather(2, slot))
        self.positions.scatter_(2, slot, freed)
        torch.argmin(self.positions, -1, out=self.spare)

    def replace(self, key: Tensor, value: Tensor, positions: Tensor, scores: Tensor, kept: Tensor) -> None:
        """Keeps some of the slots and of the tokens of a chunk: those of the chunk overwrite the slots let go.

        Args:
            key, value: the chunk, [batch, kv_heads, tokens, head_dim].
            positions: of the chunk, [batch, kv_heads, tokens] int32.
            scores: of slots then chunk, [batch, kv_heads, slots + tokens] float32.
            kept: of slots then chunk, [batch, kv_heads, slots + tokens] bool; at most `slots` a head.
        """
        slots = self.slots
        stays, comes = kept[..., :slots], kept[..., slots:]
        self.positions.masked_fill_(~stays, EMPTY)
        self.scores.copy_(scores[..., :slots])
        # free slots first and wanted tokens first, each in order: the i-th wanted token takes the i-th free slot
        moved = min(slots, key.shape[2])
        target = stays.to(torch.int8).argsort(dim=-1, stable=True)[..., :moved]
        source = comes.to(torch.int8).argsort(dim=-1, stable=True, descending=True)[..., :moved]
        wanted = comes.gather(-1, source)
        for slot_values, chunk_values in ((self.positions, positions), (self.scores, scores[..., slots:])):
            _put_where(slot_values, chunk_values, source, target, wanted)
        self._move(key, value, source, target, wanted)
        torch.argmin(self.positions, -1, out=self.spare)

    def _move(self, key: Tensor, value: Tensor, source: Tensor, target: Tensor, wanted: Tensor) -> None:
        """Writes tokens of a chunk to slots.

        Args:
            key, value: the chunk, [batch, kv_heads, tokens, head_dim].
            source, target: token and slot of each move, [batch, kv_heads, moves] int64, no slot twice.
            wanted: [batch, kv_heads, moves] bool, False for what only fills up the number of moves.
        """
        for slot_values, chunk_values in ((self.keys, key), (self.values, value)):
            width = slot_values.shape[-1]
            _put_where(
                slot_values, chunk_values, *(x[..., None].expand(-1, -1, -1, width) for x in (source, target, wanted))
            )

    def kept(self) -> Tensor:
        return (self.positions != EMPTY).sum(-1)

    @staticmethod
    def nbytes_for(batch: int, kv_heads: int, head_dim: int, itemsize: int, slots: int) -> int:
        """Bytes of so many slots: keys, values, position and score of each, and which is spare."""
        return batch * kv_heads * (slots * (2 * head_dim * itemsize + 4 + 4) + 8)


class DenseSegment(Segment):
    """Every token, in order, in buffers that grow by blocks.

    keys, values: [batch, kv_heads, room, head_dim]. visible: [batch, room] bool, False for padding, or None while
    nothing is padded. length: tokens held, at most `room`.
    """

    tensor_names = ("keys", "values", "visible")
    # room added at least when it runs out
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
            # what was written to `room` lies there already
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

    def held(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views of the tokens held: keys, values [batch, kv_heads, length, head_dim], visible [batch, length]."""
        visible = None if self.visible is None else self.visible[:, : self.length]
        return self.keys[:, :, : self.length], self.values[:, :, : self.length], visible

    def attend(
        self, query: Tensor, query_positions: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        key, value, visible = self.held()
        if visible is None:
            positions = torch.arange(self.length, device=key.device)[None]
        else:
            positions = (visible.cumsum(-1) - 1).masked_fill(~visible, EMPTY)
        positions = positions.to(torch.int32)[:, None].expand(key.shape[:3])
        return slot_attention(
            query, key, value, positions, query_positions, scale=scale, window=window, softcap=softcap
        )

    def show(self, visible: Tensor) -> None:
        """Sets which tokens are visible, [batch, length] bool."""
        if self.visible is None:
            self.visible = torch.ones(visible.shape[0], self.keys.shape[2], dtype=torch.bool, device=visible.device)
        self.visible[:, : self.length] = visible

    def reorder(self, order: Tensor) -> None:
        """Puts the first tokens in another order, [batch, first tokens] int64."""
        tokens = order.shape[1]
        for held in (self.keys, self.values):
            index = order[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
            held[:, :, :tokens] = held[:, :, :tokens].gather(2, index)
        if self.visible is not None:
            self.visible[:, :tokens] = self.visible[:, :tokens].gather(1, order)

    def drop_first(self, tokens: int) -> None:
        """Lets the oldest tokens go, and their memory with them."""
        self._reallocate(tokens, self.length - tokens)

    def drop_last(self, tokens: int) -> None:
        """Lets the newest tokens go; the room stays."""
        self.length -= tokens

    def _grow(self, tokens: int) -> None:
        if tokens > self.keys.shape[2]:
            room = tokens if self.length == 0 else tokens + max(self.growth, self.length // 8)
            self._reallocate(0, room)

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


def _put_where(slots: Tensor, chunk: Tensor, source: Tensor, target: Tensor, wanted: Tensor) -> None:
    slots.scatter_(2, target, torch.where(wanted, chunk.gather(2, source), slots.gather(2, target)))
