"""Keys of chunks, rebuilt from their low-rank coefficients where they are new in a buffer (ShadowKV, arXiv:2410.21465);
a part of kernels/fill.py.

    keys[slot] = RoPE(coefficients[chunk of the slot] @ basis of the KV head, place of the token)

The rotation is that of storage/rope.py: pairs half of rotary_dim apart or side by side, angle place * inv_freq,
length times scaling.

Bytes for each token and KV head rebuilt: rank + head_dim elements, and the basis once a program, which the L2 cache
holds; flops 2 * rank * head_dim. Reading the key itself would take head_dim: this saves memory, not bandwidth.
"""

import torch
from torch import Tensor

from kvcompress.kernels.common.runtime import tl, triton
from kvcompress.kernels.common.tile import MIN_SIDE, dot, wide


def rebuild_keys_reference(
    keys: Tensor,
    coefficients: Tensor,
    basis: Tensor,
    held: Tensor,
    is_new: Tensor,
    inv_freq: Tensor | None = None,
    scaling: float = 1.0,
    interleaved: bool = False,
) -> None:
    """Writes the keys of new chunks into their slots of a buffer, in plain PyTorch.

    Args:
        keys: [batch, kv_heads, slots * chunk, head_dim], written where a slot is new; a view of a larger buffer will
            do.
        coefficients: [batch, tokens, rank], of each token in its sequence.
        basis: [batch, rank, kv_heads * head_dim].
        held: [batch, kv_heads, slots] int64, the chunk in each slot.
        is_new: [batch, kv_heads, slots] bool.
        inv_freq: [rotary_dim / 2] float32, the angle of each pair per position; None: keys are not rotated.
        scaling: factor of a rotated key.
        interleaved: pairs are neighbours; else half of rotary_dim apart.
    """
    row, head, slots = new_first(is_new)
    chunk = keys.shape[2] // max(1, held.shape[2])
    places = held[row, head, slots].clamp(min=0)[..., None] * chunk + torch.arange(chunk, device=held.device)
    of_head = basis.unflatten(2, (held.shape[1], -1)).transpose(1, 2)  # [batch, kv_heads, rank, head_dim]
    rebuilt = coefficients[row[..., None], places].flatten(2, 3).float() @ of_head.float()
    if inv_freq is not None:
        turn_pairs(rebuilt, places.flatten(2), inv_freq, scaling, interleaved)
    keys.unflatten(2, (-1, chunk))[row, head, slots] = rebuilt.to(keys.dtype).unflatten(2, (-1, chunk))


def turn_pairs(x: Tensor, places: Tensor, inv_freq: Tensor, scaling: float, interleaved: bool) -> None:
    """Rotates vectors [..., head_dim] in place to these places, which broadcast to [...], as storage/rope.py does."""
    # float32 angles, as models compute them
    angles = places[..., None].float() * inv_freq
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    rotary_dim = 2 * inv_freq.shape[0]
    first, second = slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim)
    if interleaved:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    a, b = x[..., first].clone(), x[..., second].clone()
    x[..., first], x[..., second] = a * cos - b * sin, b * cos + a * sin


