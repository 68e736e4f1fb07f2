"""The newest tokens of a cache that packs its tokens in blocks, each by itself in 8 bits until there are enough.

Keys and values lie side by side, quantised per token (kernels/quantise.py), and rotated first where blocks rotate
values (kernels/hadamard.py). Keys are rotated too, because a few large channels would set the scale of every token;
queries then meet them rotated:

    q.k = rotate(q).rotate(k)        out = p V = (p rotate(V)) R'

Of keys and values that differ in width, the narrower ones are filled up with zeros, and so are queries.

A token's codes stay what they are until it becomes part of a block, however rows are reordered or cropped.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.quantized import QuantizedTensor, QuantScheme
from kvcompress.kernels.hadamard import rotate
from kvcompress.kernels.packed_attention import packed_attention
from kvcompress.kernels.quantise import dequantise, quantise
from kvcompress.storage.segment import EMPTY, NO_FACTS
from kvcompress.storage.tail import TailSegment

# tokens of a block as the kernels take it, where there is room for so many, and at least
BLOCK, LEAST = 32, 8


class PackedTail(TailSegment):
    """The newest tokens, in 8 bits each by itself.

    codes: [batch, 2 * kv_heads, room, head_dim] uint8, keys before values; with 8 bits this is the layout of blocks.
    scales, zeros: [batch, 2 * kv_heads, room, groups] float16. positions, held: as in TailSegment.
    coding: of keys and values. rotates: both are stored rotated. dtype: in which tokens come. widths: of keys and of
    values.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("codes", "scales", "zeros", "positions")
    is_exact: ClassVar[bool] = False

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    coding: QuantScheme
    rotates: bool
    dtype: torch.dtype
    widths: tuple[int, int]

    def __init__(self, key: Tensor, value: Tensor, room: int, coding: QuantScheme, rotates: bool) -> None:
        """Room for tokens like these, [batch, kv_heads, any, head_dim]."""
        batch, kv_heads = key.shape[:2]
        self.coding, self.rotates, self.dtype = coding, rotates, key.dtype
        self.widths = key.shape[-1], value.shape[-1]
        heads, room, head_dim = (batch, 2 * kv_heads), self._whole(room), max(self.widths)
        self.codes = key.new_zeros(*heads, room, head_dim, dtype=torch.uint8)
        self.scales, self.zeros = (
            key.new_zeros(*heads, *coding.groups(room, head_dim), dtype=torch.float16) for _ in range(2)
        )
        self.positions = torch.full((batch, room), EMPTY, dtype=torch.int32, device=key.device)
        self.held = [0] * batch

    @staticmethod
    def nbytes_for(batch: int, kv_heads: int, head_dim: int, coding: QuantScheme, room: int) -> int:  # type: ignore[override]
        """Bytes of room for at least so many tokens."""
        room = PackedTail._whole(room)
        return batch * (2 * kv_heads * coding.bytes(room, head_dim) + 4 * room)

    @staticmethod
    def _whole(room: int) -> int:
        unit = BLOCK if room > BLOCK // 2 else BLOCK // 2 if room > LEAST else LEAST
        return -(-room // unit) * unit

    def like(self) -> tuple[Tensor, Tensor]:
        batch, heads = self.codes.shape[:2]
        key, value = (self.codes.new_empty(batch, heads // 2, 0, each, dtype=self.dtype) for each in self.widths)
        return key, value

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().dump()
        return tensors, facts if len(set(self.widths)) == 1 else facts | {"widths": self.widths}

    @classmethod
    def load(cls, tensors: dict[str, Tensor], facts: Mapping[str, Any] = NO_FACTS, **built_with: Any) -> Self:
        widths = facts.get("widths", (tensors["codes"].shape[-1],) * 2)
        return super().load(tensors, facts, widths=tuple(widths), **built_with)

    def _side_by_side(self, key: Tensor, value: Tensor) -> Tensor:
        """Keys and values as they are rotated and packed, [batch, 2 * kv_heads, any, wider head_dim]."""
        return torch.cat([self._wide(key), self._wide(value)], 1)

    def _wide(self, x: Tensor) -> Tensor:
        lacking = max(self.widths) - x.shape[-1]
        # pad copies even what lacks nothing
        return pad(x, (0, lacking)) if lacking else x

    def _apart(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Takes `_side_by_side` back."""
        key, value = both.chunk(2, 1)
        return key[..., : self.widths[0]], value[..., : self.widths[1]]

    def contents(self, columns: int | None = None) -> tuple[Tensor, Tensor]:
        both = self._decoded(columns, torch.promote_types(self.dtype, torch.float32))
        return self._apart((rotate(both, back=True) if self.rotates else both).to(self.dtype))

    def _decoded(self, columns: int | None, dtype: torch.dtype) -> Tensor:
        """Keys and values as they are stored, [batch, 2 * kv_heads, columns, head_dim]."""
        parts = (each[:, :, None, :columns] for each in (self.codes, self.scales, self.zeros))
        return dequantise(QuantizedTensor(*parts), self.coding, dtype)[:, :, 0]

    def _stored(self, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        both, tokens = self._side_by_side(key, value), key.shape[2]
        both = rotate(both) if self.rotates else both
        # the quantiser takes blocks
        both = both.expand(-1, -1, LEAST, -1) if tokens == 1 else pad(both, (0, 0, 0, -tokens % LEAST))
        packed = quantise(both.unflatten(2, (-1, LEAST)), self.coding)
        parts = zip(("codes", "scales", "zeros"), packed[:3], strict=True)
        return {name: part.flatten(2, 3)[:, :, :tokens] for name, part in parts if part is not None}

    def attend(self, query: Tensor, query_positions: Tensor, spec: LogitSpec) -> tuple[Tensor, Tensor]:
        block = min(BLOCK, self.room & -self.room)
        parts = (self.codes, self.scales, self.zeros)
        of_sides = zip(*(each.unflatten(2, (-1, block)).chunk(2, 1) for each in parts), strict=True)
        keys, values = (QuantizedTensor(*side) for side in of_sides)
        query = rotate(self._wide(query), at_once=True) if self.rotates else self._wide(query)
        codings, places = (self.coding, self.coding), self.positions[:, None]
        out, lse, *_ = packed_attention(query, keys, values, *codings, places, query_positions, spec)
        return (rotate(out, back=True, at_once=True) if self.rotates else out)[..., : self.widths[1]], lse

    def attend_beside(
        self,
        others: Sequence[tuple[Tensor, Tensor, Tensor]],
        query: Tensor,
        query_positions: Tensor,
        spec: LogitSpec,
    ) -> tuple[Tensor, Tensor]:
        # to turn a query and a few others takes less than to turn back what is held
        dtype, used = torch.promote_types(query.dtype, torch.float32), max(self.held)
        both, places = self._decoded(used, dtype), self.positions[:, :used]
        if others:
            keys, values, positions = (
                torch.cat(parts, dim) for parts, dim in zip(zip(*others, strict=True), (2, 2, 1), strict=True)
            )
            beside = self._side_by_side(keys, values).to(dtype)
            beside = rotate(beside, at_once=True) if self.rotates else beside
            both, places = torch.cat([beside, both], 2), torch.cat([positions, places], 1)
        wide = self._wide(query.to(dtype))
        asked = rotate(wide, at_once=True) if self.rotates else wide
        key, value = both.chunk(2, 1)
        out, lse = slot_attention(asked, key, value, places[:, None].expand(key.shape[:3]), query_positions, spec)
        out = rotate(out, back=True, at_once=True) if self.rotates else out
        return out[..., : self.widths[1]].to(query.dtype), lse
