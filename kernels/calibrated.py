"""Attention to keys that are packed as components in a calibrated basis of all KV heads of a layer.

Before RoPE, the keys of a token hardly depend on its place, and those of all heads vary together: in the basis of their
principal components, measured once for a model (kvcompress/caches/basis.py), the first few need many bits and the last
none. Of a token at place p, with all its heads side by side, without RoPE (a basis fitted once: arXiv:2511.01815, for
files; no RoPE: arXiv:2401.18079)

    component i = vectors_i . (key - mean)              coded by 8, 4, 2 or 0 bits, the fewer the less it varies
    level i     = 2 code - (2^bits - 1)                 even levels around 0
    key         = RoPE(mean + scale * sum_i level_i * row_i, p)     row_i = vectors_i * deviation_i * unit / 2

with one scale a token, fitted three times to the levels that are nearest by the scale before, weighted as the errors of
components weigh. The values are packed as kernels/quantise.py says.

Keys cannot be attended to as they are packed, as RoPE stands between the query and the basis. A run of blocks at a time
is decoded, by one matrix product with the rows, and attended to by the kernel of packed values
(kernels/packed_attention.py), whose keys are then plain. Bytes per token: `CalibratedScheme.bytes` read, kv_heads *
head_dim elements written and read again, mostly in the L2 cache; flops 2 * components * kv_heads * head_dim beside
those of attention, by the matrix units: a long context is bound by them, and a step takes several times as long as one
over plain keys. This saves memory, not time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.packed_pieces import attend_in_pieces
from kvcompress.kernels.common.packed_tile import load_codes, tile_shape, tile_start, tile_tokens
from kvcompress.kernels.common.quantized import PLAIN, QuantizedTensor, QuantScheme, pack_codes, unpack_codes
from kvcompress.kernels.common.runtime import launch, op, shaped, tl, triton
from kvcompress.kernels.common.tile import MIN_SIDE, dot, wide
from kvcompress.kernels.merge import merge_states
from kvcompress.kernels.packed_attention import (
    empty_result,
    is_launched,
    launch_packed,
    packed_attention_reference,
)
from kvcompress.kernels.quantise import FIRST_SCALES, FITS
from kvcompress.kernels.rebuild import cos_sin, turn_pairs

# bits of a code, of the components that vary most to those that vary least
WIDTHS = (8, 4, 2)
# the distance of two levels, in deviations; 2 and 4 bits: what loses least of normally distributed numbers. 256 levels
# reach to 6 deviations
UNITS = {8: 12 / 256, 4: FIRST_SCALES[4], 2: FIRST_SCALES[2]}


class CalibratedScheme(NamedTuple):
    """How many components are coded, by 8, by 4 and by 2 bits: the first ones, in this order."""

    eight: int
    four: int
    two: int

    @property
    def components(self) -> int:
        return self.eight + self.four + self.two

    @property
    def bits(self) -> int:
        """Of all codes of a token."""
        return sum(width * count for width, count in zip(WIDTHS, self, strict=True))

    def bytes(self, block: int) -> int:
        """Of a packed block, of all KV heads: codes, a scale a token and the place of its first token."""
        return block * self.bits // 8 + 2 * block + 4

    def stretches(self) -> list[tuple[int, slice]]:
        """The bits of a code, and which components have it."""
        found, first = [], 0
        for width, count in zip(WIDTHS, self, strict=True):
            found.append((width, slice(first, first + count)))
            first += count
        return found

    def units(self, device: torch.device) -> Tensor:
        """The distance of two levels of each component, in its deviations, [components] float32."""
        return torch.cat([torch.full((count,), UNITS[width]) for width, count in zip(WIDTHS, self, strict=True)]).to(
            device
        )


class CalibratedKeys(NamedTuple):
    """Blocks of keys as `calibrated_codes` packs them, all KV heads in one.

    Attributes:
        eight, four, two: codes of 8, 4 and 2 bits (`pack_codes`), [batch, 1, blocks, block * bits / 8, components]
            uint8.
        scales: [batch, 1, blocks, block, 1] float16.
        starts: [batch, 1, blocks, 1] int32, the place of a block's first token, by which its keys are rotated.
    """

    eight: Tensor
    four: Tensor
    two: Tensor
    scales: Tensor
    starts: Tensor

    @property
    def scheme(self) -> CalibratedScheme:
        return CalibratedScheme(*(codes.shape[-1] for codes in self[:3]))

    @property
    def block(self) -> int:
        return self.scales.shape[3]

    def of_blocks(self, blocks: slice) -> "CalibratedKeys":
        return CalibratedKeys(*(part[:, :, blocks] for part in self))


class KeyDecoder(NamedTuple):
    """What decodes a layer's keys; the same for all tokens.

    Attributes:
        rows: [components, kv_heads * head_dim]: `level @ rows` is a key without its mean, scale and RoPE.
        mean: [kv_heads * head_dim] float32.
        inv_freq, scaling, interleaved: how keys are rotated, as storage/rope.py has it.
    """

    rows: Tensor
    mean: Tensor
    inv_freq: Tensor | None = None
    scaling: float = 1.0
    interleaved: bool = False


def water_filling(variances: Sequence[float], bits: float, step: int) -> CalibratedScheme:
    """Shares bits out among components, so that the error of normally distributed ones is least (reverse
    water-filling), in steps of so many components of one width.

    Args:
        variances: of the components, falling.
        bits: per component, on average; at most as many are given.
        step: components that get the same width together; the last ones may be fewer.
    """
    left = bits * len(variances)
    groups = [list(variances[first : first + step]) for first in range(0, len(variances), step)]
    widths = [0] * len(groups)
    while True:
        best, gain = None, 0.0
        for index, group in enumerate(groups):
            at = _STEPS.index(widths[index])
            if at + 1 == len(_STEPS):
                continue
            more = (_STEPS[at + 1] - widths[index]) * len(group)
            # components that vary more never get less
            if more > left or (index and widths[index - 1] < _STEPS[at + 1]):
                continue
            saved = sum(group) * (_LOST[widths[index]] - _LOST[_STEPS[at + 1]]) / more
            if saved > gain:
                best, gain = index, saved
        if best is None:
            break
        more = _STEPS[_STEPS.index(widths[best]) + 1] - widths[best]
        left -= more * len(groups[best])
        widths[best] += more
    counts = {width: sum(len(g) for g, w in zip(groups, widths, strict=True) if w == width) for width in WIDTHS}
    return CalibratedScheme(*(counts[width] for width in WIDTHS))


# the widths of codes, and the share of the variance that each loses of normally distributed numbers
_STEPS = [0, 2, 4, 8]
_LOST = {0: 1.0, 2: 0.1188, 4: 0.01154, 8: 1.9e-4}


def calibrated_codes(
    components: Tensor, deviations: Tensor, scheme: CalibratedScheme, starts: Tensor
) -> CalibratedKeys:
    """Packs whole blocks. A token with a number that is not finite decodes to NaN.

    Args:
        components: [batch, blocks, block, components] float32, at least those that the scheme codes.
        deviations: [components] float32, above 0.
        starts: [batch, blocks] int32.
    """
    x = components[..., : scheme.components]
    unknown = (x - x).sum(-1)
    x = x.nan_to_num(0.0, 0.0, 0.0)
    deviations = deviations[: scheme.components]
    steps = deviations * scheme.units(x.device)
    z = x / steps
    largest = torch.cat([x.new_full((count,), (2**width - 1) / 2) for width, count in zip(WIDTHS, scheme, strict=True)])
    weights = steps.square()
    scales = (x.square().sum(-1) / deviations.square().sum()).sqrt().half()
    codes = torch.empty(0)
    for fit in range(FITS + 1):
        scale = scales.float()[..., None]
        codes = (z * torch.where(scale > 0, 1.0 / scale, 0.0) + largest + 0.5).floor_()
        codes = torch.minimum(codes.clamp_(min=0.0), 2 * largest)
        if fit < FITS:
            levels = codes - largest
            fitted = (z * levels * weights).sum(-1) / (levels.square() * weights).sum(-1)
            scales = fitted.clamp_(0.0, torch.finfo(torch.float16).max).half()
    packed = [pack_codes(codes[..., some].to(torch.uint8), width)[:, None] for width, some in scheme.stretches()]
    return CalibratedKeys._make([*packed, (scales + unknown.half())[:, None, ..., None], starts[:, None, :, None]])


def decoded_keys(keys: CalibratedKeys, decoder: KeyDecoder, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """The keys that blocks stand for, [batch, kv_heads, blocks, block, head_dim], in plain PyTorch."""
    of_product = torch.promote_types(dtype, torch.float32)
    levels = torch.cat(
        [
            unpack_codes(codes, width).to(of_product).mul_(2).sub_(2**width - 1)
            for width, codes in zip(WIDTHS, keys[:3], strict=True)
        ],
        -1,
    )[:, 0]
    flat = (levels @ decoder.rows.to(of_product)).mul_(keys.scales[:, 0].to(of_product)).add_(decoder.mean)
    key: Tensor = flat.unflatten(-1, (kv_heads, -1)).permute(0, 3, 1, 2, 4)
    if decoder.inv_freq is not None:
        key = key.contiguous()
        places = keys.starts[:, 0, :, 0][:, None, :, None] + torch.arange(key.shape[3], device=key.device)
        turn_pairs(key, places, decoder.inv_freq, decoder.scaling, decoder.interleaved)
    return key.to(dtype)


@op(fake=lambda query, values, positions, **_: empty_result(query, values, positions, False))
def calibrated_attention(
    query: Tensor,
    keys: CalibratedKeys,
    values: QuantizedTensor,
    decoder: KeyDecoder,
    value_coding: QuantScheme,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
) -> tuple[Tensor, Tensor]:
    """Attention of queries to tokens with such keys, all of which precede every query.

    Args:
        query: [batch, heads, queries, head_dim], heads a multiple of kv_heads.
        keys: packed blocks. values: packed blocks, [batch, kv_heads, blocks, ...], of the same tokens.
        decoder: what the keys decode with.
        value_coding: how values are packed.
        positions: [batch, 1, blocks * block] int32, the position of each token; -1 where there is none.
        query_positions: [batch, queries] int32; read only where there is a window.

    Returns:
        The output, [batch, heads, queries, value_dim] in query's dtype, and its log-sum-exp (natural),
        [batch, heads, queries] float32; a query that sees nothing has 0 and -inf.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    _check(query, keys, values, decoder, value_coding, positions)
    by_kernel = is_launched(query, values, positions)
    kv_heads = values.codes.shape[1]
    answers = []
    for some in _runs(query, keys, kv_heads, by_kernel):
        part, of_part = keys.of_blocks(some), values.of_blocks(some)
        places = positions[..., some.start * keys.block : some.stop * keys.block]
        rebuild, run = (_rebuilt, launch_packed) if by_kernel else (decoded_keys, attend_in_pieces)
        key = rebuild(part, decoder, kv_heads, query.dtype)
        plain = QuantizedTensor(key, key)
        out, lse, _ = run(
            query, plain, of_part, PLAIN, value_coding, places, query_positions, spec, None, None, None, False
        )
        answers.append((out, lse))
    if not answers:
        out, lse = empty_result(query, values, positions, False)[:2]
        return out.zero_(), lse.fill_(-torch.inf)
    return answers[0] if len(answers) == 1 else merge_states(*map(list, zip(*answers, strict=True)))


