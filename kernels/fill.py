"""A decode step's writes to ShadowKV's buffer: keys and values of chunks that are new in it, and the new token.

    [ slots of selected chunks | outlier chunks | tail: newest tokens ]

Keys are rebuilt on the device (kernels/rebuild.py) while values cross the bus (kernels/pages.py): one launch of both,
and of the programs that put a row's new token at the end of its tail.

Bytes: those of rebuild.py and pages.py, and 4 * batch * kv_heads * head_dim * element size for the token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress.kernels.common.runtime import AOT_DTYPES, launch, op, runs_triton, shaped, tl, triton
from kvcompress.kernels.common.tile import wide
from kvcompress.kernels.pages import fetch_pages_reference, fetch_programs, fetch_sizes, fetch_slots
from kvcompress.kernels.rebuild import rebuild_keys_reference, rebuild_sizes, rebuild_slots, rebuild_warps

EMPTY = -1


class FoldedChunks(NamedTuple):
    """What chunks are rebuilt and fetched from.

    coefficients: [batch, tokens, rank] and basis: [batch, rank, kv_heads * head_dim]: keys without rotation.
    pages: [batch, chunks] int64, where a chunk's values are.
    addresses: int64 on the device, of the slabs of pages, in order.
    slabs: each [pages, kv_heads, chunk, head_dim]. Empty on a GPU that reads them by address, as a graph of its steps
        cannot take tensors of the CPU.
    """

    coefficients: Tensor
    basis: Tensor
    pages: Tensor
    addresses: Tensor
    slabs: list[Tensor]


class Rotation(NamedTuple):
    """How keys are rotated: storage/rope.py. inv_freq: [rotary_dim / 2] float32; None: not at all."""

    inv_freq: Tensor | None = None
    scaling: float = 1.0
    interleaved: bool = False


@op(fake=lambda **_: None, mutates=("keys", "values", "positions", "marks"))
def fill_buffer(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    marks: Tensor,
    held: Tensor,
    is_new: Tensor,
    folded: FoldedChunks,
    rotation: Rotation,
    chunk: int,
    first: int,
    key: Tensor | None = None,
    value: Tensor | None = None,
    visible: Tensor | None = None,
) -> None:
    """Writes what is new in a buffer: chunks in their slots, and one token a sequence at the end of its tail.

    Args:
        keys, values: [batch, kv_heads, room, head_dim], whose first slots * chunk places are the slots. Written.
        positions: [batch, kv_heads, room] int32. Written where a token comes.
        marks: [batch, 2 or more] int64: tokens that a sequence has, and how many of them the tail comes after. Written:
            one token more.
        held: [batch, kv_heads, slots] int64, the chunk in each slot. is_new: [batch, kv_heads, slots] bool.
        chunk: tokens of a chunk.
        first: place where the tail begins.
        key, value: [batch, kv_heads, 1, head_dim] of the token that comes. None: none does.
        visible: [batch, 1] bool, False where the token is padding, which leaves nothing behind. None: all are tokens.

    A token for which there is no room raises IndexError on a CPU. Kernels cannot raise: on a GPU the last key of its
    row becomes NaN, and so does all that attends to it.

    Raises:
        ValueError: there are fewer places than slots * chunk, or positions or marks are not contiguous.
    """
    if held.shape[2] * chunk > keys.shape[2]:
        raise ValueError(
            f"keys must have places for {held.shape[2]} slots of {chunk} tokens, got {list(keys.shape)} for held "
            f"{list(held.shape)}"
        )
    if not (positions.is_contiguous() and marks.is_contiguous()):
        raise ValueError("fill_buffer writes to positions and marks, which must be contiguous")
    run = _launch if runs_triton(keys) and keys.numel() else fill_buffer_reference
    run(keys, values, positions, marks, held, is_new, folded, rotation, chunk, first, key, value, visible)


def fill_buffer_reference(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    marks: Tensor,
    held: Tensor,
    is_new: Tensor,
    folded: FoldedChunks,
    rotation: Rotation,
    chunk: int,
    first: int,
    key: Tensor | None = None,
    value: Tensor | None = None,
    visible: Tensor | None = None,
) -> None:
    """What fill_buffer means, in plain PyTorch: the oracle of its test and its path on a CPU."""
    places = held.shape[2] * chunk
    if places:
        rebuild_keys_reference(keys[:, :, :places], folded.coefficients, folded.basis, held, is_new, *rotation)
        fetch_pages_reference(values[:, :, :places], folded.pages, held, is_new, folded.slabs)
    if key is not None and value is not None:
        place = marks[:, 0]
        at = (first + place - marks[:, 1])[:, None, None].expand(-1, keys.shape[1], 1)
        for tensor, token in ((keys, key), (values, value)):
            tensor.scatter_(2, at[..., None].expand(-1, -1, -1, token.shape[3]), token)
        place = place if visible is None else place.where(visible[:, 0], EMPTY)
        positions.scatter_(2, at, place.to(torch.int32)[:, None, None].expand_as(at))
        marks[:, 0] += 1 if visible is None else visible[:, 0]


def _launch(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    marks: Tensor,
    held: Tensor,
    is_new: Tensor,
    folded: FoldedChunks,
    rotation: Rotation,
    chunk: int,
    first: int,
    key: Tensor | None,
    value: Tensor | None,
    visible: Tensor | None,
) -> None:
    batch, kv_heads, slots = held.shape
    (head_dim, value_dim), size, device = (keys.shape[3], values.shape[3]), keys.element_size(), keys.device
    pairs = 0 if rotation.inv_freq is None else rotation.inv_freq.shape[0]
    rebuilding = rebuild_sizes(chunk, head_dim, pairs, size)
    rebuilders = batch * kv_heads * triton.cdiv(slots, rebuilding["SLOTS"])
    # also of no slabs, as of those that the caller knows to be pinned
    by_address = all(slab.device == values.device or slab.is_pinned() for slab in folded.slabs)
    fetchers = fetch_programs(held.numel(), device) if by_address else 0
    appenders = 0 if key is None else batch
    key, value = (None if token is None else token.contiguous() for token in (key, value))
    held, is_new = held.contiguous(), is_new.contiguous()
    if appenders + fetchers + rebuilders:
        launch(
            _fill_kernel, (appenders + fetchers + rebuilders,),
            keys, values, positions, marks, held, is_new.view(torch.uint8),
            folded.coefficients.contiguous(), folded.basis.contiguous(), folded.pages, folded.addresses,
            rotation.inv_freq, key, value, None if visible is None else visible.contiguous().view(torch.uint8),
            *keys.stride()[:3], *values.stride()[:3], folded.pages.stride(0), chunk * value_dim,
            marks.shape[1], appenders, fetchers, kv_heads, slots, held.numel(), folded.coefficients.shape[1],
            folded.basis.shape[1], positions.shape[2], first, rotation.scaling,
            CHUNK=chunk, HEAD_DIM=head_dim, VALUE_DIM=value_dim, INTERLEAVED=rotation.interleaved, **rebuilding,
            **fetch_sizes(folded.slabs, size), TOKEN=triton.next_power_of_2(max(head_dim, value_dim)),
            num_warps=rebuild_warps(head_dim, size), num_stages=_STAGES,
        )  # fmt: skip
    if not by_address:
        fetch_pages_reference(values[:, :, : slots * chunk], folded.pages, held, is_new, folded.slabs)


_STAGES = 4


@triton.jit
def _append_token(
    batch, keys_ptr, values_ptr, positions_ptr, marks_ptr, key_ptr, value_ptr, visible_ptr,
    key_batch_stride, key_head_stride, key_stride, value_batch_stride, value_head_stride, value_stride,
    mark_stride, kv_heads, room, first,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TOKEN: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    # the token of one row in all of its heads. Where there is no room for it, a NaN says so
    marks_ptr += batch * mark_stride
    place = tl.load(marks_ptr)
    slot = first + place - tl.load(marks_ptr + 1)
    fits = slot < room
    slot = tl.minimum(slot, room - 1)
    is_token = True
    if visible_ptr is not None:
        is_token = tl.load(visible_ptr + batch) != 0
    position = tl.where(is_token, place, -1).to(tl.int32)
    keys_ptr += batch * key_batch_stride + slot * key_stride
    values_ptr += batch * value_batch_stride + slot * value_stride
    dim = tl.arange(0, TOKEN)
    for start in range(0, kv_heads, HEADS):
        head = wide(start) + tl.arange(0, HEADS)
        token = batch * kv_heads + head
        ok = (head < kv_heads)[:, None] & (dim < HEAD_DIM)[None, :]
        key = tl.load(key_ptr + (token * HEAD_DIM)[:, None] + dim[None, :], mask=ok, other=0.0)
        key = tl.where(fits, key, float("nan")).to(key.dtype)
        tl.store(keys_ptr + (head * key_head_stride)[:, None] + dim[None, :], key, mask=ok)
        ok = (head < kv_heads)[:, None] & (dim < VALUE_DIM)[None, :]
        value = tl.load(value_ptr + (token * VALUE_DIM)[:, None] + dim[None, :], mask=ok, other=0.0)
        tl.store(values_ptr + (head * value_head_stride)[:, None] + dim[None, :], value, mask=ok)
        at_ptr = positions_ptr + token * room + slot
        tl.store(at_ptr, tl.zeros([HEADS], tl.int32) + position, mask=head < kv_heads)
    tl.debug_barrier()
    tl.store(marks_ptr, tl.where(is_token, place + 1, place))


@triton.jit(do_not_specialize=["appenders", "fetchers", "slots", "count", "tokens", "room", "first"])
def _fill_kernel(
    keys_ptr, values_ptr, positions_ptr, marks_ptr, held_ptr, new_ptr, coefficients_ptr, basis_ptr, pages_ptr,
    addresses_ptr, inv_freq_ptr, key_ptr, value_ptr, visible_ptr,
    key_batch_stride, key_head_stride, key_stride, value_batch_stride, value_head_stride, value_stride, pages_stride,
    chunk_stride, mark_stride, appenders, fetchers, kv_heads, slots, count, tokens, rank_stride, room, first, scaling,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    CHUNK_SIDE: tl.constexpr,
    SLOTS: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_SIDE: tl.constexpr,
    REST_SIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FETCHED_SLOTS: tl.constexpr,
    FETCHED: tl.constexpr,
    TOKEN: tl.constexpr,
):  # fmt: skip
    # programs append first, then fetch, as the bus is slow, and the others rebuild meanwhile
    program = tl.program_id(0)
    if program < appenders:
        if key_ptr is not None:
            _append_token(
                wide(program), keys_ptr, values_ptr, positions_ptr, marks_ptr, key_ptr, value_ptr, visible_ptr,
                key_batch_stride, key_head_stride, key_stride, value_batch_stride, value_head_stride, value_stride,
                mark_stride, kv_heads, room, first, HEAD_DIM, VALUE_DIM, TOKEN, 2048 // TOKEN,
            )  # fmt: skip
    elif program < appenders + fetchers:
        fetch_slots(
            program - appenders, fetchers, values_ptr, pages_ptr, held_ptr, new_ptr, addresses_ptr,
            value_batch_stride, value_head_stride, pages_stride, chunk_stride, count, kv_heads, slots,
            ALIGNED, FETCHED_SLOTS, FETCHED,
        )  # fmt: skip
    else:
        rebuild_slots(
            program - appenders - fetchers, keys_ptr, coefficients_ptr, basis_ptr, held_ptr, new_ptr, inv_freq_ptr,
            key_batch_stride, key_head_stride, key_stride, kv_heads, slots, tokens, rank_stride, scaling,
            CHUNK, HEAD_DIM, INTERLEAVED, BLOCK_RANK, CHUNK_SIDE, SLOTS, PAIRS, PAIRS_SIDE, REST_SIDE,
        )  # fmt: skip


def aot_calls() -> None:
    for head_dim, pairs in ((64, 32), (80, 40), (80, 10), (128, 64), (128, 0), (256, 128)):
        for dtype in AOT_DTYPES:
            keys, token = shaped(2, 8, 400, head_dim, dtype=dtype), shaped(2, 8, 1, head_dim, dtype=dtype)
            positions, marks = shaped(2, 8, 400, dtype=torch.int32), shaped(2, 3, dtype=torch.int64)
            held, is_new = (shaped(2, 8, 32, dtype=kind) for kind in (torch.int64, torch.bool))
            low_rank = shaped(2, 1000, 160, dtype=dtype), shaped(2, 160, 8 * head_dim, dtype=dtype)
            pages, addresses = shaped(2, 125, dtype=torch.int64), shaped(64, dtype=torch.int64)
            given = (FoldedChunks(*low_rank, pages, addresses, []), Rotation(shaped(pairs) if pairs else None), 8, 256)
            fill_buffer(keys, keys, positions, marks, held, is_new, *given, token, token)
            if pairs:
                fill_buffer(keys, keys, positions, marks, held, is_new, *given)
