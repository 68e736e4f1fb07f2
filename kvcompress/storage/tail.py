"""The newest tokens of a cache that packs its tokens, before they are packed; here as they came."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

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
    """The newest tokens, as they came, until there are enough for a block.

    keys, values: [batch, kv_heads, room, head_dim]. positions: [batch, room] int32, or EMPTY.
    held: how many tokens each row has, in the first columns, in order.
    is_exact: whether tokens are stored as they came (else storage/packed_tail.py).
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("keys", "values", "positions")
    is_exact: ClassVar[bool] = True

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
        return (self.positions != EMPTY).sum(-1)[:, None].expand(-1, self.like()[0].shape[1])

    def like(self) -> tuple[Tensor, Tensor]:
        """No keys and no values, [batch, kv_heads, 0, head_dim], in the dtype in which tokens come."""
        return self.keys[:, :, :0], self.values[:, :, :0]

    def contents(self, columns: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the first columns, or of all, as attention sees them, [batch, kv_heads, any, head_dim].

        Returns:
            In the dtype of `like`.
        """
        return self.keys[:, :, :columns], self.values[:, :, :columns]

    def _of_tokens(self) -> dict[str, Tensor]:
        """What is stored of tokens, by name, each [batch, any, room, any]."""
        return {name: tensor for name, tensor in self.tensors().items() if name != "positions"}

    def _stored(self, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """Tokens [batch, kv_heads, any, head_dim] as `_of_tokens` has them."""
        return {"keys": key, "values": value}

    @staticmethod
    def nbytes_for(batch: int, kv_heads: int, head_dim: int, itemsize: int, room: int) -> int:
        """Bytes of room for so many tokens."""
        return batch * room * (2 * kv_heads * head_dim * itemsize + 4)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_tensors(change)
        self.held = change(torch.tensor(self.held)).tolist()

    @property
    def room(self) -> int:
        return self.positions.shape[1]

    def trim(self, spare: int = _SPARE) -> None:
        room = self._whole(max(self.held) + spare)
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

    def attend_beside(
        self,
        others: Sequence[tuple[Tensor, Tensor, Tensor]],
        query: Tensor,
        query_positions: Tensor,
        spec: LogitSpec,
    ) -> tuple[Tensor, Tensor]:
        """Attention to what is held and to a few other tokens, in one call.

        Args:
            others: keys, values [batch, kv_heads, any, head_dim] and positions [batch, any] int32.
        """
        used = max(self.held)
        keys, values = self.contents(used)
        places = self.positions[:, :used]
        if others:
            held = (keys, values, places)
            keys, values, places = (
                torch.cat(parts, dim) for parts, dim in zip(zip(*others, held, strict=True), (2, 2, 1), strict=True)
            )
        return slot_attention(query, keys, values, places[:, None].expand(keys.shape[:3]), query_positions, spec)

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield (*self.contents(), self.positions[:, None])

    def put(self, key: Tensor, value: Tensor, real: Sequence[int], lengths: Sequence[int]) -> None:
        """Adds one token per row, [batch, kv_heads, 1, head_dim]; real is 0 for a row whose token is padding."""
        if not any(real):
            return
        at, fresh = self.held[0], self._stored(key, value)
        if all(real) and all(held == at for held in self.held):
            for name, tensor in self._of_tokens().items():
                tensor[:, :, at] = fresh[name][:, :, 0]
            self.positions[:, at] = lengths[0] if len(set(lengths)) == 1 else numbers(lengths, key.device)
        else:
            rows = [row for row, is_real in enumerate(real) if is_real]
            row = torch.tensor(rows, dtype=torch.int64, device=key.device)
            slot = torch.tensor([self.held[row] for row in rows], dtype=torch.int64, device=key.device)
            for name, tensor in self._of_tokens().items():
                tensor[row, :, slot] = fresh[name][row, :, 0]
            places = torch.tensor([lengths[row] for row in rows], dtype=torch.int32, device=key.device)
            self.positions[row, slot] = places
        self.held = [held + is_real for held, is_real in zip(self.held, real, strict=True)]

    def refill(
        self,
        key: Tensor,
        value: Tensor,
        first: list[int],
        held: list[int],
        lengths: Sequence[int],
        own: Sequence[int] | None = None,
    ) -> None:
        """Replaces each row's tokens by `held` tokens from `first` on, of [batch, kv_heads, any, head_dim].

        Args:
            lengths: tokens of each row, with these.
            own: for each row, the first of its tokens here that stays, as it is stored: those that stay come first
                among the others. None: none stays.
        """
        at, _ = span_of_rows(first, held, self.positions.device)
        columns = at.shape[1]
        if columns > self.room:
            self.grow(columns)
        stay = [0] * len(held)
        # what stays as it came is there among the others, too
        if own is not None and not self.is_exact:
            stay = [max(0, min(had - start, has)) for had, start, has in zip(self.held, own, held, strict=True)]
        most = max(stay, default=0)
        if own is not None and most:
            own_at, is_own = span_of_rows(list(own), stay, at.device)
            kept = {name: taken(tensor, own_at, 2) for name, tensor in self._of_tokens().items()}
            is_own = is_own[:, None, :, None]
        fresh = {}
        if any(has > count for has, count in zip(held, stay, strict=True)):
            fresh = self._stored(taken(key, at, 2), taken(value, at, 2))
        for name, tensor in self._of_tokens().items():
            if fresh:
                tensor[:, :, :columns] = fresh[name]
            if most:
                tensor[:, :, :most] = torch.where(is_own, kept[name], tensor[:, :, :most])
        self.held = list(held)
        self._number(lengths)

    def _number(self, lengths: Sequence[int]) -> None:
        """Sets the positions of each row's tokens, the last of `lengths`."""
        first = [length - count for length, count in zip(lengths, self.held, strict=True)]
        places, there = span_of_rows(first, self.held, self.positions.device)
        self.positions.fill_(EMPTY)
        self.positions[:, : places.shape[1]] = places.masked_fill(~there, EMPTY).to(torch.int32)

    def remap(self, remap: Tensor, lengths: Sequence[int]) -> None:
        """Follows a change of padding, as `moved` does, and closes the gaps of tokens that it drops.

        Args:
            lengths: tokens of each row, afterwards.
        """
        stays = moved(self.positions, remap) != EMPTY
        self._reorder(marked_first(stays))
        self.held = stays.sum(-1).tolist()
        self._number(lengths)

    def _reorder(self, order: Tensor) -> None:
        """Puts what is stored of tokens in another order, [batch, room] int64, in place."""
        for tensor in self._of_tokens().values():
            tensor.copy_(reordered(tensor, order))

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
            self._reorder(order)
            self.positions.copy_(self.positions.gather(1, order))
        self.held = [held + count for held, count in zip(self.held, counts, strict=True)]
        return counts

    def drop_last(self, counts: Sequence[int]) -> None:
        """Drops each row's newest tokens."""
        self.held = [held - count for held, count in zip(self.held, counts, strict=True)]
        limit = torch.tensor(self.held, device=self.positions.device)[:, None]
        gone = torch.arange(self.room, device=limit.device) >= limit
        self.positions.masked_fill_(gone, EMPTY)

    def keep_below(self, lengths: Sequence[int]) -> None:
        """Keeps those of each row's tokens that are among its first `lengths`."""
        limit = torch.tensor(lengths, device=self.positions.device)[:, None]
        goes = (self.positions >= limit).any(-1, keepdim=True)
        if not bool(goes.any()):
            return
        # tokens may have been hidden in the meantime, which take room in rows that stay
        stays = ~goes | ((self.positions != EMPTY) & (self.positions < limit))
        order = marked_first(stays)
        self._reorder(order)
        self.positions.copy_(self.positions.masked_fill(~stays, EMPTY).gather(1, order))
        counts = zip(goes[:, 0].tolist(), stays.sum(-1).tolist(), self.held, strict=True)
        self.held = [count if gone else held for gone, count, held in counts]

    def grow(self, room: int) -> None:
        """Makes room for so many tokens, at least."""
        for name, tensor in self.tensors().items():
            is_place = name == "positions"
            wide = grown(tensor, 1 if is_place else 2, self._whole(room), EMPTY if is_place else 0)
            setattr(self, name, wide)

    @staticmethod
    def _whole(room: int) -> int:
        """The room for so many tokens, or a little more where it comes in units."""
        return room

    def write(self, column: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores a token per row, [batch, kv_heads, 1, head_dim], in a column, [1] int64, without its position."""
        fresh = self._stored(key, value)
        for name, tensor in self._of_tokens().items():
            tensor.index_copy_(2, column, fresh[name])


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
