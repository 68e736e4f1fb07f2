"""Device functions for the codes of packed blocks as operands of the matrix units, two at a time.

The codes of two neighbouring channels lie in the bytes of one 16-bit word. A tile of words is loaded as a tile of
16-bit numbers would be: by asynchronous copies, and by matrix loads that leave each lane with two words that belong
together in an operand. From such a pair of words one plane of tokens and one parity of channels takes a shift, a mask
with a constant put in, and a sum (`plane_levels`): the constant makes the code the last places of a number's
significand, and the sum takes away what the constant stands for. No code is joined, permuted or converted by itself.

Planes are those of common/packed_tile.py: a tile has RUN tokens of each of PLANES planes of TILE_BLOCKS blocks.
"""

# in device functions a tuple grows
# mypy: disable-error-code="assignment"

from kvcompress.kernels.common.runtime import tl, triton
from kvcompress.kernels.common.tile import wide

# queries are multiplied in these units, so that scales of up to 64 can be applied to any float16
QUERY_UNIT = tl.constexpr(64.0)


@triton.constexpr_function
def decode_shift(first_bit, bits):
    """How far words are shifted to the right (below 0: to the left), so that a code begins at place 1, 3 or 5."""
    # of a bfloat16's significand, which has 7 places: codes of 2 bits fit in three, of 3 bits in two, of 4 in one
    each = 6 if bits == 2 else 4
    return first_bit // each * each - 1


@triton.constexpr_function
def decode_numbers(first_bit, bits, middle, significand, exponent_of_1):
    """What plane_levels masks with, puts in, adds, and with 3 bits masks the third with: three integers, a float."""
    place = first_bit - decode_shift(first_bit, bits)
    # 2^(significand - place): the places of its significand count in ones from `place` on
    return (
        ((1 << (2 if bits == 3 else bits)) - 1) << place,
        (exponent_of_1 + significand - place) << significand,
        -(2.0 ** (significand - place)) - middle,
        4 << place,
    )


@triton.constexpr_function
def decode_assembly(shift, bits, kind):
    """PTX for a pair of words: $0 levels, $1 words, $2 mask, $3 put in, $4 one, $5 added, $6 third bits, $7 mask."""

    def shifted(to: str, source: str, count: int) -> str:
        return f"shl.b32 {to}, {source}, {-count};" if count < 0 else f"shr.u32 {to}, {source}, {count};"

    # 0xEA: (a & b) | c
    lines = ["{.reg .b32 low, high;", shifted("low", "$1", shift), "lop3.b32 low, low, $2, $3, 0xEA;"]
    if bits == 3:
        lines += [shifted("high", "$6", shift - 2), "lop3.b32 low, high, $7, low, 0xEA;"]
    return "".join([*lines, f"fma.rn.{kind} $0, low, $4, $5;", "}"])


