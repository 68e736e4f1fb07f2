"""Exact merge of partial attention results.

A query that attends to disjoint sets of keys separately gets one softmax from each. Their log-sum-exps say
how much weight each deserves (Hydragen, arXiv:2402.05099, eq. 4, for any number of states):

    lse = log(sum_n exp(lse_n))
    out = sum_n exp(lse_n - lse) * out_n

Bytes: every state is read once and the result written once, (states + 1) * batch * heads * queries *
(head_dim * element size + 4); one multiplication and one addition per element: bound by bandwidth.

All log-sum-exps here are natural logarithms in float32.
"""

import torch
from torch import Tensor

from kvcompress.kernels.common.runtime import AOT_DTYPES, launch, op, runs_triton, shaped, tl, triton


@op(fake=lambda outs, lses: (outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)))
def merge_states(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention states over disjoint keys into the state over their union.

    Args:
        outs: partial attention outputs, each [batch, heads, queries, head_dim].
        lses: their log-sum-exps, each [batch, heads, queries], float32.
            -inf marks a state that saw no key; whatever its output holds, it takes no part in the result. Every
            other NaN comes through, however little its state weighs, as it would if all keys were attended to at once.

    Returns:
        The merged output, [batch, heads, queries, head_dim] in the dtype of the first, and its
        log-sum-exp, [batch, heads, queries].
    """
    if (
        not outs
        or len(outs) != len(lses)
        or any(out.shape != outs[0].shape for out in outs)
        or any(lse.shape != outs[0].shape[:-1] for lse in lses)
    ):
        raise ValueError(
            "merge_states needs outputs [batch, heads, queries, head_dim] and log-sum-exps [batch, heads, queries] "
            f"of one size, as many of each and at least one; got outs {[list(out.shape) for out in outs]}, "
            f"lses {[list(lse.shape) for lse in lses]}"
        )
    if not runs_triton(outs[0]):
        return merge_states_reference(outs, lses)
    outs, lses = [out.contiguous() for out in outs], [lse.contiguous() for lse in lses]
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    head_dim = out.shape[-1]
    if out.numel():
        block_dim = triton.next_power_of_2(head_dim)
        block_rows = max(1, _TILE // block_dim)
        launch(
            _merge_states_kernel, (triton.cdiv(lse.numel(), block_rows),),
            tuple(outs), tuple(lses), out, lse, lse.numel(),
            HEAD_DIM=head_dim, STATES=len(outs), BLOCK_ROWS=block_rows, BLOCK_DIM=block_dim,
        )  # fmt: skip
    return out, lse


def with_sinks(outs: list[Tensor], lses: list[Tensor], sinks: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Partial attentions with one more, that of sink logits, which carry weight and no value: learned ones [heads], or
    those of each query [batch, heads, queries]."""
    sinks = sinks.float() if sinks.dim() == 3 else sinks.float()[None, :, None]
    lse = sinks.expand_as(lses[0])
    return [*outs, outs[0].new_zeros(()).expand_as(outs[0])], [*lses, lse]


def output_of(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """The output of an attention with which nothing but learned sink logits [heads] is to be merged."""
    return out if sinks is None else merge_states(*with_sinks([out], [lse], sinks))[0]


def joint_output(answers: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> Tensor:
    """The output of attention to disjoint keys and to sink logits, as in `with_sinks`; answers: outputs and lses."""
    outs, lses = [out for out, _ in answers], [lse for _, lse in answers]
    if sinks is not None:
        outs, lses = with_sinks(outs, lses, sinks)
    return outs[0] if len(outs) == 1 else merge_states(outs, lses)[0]


def merge_states_reference(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What merge_states means, in plain PyTorch: the oracle of its test and its path on a CPU."""
    lse = lses[0].clone() if len(lses) == 1 else torch.logaddexp(lses[0], lses[1])
    for other in lses[2:]:
        lse = torch.logaddexp(lse, other)
    # where all are empty lse = -inf; shifting by 0 there makes exp(-inf - shift) 0 instead of NaN
    shift = lse.masked_fill(lse == -torch.inf, 0.0)
    merged = torch.zeros((), dtype=torch.promote_types(outs[0].dtype, torch.float32), device=lse.device)
    for out, part in zip(outs, lses, strict=True):
        weight = (part - shift).exp_()[..., None]
        # the output of an empty state may hold anything, NaN included
        merged = merged + torch.where(part[..., None] == -torch.inf, 0.0, out * weight)
    return merged.to(outs[0].dtype), lse


def merge_stack(outs: Tensor, lses: Tensor, dtype: torch.dtype, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """merge_states of the partial results of a kernel's splits.

    Args:
        outs: [parts, batch, heads, queries, head_dim] float32, contiguous.
        lses: [parts, batch, heads, queries] float32, contiguous.
        dtype: of the merged output.
        sinks: [heads], learned logits that carry weight and no value, as in `with_sinks`.
    """
    parts, *shape, head_dim = outs.shape
    out = outs.new_empty(*shape, head_dim, dtype=dtype)
    lse = lses.new_empty(shape)
    launch(
        _merge_stack_kernel, (lse.numel(),),
        outs, lses, None if sinks is None else sinks.contiguous(), out, lse, lse.numel(), parts, *shape[1:],
        HEAD_DIM=head_dim, BLOCK_PARTS=_BLOCK_PARTS, BLOCK_DIM=triton.next_power_of_2(head_dim),
    )  # fmt: skip
    return out, lse


# elements of a program's tile, about eight per thread: larger tiles would leave fewer programs on the GPU
_TILE = 1024
_BLOCK_PARTS = 16


@triton.jit
def _merge_states_kernel(
    out_ptrs, lse_ptrs, out_ptr, lse_ptr,  # STATES of [rows, HEAD_DIM], STATES of [rows], and one of each
    rows,
    HEAD_DIM: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    # one program merges BLOCK_ROWS rows; a row is one (batch, head, query)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [R]
    dim = tl.arange(0, BLOCK_DIM)  # [D]
    row_ok = row < rows
    tile_ok = row_ok[:, None] & (dim[None, :] < HEAD_DIM)  # [R, D]
    tile = row[:, None] * HEAD_DIM + dim[None, :]

    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    for n in tl.static_range(STATES):
        peak = tl.maximum(peak, tl.load(lse_ptrs[n] + row, mask=row_ok, other=float("-inf")))
    # all states of a row are empty: shifting by 0 makes exp(-inf - shift) 0 instead of NaN
    shift = tl.where(peak == float("-inf"), 0.0, peak)

    total = tl.zeros([BLOCK_ROWS], tl.float32)
    merged = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for n in tl.static_range(STATES):
        part = tl.load(lse_ptrs[n] + row, mask=row_ok, other=float("-inf"))
        weight = tl.exp(part - shift)  # [R]
        # an empty state is not even read: its output may hold anything
        out = tl.load(out_ptrs[n] + tile, mask=tile_ok & (part != float("-inf"))[:, None], other=0.0).to(tl.float32)
        merged += weight[:, None] * out
        total += weight
    merged = merged * tl.where(total == 0, 0.0, 1.0 / total)[:, None]
    tl.store(out_ptr + tile, merged.to(out_ptr.dtype.element_ty), mask=tile_ok)
    tl.store(lse_ptr + row, shift + tl.log(total), mask=row_ok)


@triton.jit(do_not_specialize=["rows", "parts", "heads", "queries"])
def _merge_stack_kernel(
    outs_ptr, lses_ptr, sinks_ptr,  # [parts, rows, HEAD_DIM], [parts, rows] and [heads] or None
    out_ptr, lse_ptr,  # [rows, HEAD_DIM] and [rows]
    rows, parts, heads, queries,
    HEAD_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    # one program merges one row; few rows have many parts, so the parts are a side of the tile
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)  # [D]
    dim_ok = dim < HEAD_DIM
    peak = tl.full([BLOCK_PARTS], float("-inf"), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)  # [P]
        peak = tl.maximum(
            peak, tl.load(lses_ptr + part.to(tl.int64) * rows + row, mask=part < parts, other=float("-inf"))
        )
    highest = tl.max(peak, 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + row // queries % heads).to(tl.float32)
        highest = tl.maximum(highest, sink)
    shift = tl.where(highest == float("-inf"), 0.0, highest)

    total = tl.zeros([BLOCK_PARTS], tl.float32)
    merged = tl.zeros([BLOCK_PARTS, BLOCK_DIM], tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        part_row = part.to(tl.int64) * rows + row
        lse = tl.load(lses_ptr + part_row, mask=part < parts, other=float("-inf"))
        weight = tl.exp(lse - shift)
        ok = (lse != float("-inf"))[:, None] & dim_ok[None, :]
        merged += weight[:, None] * tl.load(outs_ptr + part_row[:, None] * HEAD_DIM + dim[None, :], mask=ok, other=0.0)
        total += weight
    whole = tl.sum(total, 0)
    if sinks_ptr is not None:
        whole += tl.exp(sink - shift)
    out = tl.sum(merged, 0) * tl.where(whole == 0, 0.0, 1.0 / whole)
    tl.store(out_ptr + row * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim_ok)
    tl.store(lse_ptr + row, shift + tl.log(whole))


def aot_calls() -> None:
    for head_dim in (64, 80, 256):
        for dtype in AOT_DTYPES:
            out, lse = shaped(2, 32, 7, head_dim, dtype=dtype), shaped(2, 32, 7)
            merge_states([out] * 2, [lse] * 2)
            merge_states([out] * 5, [lse] * 5)
            merge_stack(shaped(3, 2, 32, 7, head_dim), shaped(3, 2, 32, 7), dtype)
            merge_stack(shaped(3, 2, 32, 7, head_dim), shaped(3, 2, 32, 7), dtype, shaped(32, dtype=dtype))
