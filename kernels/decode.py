"""One decode step over cache slots: attention, and the attention each slot received, in one pass.

Bytes 2 * batch * kv_heads * slots * head_dim * element size + 8 * batch * kv_heads * slots;
flops 4 * batch * heads * slots * head_dim: bound by bandwidth. The speed-up over a full cache comes from reading
`budget` slots instead of `tokens`: tokens / budget at best.

A probability needs the log-sum-exp over all slots, which no split knows. So the splits store their logits in float32,
and a second launch turns them into probabilities while it merges the splits: 8 more bytes per slot and query head
(group / head_dim * 2 of K and V in 16 bits: 6 % at group 4 and head_dim 128, most of it in the L2 cache), where reading
K again would cost 50 %. Logits cannot be summed over the group before they are stored, as each head has its own
log-sum-exp.
"""

import torch
from torch import Tensor

from kvcompress.kernels.attention import slot_attention_reference
from kvcompress.kernels.column_sums import slot_column_sums_reference
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.runtime import (
    AOT_DTYPES,
    AOT_HEAD_DIMS,
    AOT_LATENTS,
    launch,
    op,
    shaped,
    tl,
    triton,
)
from kvcompress.kernels.common.split_attention import MOST_SPLITS, Extents, launch_split, splits_in_triton
from kvcompress.kernels.common.torch_attention import slots_seen


@op(
    fake=lambda query, key, value, **_: (
        query.new_empty(*query.shape[:-1], value.shape[-1]),
        key.new_empty(key.shape[:3], dtype=torch.float32),
    )
)
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one new token to the cache slots, its own among them.

    Args:
        query: [batch, heads, 1, head_dim].
        key: [batch, kv_heads, slots, head_dim].
        value: [batch, kv_heads, slots, value_dim].
        positions: [batch, kv_heads, slots] int32, -1 marks an empty slot.
        query_positions: [batch, 1] int32; read only where there is a window.
        sink_logits: [heads], one learned logit per head that takes weight and has no value (gpt-oss).

    Returns:
        The output, [batch, heads, 1, value_dim] in query's dtype, and the probabilities summed over the
        query heads of each group, [batch, kv_heads, slots] float32. A query that sees no slot gives 0.
    """
    if query.shape[2] != 1:
        raise ValueError(f"decode_attention takes one query per sequence, got query {list(query.shape)}")
    run = launch_decode if splits_in_triton(query, key, value) and query.numel() else _decode_in_pytorch
    return run(query, key, value, positions, query_positions, spec, sink_logits)


def decode_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What decode_attention means, in plain PyTorch."""
    out, lse = slot_attention_reference(query, key, value, positions, query_positions, spec)
    if sink_logits is not None:
        whole = torch.logaddexp(lse, sink_logits.float()[:, None])
        out, lse = (out * (lse - whole).exp()[..., None]).to(query.dtype), whole
    return out, slot_column_sums_reference(query, key, positions, query_positions, lse, spec)