@triton.constexpr_function
def plane_at(turn, side_planes, planes):
    # planes in such an order that those that come from the same words follow one another
    return turn % side_planes * (planes // side_planes) + turn // side_planes


@triton.constexpr_function
def turn_of(plane, side_planes, planes):
    return plane % (planes // side_planes) * side_planes + plane // (planes // side_planes)


@triton.constexpr_function
def begins_group(turn, side_planes, planes, stretch, group):
    # whether that plane's scales of channels are other ones than those before
    if not group:
        return False
    now, before = (plane_at(n, side_planes, planes) * stretch // group for n in (turn, turn - 1))
    return turn == 0 or now != before


@triton.jit
def plane_levels(
    words, high, FIRST_BIT: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr, DTYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    # of int16 words the codes that begin at FIRST_BIT, less MIDDLE, as bfloat16 or float16, exactly;
    # of 3 bits the third is that bit of `high`
    LOW_BITS: tl.constexpr = 2 if BITS == 3 else BITS
    if ASSEMBLY:
        SHIFT: tl.constexpr = decode_shift(FIRST_BIT, BITS)
        SIGNIFICAND: tl.constexpr = 7 if DTYPE == tl.bfloat16 else 10
        EXPONENT_OF_1: tl.constexpr = 127 if DTYPE == tl.bfloat16 else 15
        NUMBERS: tl.constexpr = decode_numbers(FIRST_BIT, BITS, MIDDLE, SIGNIFICAND, EXPONENT_OF_1)
        KIND: tl.constexpr = "bf16x2" if DTYPE == tl.bfloat16 else "f16x2"
        mask = tl.full([1, 1], NUMBERS[0], tl.int16)
        put_in = tl.full([1, 1], NUMBERS[1], tl.int16)
        one = tl.full([1, 1], 1.0, DTYPE)
        added = tl.full([1, 1], NUMBERS[2], DTYPE)
        if BITS == 3:
            third = tl.full([1, 1], NUMBERS[3], tl.int16)
            levels = tl.inline_asm_elementwise(
                decode_assembly(SHIFT, BITS, KIND), "=r,r,r,r,r,r,r,r",
                [words, mask, put_in, one, added, high, third], dtype=one.dtype, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            levels = tl.inline_asm_elementwise(
                decode_assembly(SHIFT, BITS, KIND), "=r,r,r,r,r,r",
                [words, mask, put_in, one, added], dtype=one.dtype, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        codes = (words >> FIRST_BIT) & ((1 << LOW_BITS) - 1)
        if BITS == 3:
            codes += ((high >> FIRST_BIT) & 1) << 2
        levels = (codes.to(tl.float32) - MIDDLE).to(DTYPE)
    return levels


@triton.jit
def _half_of_rows(high, second, ASSEMBLY: tl.constexpr):
    # of the words of third bits, where a bit of a row of the second half stands one higher, all as in the first half
    if ASSEMBLY:
        moved = tl.inline_asm_elementwise(
            "{.reg .b32 by; and.b32 by, $2, 1; shr.u32 $0, $1, by;}", "=r,r,r", [high, second],
            dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        moved = (high >> second) & 0x7FFF
    return moved


@triton.jit
def _load_words(ptr, row, ok, column, WORDS: tl.constexpr, TILE_BLOCKS: tl.constexpr, ALL: tl.constexpr):
    # words [columns, rows] of rows that count from a tile's first block, at these columns
    offset = column[:, None] + row[None, :] * WORDS
    if ALL and TILE_BLOCKS == 1:
        words = tl.load(ptr + offset)
    else:
        words = tl.load(ptr + offset, mask=(column < WORDS)[:, None] & ok[None, :], other=0)
    return words


@triton.jit
def plane_words(
    ptr, rows_ptr, block, blocks, offset, plane, first,
    BITS: tl.constexpr, SIDE_PLANES: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PLANES: tl.constexpr, RUN: tl.constexpr, TILE_BLOCKS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    # of a tile the words of one plane of tokens, from column `first` on, and with 3 bits those of their third bits
    STRETCH: tl.constexpr = BLOCK // PLANES
    ROWS: tl.constexpr = BLOCK * BITS // 8
    ALL: tl.constexpr = WORDS % WIDTH == 0
    index = tl.arange(0, TILE_BLOCKS * RUN)
    ok = block + index // RUN < blocks
    row = plane % (PLANES // SIDE_PLANES) * STRETCH + offset + index % RUN
    column = first + tl.arange(0, WIDTH)
    ptr += wide(block) * (ROWS * WORDS)
    ahead = index // RUN * ROWS
    words = _load_words(ptr, ahead + row, ok, column, WORDS, TILE_BLOCKS, ALL)
    high = words
    if BITS == 3:
        high_row = ahead + BLOCK // 4 + row % (BLOCK // 8)
        high = _load_words(ptr, high_row, ok, column, WORDS, TILE_BLOCKS, ALL)
        second = (tl.load(rows_ptr + row) >= BLOCK // 8).to(tl.int16)
        second = tl.broadcast_to(second[None, :], [WIDTH, TILE_BLOCKS * RUN])
        high = _half_of_rows(high, second, ASSEMBLY)
    return words, high


@triton.jit
def first_rows(x, ROWS: tl.constexpr):
    # [16, T]: of 16 rows the first ROWS; which a lane has in other registers, so that nothing moves
    if ROWS == 8:
        x, _ = tl.split(tl.permute(tl.reshape(x, [2, 8, x.shape[1]]), (1, 2, 0)))
    return x


@triton.jit
def channels(pairs):
    # int32 of two float16: those of the even and of the odd channels
    return pairs.to(tl.int16).to(tl.float16, bitcast=True), (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def load_of_tokens(ptr, ok, other: tl.constexpr, TILE_BLOCKS: tl.constexpr):
    # a number of each token; only where a tile has several blocks may there be fewer
    if TILE_BLOCKS == 1:
        found = tl.load(ptr)
    else:
        found = tl.load(ptr, mask=ok, other=other)
    return found


@triton.jit
def of_groups(ptr, token, ok, GROUPS: tl.constexpr, TILE_BLOCKS: tl.constexpr):
    # of each token a float16 per group, as a tuple of float32; those of two groups are loaded as one number
    found = ()
    if GROUPS == 2:
        first, second = channels(load_of_tokens(ptr + token, ok, 0, TILE_BLOCKS))
        found = (first.to(tl.float32), second.to(tl.float32))
    else:
        for g in tl.static_range(GROUPS):
            found = found + (load_of_tokens(ptr + token * GROUPS + g, ok, 0.0, TILE_BLOCKS).to(tl.float32),)
    return found


@triton.jit
def load_pairs(ptr, at, column, WORDS: tl.constexpr, WIDTH: tl.constexpr):
    if WORDS == WIDTH:
        pairs = tl.load(ptr + at * WORDS + column)
    else:
        pairs = tl.load(ptr + at * WORDS + column, mask=column < WORDS, other=0)
    return pairs


@triton.jit
def load_queries(
    ptr, head_stride, stride, queries,
    GROUP: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # the rows of a KV head from pairs of channels, in float16 and QUERY_UNIT: by group even and odd ones, [16, WIDTH]
    row = tl.arange(0, 16)
    offset = (row % GROUP) * head_stride + (row // GROUP) * stride
    query = ()
    for g in tl.static_range(GROUPS):
        word = g * WIDTH + tl.arange(0, WIDTH)
        ok = (row < queries * GROUP)[:, None] & (word < WORDS)[None, :]
        pairs = tl.load(ptr + offset[:, None] + word[None, :], mask=ok, other=0)
        even = pairs.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32) * (1.0 / QUERY_UNIT)
        odd = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32) * (1.0 / QUERY_UNIT)
        query = query + (even.to(tl.float16), odd.to(tl.float16))
    return query