def new_first(is_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [batch, kv_heads, most] of rows, heads and slots: each head's new slots, and as many others as fill the
    row of the head that has most; what an op writes there must be what is there already."""
    batch, kv_heads, _ = is_new.shape
    most = int(is_new.sum(-1).amax()) if is_new.numel() else 0
    slots = is_new.to(torch.uint8).argsort(dim=-1, stable=True, descending=True)[..., :most]
    row = torch.arange(batch, device=is_new.device)[:, None, None]
    head = torch.arange(kv_heads, device=is_new.device)[:, None]
    return row.expand_as(slots), head.expand_as(slots), slots


def rebuild_sizes(chunk: int, head_dim: int, pairs: int, element_size: int) -> dict[str, int]:
    """Sides of a program's tiles; float32 is multiplied without matrix units, by operands in registers."""
    tokens, block_rank = (32, 32) if element_size == 2 else (16, 16)
    padded = triton.next_power_of_2(chunk)
    rest = head_dim - 2 * pairs
    return {
        "CHUNK_SIDE": padded,
        "SLOTS": max(1, tokens // padded),
        "BLOCK_RANK": block_rank,
        "PAIRS": pairs,
        "PAIRS_SIDE": max(MIN_SIDE, triton.next_power_of_2(pairs)) if pairs else 0,
        "REST_SIDE": max(MIN_SIDE, triton.next_power_of_2(rest)) if rest else 0,
    }


def rebuild_warps(head_dim: int, element_size: int) -> int:
    return 8 if head_dim * element_size > 256 else 4


@triton.jit
def cos_sin(angle):
    # cosine and sine of angles up to 1e5 to the last digits; the device's own keep a table in local memory for those
    # beyond. First to the nearest quarter turn, subtracted in three parts of few bits, then by polynomials made for an
    # eighth of a turn
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = tl.fma(turns, -1.5703125, angle)
    rest = tl.fma(turns, -4.837512969970703125e-4, rest)
    rest = tl.fma(turns, -7.549789948768648e-8, rest)
    square = rest * rest
    sin = (-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1
    sin = sin * square * rest + rest
    cos = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cos = cos * square * square - 0.5 * square + 1.0
    quarter = turns.to(tl.int32) & 3
    is_odd = (quarter & 1) != 0
    swapped = tl.where(is_odd, sin, cos)
    sin = tl.where(is_odd, cos, sin)
    cos = tl.where((quarter == 1) | (quarter == 2), -swapped, swapped)
    return cos, tl.where(quarter >= 2, -sin, sin)


@triton.jit
def _low_rank(
    coefficients_ptr, token, token_ok, basis_ptr, basis_stride, column, column_ok, rank_stride,
    TOKENS: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    # some columns of coefficients @ basis for these tokens, float32. What is left of a token's rank goes from turn to
    # turn: a mask out of bytes in the loop would have the compiler lay bfloat16 out as if it were bytes
    r = tl.arange(0, BLOCK_RANK)
    rest = tl.where(token_ok, rank_stride, 0)
    left_ptr = (coefficients_ptr + token * rank_stride)[:, None] + r[None, :]
    right_ptr = basis_ptr + (wide(r) * basis_stride)[:, None] + column[None, :]
    out = tl.zeros([TOKENS, SIDE], tl.float32)
    for start in range(0, rank_stride, BLOCK_RANK):
        r_ok = r < rank_stride - start
        left = tl.load(left_ptr, mask=r[None, :] < rest[:, None], other=0.0)
        right = tl.load(right_ptr, mask=r_ok[:, None] & column_ok[None, :], other=0.0)
        out = dot(left, right, out)
        rest -= BLOCK_RANK
        left_ptr += BLOCK_RANK
        right_ptr += BLOCK_RANK * basis_stride
    return out


@triton.jit
def rebuild_slots(
    program, keys_ptr, coefficients_ptr, basis_ptr, held_ptr, new_ptr, inv_freq_ptr,
    key_batch_stride, key_head_stride, key_stride,
    kv_heads, slots, tokens, rank_stride, scaling,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    CHUNK_SIDE: tl.constexpr,
    SLOTS: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_SIDE: tl.constexpr,
    REST_SIDE: tl.constexpr,
):  # fmt: skip
    # a program's share: some slots of one KV head; where none is new it has nothing to do
    blocks = tl.cdiv(slots, SLOTS)
    kv_head = wide(program // blocks % kv_heads)
    batch = wide(program // blocks // kv_heads)
    TOKENS: tl.constexpr = SLOTS * CHUNK_SIDE
    line = tl.arange(0, TOKENS)
    slot = program % blocks * SLOTS + line // CHUNK_SIDE
    within = line % CHUNK_SIDE
    at = (batch * kv_heads + kv_head) * slots + slot
    is_new = tl.load(new_ptr + at, mask=slot < slots, other=0) != 0
    if tl.sum(is_new.to(tl.int32), 0) > 0:
        ok = is_new & (within < CHUNK)
        place = tl.load(held_ptr + at, mask=ok, other=0) * CHUNK + within  # [TOKENS] int64
        token = batch * tokens + place
        basis_stride = kv_heads * HEAD_DIM
        basis_ptr += batch * rank_stride * basis_stride + kv_head * HEAD_DIM
        keys_ptr += batch * key_batch_stride + kv_head * key_head_stride
        out = (slot * CHUNK + within).to(tl.int64) * key_stride
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
            turned = _low_rank(
                coefficients_ptr,
                token,
                ok,
                basis_ptr,
                basis_stride,
                column,
                column_ok,
                rank_stride,
                TOKENS,
                2 * PAIRS_SIDE,
                BLOCK_RANK,
            )
            if INTERLEAVED:
                a, b = tl.split(tl.reshape(turned, [TOKENS, PAIRS_SIDE, 2]))
            else:
                a, b = tl.split(tl.permute(tl.reshape(turned, [TOKENS, 2, PAIRS_SIDE]), (0, 2, 1)))
            angle = place.to(tl.float32)[:, None] * tl.load(inv_freq_ptr + pair, mask=pair_ok, other=0.0)[None, :]
            cos, sin = cos_sin(angle)
            cos, sin = cos * scaling, sin * scaling
            store = ok[:, None] & pair_ok[None, :]
            kind = keys_ptr.dtype.element_ty
            tl.store(keys_ptr + out[:, None] + first[None, :], (a * cos - b * sin).to(kind), mask=store)
            tl.store(keys_ptr + out[:, None] + second[None, :], (b * cos + a * sin).to(kind), mask=store)
        if REST_SIDE > 0:
            column = 2 * PAIRS + tl.arange(0, REST_SIDE)
            column_ok = column < HEAD_DIM
            rest = _low_rank(
                coefficients_ptr,
                token,
                ok,
                basis_ptr,
                basis_stride,
                column,
                column_ok,
                rank_stride,
                TOKENS,
                REST_SIDE,
                BLOCK_RANK,
            )
            store = ok[:, None] & column_ok[None, :]
            tl.store(keys_ptr + out[:, None] + column[None, :], rest.to(keys_ptr.dtype.element_ty), mask=store)