def _decode_in_pytorch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    # in 16 bits, the error of a logit grows with the logit, and large ones overflow
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = query.to(dtype).view(batch, kv_heads, heads // kv_heads, head_dim) * spec.scale
    logits = rows @ key.to(dtype).mT
    of_sinks = None if sink_logits is None else sink_logits.to(dtype).view(kv_heads, -1, 1).expand(batch, -1, -1, -1)
    probabilities = slot_probabilities(logits, positions, query_positions, spec, of_sinks)
    out = probabilities @ value.to(dtype)
    return out.view(batch, heads, 1, -1).to(query.dtype), probabilities.sum(2).float()


def slot_probabilities(
    logits: Tensor, positions: Tensor, query_positions: Tensor, spec: LogitSpec, of_sinks: Tensor | None = None
) -> Tensor:
    """Softmax over the slots that one query per sequence sees, [batch, kv_heads, group, slots]; logits are overwritten.

    Args:
        logits: [batch, kv_heads, group, slots], scaled but not capped. of_sinks: [batch, kv_heads, group, 1].
        positions, query_positions, spec: as in decode_attention.
    """
    spec.cap_(logits)
    seen = slots_seen(positions, query_positions, spec.window)
    # a finite floor: a query that sees nothing gets a flat softmax instead of NaN, and the mask then clears it
    logits.masked_fill_(~seen, -1e30)
    if of_sinks is None:
        return logits.softmax(-1).masked_fill_(~seen, 0.0)
    return torch.cat([logits, of_sinks], -1).softmax(-1)[..., :-1].masked_fill_(~seen, 0.0)


def launch_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    sink_logits: Tensor | None,
    extents: Extents | None = None,
) -> tuple[Tensor, Tensor]:
    """decode_attention on a GPU. extents: as in launch_split."""
    batch, heads = query.shape[:2]
    kv_heads, slots = positions.shape[1:]
    logits = query.new_empty(batch, kv_heads, slots, heads // kv_heads, dtype=torch.float32)
    parts, lses = launch_split(
        query, key, value, spec, None, positions, query_positions, logits=logits, merge=False, extents=extents
    )
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    probabilities = query.new_empty(positions.shape, dtype=torch.float32)
    value_dim, group = value.shape[-1], heads // kv_heads
    launch(
        _finish_kernel, (triton.cdiv(slots, _CHUNK), kv_heads, batch),
        parts, lses, sink_logits, logits, extents and extents.capacities, out, probabilities,
        batch, kv_heads, slots, len(parts),
        GROUP=group, VALUE_DIM=value_dim, RAGGED=extents is not None, CHUNK=_CHUNK,
        **finish_blocks(group, value_dim, _CHUNK),
    )  # fmt: skip
    return out, probabilities


# slots that a program of the second launch turns into probabilities
_CHUNK = 512


def finish_blocks(group: int, value_dim: int, chunk: int) -> dict[str, int]:
    """Sides of the tiles of a second launch whose programs own `chunk` slots, a power of two."""
    block_group = triton.next_power_of_2(group)
    return {
        "BLOCK_GROUP": block_group,
        "BLOCK_VALUE": triton.next_power_of_2(value_dim),
        "BLOCK_SPLITS": max(1, min(MOST_SPLITS, 2048 // block_group)),
        "BLOCK_SLOTS": min(chunk, 512, 2048 // block_group),
    }


@triton.jit
def group_lse(
    lses_ptr, sink_logits_ptr, kv_head, first_row, rows, splits,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    # the splits' log-sum-exps [splits, rows] and the heads' sinks [heads], where there are any, merged for the rows of
    # a group; -inf where a head saw nothing
    head = tl.arange(0, BLOCK_GROUP)  # [G]
    peak = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    if sink_logits_ptr is not None:
        sink = tl.load(sink_logits_ptr + kv_head * GROUP + head, mask=head < GROUP, other=float("-inf"))
        peak = sink.to(tl.float32)
        total = tl.where(head < GROUP, 1.0, 0.0)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        offset = split.to(tl.int64)[None, :] * rows + first_row + head[:, None]
        ok = (head < GROUP)[:, None] & (split < splits)[None, :]
        lse = tl.load(lses_ptr + offset, mask=ok, other=float("-inf"))  # [G, splits]
        risen = tl.maximum(peak, tl.max(lse, 1))
        shift = tl.where(risen == float("-inf"), 0.0, risen)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(lse - shift[:, None]), 1)
        peak = risen
    return tl.where(total == 0, float("-inf"), peak + tl.log(total))  # [G]


@triton.jit
def merge_head(
    parts_ptr, lses_ptr, row, rows, splits, lse,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    # the splits' outputs [splits, rows, VALUE_DIM] of one row, weighted by their share of its whole log-sum-exp
    dim = tl.arange(0, BLOCK_VALUE)  # [V]
    shift = tl.where(lse == float("-inf"), 0.0, lse)
    merged = tl.zeros([16, BLOCK_VALUE], tl.float32)
    for start in range(0, splits, 16):
        split = start + tl.arange(0, 16)
        part = split.to(tl.int64) * rows + row
        of_part = tl.load(lses_ptr + part, mask=split < splits, other=float("-inf"))
        weight = tl.exp(of_part - shift)
        ok = (split < splits)[:, None] & (dim < VALUE_DIM)[None, :]
        out = tl.load(parts_ptr + part[:, None] * VALUE_DIM + dim[None, :], mask=ok, other=0.0)
        # an empty part may hold anything; a mask of the load would wait for the log-sum-exps
        merged += tl.where((of_part != float("-inf"))[:, None], weight[:, None] * out, 0.0)
    return tl.sum(merged, 0)  # [V]


@triton.jit
def load_logits(
    logits_ptr, slots,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    # the logits [slots, rows of a group] of as many slots as there are, -inf beyond; a thread reads a slot's at once
    head = tl.arange(0, BLOCK_GROUP)  # [G]
    slot = tl.arange(0, BLOCK_SLOTS)  # [S]
    ok = (slot < slots)[:, None] & (head < GROUP)[None, :]
    return tl.load(logits_ptr + slot[:, None] * GROUP + head[None, :], mask=ok, other=float("-inf"))  # [S, G]


@triton.jit
def group_probabilities(logits, lse):
    # exp(logit - lse), summed over the rows of a group
    shift = tl.where(lse == float("-inf"), 0.0, lse)
    # what a head does not see gets nothing, even if its log-sum-exp is NaN
    return tl.sum(tl.where(logits == float("-inf"), 0.0, tl.exp(logits - shift[None, :])), 1)  # [S]


@triton.jit(do_not_specialize=["batch_size", "slots", "splits"])
def _finish_kernel(
    parts_ptr, lses_ptr, sink_logits_ptr, logits_ptr, capacities_ptr, out_ptr, probabilities_ptr,
    batch_size, kv_heads, slots, splits,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    RAGGED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    # one program owns CHUNK slots of one KV head, and a share of its group's outputs
    owner = tl.program_id(2).to(tl.int64) * kv_heads + tl.program_id(1)
    first_row = owner * GROUP
    rows = batch_size.to(tl.int64) * kv_heads * GROUP
    lse = group_lse(
        lses_ptr, sink_logits_ptr, tl.program_id(1), first_row, rows, splits, GROUP, BLOCK_GROUP, BLOCK_SPLITS
    )

    head = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_VALUE)
    for g in range(tl.program_id(0), GROUP, tl.num_programs(0)):
        row = first_row + g
        # a sum, as a maximum would drop NaN
        head_lse = tl.sum(tl.where(head == g, lse, 0.0), 0)
        out = merge_head(parts_ptr, lses_ptr, row, rows, splits, head_lse, VALUE_DIM, BLOCK_VALUE)
        tl.store(out_ptr + row * VALUE_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < VALUE_DIM)

    first_slot = tl.program_id(0) * CHUNK
    if RAGGED:
        # no logits are written from a head's capacity on
        length = tl.load(capacities_ptr + owner).to(tl.int32)
    else:
        length = slots
    for start in range(first_slot, tl.minimum(first_slot + CHUNK, slots), BLOCK_SLOTS):
        first = owner * slots + start
        logits = load_logits(logits_ptr + first * GROUP, length - start, GROUP, BLOCK_GROUP, BLOCK_SLOTS)
        slot = tl.arange(0, BLOCK_SLOTS)
        tl.store(probabilities_ptr + first + slot, group_probabilities(logits, lse), mask=slot < slots - start)


def aot_calls() -> None:
    for head_dim in AOT_HEAD_DIMS:
        for dtype in AOT_DTYPES:
            key, positions = shaped(1, 2, 900, head_dim, dtype=dtype), shaped(1, 2, 900, dtype=torch.int32)
            at = shaped(1, 1, dtype=torch.int32)
            for group in (1, 4, 64) if head_dim in (64, 256) else (4, 64):
                query, sinks = shaped(1, 2 * group, 1, head_dim, dtype=dtype), shaped(2 * group, dtype=dtype)
                decode_attention(query, key, key, positions, at, LogitSpec(0.1))
                decode_attention(query, key, key, positions, at, LogitSpec(0.1, window=700, softcap=30.0), sinks)
    for rank, shared in AOT_LATENTS:
        latents, positions = (
            shaped(1, 1, 900, rank + shared, dtype=torch.bfloat16),
            shaped(1, 1, 900, dtype=torch.int32),
        )
        query, at = shaped(1, 64, 1, rank + shared, dtype=torch.bfloat16), shaped(1, 1, dtype=torch.int32)
        decode_attention(query, latents, latents[..., :rank], positions, at, LogitSpec(0.1))
