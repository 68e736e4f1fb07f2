"""The newest tokens of a cache that packs its tokens, still unpacked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.storage.columns import grown, marked_first, span_of_rows, taken
from kvcompress.storage.padding import reordered
from kvcompress.storage.segment import EMPTY, NO_FACTS, Segment

# how much spare room a tail keeps when sequences leave
_SPARE = 64


class TailSegment(Segment):
    """The newest tokens, unpacked, until there are enough for a block.

    keys, values: [batch, kv_heads, room, head_dim]. positions: [batch, room] int32, or EMPTY.
    held: how many tokens each row has, in the first columns, in order.
    """

    tensor_names = ("keys", "values", "positions")

    keys: Tensor
    values: Tensor
    positions: Tensor
    held: list[int]

    def __init__(self, key: Tensor, value: Tensor, room: int) -> None:
        """Room for tokens like these, [batch, kv_heads, any, head_dim]."""
        batch, kv_heads = key.shape[:2]
        self.keys = key.new_zeros(batch, kv_heads, room, key.shape[-1])
        self.values = value.new_zeros(batch, kv_heads, room, value.shape[-1])
        self.positions = torch.full((batch, room), EMPTY, dtype=torch.int32, device=key.device)
        self.held = [0] * batch

    def component(self, name: str) -> str:
        return "tail"

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.tensors(), {"held": self.held}

    @classmethod
    def load(cls, tensors: dict[str, Tensor], facts: Mapping[str, Any] = NO_FACTS, **built_with: Any) -> Self:
        return super().load(tensors, held=list(facts["held"]), **built_with)

    def kept(self) -> Tensor:
        return (self.positions != EMPTY).sum(-1)[:, None].expand(-1, self.keys.shape[1])

    @staticmethod
    def nbytes_for(batch: int, kv_heads: int, head_dim: int, itemsize: int, room: int) -> int:
        """Bytes of room for so many tokens."""
        return batch * room * (2 * kv_heads * head_dim * itemsize + 4)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_tensors(change)
        self.held = change(torch.tensor(self.held)).tolist()

    @property
    def room(self) -> int:
        return self.keys.shape[2]

    def trim(self, spare: int = _SPARE) -> None:
        room = max(self.held) + spare
        if room < self.room:
            for name in self.tensor_names:
                dim = 1 if name == "positions" else 2
                tensor = getattr(self, name).narrow(dim, 0, room)
                setattr(self, name, tensor.clone(memory_format=torch.contiguous_format))

    def attend(self, query: Tensor, query_positions: Tensor, spec: LogitSpec) -> tuple[Tensor, Tensor]:
        # a graph serves however many there are
        used = self.room if torch.compiler.is_compiling() else max(self.held)
        positions = self.positions[:, None, :used].expand(-1, self.keys.shape[1], -1)
        return slot_attention(query, self.keys[:, :, :used], self.values[:, :, :used], positions, query_positions, spec)

    def beside(self, other: "TailSegment") -> "TailSegment":
        """A copy of the tokens of both."""
        used = max(self.held), max(other.held)
        joined = TailSegment.__new__(TailSegment)
        for name in ("keys", "values"):
            sides = [getattr(part, name)[:, :, :count] for part, count in zip((self, other), used, strict=True)]
            setattr(joined, name, torch.cat(sides, 2))
        joined.positions = torch.cat([self.positions[:, : used[0]], other.positions[:, : used[1]]], 1)
        joined.held = [sum(used)]
        return joined

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield self.keys, self.values, self.positions[:, None]

    def put(self, key: Tensor, value: Tensor, real: Sequence[int], lengths: Sequence[int]) -> None:
        """Adds one token per row, [batch, kv_heads, 1, head_dim]; real is 0 for a row whose token is padding."""
        at = self.held[0]
        if all(real) and all(held == at for held in self.held):
            self.keys[:, :, at] = key[:, :, 0]
            self.values[:, :, at] = value[:, :, 0]
            self.positions[:, at] = lengths[0] if len(set(lengths)) == 1 else numbers(lengths, key.device)
        else:
            rows = [row for row, is_real in enumerate(real) if is_real]
            row = torch.tensor(rows, dtype=torch.int64, device=key.device)
            slot = torch.tensor([self.held[row] for row in rows], dtype=torch.int64, device=key.device)
            self.keys[row, :, slot] = key[row, :, 0]
            self.values[row, :, slot] = value[row, :, 0]
            places = torch.tensor([lengths[row] for row in rows], dtype=torch.int32, device=key.device)
            self.positions[row, slot] = places
        self.held = [held + is_real for held, is_real in zip(self.held, real, strict=True)]

    def refill(self, key: Tensor, value: Tensor, first: list[int], held: list[int], lengths: Sequence[int]) -> None:
        """Replaces each row's tokens by `held` tokens from `first` on, of [batch, kv_heads, any, head_dim].

        Args:
            lengths: tokens of each row, with these.
        """
        at, there = span_of_rows(first, held, key.device)
        if at.shape[1] > self.room:
            self.grow(at.shape[1])
        used = slice(0, at.shape[1])
        self.keys[:, :, used], self.values[:, :, used] = taken(key, at, 2), taken(value, at, 2)
        start = torch.tensor([length - count for length, count in zip(lengths, held, strict=True)], device=key.device)
        places = start[:, None] + torch.arange(at.shape[1], device=key.device)
        self.positions.fill_(EMPTY)
        self.positions[:, used] = places.masked_fill(~there, EMPTY).to(torch.int32)
        self.held = list(held)

    def remap(self, remap: Tensor, lengths: Sequence[int]) -> None:
        """Follows a change of padding, as `moved` does, and closes the gaps of tokens that it drops.

        Args:
            lengths: tokens of each row, afterwards.
        """
        stays = moved(self.positions, remap) != EMPTY
        order, held = marked_first(stays), stays.sum(-1).tolist()
        self.refill(reordered(self.keys, order), reordered(self.values, order), [0] * len(held), held, lengths)

    def places(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What changes from step to step: `positions` itself; each row's real tokens [batch] int32, here `lengths`; the
        column behind every row's tokens [1] int64."""
        device = self.positions.device
        column = torch.full((1,), max(self.held), dtype=torch.int64, device=device)
        return self.positions, numbers(lengths, device), column

    def take_in(self, tokens: int) -> list[int]:
        """Counts what was written to so many columns behind every row's tokens, and closes the gaps between rows.

        Returns:
            How many of them each row has taken.
        """
        start = max(self.held)
        written = self.positions[:, start : start + tokens] != EMPTY
        counts = [tokens] * len(self.held)
        if min(self.held) < start or not bool(written.all()):
            counts = written.sum(-1).tolist()
            order = marked_first(self.positions != EMPTY)
            self.keys.copy_(reordered(self.keys, order))
            self.values.copy_(reordered(self.values, order))
            self.positions.copy_(self.positions.gather(1, order))
        self.held = [held + count for held, count in zip(self.held, counts, strict=True)]
        return counts

    def drop_last(self, counts: Sequence[int]) -> None:
        """Drops each row's newest tokens."""
        self.held = [held - count for held, count in zip(self.held, counts, strict=True)]
        limit = torch.tensor(self.held, device=self.positions.device)[:, None]
        gone = torch.arange(self.room, device=limit.device) >= limit
        self.positions.masked_fill_(gone, EMPTY)

    def cut(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Empties the rows that reach beyond their first `lengths` tokens.

        Returns:
            Those of the row's first `lengths` tokens that were here: keys and values [batch, kv_heads, room, head_dim],
            each row's tokens first, and how many there are.
        """
        limit = torch.tensor(lengths, device=self.positions.device)[:, None]
        goes = (self.positions >= limit).any(-1, keepdim=True)
        if not bool(goes.any()):
            return self.keys, self.values, [0] * len(lengths)
        # tokens may have been hidden in the meantime
        stays = goes & (self.positions != EMPTY) & (self.positions < limit)
        order = marked_first(stays)
        key, value = reordered(self.keys, order), reordered(self.values, order)
        self.positions.masked_fill_(goes, EMPTY)
        self.held = [0 if gone else held for gone, held in zip(goes[:, 0].tolist(), self.held, strict=True)]
        return key, value, stays.sum(-1).tolist()

    def grow(self, room: int) -> None:
        """Makes room for so many tokens."""
        for name, fill in (("keys", 0), ("values", 0), ("positions", EMPTY)):
            setattr(self, name, grown(getattr(self, name), 1 if name == "positions" else 2, room, fill))


def moved(positions: Tensor, remap: Tensor) -> Tensor:
    """Positions [batch, ..., tokens] after a change of padding; remap: [batch, past tokens], EMPTY for what goes."""
    flat = positions.flatten(1)
    to = remap.gather(1, flat.clamp(min=0).long())
    return torch.where(flat == EMPTY, EMPTY, to).to(torch.int32).view_as(positions)


def numbers(each: Sequence[int], device: torch.device) -> Tensor:
    """A number for each row, [batch] int32, without a copy to the device where all are one."""
    if len(set(each)) == 1:
        return torch.full((len(each),), each[0], dtype=torch.int32, device=device)
    return torch.tensor(each, dtype=torch.int32, device=device)
