"""Segments of a cache that packs its tokens: blocks of codes, and the dense tail in which a block gathers.

Rows of a padded batch differ in length. A row's tokens are packed as if it were alone: its own first `block` tokens
are its first block. Rows therefore hold different numbers of blocks; positions tell what is there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.low_rank import residual_factors
from kvcompress.kernels.packed_attention import packed_attention
from kvcompress.kernels.quantise import QuantizedTensor, QuantScheme, dequantise, quantise
from kvcompress.storage.padding import reordered
from kvcompress.storage.segment import EMPTY, NO_FACTS, Segment

_COMPONENTS = {
    "codes": "codes",
    "scales": "scales",
    "zeros": "scales",
    "outlier_values": "outliers",
    "outlier_index": "outliers",
    "left": "factors",
    "right": "factors",
}
# places that a tail keeps beside the tokens it holds, when sequences leave
_SPARE = 64
# names that a saved segment had for its tensors
_SIDES = ("keys", "values")


class QuantizedBlocks(Segment):
    """Blocks of tokens as codes, scales, outliers and low-rank factors; never touched again once written.

    keys, values: as kernels/quantise.py lays them out, [batch, kv_heads, blocks, ...]; of the factors, `right` is
    [batch, kv_heads, spans, head_dim, rank], one basis for all blocks that were packed at once.
    positions: [batch, 1, blocks * block] int32, place of each token in its sequence, or EMPTY.
    spans: [batch, blocks] int32, the basis of each block; None without a low-rank part.
    blocks: blocks that each row holds; the others up to the longest row's are there, and empty.
    """

    keys: QuantizedTensor
    values: QuantizedTensor
    positions: Tensor
    spans: Tensor | None

    def __init__(self, codings: tuple[QuantScheme, QuantScheme], block: int) -> None:
        """An empty segment; it takes shapes from what is appended first."""
        self.codings = codings
        self.block = block
        self.blocks: list[int] = []

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor | None] = {"positions": self.positions, "spans": self.spans}
        for side in _SIDES:
            found |= {f"{side}.{name}": tensor for name, tensor in getattr(self, side)._asdict().items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def component(self, name: str) -> str:
        part = name.partition(".")[2]
        return _COMPONENTS[part] if part else "positions"

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_tensors(change)
        self.blocks = change(torch.tensor(self.blocks)).tolist()

    @classmethod
    def load(cls, tensors: dict[str, Tensor], facts: Mapping[str, Any] = NO_FACTS, **built_with: Any) -> Self:
        """As Segment.load; built_with: codings and block."""
        segment = super().load(tensors, facts, **built_with)
        held = (segment.positions.unflatten(2, (-1, segment.block)) != EMPTY).any(-1)[:, 0]  # [batch, blocks]
        number = torch.arange(1, held.shape[1] + 1, device=held.device)
        segment.blocks = (held * number).amax(-1).tolist() if held.shape[1] else [0] * held.shape[0]
        return segment

    def _set(self, tensors: dict[str, Tensor]) -> None:
        for side in _SIDES:
            setattr(self, side, QuantizedTensor(*(tensors.get(f"{side}.{name}") for name in QuantizedTensor._fields)))  # type: ignore[arg-type]
        self.positions, self.spans = tensors["positions"], tensors.get("spans")

    def trim(self) -> None:
        if max(self.blocks, default=0) * self.block < self.positions.shape[2]:
            self.keep([0] * len(self.blocks), self.blocks)

    def attend(
        self, query: Tensor, query_positions: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        return packed_attention(
            query,
            self.keys,
            self.values,
            *self.codings,
            self.positions,
            query_positions,
            spans=self.spans,
            scale=scale,
            window=window,
            softcap=softcap,
        )[:2]

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield (*self.decoded(), self.positions)

    def decoded(self) -> tuple[Tensor, Tensor]:
        """The keys and values that attention sees, [batch, kv_heads, blocks * block, head_dim] float32 each."""
        key, value = (
            dequantise(packed, coding, spans=self.spans).flatten(2, 3)
            for packed, coding in zip((self.keys, self.values), self.codings, strict=True)
        )
        return key, value

    def kept(self) -> Tensor:
        return (self.positions != EMPTY).sum(-1).expand(-1, self.keys.codes.shape[1])

    @staticmethod
    def nbytes_for(
        batch: int, kv_heads: int, head_dim: int, codings: tuple[QuantScheme, QuantScheme], block: int, blocks: int
    ) -> int:
        """Bytes of so many blocks that were encoded at once: codes, scales, outliers, factors, and positions."""
        rank = codings[0].rank
        a_head = blocks * sum(coding.bytes(block, head_dim) for coding in codings) + 2 * 2 * head_dim * rank
        return batch * (kv_heads * a_head + blocks * (4 * block + (4 if rank else 0))) if blocks else 0

    def append(
        self,
        key: Tensor,
        value: Tensor,
        begins: Sequence[int],
        first: Sequence[int],
        counts: Sequence[int],
        rows: Sequence[int],
    ) -> None:
        """Packs blocks of some rows, each behind the blocks its row has.

        Args:
            key, value: [batch, kv_heads, any, head_dim].
            begins: where the tokens of these rows begin.
            first: position of each row's first token.
            counts: blocks of each row.
            rows: which rows of the batch these are.
        """
        device, batch, most = key.device, key.shape[0], max(counts)
        present = torch.arange(most, device=device) < torch.tensor(counts, device=device)[:, None]  # [rows, blocks]
        whole = min(counts) == most
        places = torch.tensor(first, device=device)[:, None] + torch.arange(most * self.block, device=device)
        places = places.masked_fill(~present.repeat_interleave(self.block, 1), EMPTY)
        fresh = {"positions": places[:, None].to(torch.int32)}
        for side, x, coding in zip(_SIDES, (key, value), self.codings, strict=True):
            if len(set(begins)) == 1 and begins[0] + most * self.block <= x.shape[2]:
                taken = x if len(rows) == batch else x[list(rows)]
                taken = taken[:, :, begins[0] : begins[0] + most * self.block].unflatten(2, (-1, self.block))
                packed = _encode(taken, coding, None if whole else present)
            else:
                # row by row, so that there is never a second copy of them all
                packed = _side_by_side(
                    [
                        _encode(x[row : row + 1, :, at : at + n * self.block].unflatten(2, (-1, self.block)), coding)
                        for row, at, n in zip(rows, begins, counts, strict=True)
                    ],
                    most,
                )
            fresh |= {f"{side}.{name}": tensor for name, tensor in packed._asdict().items() if tensor is not None}
        if self.codings[0].rank:
            fresh["spans"] = torch.zeros_like(present, dtype=torch.int32)
        if not self.blocks and whole and len(rows) == batch:
            self._set(fresh)
            self.blocks = list(counts)
            return
        self._place(fresh, present, list(counts), list(rows), batch)

    def _place(self, fresh: dict[str, Tensor], present: Tensor, counts: list[int], rows: list[int], batch: int) -> None:
        before = self.blocks or [0] * batch
        after = list(before)
        for row, count in zip(rows, counts, strict=True):
            after[row] += count
        held = self.tensors() if self.blocks else {}
        # rows that had more may have gone
        columns = max(*after, self.positions.shape[2] // self.block if held else 0)
        spans = [0] * batch
        if "spans" in fresh:
            spans = self._spans_used(batch)
            used = torch.tensor([[spans[row]] for row in rows], dtype=torch.int32, device=present.device)
            fresh["spans"] = fresh["spans"] + used
        there = present.nonzero(as_tuple=True)
        which = torch.tensor(rows, device=present.device)
        start = torch.tensor([before[row] for row in rows], device=present.device)
        target = which[there[0]], start[there[0]] + there[1]
        grown = {}
        for name, tensor in fresh.items():
            old = held.get(name)
            if name.endswith(".right"):
                bases = max([spans[row] + 1 for row in rows] + ([] if old is None else [old.shape[2]]))
                filled = _room_for(old, tensor, batch, 2, bases, 0)
                filled[which, :, torch.tensor([spans[row] for row in rows], device=which.device)] = tensor[:, :, 0]
            elif name == "spans":
                filled = _room_for(old, tensor, batch, 1, columns, 0)
                filled[target] = tensor[there]
            else:
                fill = 0
                if name == "positions":
                    fill, tensor = EMPTY, tensor.unflatten(2, (-1, self.block))
                    old = None if old is None else old.unflatten(2, (-1, self.block))
                filled = _room_for(old, tensor, batch, 2, columns, fill)
                filled[target[0], :, target[1]] = tensor[there[0], :, there[1]]
            grown[name] = filled.flatten(2, 3) if name == "positions" else filled
        self._set(grown)
        self.blocks = after

    def _spans_used(self, batch: int) -> list[int]:
        if not self.blocks or self.spans is None or not self.spans.shape[1]:
            return [0] * batch
        number = torch.arange(self.spans.shape[1], device=self.spans.device)
        held = number < torch.tensor(self.blocks, device=self.spans.device)[:, None]
        return ((self.spans + 1) * held).amax(-1).tolist()

    def cut(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Lets go of each row's blocks that reach beyond its first `lengths` tokens.

        Returns:
            What they held of those, as attention saw it: keys and values [batch, kv_heads, any, head_dim], a row's
            tokens in its first places, and how many those are.
        """
        places = self.positions[:, 0].unflatten(1, (-1, self.block))
        limit = torch.tensor(lengths, device=places.device)[:, None]
        goes = (places >= limit[..., None]).any(-1)  # [batch, blocks]
        if not bool(goes.any()):
            none = [
                side.codes.new_empty(*side.codes.shape[:2], 0, side.codes.shape[-1])
                for side in (self.keys, self.values)
            ]
            return none[0], none[1], [0] * len(places)
        at = goes.to(torch.uint8).argmax(1, keepdim=True)
        stays = places.gather(1, at[..., None].expand(-1, -1, self.block))[:, 0]
        stays = (stays != EMPTY) & (stays < limit) & goes.any(1, keepdim=True)
        order = stays.to(torch.uint8).argsort(dim=-1, stable=True, descending=True)
        spans = None if self.spans is None else self.spans.gather(1, at)
        sides = []
        for packed, coding in zip((self.keys, self.values), self.codings, strict=True):
            one: Any = [None if part is None else _taken(part, at, 2) for part in packed[:6]]
            sides.append(
                reordered(dequantise(QuantizedTensor._make([*one, packed.right]), coding, spans=spans)[:, :, 0], order)
            )
        # what follows a block that goes goes too, hidden tokens or not
        held = torch.tensor(self.blocks, device=at.device)
        self.keep([0] * len(places), torch.where(goes.any(1), at[:, 0], held).tolist())
        return sides[0], sides[1], stays.sum(-1).tolist()

    def keep(self, first: Sequence[int], last: Sequence[int]) -> None:
        """Keeps of each row the blocks first .. last - 1 alone, and no memory for the others."""
        counts = [stop - start for start, stop in zip(first, last, strict=True)]
        device = self.positions.device
        tensors = self.tensors()
        tensors["positions"] = tensors["positions"].unflatten(2, (-1, self.block))
        at, there = _window(list(first), counts, device)
        if self.spans is not None:
            spans = self.spans.gather(1, at) if at.shape[1] else self.spans[:, :0]
            low = spans.masked_fill(~there, torch.iinfo(torch.int32).max).amin(-1) if at.shape[1] else spans.sum(-1)
            high = spans.masked_fill(~there, -1).amax(-1) if at.shape[1] else spans.sum(-1) - 1
            used = (high - low + 1).clamp(min=0).tolist()
            span_at, _ = _window(low.tolist(), used, device)
            tensors["spans"] = self.spans - low[:, None].to(torch.int32)
            for side in _SIDES:
                tensors[f"{side}.right"] = _taken(tensors[f"{side}.right"], span_at, 2)
        for name, tensor in tensors.items():
            if not name.endswith(".right"):
                tensors[name] = _taken(tensor, at, 1 if name == "spans" else 2)
        empty = ~there[:, None, :, None]
        tensors["positions"] = tensors["positions"].masked_fill(empty, EMPTY).flatten(2, 3)
        if self.spans is not None:
            tensors["spans"] = tensors["spans"].masked_fill(~there, 0)
        self._set(tensors)
        self.blocks = counts


