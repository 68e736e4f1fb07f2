"""Packed slots of which each KV head has as many as it needs (storage/ragged.py, storage/quantized_slots.py).

Blocks of all heads lie one after another. Few tokens share a block, as each head's slots are rounded up to whole ones.
A token that moves to another slot keeps its codes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.quantized import QuantizedTensor, QuantScheme, pack_codes, unpack_codes
from kvcompress.kernels.hadamard import rotate
from kvcompress.kernels.packed_attention import is_launched, packed_attention
from kvcompress.kernels.quantise import dequantise, quantise
from kvcompress.kernels.ragged import by_column
from kvcompress.kernels.ragged_packed import ragged_packed_attention
from kvcompress.storage.quantized_slots import LEAST, SIDES, PackedSlots, overwrite, packed_of
from kvcompress.storage.ragged import RaggedSlots
from kvcompress.storage.segment import EMPTY

BLOCK = 16


class RaggedPackedSlots(PackedSlots, RaggedSlots):
    """Packed slots whose number differs from head to head, a multiple of BLOCK.

    packed: keys and values of all heads, [1, 1, slots / BLOCK, ...]. centre, spread: as in PackedSlots, by head.
    The rest as in RaggedSlots.
    """

    tensor_names = tuple(name for name in RaggedSlots.tensor_names if name not in SIDES)

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        slots: int,
        coding: QuantScheme,
        rotates: bool = False,
        has_bias: bool = False,
    ) -> None:
        """Empty slots, at least so many, for tokens like these, [batch, kv_heads, any, head_dim]."""
        self.coding, self.rotates, self.dtype = coding, rotates, key.dtype
        self.centre = key.new_zeros(*key.shape[:2], key.shape[-1], dtype=torch.float16)
        self.spread = torch.ones_like(self.centre)
        RaggedSlots.__init__(self, key, value, self.whole(slots), has_bias)

    def _flatten(self) -> None:
        # of zeros
        nothing = {side: getattr(self, side).flatten(0, 2).unflatten(0, (-1, BLOCK))[None, None] for side in SIDES}
        self.packed = {side: quantise(x, self.coding) for side, x in nothing.items()}
        del self.keys, self.values

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | self._packed_tensors()

    def _set(self, tensors: dict[str, Tensor]) -> None:
        self.centre, self.spread = tensors["keys.centre"], tensors["keys.spread"]
        self.packed = packed_of(tensors)
        RaggedSlots._set(self, tensors)

    def map_tensors(self, change: Any) -> None:
        RaggedSlots.map_tensors(self, change)
        self.centre, self.spread = change(self.centre), change(self.spread)

    def _take(self, source: Tensor) -> None:
        # heads are whole blocks
        blocks = source[::BLOCK] // BLOCK
        self.packed = {
            side: QuantizedTensor(*(None if part is None else part[:, :, blocks] for part in packed))  # type: ignore[arg-type]
            for side, packed in self.packed.items()
        }

    @staticmethod
    def nbytes_for(  # type: ignore[override]
        batch: int,
        kv_heads: int,
        head_dim: int,
        coding: QuantScheme,
        slots: int,
        has_bias: bool = False,
        value_dim: int | None = None,
    ) -> int:
        """Bytes of so many slots per head on average, in whole blocks, and where they lie.

        Args:
            value_dim: of values, if not head_dim.
        """
        of_block = sum(coding.bytes(BLOCK, width) for width in (head_dim, head_dim if value_dim is None else value_dim))
        of_head = slots * (of_block // BLOCK + 4 + 4 + 4 * has_bias) + 2 * 2 * head_dim
        return batch * kv_heads * (of_head + 8 + 3 * 8)

    @staticmethod
    def whole(slots: int) -> int:
        """So many slots of a head in whole blocks."""
        return -(-slots // BLOCK) * BLOCK

    def _encoded(self, side: str, x: Tensor, heads: tuple[Tensor, Tensor], block: int = BLOCK) -> QuantizedTensor:
        """Tokens [tokens, head_dim] as blocks [1, 1, blocks, ...], the last one filled up with 0.

        Args:
            heads: sequence and KV head of each token.
        """
        x = self._as_packed(side, x.float(), heads)
        x = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % block))
        return quantise(x.unflatten(0, (-1, block))[None, None], self.coding)

    def _rows_of(self, side: str, packed: QuantizedTensor) -> dict[str, Tensor]:
        """What blocks hold of each token, [tokens, ...] by name; codes as bytes."""
        found = {f"{side}.codes": unpack_codes(packed.codes, self.coding.bits)[0, 0].flatten(0, 1)}
        for name in ("scales", "zeros", "outlier_values", "outlier_index"):
            part = getattr(packed, name)
            if part is not None:
                found[f"{side}.{name}"] = part[0, 0].flatten(0, 1)
        return found

    def _rows(self) -> dict[str, Tensor]:
        return {
            name: rows for side, packed in self.packed.items() for name, rows in self._rows_of(side, packed).items()
        }

    def _set_rows(self, rows: dict[str, Tensor]) -> None:
        blocks = {name: held.unflatten(0, (-1, BLOCK))[None, None] for name, held in rows.items()}
        for side in SIDES:
            blocks[f"{side}.codes"] = pack_codes(blocks[f"{side}.codes"], self.coding.bits)
        self.packed = packed_of(blocks)

    def _as_rows(self, key: Tensor | None, value: Tensor, heads: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        sides = {"values": value} if key is None else {"keys": key, "values": value}
        found: dict[str, Tensor] = {}
        for side, x in sides.items():
            found |= {name: rows[: len(x)] for name, rows in self._rows_of(side, self._encoded(side, x, heads)).items()}
        return found

    def as_held(self, key: Tensor, positions: Tensor) -> Tensor:
        self._learn(key, positions != EMPTY)
        kv_heads, tokens = key.shape[1:3]
        number = torch.arange(key.shape[:2].numel(), device=key.device).repeat_interleave(tokens)
        packed = self._encoded("keys", key.flatten(0, 2), (number // kv_heads, number % kv_heads))
        held = dequantise(packed, self.coding)[0, 0].flatten(0, 1)[: len(number)].view(key.shape)
        return self._as_fed(held)

    def _rounded(self, capacities: Tensor) -> Tensor:
        return (capacities + BLOCK - 1) // BLOCK * BLOCK

    def like(self) -> tuple[Tensor, Tensor]:
        widths = (self.packed[side].codes.shape[-1] for side in SIDES)
        key, value = (self.centre.new_empty(*self.starts.shape, 0, each, dtype=self.dtype) for each in widths)
        return key, value

    def _decoded(self, packed: dict[str, QuantizedTensor], heads: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of blocks, [any, 1, slots, head_dim].

        Args:
            heads: [any, 1, slots or 1], of which heads these are, by number.
        """
        keys, values = (dequantise(packed[side], self.coding).flatten(2, 3) for side in SIDES)
        kv_heads = self.starts.shape[1]
        keys = self._as_fed(keys, (heads // kv_heads, heads % kv_heads))
        return keys, (rotate(values, back=True) if self.rotates else values).to(self.dtype)

    def contents(self) -> tuple[Tensor, Tensor]:
        sizes = self.capacities.flatten()[self.order]
        keys, values = self._decoded(self.packed, self.order.repeat_interleave(sizes)[None, None])
        extents = self._extents()
        return by_column(keys[0, 0], extents, self.slots), by_column(values[0, 0], extents, self.slots)

    def _stored(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        for heads, packed, weights in self._packed_by_capacity():
            yield heads, *self._decoded(packed, self.order[heads][:, None, None]), weights

    def _packed_by_capacity(self) -> Iterator[tuple[slice, dict[str, QuantizedTensor], Tensor | None]]:
        """By capacity: the heads' places in `order`, their blocks [heads, 1, blocks, ...], and their log-weights
        [heads, 1, capacity]."""
        weights = self.log_weights
        for bucket in self.buckets:
            packed = {
                side: QuantizedTensor(*(None if part is None else bucket.rows_of(part[0, 0], BLOCK) for part in held))  # type: ignore[arg-type]
                for side, held in self.packed.items()
            }
            of_heads = None if weights is None else bucket.rows_of(weights)
            yield slice(bucket.start, bucket.stop), packed, of_heads

    def decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if self.log_weights is not None:
            raise NotImplementedError("slots with log-weights take no tokens one by one")
        return PackedSlots.decode(self, *args, **options)

    def _attend_packed(
        self,
        query: Tensor,
        positions: Tensor,
        query_positions: Tensor,
        spec: LogitSpec,
        offsets: Tensor,
        with_logits: bool,
    ) -> tuple[Tensor, ...]:
        keys, values = (self.packed[side] for side in SIDES)
        if is_launched(query, values, positions):
            at = query_positions.expand(len(query), -1)
            return ragged_packed_attention(
                query, keys, values, self.coding, self._extents(), positions, at, spec, offsets, self.log_weights,
                with_logits,
            )  # fmt: skip
        queries, places, shared = (self._by_place(x) for x in (query, positions, offsets))
        at, columns = self._of_queries(query_positions), positions.shape[-1]
        parts = []
        for heads, packed, weights in self._packed_by_capacity():
            slots = packed["keys"].codes.shape[2] * BLOCK
            out, lse, *logits = packed_attention(
                queries[heads], packed["keys"], packed["values"], self.coding, self.coding, places[heads, :, :slots],
                at[heads], spec, offsets=shared[heads], bias=weights, with_logits=with_logits,
            )  # fmt: skip
            beyond = [torch.nn.functional.pad(x, (0, columns - slots), value=-torch.inf) for x in logits]
            parts.append((out, lse, *beyond))
        return tuple(self._by_head(list(each), query.shape) for each in zip(*parts, strict=True))

    def _write(self, key: Tensor, value: Tensor) -> None:
        batch, kv_heads = self.spare.shape
        row = torch.arange(batch, device=key.device).repeat_interleave(kv_heads)
        head = torch.arange(kv_heads, device=key.device).repeat(batch)
        free = (self.starts + self.spare).view(1, -1)
        block, place = free // BLOCK, free % BLOCK
        for side, x in zip(SIDES, (key, value), strict=True):
            # each token as the first of a block of its own
            tokens = x.flatten(0, 2).repeat_interleave(LEAST, 0)
            heads = row.repeat_interleave(LEAST), head.repeat_interleave(LEAST)
            fresh, packed = self._encoded(side, tokens, heads, LEAST), self.packed[side]
            overwrite(packed.codes, fresh.codes[0], (0, 0, block), place, self.coding.bits)
            for old, new in zip(packed[1:5], fresh[1:5], strict=True):
                if old is not None and new is not None:
                    old[0, 0, block, place] = new[0, :, :, 0]

    def replace(self, *args: Any, **options: Any) -> None:
        RaggedSlots.replace(self, *args, **options)

    def refill(self, key: Tensor, value: Tensor, positions: Tensor, *args: Any, **options: Any) -> None:
        self._learn(key, positions != EMPTY)
        RaggedSlots.refill(self, key, value, positions, *args, **options)
