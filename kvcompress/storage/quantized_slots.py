"""Slots of an evicting cache whose tokens are packed: heavy hitters, in a few bits each.

A slot is overwritten as soon as its token is evicted, so every token must be packed by itself: keys, too, are quantised
per token (as GEAR, arXiv:2403.05527, packs values), with their own outliers. Nothing is ever packed twice, so errors do
not grow with the length of the text. GEAR's groups along tokens and its low-rank part need blocks that stay.

Some channels of keys are far from 0 or vary far more than the others, because of the weights or a bias of the key
projection (Qwen2), and would set the scale of every token. So what is packed is

    key' = (key - centre) / spread        q.key = (q * spread).key' + q.centre

The centre is the middle of the range for the few channels outside the typical range, and 0 for the others; it reaches
attention as one offset of a query's logits. A head learns both from the first tokens that it gets while it is empty,
and keeps them. Channels that RoPE rotates slowly, where models have their largest biases, stay near their centre; one
that rotates away from it is packed more coarsely, which is less precise but not wrong.
"""

from typing import Any

import torch
from torch import Tensor

from kvcompress.kernels.attention import causal_attention
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.quantized import QuantizedTensor, QuantScheme, pack_codes, unpack_codes
from kvcompress.kernels.hadamard import rotate
from kvcompress.kernels.merge import merge_states, with_sinks
from kvcompress.kernels.packed_attention import packed_attention
from kvcompress.kernels.quantise import dequantise, quantise
from kvcompress.storage.columns import grown
from kvcompress.storage.segment import EMPTY
from kvcompress.storage.slots import SlotSegment

# how many slots share bytes of codes: few, as the number of slots is rounded up to a multiple
BLOCK = 32
# the fewest tokens that the quantiser takes
LEAST = 8
SIDES = ("keys", "values")
_COMPONENTS = {"codes": "codes", "scales": "scales", "zeros": "scales", "centre": "scales", "spread": "scales"}
_LARGEST = torch.finfo(torch.float16).max


