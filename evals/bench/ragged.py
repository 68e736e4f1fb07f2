"""Rows of kvcompress bench kernels for heads that keep different numbers of tokens."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcompress.evals.bench.case import Case, Shape, make_random
from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.quantized import QuantScheme
from kvcompress.kernels.common.split_attention import Extents
from kvcompress.kernels.decode import decode_attention
from kvcompress.kernels.packed_attention import packed_attention
from kvcompress.kernels.quantise import quantise
from kvcompress.kernels.ragged import padded, ragged_attention, ragged_decode_attention
from kvcompress.kernels.ragged_packed import ragged_packed_attention, ragged_packed_attention_reference

# tokens are the slots of a head on average
RAGGED = {
    "cuda": [Shape(batch, 32, 8, tokens, 128) for batch, tokens in ((1, 4096), (1, 32768), (8, 4096), (8, 32768))],
    "cpu": [Shape(1, 9, 3, 512, 64), Shape(8, 9, 3, 512, 64)],
}
# how many times as many slots the longest head has as the shortest
_SPREAD = 10
# slots that are packed together (storage/ragged_packed.py)
BLOCK = 16


def ragged_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """A decode step's attention to heads of different lengths, beside as many slots in heads of one length, and beside
    every head padded to the longest."""
    batch, heads, kv_heads, tokens, head_dim = shape
    spec = LogitSpec(head_dim**-0.5)
    random = make_random(dtype, device)
    # evenly spread between the shortest and the longest, in another order in each sequence
    lengths = torch.linspace(1, _SPREAD, batch * kv_heads).mul_(2 * tokens / (1 + _SPREAD)).long()
    # whole blocks, for packed slots
    lengths = lengths.add(BLOCK - 1) // BLOCK * BLOCK
    lengths = lengths[torch.randperm(len(lengths))].view(batch, kv_heads)
    starts = lengths.flatten().cumsum(0).view_as(lengths) - lengths
    total, longest = int(lengths.sum()), int(lengths.max())
    extents = Extents(starts.to(device), lengths.to(device))
    query, key, value = random(batch, heads, 1, head_dim), random(total, head_dim), random(total, head_dim)
    column = torch.arange(longest, dtype=torch.int32, device=device)
    positions = column.where(column < extents.capacities[..., None], -1).contiguous()
    at = torch.full((batch, 1), longest, dtype=torch.int32, device=device)
    even_key, even_value, _ = padded(key, value, extents, positions)
    each = total // (batch * kv_heads * BLOCK) * BLOCK
    alike_key, alike_value = (x[: each * batch * kv_heads].view(batch, kv_heads, each, head_dim) for x in (key, value))
    alike = column[:each].expand(batch, kv_heads, -1).contiguous()
    moved = 2 * key.nbytes

    # other tokens for each head, so that there is nothing to compare
    def of_equal_heads() -> None:
        slot_attention(query, alike_key, alike_value, alike, at, spec)

    def decoded_of_equal_heads() -> tuple[Tensor | None, None]:
        decode_attention(query, alike_key, alike_value, alike, at, spec)
        return None, None

    yield Case(
        "ragged_attention", shape,
        {
            "ours": lambda: ragged_attention(query, key, value, extents, positions, at, spec)[0],
            "as many slots, heads alike": of_equal_heads,
            "padded to the longest head": lambda: slot_attention(query, even_key, even_value, positions, at, spec)[0],
        },
        "padded to the longest head", bytes=moved + 4 * total,
    )  # fmt: skip
    yield Case(
        "ragged_decode_attention", shape,
        {
            "ours": lambda: ragged_decode_attention(query, key, value, extents, positions, at, spec),
            "as many slots, heads alike": decoded_of_equal_heads,
            "padded to the longest head": lambda: decode_attention(query, even_key, even_value, positions, at, spec),
        },
        "padded to the longest head", bytes=moved + 8 * total,
    )  # fmt: skip

    coding = QuantScheme(4, 64, "token")
    keys, values = (quantise(x.unflatten(0, (-1, BLOCK))[None, None], coding) for x in (key, value))
    alike_keys, alike_values = (
        quantise(x.unflatten(2, (-1, BLOCK)), coding) for x in (alike_key.contiguous(), alike_value.contiguous())
    )

    def packed_in_equal_heads() -> None:
        packed_attention(query, alike_keys, alike_values, coding, coding, alike, at, spec)

    def not_packed() -> None:
        ragged_attention(query, key, value, extents, positions, at, spec)

    packed = query, keys, values, coding, extents, positions, at, spec
    yield Case(
        "ragged_packed_attention, 4 bits", shape,
        {
            "ours": lambda: ragged_packed_attention(*packed)[0],
            "as many slots, heads alike": packed_in_equal_heads,
            "not packed": not_packed,
            "reference": lambda: ragged_packed_attention_reference(*packed)[0],
        },
        "reference", bytes=2 * total // BLOCK * coding.bytes(BLOCK, head_dim) + 4 * total,
    )  # fmt: skip
