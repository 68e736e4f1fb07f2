"""Rows of kvcompress bench kernels for packed keys and values."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcompress.evals.bench.case import Case, Shape, beside_reference, make_random
from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.calibrated import (
    CalibratedKeys,
    KeyDecoder,
    calibrated_attention,
    calibrated_attention_reference,
    calibrated_codes,
    water_filling,
)
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.quantized import QuantizedTensor, QuantScheme
from kvcompress.kernels.low_rank import residual_factors, residual_factors_reference
from kvcompress.kernels.packed_attention import packed_attention
from kvcompress.kernels.quantise import dequantise, quantise, quantise_reference

# Llama-3.1-8B on a GPU, SmolLM2-135M on a CPU
PACKED = {
    "cuda": [Shape(batch, 32, 8, tokens, 128) for batch, tokens in ((1, 32768), (1, 131072), (8, 32768), (64, 4096))],
    "cpu": [Shape(1, 9, 3, 4096, 64), Shape(8, 9, 3, 4096, 64)],
}
# names, and of keys and values alike bits, group, outliers and rank
_SCHEMES = {"2 bits": (2, 64, 0, 0), "4 bits": (4, 64, 0, 0), "GEAR at 2 bits": (2, 64, 1, 4)}
# GEARCache's own at 4 bits, with fewer of values; at 2 bits: a scale per token, levels around the mean of a block's
# keys and around 0
_GEAR_4 = QuantScheme(4, 64, "channel"), QuantScheme(3, 64, "token")
_GEAR_2 = QuantScheme(2, 256, "token", zeros="block"), QuantScheme(2, 256, "token", zeros="none")


def packed_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Packing keys, the factors of what that loses, and a decode step's attention to packed keys and values."""
    block = 64 if shape.tokens >= 64 else 8
    blocks = (shape.batch, shape.kv_heads, shape.tokens // block, block, shape.head_dim)
    random = make_random(dtype, device)
    keys, values = random(*blocks), random(*blocks)
    for name, (bits, group, outliers, rank) in _SCHEMES.items():
        schemes = [QuantScheme(bits, group, axis, outliers) for axis in ("channel", "token")]
        yield from _packing_cases(name, shape, keys, schemes[0], rank)
        yield _packed_step(name, shape, keys, values, *(scheme._replace(rank=rank) for scheme in schemes))
    yield _packed_step("4 and 3 bits", shape, keys, values, *_GEAR_4)
    yield from _packing_cases("2 bits, centred", shape, keys, _GEAR_2[0], 0)
    yield _packed_step("2 bits, centred", shape, keys, values, *_GEAR_2)
    yield _calibrated_step(shape, keys, values)


def _packing_cases(name: str, shape: Shape, keys: Tensor, scheme: QuantScheme, rank: int) -> Iterator[Case]:
    owners, block, head_dim = keys.shape[:3].numel(), *keys.shape[3:]
    moved = keys.nbytes + owners * scheme.bytes(block, head_dim)
    packed = quantise(keys, scheme)

    def error(packed: QuantizedTensor) -> Tensor:
        return (dequantise(packed, scheme) - keys).flatten(2).norm(dim=-1)

    # codes of numbers midway between two may differ, scales and the error as a whole may not
    yield beside_reference(
        f"quantise, {name}", shape, quantise, quantise_reference, keys, scheme, bytes=moved,
        compared=lambda packed: tuple(x for x in (packed.scales, packed.zeros, error(packed)) if x is not None),
    )  # fmt: skip
    if rank:
        yield beside_reference(
            f"residual_factors, {name}", shape, residual_factors, residual_factors_reference,
            keys, packed, scheme, rank, bytes=4 * moved,
            compared=lambda factors: error(packed._replace(left=factors[0], right=factors[1][:, :, None])),
        )  # fmt: skip


def _calibrated_step(shape: Shape, keys: Tensor, values: Tensor) -> Case:
    """Attention to keys in a calibrated basis, whose variances fall as those of models do, and values of 2 bits."""
    batch, heads, kv_heads, tokens, head_dim = shape
    spec, width, blocks, block = LogitSpec(head_dim**-0.5), kv_heads * head_dim, keys.shape[2], keys.shape[3]
    device, dtype = keys.device, keys.dtype
    variances = torch.logspace(1, -2, width)
    scheme = water_filling(variances.tolist(), 2, 32)
    random = make_random(torch.float32, device)
    starts = torch.arange(0, blocks * block, block, dtype=torch.int32, device=device).repeat(batch, 1)
    deviations = variances.sqrt().to(device)
    # row by row: components are float32
    codes = [
        calibrated_codes(random(1, blocks, block, width) * deviations, deviations, scheme, start[None])
        for start in starts
    ]
    packed_keys = CalibratedKeys(*map(torch.cat, zip(*codes, strict=True)))
    rows = random(scheme.components, width) * (scheme.units(device) * deviations[: scheme.components])[:, None]
    inv_freq = 1e4 ** -(torch.arange(head_dim // 2, device=device) / (head_dim // 2))
    decoder = KeyDecoder((rows / width**0.5).to(dtype), random(width), inv_freq)
    packed_values, query = quantise(values, _GEAR_2[1]), make_random(dtype, device)(batch, heads, 1, head_dim)
    positions = torch.arange(blocks * block, dtype=torch.int32, device=device).repeat(batch, 1, 1)
    at = torch.full((batch, 1), tokens, dtype=torch.int32, device=device)
    arguments = packed_keys, packed_values, decoder, _GEAR_2[1], positions, at, spec
    key, value = keys.flatten(2, 3), values.flatten(2, 3)

    def dense() -> None:
        slot_attention(query, key, value, positions.expand(-1, kv_heads, -1), at, spec)

    def in_float32() -> Tensor:
        wide = decoder._replace(rows=decoder.rows.float())
        return calibrated_attention_reference(query.float(), packed_keys, packed_values, wide, *arguments[3:])[0]

    return Case(
        "calibrated_attention, 2 bits",
        shape,
        {
            "ours": lambda: calibrated_attention(query, *arguments)[0],
            "dense slot_attention": dense,
            "in float32": in_float32,
        },
        "in float32",
        # decoded keys are written once, and read again
        bytes=sum(part.nbytes for side in (packed_keys, packed_values) for part in side if part is not None)
        + 2 * keys.nbytes,
        flops=2 * batch * blocks * block * scheme.components * width,
    )


def _packed_step(
    name: str, shape: Shape, keys: Tensor, values: Tensor, key_scheme: QuantScheme, value_scheme: QuantScheme
) -> Case:
    batch, heads, kv_heads, tokens, head_dim = shape
    spec = LogitSpec(head_dim**-0.5)
    # large enough to look at some tokens more than at others, as a model's do: the mean of all is next to nothing
    query = 4 * make_random(keys.dtype, keys.device)(batch, heads, 1, head_dim)
    key, value = keys.flatten(2, 3), values.flatten(2, 3)
    positions = torch.arange(key.shape[2], dtype=torch.int32, device=keys.device).repeat(batch, 1, 1)
    at = torch.full((batch, 1), tokens, dtype=torch.int32, device=keys.device)

    def pack(x: Tensor, scheme: QuantScheme) -> QuantizedTensor:
        packed = quantise(x, scheme)
        if not scheme.rank:
            return packed
        left, right = residual_factors(x, packed, scheme, scheme.rank)
        return packed._replace(left=left, right=right[:, :, None])

    packed = pack(keys, key_scheme), pack(values, value_scheme)

    def sdpa(key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query.to(key.dtype), key, value, scale=spec.scale, enable_gqa=True)

    def ours() -> Tensor:
        return packed_attention(query, *packed, key_scheme, value_scheme, positions, at, spec)[0]

    def expanded(dtype: torch.dtype) -> Tensor:
        pairs = zip(packed, (key_scheme, value_scheme), strict=True)
        return sdpa(*(dequantise(*pair, dtype).flatten(2, 3) for pair in pairs))

    # attention to what was packed: there is nothing to compare
    def dense() -> None:
        slot_attention(query, key, value, positions.expand(-1, kv_heads, -1), at, spec)

    def dense_sdpa() -> None:
        sdpa(key, value)

    return Case(
        f"packed_attention, {name}",
        shape,
        {
            "ours": ours,
            "dense slot_attention": dense,
            "dense sdpa": dense_sdpa,
            "dequantise, then sdpa": lambda: expanded(query.dtype),
            "in float32": lambda: expanded(torch.float32),
        },
        "in float32",
        bytes=sum(part.nbytes for side in packed for part in side if part is not None),
    )
