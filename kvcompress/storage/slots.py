"""Slots: room for a fixed number of tokens per KV head; an evicted token frees its slot for the next one."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.column_sums import slot_column_maxima, slot_column_sums
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.decode import decode_attention
from kvcompress.kernels.decode_evict import Slots, decode_and_evict
from kvcompress.storage.columns import grown
from kvcompress.storage.segment import EMPTY, Segment


class SlotSegment(Segment):
    """A fixed number of slots per KV head, in no order; an evicted token frees its slot for the next one.

    keys, values: [batch, kv_heads, slots, head_dim]. positions: [batch, kv_heads, slots] int32, which of its
    sequence's tokens a slot holds, pads not counted, or EMPTY. scores: [batch, kv_heads, slots] float32, what the
    policy stores about each token. spare: [batch, kv_heads] int64, the free slot that the next token takes.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("keys", "values", "positions", "scores", "spare")

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
        """How many slots each KV head has, with the free one."""
        return self.keys.shape[2]

    def grow(self, slots: int) -> None:
        """Grows to so many slots; tokens stay where they are."""
        for name, fill in (("keys", 0), ("values", 0), ("positions", EMPTY), ("scores", 0)):
            setattr(self, name, grown(getattr(self, name), 2, slots, fill))
        torch.argmin(self.positions, -1, out=self.spare)

    def rotated_keys(self) -> Tensor:
        """The keys as queries see them, rotated to their positions, [batch, kv_heads, slots, head_dim]."""
        return self.keys

    def contents(self) -> tuple[Tensor, Tensor]:
        """Keys, as queries see them, and values, [batch, kv_heads, slots, head_dim]."""
        return self.rotated_keys(), self.values

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield (*self.contents(), self.positions)

    def like(self) -> tuple[Tensor, Tensor]:
        """Tensors with the dtype and, except for tokens, the shape of keys and of values."""
        return self.keys, self.values

    def decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        query_positions: Tensor,
        spec: LogitSpec,
        sink_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Stores one token and computes the attention of its query.

        Args:
            query: [batch, heads, 1, head_dim], rotated to match `rotated_keys`.
            key, value, positions: as `put` takes them.
            query_positions: [batch, 1] int32.
            sink_logits: [heads], as in decode_attention.

        Returns:
            The output, [batch, heads, 1, head_dim], and the attention that each slot received, summed over the query
            heads of a group, [batch, kv_heads, slots] float32.
        """
        self.put(key, value, positions)
        return self.decode_again(query, key, value, positions, query_positions, spec, sink_logits)

    def decode_again(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        query_positions: Tensor,
        spec: LogitSpec,
        sink_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The attention of another query of the token that `decode` stored, of which nothing was freed since."""
        keys = self.rotated_keys()
        return decode_attention(query, keys, self.values, self.positions, query_positions, spec, sink_logits)

    def decode_and_evict(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        limits: Tensor,
        recents: Tensor,
        spec: LogitSpec,
        **options: Any,
    ) -> Tensor:
        """Stores one token, computes its query's attention, scores every slot and evicts one, by `decode_and_evict`.

        Args:
            query, key, value, positions: as in `decode`. limits, recents, spec, options: as the op takes them.
        """
        slots = Slots(self.keys, self.values, self.positions, self.scores, self.spare)
        return decode_and_evict(query, key, value, slots, positions, limits, recents, spec, **options)

    def attend(self, query: Tensor, query_positions: Tensor, spec: LogitSpec) -> tuple[Tensor, Tensor]:
        return slot_attention(query, self.rotated_keys(), self.values, self.positions, query_positions, spec)

    def column_sums(self, query: Tensor, query_positions: Tensor, lse: Tensor, spec: LogitSpec) -> Tensor:
        """The attention each slot received, [batch, kv_heads, slots] float32; lse: the queries', over all they see."""
        return slot_column_sums(query, self.rotated_keys(), self.positions, query_positions, lse, spec)

    def column_maxima(self, query: Tensor, query_positions: Tensor, lse: Tensor, spec: LogitSpec) -> Tensor:
        """The most attention each slot received from one query and head, [batch, kv_heads, slots] float32."""
        return slot_column_maxima(query, self.rotated_keys(), self.positions, query_positions, lse, spec)

    def column_squares(self, query: Tensor, query_positions: Tensor, lse: Tensor, spec: LogitSpec) -> Tensor:
        """The squares of the attention that each slot received, summed, [batch, kv_heads, slots] float32."""
        return self.column_sums(query, query_positions, 2 * lse, spec.doubled())

    def put(self, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Writes one token into the free slots.

        Args:
            key, value: [batch, kv_heads, 1, head_dim].
            positions: [batch] int32; EMPTY for a sequence whose token is padding.
        """
        batch, kv_heads = self.spare.shape
        row = torch.arange(batch, device=key.device)[:, None]
        head = torch.arange(kv_heads, device=key.device)
        # by index, as a compiled scatter would copy all slots
        self._write(key, value)
        self.positions[row, head, self.spare] = positions[:, None].expand(-1, kv_heads)
        self.scores[row, head, self.spare] = 0.0

    def _write(self, key: Tensor, value: Tensor) -> None:
        """Writes one token, [batch, kv_heads, 1, head_dim], to the free slots."""
        batch, kv_heads = self.spare.shape
        row = torch.arange(batch, device=key.device)[:, None]
        head = torch.arange(kv_heads, device=key.device)
        self.keys[row, head, self.spare] = key[:, :, 0]
        self.values[row, head, self.spare] = value[:, :, 0]

    def free(self, victims: Tensor, over: Tensor) -> None:
        """Empties the victim's slot if a head is over its budget, and finds the next free slot.

        Args:
            victims: [batch, kv_heads] int64.
            over: [batch, kv_heads] bool.
        """
        slot = victims[..., None]
        freed = torch.where(over[..., None], EMPTY, self.positions.gather(2, slot))
        self.positions.scatter_(2, slot, freed)
        torch.argmin(self.positions, -1, out=self.spare)

    def replace(self, key: Tensor, value: Tensor, positions: Tensor, scores: Tensor, kept: Tensor) -> None:
        """Keeps some of the slots and of a chunk's tokens; the chunk's tokens overwrite the slots that are not kept.

        Args:
            key, value: the chunk, [batch, kv_heads, tokens, head_dim].
            positions: of the chunk, [batch, kv_heads, tokens] int32.
            scores: of slots then chunk, [batch, kv_heads, slots + tokens] float32.
            kept: of slots then chunk, [batch, kv_heads, slots + tokens] bool; at most `slots` per head.
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
            wanted: [batch, kv_heads, moves] bool, False for padding of the moves.
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
        """Bytes of so many slots: keys, values, position and score of each, and which one is free."""
        return batch * kv_heads * (slots * (2 * head_dim * itemsize + 4 + 4) + 8)


def _put_where(slots: Tensor, chunk: Tensor, source: Tensor, target: Tensor, wanted: Tensor) -> None:
    slots.scatter_(2, target, torch.where(wanted, chunk.gather(2, source), slots.gather(2, target)))