class TailSegment(Segment):
    """The newest tokens as they came, until there are enough for a block.

    keys, values: [batch, kv_heads, room, head_dim]. positions: [batch, room] int32, or EMPTY.
    held: tokens of each row, in the first slots, in order.
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

    def attend(
        self, query: Tensor, query_positions: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        used = max(self.held)
        positions = self.positions[:, None, :used].expand(-1, self.keys.shape[1], -1)
        return slot_attention(
            query,
            self.keys[:, :, :used],
            self.values[:, :, :used],
            positions,
            query_positions,
            scale=scale,
            window=window,
            softcap=softcap,
        )

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield self.keys, self.values, self.positions[:, None]

    def put(self, key: Tensor, value: Tensor, real: Sequence[int], lengths: Sequence[int]) -> None:
        """Adds one token a row, [batch, kv_heads, 1, head_dim]: real is 0 for a row whose token is padding."""
        at = self.held[0]
        if all(real) and all(held == at for held in self.held):
            self.keys[:, :, at] = key[:, :, 0]
            self.values[:, :, at] = value[:, :, 0]
            self.positions[:, at] = (
                lengths[0]
                if len(set(lengths)) == 1
                else torch.tensor(lengths, dtype=torch.int32, device=self.positions.device)
            )
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
        """Holds, of each row of these [batch, kv_heads, any, head_dim], the `held` tokens from `first` on.

        Args:
            lengths: tokens of each row, these included.
        """
        at, there = _window(first, held, key.device)
        self._make_room(at.shape[1])
        used = slice(0, at.shape[1])
        self.keys[:, :, used], self.values[:, :, used] = _taken(key, at, 2), _taken(value, at, 2)
        start = torch.tensor([length - count for length, count in zip(lengths, held, strict=True)], device=key.device)
        places = start[:, None] + torch.arange(at.shape[1], device=key.device)
        self.positions.fill_(EMPTY)
        self.positions[:, used] = places.masked_fill(~there, EMPTY).to(torch.int32)
        self.held = list(held)

    def drop_last(self, counts: Sequence[int]) -> None:
        """Lets each row's newest tokens go."""
        self.held = [held - count for held, count in zip(self.held, counts, strict=True)]
        limit = torch.tensor(self.held, device=self.positions.device)[:, None]
        gone = torch.arange(self.room, device=limit.device) >= limit
        self.positions.masked_fill_(gone, EMPTY)

    def cut(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Empties the rows that reach beyond their first `lengths` tokens.

        Returns:
            What they held of those: keys and values [batch, kv_heads, room, head_dim], a row's tokens in its first
            places, and how many those are.
        """
        limit = torch.tensor(lengths, device=self.positions.device)[:, None]
        goes = (self.positions >= limit).any(-1, keepdim=True)
        if not bool(goes.any()):
            return self.keys, self.values, [0] * len(lengths)
        # tokens may have been hidden since
        stays = goes & (self.positions != EMPTY) & (self.positions < limit)
        order = stays.to(torch.uint8).argsort(dim=-1, stable=True, descending=True)
        key, value = reordered(self.keys, order), reordered(self.values, order)
        self.positions.masked_fill_(goes, EMPTY)
        self.held = [0 if gone else held for gone, held in zip(goes[:, 0].tolist(), self.held, strict=True)]
        return key, value, stays.sum(-1).tolist()

    def grow(self, room: int) -> None:
        """Makes room for so many tokens."""
        for name, fill in (("keys", 0), ("values", 0), ("positions", EMPTY)):
            tensor = getattr(self, name)
            dim = 1 if name == "positions" else 2
            setattr(self, name, _room_for(tensor, tensor, tensor.shape[0], dim, room, fill))

    def _make_room(self, tokens: int) -> None:
        if tokens > self.room:
            batch, kv_heads = self.keys.shape[:2]
            self.keys = self.keys.new_zeros(batch, kv_heads, tokens, self.keys.shape[3])
            self.values = self.values.new_zeros(batch, kv_heads, tokens, self.values.shape[3])
            self.positions = self.positions.new_full((batch, tokens), EMPTY)


def _encode(x: Tensor, coding: QuantScheme, present: Tensor | None = None) -> QuantizedTensor:
    packed = quantise(x, coding)
    if not coding.rank:
        return packed
    left, right = residual_factors(x, packed, coding, coding.rank, present)
    return packed._replace(left=left, right=right[:, :, None])


def _side_by_side(rows: list[QuantizedTensor], blocks: int) -> QuantizedTensor:
    """One batch of rows that were encoded alone, each as many blocks wide."""
    parts: dict[str, Any] = {}
    for name, tensors in zip(QuantizedTensor._fields, zip(*rows, strict=True), strict=True):
        if tensors[0] is not None:
            wide = tensors if name == "right" else [_room_for(each, each, 1, 2, blocks, 0) for each in tensors]
            parts[name] = torch.cat(list(wide))
    return QuantizedTensor(**parts)


def _room_for(old: Tensor | None, like: Tensor, batch: int, dim: int, columns: int, fill: int) -> Tensor:
    """What is there, with columns for more along a dimension."""
    shape = [batch, *like.shape[1:]]
    shape[dim] = columns
    grown = like.new_full(shape, fill)
    if old is not None:
        grown.narrow(dim, 0, old.shape[dim]).copy_(old)
    return grown


def _window(first: list[int], counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns first .. first + count - 1 of each row, [batch, most] int64, and which of them are there."""
    number = torch.arange(max(counts, default=0), device=device)
    there = number < torch.tensor(counts, device=device)[:, None]
    at = torch.tensor(first, device=device)[:, None] + number
    return at.masked_fill(~there, 0), there


def _taken(tensor: Tensor, at: Tensor, dim: int) -> Tensor:
    """Columns of a dimension, chosen by row, [batch, columns]."""
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = at.shape
    target = list(tensor.shape)
    target[dim] = at.shape[1]
    return tensor.gather(dim, at.view(shape).expand(target))
