"""Tokens packed in blocks: codes, scales, outliers and low-rank factors.

Rows of a padded batch differ in length. A row's tokens are packed as if it were alone: its own first `block` tokens
are its first block. Rows therefore hold different numbers of blocks; positions tell what is there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from kvcompress.kernels.calibrated import CalibratedKeys, CalibratedScheme, calibrated_attention
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.quantized import QuantizedTensor, QuantScheme, empty_packed
from kvcompress.kernels.hadamard import rotate
from kvcompress.kernels.low_rank import residual_factors
from kvcompress.kernels.packed_attention import packed_attention
from kvcompress.kernels.quantise import blocks_apart, dequantise, quantise
from kvcompress.storage.columns import grown, marked_first, span_of_rows, taken
from kvcompress.storage.key_codec import KeyCodec
from kvcompress.storage.padding import reordered
from kvcompress.storage.segment import EMPTY, NO_FACTS, Segment

_COMPONENTS = {
    "codes": "codes",
    "scales": "scales",
    "zeros": "scales",
    "outlier_values": "outliers",
    "outlier_index": "outliers",
    "eight": "codes",
    "four": "codes",
    "two": "codes",
    "starts": "positions",
    "left": "factors",
    "right": "factors",
}
# earlier names of a saved segment's tensors
_SIDES = ("keys", "values")


class QuantizedBlocks(Segment):
    """Blocks of tokens as codes, scales, outliers and low-rank factors; never changed once written.

    keys, values: as kernels/quantise.py lays them out, [batch, kv_heads, blocks, ...]; of the factors, `right` is
    [batch, kv_heads, spans, head_dim, rank], one basis for all blocks that were packed at once.
    positions: [batch, 1, blocks * block] int32, each token's position in its sequence, or EMPTY.
    codec: of a calibrated basis, in which the keys are packed, of all KV heads together; None: each head's as they are.
    spans: [batch, blocks] int32, the basis of each block; None without a low-rank part.
    blocks: how many blocks each row holds; the others, up to the longest row's, exist but are empty.
    rotates: values are stored rotated (kernels/hadamard.py), and keys too that are coded around their block's mean.
    has_room: whether there is room for more (`take_room`), so that blocks come and go in place.
    """

    has_room = False
    codec: KeyCodec | None = None
    keys: QuantizedTensor | CalibratedKeys
    values: QuantizedTensor
    positions: Tensor
    spans: Tensor | None

    def __init__(
        self, codings: tuple[QuantScheme, QuantScheme], block: int, rotates: bool = False, codec: KeyCodec | None = None
    ) -> None:
        """An empty segment; its shapes follow from what is appended first."""
        self.codings = codings
        self.rotates = rotates
        self.codec = codec
        self.block = block
        self.blocks: list[int] = []

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor | None] = {"positions": self.positions, "spans": self.spans}
        for side in _SIDES:
            found |= {f"{side}.{name}": tensor for name, tensor in getattr(self, side)._asdict().items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors without room for more."""
        if not self.has_room:
            return self.tensors(), {}
        most, spans = max(self.blocks), max(self._spans_used(len(self.blocks)), default=0)
        found = {}
        for name, tensor in self.tensors().items():
            if name == "positions":
                found[name] = tensor[:, :, : most * self.block]
            elif name == "spans":
                found[name] = tensor[:, :most]
            else:
                found[name] = tensor[:, :, : spans if name.endswith(".right") else most]
        return found, {}

    def component(self, name: str) -> str:
        part = name.partition(".")[2]
        return _COMPONENTS[part] if part else "positions"

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_tensors(change)
        self.blocks = change(torch.tensor(self.blocks)).tolist()

    @classmethod
    def load(cls, tensors: dict[str, Tensor], facts: Mapping[str, Any] = NO_FACTS, **built_with: Any) -> Self:
        """As Segment.load; built_with: codings, block, rotates and codec."""
        segment = super().load(tensors, facts, **built_with)
        held = (segment.positions.unflatten(2, (-1, segment.block)) != EMPTY).any(-1)[:, 0]  # [batch, blocks]
        number = torch.arange(1, held.shape[1] + 1, device=held.device)
        segment.blocks = (held * number).amax(-1).tolist() if held.shape[1] else [0] * held.shape[0]
        return segment

    def _set(self, tensors: dict[str, Tensor]) -> None:
        for side, kind in zip(
            _SIDES, (QuantizedTensor if self.codec is None else CalibratedKeys, QuantizedTensor), strict=True
        ):
            setattr(self, side, kind(*(tensors.get(f"{side}.{name}") for name in kind._fields)))  # type: ignore[arg-type]
        self.positions, self.spans = tensors["positions"], tensors.get("spans")

    def trim(self) -> None:
        self.has_room = False
        if max(self.blocks, default=0) * self.block < self.positions.shape[2]:
            self.keep([0] * len(self.blocks), self.blocks)

    def attend(self, query: Tensor, query_positions: Tensor, spec: LogitSpec) -> tuple[Tensor, Tensor]:
        keys, values, positions, spans = self.keys, self.values, self.positions, self.spans
        if self.has_room and not torch.compiler.is_compiling():
            # a graph attends to the room too, where nothing is
            some = slice(0, max(self.blocks))
            keys, values = keys.of_blocks(some), values.of_blocks(some)
            positions = positions[:, :, : some.stop * self.block]
            spans = None if spans is None else spans[:, some]
        if isinstance(keys, CalibratedKeys):
            assert self.codec is not None
            decoder = self.codec.decoder(query.dtype, query.device)
            out, lse = calibrated_attention(
                query, keys, values, decoder, self.codings[1], positions, query_positions, spec
            )
            return rotate(out, back=True) if self.rotates else out, lse
        query = rotate(query, at_once=True) if self._rotated(0) else query
        out, lse, *_ = packed_attention(query, keys, values, *self.codings, positions, query_positions, spec, spans)
        return rotate(out, back=True, at_once=True) if self.rotates else out, lse

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield (*self.decoded(), self.positions)

    def some(self, blocks: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Some blocks of each row, as `pieces` yields all."""
        spans = None if self.spans is None else self.spans[:, blocks]
        key, value = (
            self._decode(side, packed.of_blocks(blocks), spans).flatten(2, 3)
            for side, packed in enumerate((self.keys, self.values))
        )
        return key, value, self.positions[:, :, blocks.start * self.block : blocks.stop * self.block]

    def decoded(self) -> tuple[Tensor, Tensor]:
        """The keys and values that attention sees, [batch, kv_heads, blocks * block, head_dim] float32 each."""
        key, value, _ = self.some(slice(0, self.positions.shape[2] // self.block))
        return key, value

    def _decode(self, side: int, packed: Any, spans: Tensor | None) -> Tensor:
        """What attention sees of packed keys (0) or values (1), [batch, kv_heads, blocks, block, head_dim] float32."""
        if isinstance(packed, CalibratedKeys):
            assert self.codec is not None
            return self.codec.decode(packed)
        x = dequantise(packed, self.codings[side], spans=spans)
        return rotate(x, back=True) if self._rotated(side) else x

    def _rotated(self, side: int) -> bool:
        """Whether keys (0) or values (1) are stored rotated."""
        return self.rotates and (side == 1 or self.codings[0].zeros == "block")

    def kept(self) -> Tensor:
        return (self.positions != EMPTY).sum(-1).expand(-1, self.values.codes.shape[1])

    @staticmethod
    def nbytes_for(
        batch: int,
        kv_heads: int,
        head_dim: int,
        codings: tuple[QuantScheme, QuantScheme],
        block: int,
        blocks: int,
        scheme: CalibratedScheme | None = None,
        value_dim: int | None = None,
    ) -> int:
        """Bytes of so many blocks encoded at once: codes, scales, outliers, factors, and positions.

        Args:
            scheme: of keys in a calibrated basis; None: they are packed as the first of the codings says.
            value_dim: of values, if not head_dim.
        """
        rank, widths = codings[0].rank, (head_dim, head_dim if value_dim is None else value_dim)
        of_block = [coding.bytes(block, width) for coding, width in zip(codings, widths, strict=True)]
        a_head = blocks * sum(of_block) + 2 * sum(widths) * rank
        if scheme is not None:
            a_head = blocks * of_block[1]
            return batch * blocks * (scheme.bytes(block) + 4 * block) + batch * kv_heads * a_head
        return batch * (kv_heads * a_head + blocks * (4 * block + (4 if rank else 0))) if blocks else 0

    def room(self) -> int:
        """For how many blocks a row there is room, with those held."""
        return self.positions.shape[2] // self.block if self.blocks else 0

    def take_room(self, blocks: int, key: Tensor, value: Tensor) -> None:
        """Makes room for so many more blocks a row, each with a basis of its own; what comes is stored in place.

        Args:
            key, value: [batch, kv_heads, any, head_dim], like what is to come.
        """
        batch = key.shape[0]
        if not self.blocks:
            self._set(self._nothing(key, value))
            self.blocks = [0] * batch
        columns, bases = max(self.blocks) + blocks, max(self._spans_used(batch)) + blocks
        tensors = self.tensors()
        for name, tensor in tensors.items():
            dim, room = 2, columns
            if name == "positions":
                room = columns * self.block
            elif name == "spans":
                dim = 1
            elif name.endswith(".right"):
                room = bases
            if tensor.shape[dim] < room:
                tensors[name] = grown(tensor, dim, room, EMPTY if name == "positions" else 0)
        self._set(tensors)
        self.has_room = True

    def _nothing(self, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """The tensors of no block."""
        batch, kv_heads = key.shape[:2]
        tensors = {"positions": key.new_empty(batch, 1, 0, dtype=torch.int32)}
        for side, x, coding in zip(_SIDES, (key, value), self.codings, strict=True):
            head_dim = x.shape[-1]
            if side == "keys" and self.codec is not None:
                starts = x.new_empty(batch, 0, dtype=torch.int32)
                none = self.codec.encode(x.new_empty(batch, kv_heads, 0, self.block, head_dim), starts)
                tensors |= {f"{side}.{name}": part for name, part in none._asdict().items()}
                continue
            packed = empty_packed(x.new_empty(batch, kv_heads, 0, self.block, head_dim), coding)
            if coding.rank:
                shapes = (0, self.block, coding.rank), (0, head_dim, coding.rank)
                left, right = (x.new_empty(batch, kv_heads, *shape, dtype=torch.float16) for shape in shapes)
                packed = packed._replace(left=left, right=right)
                tensors["spans"] = x.new_empty(batch, 0, dtype=torch.int32)
            tensors |= {f"{side}.{name}": part for name, part in packed._asdict().items() if part is not None}
        return tensors

    def append(
        self,
        key: Tensor,
        value: Tensor,
        begins: Sequence[int],
        first: Sequence[int],
        counts: Sequence[int],
        rows: Sequence[int],
        shifts: Sequence[int] | None = None,
    ) -> None:
        """Packs blocks of some rows, each after the blocks that its row has.

        Args:
            key, value: [batch, kv_heads, any, head_dim].
            begins: where the tokens of these rows begin.
            first: position of each row's first token.
            counts: blocks of each row.
            rows: which rows of the batch these are.
            shifts: how far the positions by which keys are rotated are ahead of these, of each row; None: not at all.
        """
        device, batch, most = key.device, key.shape[0], max(counts)
        present = torch.arange(most, device=device) < torch.tensor(counts, device=device)[:, None]  # [rows, blocks]
        whole = min(counts) == most
        starts = torch.tensor(first, dtype=torch.int32, device=device)[:, None]
        places = starts + torch.arange(most * self.block, device=device)
        if shifts is not None:
            starts = starts + torch.tensor(shifts, dtype=torch.int32, device=device)[:, None]
        starts = starts + torch.arange(0, most * self.block, self.block, dtype=torch.int32, device=device)
        places = places.masked_fill(~present.repeat_interleave(self.block, 1), EMPTY)
        fresh = {"positions": places[:, None].to(torch.int32)}
        for side, x, coding in zip(_SIDES, (key, value), self.codings, strict=True):
            if len(set(begins)) == 1 and begins[0] + most * self.block <= x.shape[2]:
                taken = x if len(rows) == batch else x[list(rows)]
                taken = taken[:, :, begins[0] : begins[0] + most * self.block].unflatten(2, (-1, self.block))
                packed = self._encode(side, taken, coding, starts, None if whole else present)
            else:
                # row by row, to avoid a second copy of all of them
                packed = _side_by_side(
                    [
                        self._encode(
                            side,
                            x[row : row + 1, :, at : at + n * self.block].unflatten(2, (-1, self.block)),
                            coding,
                            start[None, :n],
                        )
                        for row, at, n, start in zip(rows, begins, counts, starts, strict=True)
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

    def _encode(
        self, side: str, x: Tensor, coding: QuantScheme, starts: Tensor, present: Tensor | None = None
    ) -> QuantizedTensor | CalibratedKeys:
        if side == "keys" and self.codec is not None:
            return self.codec.encode(x, starts)
        if not self._rotated(_SIDES.index(side)):
            return _encode(x, coding, present)
        if coding.rank:
            return _encode(rotate(x), coding, present)
        # some blocks at a time: there is no second copy of all of them
        parts = [quantise(rotate(x[:, :, some]), coding) for some in blocks_apart(x)]
        return parts[0] if len(parts) == 1 else QuantizedTensor(*map(_joined, zip(*parts, strict=True)))  # type: ignore[arg-type]

    def _place(self, fresh: dict[str, Tensor], present: Tensor, counts: list[int], rows: list[int], batch: int) -> None:
        before = self.blocks or [0] * batch
        after = list(before)
        for row, count in zip(rows, counts, strict=True):
            after[row] += count
        held = self.tensors() if self.blocks else {}
        # rows that had more may have left
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
            if name == "positions":
                filled = held[name] if filled is old else filled.flatten(2, 3)
            grown[name] = filled
        self._set(grown)
        self.blocks = after

    def _spans_used(self, batch: int) -> list[int]:
        if not self.blocks or self.spans is None or not self.spans.shape[1]:
            return [0] * batch
        number = torch.arange(self.spans.shape[1], device=self.spans.device)
        held = number < torch.tensor(self.blocks, device=self.spans.device)[:, None]
        return ((self.spans + 1) * held).amax(-1).tolist()

    def cut(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Drops each row's blocks that reach beyond its first `lengths` tokens.

        Returns:
            Those of the row's first `lengths` tokens that were in these blocks, as attention saw them: keys and values
            [batch, kv_heads, any, head_dim], each row's tokens first, and how many there are.
        """
        places = self.positions[:, 0].unflatten(1, (-1, self.block))
        limit = torch.tensor(lengths, device=places.device)[:, None]
        goes = (places >= limit[..., None]).any(-1)  # [batch, blocks]
        if not bool(goes.any()):
            key, value, _ = self.some(slice(0, 0))
            return key, value, [0] * len(places)
        at = goes.to(torch.uint8).argmax(1, keepdim=True)
        stays = places.gather(1, at[..., None].expand(-1, -1, self.block))[:, 0]
        stays = (stays != EMPTY) & (stays < limit) & goes.any(1, keepdim=True)
        order = marked_first(stays)
        spans = None if self.spans is None else self.spans.gather(1, at)
        sides = []
        for side, packed in enumerate((self.keys, self.values)):
            one: Any = [
                part if part is None or name == "right" else taken(part, at, 2)
                for name, part in packed._asdict().items()
            ]
            sides.append(reordered(self._decode(side, type(packed)(*one), spans)[:, :, 0], order))
        # blocks after a dropped one are dropped too, hidden tokens or not
        held = torch.tensor(self.blocks, device=at.device)
        self.keep([0] * len(places), torch.where(goes.any(1), at[:, 0], held).tolist())
        return sides[0], sides[1], stays.sum(-1).tolist()

    def keep(self, first: Sequence[int], last: Sequence[int]) -> None:
        """Keeps only blocks first .. last - 1 of each row, and frees the others' memory."""
        counts = [stop - start for start, stop in zip(first, last, strict=True)]
        device = self.positions.device
        tensors = self.tensors()
        tensors["positions"] = tensors["positions"].unflatten(2, (-1, self.block))
        at, there = span_of_rows(list(first), counts, device)
        if self.spans is not None:
            spans = self.spans.gather(1, at) if at.shape[1] else self.spans[:, :0]
            low = spans.masked_fill(~there, torch.iinfo(torch.int32).max).amin(-1) if at.shape[1] else spans.sum(-1)
            high = spans.masked_fill(~there, -1).amax(-1) if at.shape[1] else spans.sum(-1) - 1
            used = (high - low + 1).clamp(min=0).tolist()
            span_at, _ = span_of_rows(low.tolist(), used, device)
            tensors["spans"] = self.spans - low[:, None].to(torch.int32)
            for side in _SIDES:
                tensors[f"{side}.right"] = taken(tensors[f"{side}.right"], span_at, 2)
        for name, tensor in tensors.items():
            if not name.endswith(".right"):
                tensors[name] = taken(tensor, at, 1 if name == "spans" else 2)
        empty = ~there[:, None, :, None]
        tensors["positions"] = tensors["positions"].masked_fill(empty, EMPTY).flatten(2, 3)
        if self.spans is not None:
            tensors["spans"] = tensors["spans"].masked_fill(~there, 0)
        if self.has_room:
            tensors = {name: _in_place(held, tensors[name], name) for name, held in self.tensors().items()}
        self._set(tensors)
        self.blocks = counts


def _joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    """Parts of a packed tensor, block after block; None where it has none."""
    there = [part for part in parts if part is not None]
    return torch.cat(there, 2) if there else None


def _encode(x: Tensor, coding: QuantScheme, present: Tensor | None = None) -> QuantizedTensor:
    packed = quantise(x, coding)
    if not coding.rank:
        return packed
    left, right = residual_factors(x, packed, coding, coding.rank, present)
    return packed._replace(left=left, right=right[:, :, None])


def _side_by_side(rows: list[Any], blocks: int) -> Any:
    """One batch of rows that were encoded separately, each padded to as many blocks."""
    parts: dict[str, Any] = {}
    for name, tensors in zip(rows[0]._fields, zip(*rows, strict=True), strict=True):
        if tensors[0] is not None:
            wide = tensors if name == "right" else [grown(each, 2, blocks) for each in tensors]
            parts[name] = torch.cat(list(wide))
    return type(rows[0])(**parts)


def _room_for(old: Tensor | None, like: Tensor, batch: int, dim: int, columns: int, fill: int) -> Tensor:
    """The tensor with columns for more along a dimension."""
    if old is None:
        shape = [batch, *like.shape[1:]]
        shape[dim] = 0
        old = like.new_empty(shape)
    return old if old.shape[dim] == columns else grown(old, dim, columns, fill)


def _in_place(held: Tensor, fewer: Tensor, name: str) -> Tensor:
    """What is held, replaced where it is by what has fewer columns."""
    dim = 1 if name == "spans" else 2
    columns = fewer.shape[dim]
    held.narrow(dim, 0, columns).copy_(fewer)
    held.narrow(dim, columns, held.shape[dim] - columns).fill_(EMPTY if name == "positions" else 0)
    return held