def calibrated_attention_reference(
    query: Tensor,
    keys: CalibratedKeys,
    values: QuantizedTensor,
    decoder: KeyDecoder,
    value_coding: QuantScheme,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
) -> tuple[Tensor, Tensor]:
    """What calibrated_attention means, in plain PyTorch: attention to decoded keys, in query's dtype, and values."""
    key = decoded_keys(keys, decoder, values.codes.shape[1], query.dtype)
    found = packed_attention_reference(
        query, QuantizedTensor(key, key), values, PLAIN, value_coding, positions, query_positions, spec
    )
    return found[0], found[1]


# numbers of keys that are decoded at once: 4 MB in float32 on a CPU, near what a core's cache holds; 64 MB in 16 bits
# on a GPU
_AT_ONCE = {"cpu": 2**20, "cuda": 2**25}


def _runs(query: Tensor, keys: CalibratedKeys, kv_heads: int, by_kernel: bool) -> list[slice]:
    batch, blocks = keys.scales.shape[0], keys.scales.shape[2]
    numbers = batch * kv_heads * keys.block * query.shape[-1]
    step = max(1, _AT_ONCE["cuda" if by_kernel or query.is_cuda else "cpu"] // max(1, numbers))
    return [slice(first, min(blocks, first + step)) for first in range(0, blocks, step)]


def _check(
    query: Tensor, keys: CalibratedKeys, values: QuantizedTensor, decoder: KeyDecoder, value_coding: QuantScheme,
    positions: Tensor,
) -> None:  # fmt: skip
    batch, heads, _, head_dim = query.shape
    kv_heads, blocks = values.codes.shape[1:3]
    block, scheme = keys.block, keys.scheme
    if (
        heads % kv_heads
        or keys.scales.shape != (batch, 1, blocks, block, 1)
        or keys.starts.shape != (batch, 1, blocks, 1)
        or any(
            codes.shape[:4] != (batch, 1, blocks, block * width // 8)
            for width, codes in zip(WIDTHS, keys[:3], strict=True)
        )
        or values.codes.shape[0] != batch
        or values.codes.shape[3] * 8 != block * value_coding.bits
        or decoder.rows.shape != (scheme.components, kv_heads * head_dim)
        or decoder.mean.shape != (kv_heads * head_dim,)
        or positions.shape != (batch, 1, blocks * block)
        or values.left is not None
    ):
        raise ValueError(
            "calibrated_attention needs query [batch, heads, queries, head_dim], codes of keys [batch, 1, blocks, "
            "block * bits / 8, components] and of values [batch, kv_heads, blocks, block * bits / 8, value_dim] "
            "without a low-rank part, rows [components, kv_heads * head_dim] and positions [batch, 1, blocks * block]; "
            f"got query {list(query.shape)}, keys {[list(part.shape) for part in keys]}, {value_coding.bits}-bit "
            f"values {list(values.codes.shape)}, rows {list(decoder.rows.shape)} and positions {list(positions.shape)}"
        )


def _rebuilt(keys: CalibratedKeys, decoder: KeyDecoder, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """`decoded_keys` by a kernel."""
    batch, blocks, block, scheme = keys.scales.shape[0], keys.scales.shape[2], keys.block, keys.scheme
    parts = [part if part.stride(2) == part[0, 0, 0].numel() else part.contiguous() for part in keys]
    head_dim = decoder.rows.shape[1] // kv_heads
    key = decoder.rows.new_empty(batch, kv_heads, blocks, block, head_dim, dtype=dtype)
    tile = tile_shape(block, [4, 2], 16 if dtype == torch.float32 else 64)
    tiles = tile.count(blocks)
    pairs = 0 if decoder.inv_freq is None else decoder.inv_freq.shape[0]
    rest = head_dim - 2 * pairs
    launch(
        _rebuild_kernel, (batch * kv_heads * tiles,),
        *parts, decoder.rows.to(dtype).contiguous(), decoder.mean, decoder.inv_freq, key,
        *(part.stride(0) for part in parts), kv_heads, blocks, tiles, decoder.scaling,
        EIGHT=scheme.eight, FOUR=scheme.four, TWO=scheme.two, HEAD_DIM=head_dim, INTERLEAVED=decoder.interleaved,
        STEP=16 if dtype == torch.float32 else 64, PAIRS=pairs,
        PAIRS_SIDE=max(MIN_SIDE, triton.next_power_of_2(pairs)) if pairs else 0,
        REST_SIDE=max(MIN_SIDE, triton.next_power_of_2(rest)) if rest else 0,
        **tile.constants(), num_warps=8 if head_dim * dtype.itemsize > 256 else 4,
    )  # fmt: skip
    return key


@triton.jit
def _some_products(
    out, codes_ptr, block, blocks, offset, rows_ptr, row_stride, column, column_ok,
    BITS: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr, PLANES: tl.constexpr, RUN: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    # out [T, columns] + the levels of a tile's tokens @ these rows
    for start in range(0, COUNT, STEP):
        component = start + tl.arange(0, STEP)
        codes = load_codes(
            codes_ptr, tl.full((), 0, tl.int64), block, blocks, offset, component, BITS, COUNT, STEP,
            BLOCK, PLANES, RUN, TILE_BLOCKS,
        )  # fmt: skip
        # small whole numbers, exact in 16 bits
        levels = (2 * codes - (2**BITS - 1)).to(tl.float32).to(rows_ptr.dtype.element_ty)
        at = wide(component)[:, None] * row_stride + column[None, :]
        rows = tl.load(rows_ptr + at, mask=(component < COUNT)[:, None] & column_ok[None, :], other=0.0)
        out = dot(levels, rows, out)
    return out


@triton.jit
def _columns(
    eight_ptr, four_ptr, two_ptr, block, blocks, offset, rows_ptr, mean_ptr, row_stride, scale, column, column_ok,
    EIGHT: tl.constexpr, FOUR: tl.constexpr, TWO: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr, PLANES: tl.constexpr, RUN: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    # these columns of the keys of a tile's tokens, before RoPE, float32 [T, SIDE]
    out = tl.zeros([TILE_BLOCKS * PLANES * RUN, SIDE], tl.float32)
    if EIGHT > 0:
        out = _some_products(
            out, eight_ptr, block, blocks, offset, rows_ptr, row_stride, column, column_ok,
            8, EIGHT, STEP, BLOCK, PLANES, RUN, TILE_BLOCKS,
        )  # fmt: skip
    if FOUR > 0:
        out = _some_products(
            out, four_ptr, block, blocks, offset, rows_ptr + EIGHT * row_stride, row_stride, column, column_ok,
            4, FOUR, STEP, BLOCK, PLANES, RUN, TILE_BLOCKS,
        )  # fmt: skip
    if TWO > 0:
        out = _some_products(
            out, two_ptr, block, blocks, offset, rows_ptr + (EIGHT + FOUR) * row_stride, row_stride, column, column_ok,
            2, TWO, STEP, BLOCK, PLANES, RUN, TILE_BLOCKS,
        )  # fmt: skip
    mean = tl.load(mean_ptr + column, mask=column_ok, other=0.0)
    return out * scale[:, None] + mean[None, :]


@triton.jit(do_not_specialize=["blocks", "tiles"])
def _rebuild_kernel(
    eight_ptr, four_ptr, two_ptr, scales_ptr, starts_ptr, rows_ptr, mean_ptr, inv_freq_ptr, keys_ptr,
    eight_stride, four_stride, two_stride, scale_stride, start_stride, kv_heads, blocks, tiles, scaling,
    EIGHT: tl.constexpr,
    FOUR: tl.constexpr,
    TWO: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    STEP: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_SIDE: tl.constexpr,
    REST_SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PLANES: tl.constexpr,
    RUN: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    # one program owns a tile's tokens of one KV head
    tile = tl.program_id(0) % tiles
    kv_head = tl.program_id(0) // tiles % kv_heads
    batch = wide(tl.program_id(0) // tiles // kv_heads)
    block, offset = tile_start(tile, BLOCK, PLANES, RUN, TILE_BLOCKS)
    ahead, place = tile_tokens(offset, 1, BLOCK, PLANES, RUN, TILE_BLOCKS)  # [T]
    token_ok = block + ahead < blocks
    eight_ptr += batch * eight_stride
    four_ptr += batch * four_stride
    two_ptr += batch * two_stride
    scale_at = batch * scale_stride + (block + ahead) * BLOCK + place
    scale = tl.load(scales_ptr + scale_at, mask=token_ok, other=0.0).to(tl.float32)
    row_stride = kv_heads * HEAD_DIM
    rows_ptr += kv_head * HEAD_DIM
    mean_ptr += kv_head * HEAD_DIM
    out = (((batch * kv_heads + kv_head) * blocks + block + ahead) * BLOCK + place) * HEAD_DIM
    kind = keys_ptr.dtype.element_ty
    if PAIRS > 0:
        # both of all pairs in one product
        both = tl.arange(0, 2 * PAIRS_SIDE)
        pair = tl.arange(0, PAIRS_SIDE)
        pair_ok = pair < PAIRS
        if INTERLEAVED:
            column, column_ok = both, both < 2 * PAIRS
            first, second = 2 * pair, 2 * pair + 1
        else:
            column, column_ok = both // PAIRS_SIDE * PAIRS + both % PAIRS_SIDE, both % PAIRS_SIDE < PAIRS
            first, second = pair, pair + PAIRS
        turned = _columns(
            eight_ptr, four_ptr, two_ptr, block, blocks, offset, rows_ptr, mean_ptr, row_stride, scale, column,
            column_ok, EIGHT, FOUR, TWO, 2 * PAIRS_SIDE, STEP, BLOCK, PLANES, RUN, TILE_BLOCKS,
        )  # fmt: skip
        TOKENS: tl.constexpr = TILE_BLOCKS * PLANES * RUN
        if INTERLEAVED:
            a, b = tl.split(tl.reshape(turned, [TOKENS, PAIRS_SIDE, 2]))
        else:
            a, b = tl.split(tl.permute(tl.reshape(turned, [TOKENS, 2, PAIRS_SIDE]), (0, 2, 1)))
        start = tl.load(starts_ptr + batch * start_stride + block + ahead, mask=token_ok, other=0)
        angle = (start + place).to(tl.float32)[:, None] * tl.load(inv_freq_ptr + pair, mask=pair_ok, other=0.0)[None, :]
        cos, sin = cos_sin(angle)
        cos, sin = cos * scaling, sin * scaling
        ok = token_ok[:, None] & pair_ok[None, :]
        tl.store(keys_ptr + out[:, None] + first[None, :], (a * cos - b * sin).to(kind), mask=ok)
        tl.store(keys_ptr + out[:, None] + second[None, :], (b * cos + a * sin).to(kind), mask=ok)
    if REST_SIDE > 0:
        column = 2 * PAIRS + tl.arange(0, REST_SIDE)
        column_ok = column < HEAD_DIM
        rest = _columns(
            eight_ptr, four_ptr, two_ptr, block, blocks, offset, rows_ptr, mean_ptr, row_stride, scale, column,
            column_ok, EIGHT, FOUR, TWO, REST_SIDE, STEP, BLOCK, PLANES, RUN, TILE_BLOCKS,
        )  # fmt: skip
        tl.store(keys_ptr + out[:, None] + column[None, :], rest.to(kind), mask=token_ok[:, None] & column_ok[None, :])


def aot_calls() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim, block, pairs, interleaved, scheme in (
            (64, 64, 32, False, CalibratedScheme(0, 64, 64)),
            (128, 64, 64, False, CalibratedScheme(32, 256, 448)),
            (128, 128, 64, True, CalibratedScheme(0, 96, 160)),
            (80, 64, 16, False, CalibratedScheme(32, 64, 96)),
            (256, 16, 128, False, CalibratedScheme(0, 64, 128)),
            (64, 64, 0, False, CalibratedScheme(0, 32, 96)),
        ):
            if dtype == torch.float32 and head_dim > 64:
                continue
            _aot_call(dtype, head_dim, block, pairs, interleaved, scheme)


def _aot_call(
    dtype: torch.dtype, head_dim: int, block: int, pairs: int, interleaved: bool, scheme: CalibratedScheme
) -> None:
    kv_heads, blocks = 2, 1024 // block
    codes = [
        shaped(1, 1, blocks, block * width // 8, count, dtype=torch.uint8)
        for width, count in zip(WIDTHS, scheme, strict=True)
    ]
    keys = CalibratedKeys._make(
        [
            *codes,
            shaped(1, 1, blocks, block, 1, dtype=torch.float16),
            shaped(1, 1, blocks, 1, dtype=torch.int32),
        ]
    )
    values = QuantizedTensor(
        shaped(1, kv_heads, blocks, block // 4, head_dim, dtype=torch.uint8),
        shaped(1, kv_heads, blocks, block, 1, dtype=torch.float16),
    )
    decoder = KeyDecoder(
        shaped(scheme.components, kv_heads * head_dim, dtype=dtype),
        shaped(kv_heads * head_dim),
        shaped(pairs) if pairs else None,
        interleaved=interleaved,
    )
    calibrated_attention(
        shaped(1, 4 * kv_heads, 1, head_dim, dtype=dtype), keys, values, decoder,
        QuantScheme(2, 256, "token", zeros="none"), shaped(1, 1, 1024, dtype=torch.int32),
        shaped(1, 1, dtype=torch.int32), LogitSpec(0.1),
    )  # fmt: skip