class PackedSlots(SlotSegment):
    """Slots that hold codes, scales and outliers instead of keys and values.

    packed: keys, centred and divided by their spread, and values, as kernels/quantise.py lays them out, each token by
    itself. centre, spread: of the keys' channels, [batch, kv_heads, head_dim] float16. positions, scores, spare: as in
    SlotSegment. coding: of keys and values. rotates: values are stored rotated (kernels/hadamard.py).
    """

    packed: dict[str, QuantizedTensor]
    centre: Tensor
    spread: Tensor
    coding: QuantScheme
    dtype: torch.dtype
    rotates: bool

    def _packed_tensors(self) -> dict[str, Tensor]:
        """What is packed, and how keys were centred, by name: keys.codes, values.scales, keys.centre and so on."""
        found = {"keys.centre": self.centre, "keys.spread": self.spread}
        for side, packed in self.packed.items():
            found |= {f"{side}.{name}": part for name, part in packed._asdict().items() if part is not None}
        return found

    def component(self, name: str) -> str:
        part = name.partition(".")[2]
        return _COMPONENTS.get(part, "outliers") if part else name

    def attend(self, query: Tensor, query_positions: Tensor, spec: LogitSpec) -> tuple[Tensor, Tensor]:
        out, lse = self._attend(query, query_positions, spec, with_logits=False)
        return out, lse

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        answer = self._decode(self.positions, query, key, value, positions, *args, **options)
        self.put(key, value, positions)
        return answer

    def decode_again(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return self._decode(self.positions.scatter(2, self.spare[..., None], EMPTY), *args, **options)

    def _decode(
        self,
        past: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        query_positions: Tensor,
        spec: LogitSpec,
        sink_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `decode`, without `put`.

        Args:
            past: [batch, kv_heads, slots] int32, positions of the slots without this token.
        """
        out, lse, logits = self._attend(query, query_positions, spec, with_logits=True, positions=past)
        # the token itself takes part unpacked, and is packed for later ones
        visible = (positions != EMPTY)[:, None]
        own_out, own_lse = causal_attention(query, key, value, spec, visible)
        outs, lses = [out, own_out], [lse, own_lse]
        if sink_logits is not None:
            outs, lses = with_sinks(outs, lses, sink_logits)
        out, lse = merge_states(outs, lses)
        # a query that sees nothing has lse = -inf, as have all its logits
        shift = lse.masked_fill(lse == -torch.inf, 0.0)
        group = (self.positions.shape[1], -1)
        attention = (logits - shift).exp().unflatten(1, group).sum(2)
        own = (own_lse - shift).exp().unflatten(1, group).sum(2)
        return out, attention.scatter(2, self.spare[..., None], own)

    def _attend(
        self,
        query: Tensor,
        query_positions: Tensor,
        spec: LogitSpec,
        *,
        with_logits: bool,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        rows = query.to(torch.promote_types(query.dtype, torch.float32)).unflatten(1, (self.positions.shape[1], -1))
        centre, spread = (x.to(rows.dtype)[:, :, None, None] for x in (self.centre, self.spread))
        scaled = (rows * spread).flatten(1, 2).to(query.dtype)
        offsets = (rows * centre).sum(-1).flatten(1, 2).float()
        places = self.positions if positions is None else positions
        out, *rest = self._attend_packed(scaled, places, query_positions, spec, offsets, with_logits)
        return (rotate(out, back=True, at_once=True) if self.rotates else out, *rest)

    def _attend_packed(
        self,
        query: Tensor,
        positions: Tensor,
        query_positions: Tensor,
        spec: LogitSpec,
        offsets: Tensor,
        with_logits: bool,
    ) -> tuple[Tensor, ...]:
        """Attention to `packed` as packed_attention gives it, for queries that meet the keys as they are stored."""
        raise NotImplementedError

    def put(self, key: Tensor, value: Tensor, positions: Tensor) -> None:
        self._learn(key, (positions != EMPTY)[:, None, None])
        super().put(key, value, positions)

    def _learn(self, key: Tensor, real: Tensor) -> None:
        """Sets centre and spread of empty heads, from the tokens that they get.

        Args:
            key: [batch, kv_heads, tokens, head_dim].
            real: [batch, 1 or kv_heads, tokens] bool.
        """
        if not key.shape[2]:
            return
        holds_nothing = (self.positions == EMPTY).all(-1) & real.any(-1)
        for held, learned in zip((self.centre, self.spread), _channels(key, real), strict=True):
            held.copy_(torch.where(holds_nothing[..., None], learned, held))

    def _as_packed(self, side: str, x: Tensor, heads: tuple[Tensor, ...] | None = None) -> Tensor:
        """Keys or values as packed: [batch, kv_heads, tokens, head_dim], or of these heads [tokens, head_dim]."""
        if side == "keys":
            centre, spread = self._of_channels(heads)
            return (x.float() - centre) / spread
        return rotate(x) if self.rotates else x

    def _as_fed(self, key: Tensor, heads: tuple[Tensor, ...] | None = None) -> Tensor:
        """Keys as they were before `_as_packed`, of its shapes, in the dtype in which tokens are fed; changes them."""
        centre, spread = self._of_channels(heads)
        return key.mul_(spread).add_(centre).to(self.dtype)

    def _of_channels(self, heads: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
        """Centre and spread for the tokens of all heads, or of these: sequences and KV heads."""
        if heads is None:
            return self.centre[:, :, None], self.spread[:, :, None]
        return self.centre[heads], self.spread[heads]


class QuantizedSlots(PackedSlots):
    """Packed slots, equally many of each KV head: `packed` is [batch, kv_heads, slots / BLOCK, ...]."""

    def __init__(self, key: Tensor, value: Tensor, slots: int, coding: QuantScheme, rotates: bool = False) -> None:
        """Empty slots, at least so many, for tokens like these, [batch, kv_heads, any, head_dim]."""
        batch, kv_heads = key.shape[:2]
        blocks = -(-slots // BLOCK)
        self.coding, self.rotates = coding, rotates
        self.dtype = key.dtype
        nothing = (x.new_zeros(batch, kv_heads, blocks, BLOCK, x.shape[-1]) for x in (key, value))
        self.packed = {side: quantise(x, coding) for side, x in zip(SIDES, nothing, strict=True)}
        self.centre = key.new_zeros(batch, kv_heads, key.shape[-1], dtype=torch.float16)
        self.spread = torch.ones_like(self.centre)
        shape = (batch, kv_heads, blocks * BLOCK)
        self.positions = torch.full(shape, EMPTY, dtype=torch.int32, device=key.device)
        self.scores = torch.zeros(shape, dtype=torch.float32, device=key.device)
        self.spare = torch.zeros(batch, kv_heads, dtype=torch.int64, device=key.device)

    def tensors(self) -> dict[str, Tensor]:
        return {"positions": self.positions, "scores": self.scores, "spare": self.spare} | self._packed_tensors()

    def _set(self, tensors: dict[str, Tensor]) -> None:
        self.positions, self.scores, self.spare = (tensors[name] for name in ("positions", "scores", "spare"))
        if "keys.centre" not in tensors:
            # a file from before keys were centred
            codes = tensors["keys.codes"]
            plain = codes.new_zeros(*codes.shape[:2], codes.shape[-1], dtype=torch.float16)
            tensors = tensors | {"keys.centre": plain, "keys.spread": plain + 1}
        self.centre, self.spread = tensors["keys.centre"], tensors["keys.spread"]
        self.packed = packed_of(tensors)

    @staticmethod
    def nbytes_for(  # type: ignore[override]
        batch: int, kv_heads: int, head_dim: int, coding: QuantScheme, slots: int, value_dim: int | None = None
    ) -> int:
        """Bytes of at least so many slots: codes, position and score of each; centre and spread; which one is free.

        Args:
            value_dim: of values, if not head_dim.
        """
        blocks, widths = -(-slots // BLOCK), (head_dim, head_dim if value_dim is None else value_dim)
        a_block = sum(coding.bytes(BLOCK, width) for width in widths) + BLOCK * (4 + 4)
        return batch * kv_heads * (blocks * a_block + 2 * 2 * head_dim + 8)

    @property
    def slots(self) -> int:
        return self.positions.shape[2]

    def grow(self, slots: int) -> None:
        blocks = -(-slots // BLOCK)
        for side, packed in self.packed.items():
            self.packed[side] = QuantizedTensor(*(None if part is None else grown(part, 2, blocks) for part in packed))  # type: ignore[arg-type]
        self.positions = grown(self.positions, 2, blocks * BLOCK, EMPTY)
        self.scores = grown(self.scores, 2, blocks * BLOCK)
        torch.argmin(self.positions, -1, out=self.spare)

    def like(self) -> tuple[Tensor, Tensor]:
        codes = (self.packed[side].codes for side in SIDES)
        key, value = (x.new_empty(*x.shape[:2], 0, x.shape[-1], dtype=self.dtype) for x in codes)
        return key, value

    def rotated_keys(self) -> Tensor:
        key = dequantise(self.packed["keys"], self.coding).flatten(2, 3)
        return self._as_fed(key)

    def contents(self) -> tuple[Tensor, Tensor]:
        values = dequantise(self.packed["values"], self.coding, self.dtype).flatten(2, 3)
        return self.rotated_keys(), rotate(values, back=True) if self.rotates else values

    def _attend_packed(
        self,
        query: Tensor,
        positions: Tensor,
        query_positions: Tensor,
        spec: LogitSpec,
        offsets: Tensor,
        with_logits: bool,
    ) -> tuple[Tensor, ...]:
        sides = self.packed["keys"], self.packed["values"], self.coding, self.coding
        return packed_attention(
            query, *sides, positions, query_positions, spec, offsets=offsets, with_logits=with_logits
        )

    def replace(self, key: Tensor, value: Tensor, positions: Tensor, scores: Tensor, kept: Tensor) -> None:
        self._learn(key, positions != EMPTY)
        super().replace(key, value, positions, scores, kept)

    def _write(self, key: Tensor, value: Tensor) -> None:
        batch, kv_heads = self.spare.shape
        row = torch.arange(batch, device=key.device)[:, None]
        head = torch.arange(kv_heads, device=key.device)
        block, place = self.spare // BLOCK, self.spare % BLOCK
        for side, x in zip(SIDES, (key, value), strict=True):
            fresh = quantise(self._as_packed(side, x)[:, :, None].expand(-1, -1, 1, LEAST, -1), self.coding)
            packed = self.packed[side]
            overwrite(packed.codes, fresh.codes[:, :, 0], (row, head, block), place, self.coding.bits)
            for old, new in zip(packed[1:5], fresh[1:5], strict=True):
                if old is not None and new is not None:
                    old[row, head, block, place] = new[:, :, 0, 0]

    def _move(self, key: Tensor, value: Tensor, source: Tensor, target: Tensor, wanted: Tensor) -> None:
        # the quantiser takes whole blocks: tokens beyond those that move are not wanted
        excess = -source.shape[2] % BLOCK
        source, target, wanted = (torch.nn.functional.pad(x, (0, excess)) for x in (source, target, wanted))
        if excess:
            # tokens that do not move all go to one slot that is not written
            target[..., -excess:] = self.slots
        target = target.masked_fill(~wanted, self.slots)
        for side, x in zip(SIDES, (key, value), strict=True):
            taken = x.gather(2, source[..., None].expand(-1, -1, -1, x.shape[-1]))
            fresh = quantise(self._as_packed(side, taken).unflatten(2, (-1, BLOCK)), self.coding)
            packed = self.packed[side]
            codes = unpack_codes(packed.codes, self.coding.bits)
            _scatter(codes, unpack_codes(fresh.codes, self.coding.bits), target)
            packed.codes.copy_(pack_codes(codes, self.coding.bits))
            for old, new in zip(packed[1:5], fresh[1:5], strict=True):
                if old is not None and new is not None:
                    _scatter(old, new, target)


def _channels(key: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and spread of each channel, [batch, kv_heads, head_dim] float16; arbitrary if no token is real.

    With few tokens, ranges say little, and the spread approaches the same value for all channels. However many tokens
    there are, it includes a share of the mean over channels, as a channel may leave the range of the first tokens.

    Args:
        key, real: as in `QuantizedSlots._learn`.
    """
    key, real = key.float(), real[..., None]
    high = key.masked_fill(~real, -torch.inf).amax(2)
    low = key.masked_fill(~real, torch.inf).amin(2)
    middle = (high + low) / 2
    typical = torch.maximum(high.abs(), low.abs()).median(-1, keepdim=True).values
    centre = torch.where(middle.abs() > typical, middle, 0.0).clamp(-_LARGEST, _LARGEST).half()
    reach = torch.maximum(high - centre, centre - low).square()
    spread = (reach + (0.25 + 32 / real.sum(2)) * reach.mean(-1, keepdim=True)).sqrt()
    size = spread.square().mean(-1, keepdim=True).sqrt()
    return centre, torch.where(size > 0, spread / size, 1.0).half()


def _scatter(slots: Tensor, fresh: Tensor, target: Tensor) -> None:
    """Writes tokens [batch, kv_heads, blocks, BLOCK, any] to slots; target: [batch, kv_heads, tokens], the number of
    slots for a token not to write."""
    flat = slots.flatten(2, 3)
    room = torch.cat([flat, flat[:, :, :1]], 2)
    room.scatter_(2, target[..., None].expand(-1, -1, -1, room.shape[-1]), fresh.flatten(2, 3))
    slots.copy_(room[:, :, :-1].view_as(slots))


def packed_of(tensors: dict[str, Tensor]) -> dict[str, QuantizedTensor]:
    """Packed keys and values of tensors by name: keys.codes, values.scales and so on."""
    return {
        side: QuantizedTensor(*(tensors.get(f"{side}.{name}") for name in QuantizedTensor._fields))  # type: ignore[arg-type]
        for side in SIDES
    }


def overwrite(codes: Tensor, fresh: Tensor, where: tuple[Any, Any, Tensor], place: Tensor, bits: int) -> None:
    """Writes one token's codes among those that share its bytes, for each sequence and head.

    Args:
        codes: as `pack_codes` returns them, [batch, kv_heads, blocks, block * bits / 8, head_dim].
        fresh: of a block of LEAST tokens that begins with the token, [batch, kv_heads, LEAST * bits / 8, head_dim].
        where: row, head and block of each token. place: [batch, kv_heads], its index within the block.
    """
    block = codes.shape[-2] * 8 // bits
    # width, and first row in either block, of each plane of codes
    planes = [(2, 0, 0), (1, block // 4, LEAST // 4)] if bits == 3 else [(bits, 0, 0)]
    for width, first, fresh_first in planes:
        rows = block * width // 8
        at = (*where, first + place % rows)
        shift = (place // rows * width).to(torch.uint8)[..., None]
        hole = torch.bitwise_left_shift(torch.full_like(shift, 2**width - 1), shift)
        code = fresh[:, :, fresh_first] & 2**width - 1
        codes[at] = (codes[at] & ~hole) | torch.bitwise_left_shift(code, shift)
