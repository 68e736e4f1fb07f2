"""Attention to keys and values that stay packed: decoded a tile at a time, never into memory.

GEAR (arXiv:2403.05527): with keys D_k + S_k + A_k B_k^T and values D_v + S_v + A_v B_v^T (decoded codes, outliers and
low-rank factors; kernels/quantise.py says how they are stored)

    logits = scale * (q (D_k + S_k)^T + (q B_k) A_k^T)        out = p (D_v + S_v) + (p A_v) B_v^T

so that the low-rank terms cost rank, not head_dim, operations a token, and nothing of full size is ever built.

Bytes: batch * kv_heads * blocks * (Coding.bytes of keys + that of values), each read once for all query heads of a
group. Flops 4 * batch * heads * queries * tokens * (head_dim + rank), and some 5 operations to decode a number:
bound by bandwidth at 8 bits, by the decoding below. The bound on the speed-up over 16-bit keys and values is
32 * block * head_dim / (8 * (both Coding.bytes)), 6.4 at 2 bits and groups of 64.
"""

import torch
from torch import Tensor

from kvcompress.kernels.quantise import Coding, Packed, check_coding, dequantise

# numbers that a piece of the CPU path may hold: 1 MB in float32, so that keys, values and logits fit a core's cache
_PIECE = 2**18


def packed_attention(
    query: Tensor,
    keys: Packed,
    values: Packed,
    key_coding: Coding,
    value_coding: Coding,
    positions: Tensor,
    query_positions: Tensor,
    *,
    spans: Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    with_logits: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Attention of queries to packed tokens, all of which stand before every query.

    Args:
        query: [batch, heads, queries, head_dim], heads a multiple of kv_heads.
        keys, values: packed blocks, [batch, kv_heads, blocks, ...], of one block size.
        key_coding, value_coding: how they are packed.
        positions: [batch, 1 or kv_heads, blocks * block] int32, the position of each token; -1: nothing there.
        query_positions: [batch, queries] int32; read only where there is a window.
        spans: [batch, blocks] int32, which basis (`Packed.right`) a block has. None: all have the first.
        scale: factor of q.k.
        window: a query sees positions greater than its own less `window`. None: all.
        softcap: bound of the logits. None: no bound.
        with_logits: also returns the logits; for one query.

    Returns:
        The output, [batch, heads, queries, value_dim] in query's dtype, and its log-sum-exp (natural),
        [batch, heads, queries] float32; a query that sees nothing has 0 and -inf. With logits also
        [batch, heads, blocks * block] float32, -inf where unseen.

    Raises:
        ValueError: for shapes or codings that do not fit each other.
    """
    _check(query, keys, values, key_coding, value_coding, positions, spans, with_logits)
    found = _on_cpu(
        query, keys, values, key_coding, value_coding, positions, query_positions, spans, scale, window, softcap,
        with_logits,
    )  # fmt: skip
    return found if with_logits else found[:2]


def packed_attention_reference(
    query: Tensor,
    keys: Packed,
    values: Packed,
    key_coding: Coding,
    value_coding: Coding,
    positions: Tensor,
    query_positions: Tensor,
    *,
    spans: Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    with_logits: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """What packed_attention means, in plain PyTorch: attention to what the packed tensors decode to."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = dequantise(keys, key_coding, dtype, spans).flatten(2, 3)
    value = dequantise(values, value_coding, dtype, spans).flatten(2, 3)
    rows = query.to(dtype).unflatten(1, (key.shape[1], -1))
    logits = rows @ key[:, :, None].mT * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~_seen(positions, query_positions, window)[:, :, None], -torch.inf)
    lse = logits.logsumexp(-1)
    # a query that sees nothing: shifting by 0 keeps exp(-inf - shift) = 0 and not NaN
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    out = (weights @ value[:, :, None]).flatten(1, 2).to(query.dtype)
    lse = lse.flatten(1, 2).float()
    return (out, lse, logits.flatten(1, 2)[:, :, 0].float()) if with_logits else (out, lse)


def _check(
    query: Tensor,
    keys: Packed,
    values: Packed,
    key_coding: Coding,
    value_coding: Coding,
    positions: Tensor,
    spans: Tensor | None,
    with_logits: bool,
) -> None:
    batch, heads, queries, head_dim = query.shape
    kv_heads, blocks = keys.codes.shape[1:3]
    block, value_block = (
        packed.codes.shape[3] * 8 // coding.bits for packed, coding in ((keys, key_coding), (values, value_coding))
    )
    if (
        keys.codes.shape[:3] != values.codes.shape[:3]
        or block != value_block
        or keys.codes.shape[0] != batch
        or keys.codes.shape[-1] != head_dim
        or heads % kv_heads
        or positions.shape not in ((batch, 1, blocks * block), (batch, kv_heads, blocks * block))
        or (spans is not None and spans.shape != (batch, blocks))
    ):
        raise ValueError(
            "packed_attention needs query [batch, heads, queries, head_dim], codes [batch, kv_heads, blocks, "
            "block * bits / 8, head_dim] with heads a multiple of kv_heads, positions [batch, 1 or kv_heads, "
            f"blocks * block] and spans [batch, blocks]; got query {list(query.shape)}, {key_coding.bits}-bit keys "
            f"{list(keys.codes.shape)}, {value_coding.bits}-bit values {list(values.codes.shape)}, positions "
            f"{list(positions.shape)}, spans {None if spans is None else list(spans.shape)}"
        )
    check_coding(key_coding, block, head_dim)
    check_coding(value_coding, block, values.codes.shape[-1])
    if with_logits and queries != 1:
        raise ValueError(f"packed_attention reports the logits of one query, got query {list(query.shape)}")


def _seen(positions: Tensor, query_positions: Tensor, window: int | None) -> Tensor:
    """Which tokens a query sees, [batch, 1 or kv_heads, queries or 1, tokens]."""
    there = (positions >= 0)[:, :, None, :]
    if window is None:
        return there
    return there & (positions[:, :, None, :] > query_positions[:, None, :, None] - window)


def _blocks(packed: Packed, blocks: slice) -> Packed:
    """Some blocks, the factors apart."""
    return Packed(*(None if part is None else part[:, :, blocks] for part in packed[:5]))  # type: ignore[arg-type]


def _on_cpu(
    query: Tensor,
    keys: Packed,
    values: Packed,
    key_coding: Coding,
    value_coding: Coding,
    positions: Tensor,
    query_positions: Tensor,
    spans: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    with_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, head_dim = query.shape
    kv_heads, blocks = keys.codes.shape[1:3]
    tokens, value_dim = positions.shape[-1], values.codes.shape[-1]
    group, block = heads // kv_heads, tokens // max(1, blocks)
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = (query.to(dtype) * scale).reshape(batch, kv_heads, group * queries, head_dim)
    # base of the online softmax: finite, so that a query that has seen nothing yet gives 0 and not NaN
    peak = rows.new_full((*rows.shape[:3], 1), -1e30)
    total = rows.new_zeros(*rows.shape[:3], 1)
    out = rows.new_zeros(*rows.shape[:3], value_dim)
    kept = query.new_empty(batch, heads, tokens if with_logits else 0, dtype=torch.float32)

    of_a_block = batch * kv_heads * block * max(head_dim, value_dim)
    piece = max(1, _PIECE // max(1, of_a_block))
    # queries whose logits over a piece are no larger than the piece
    step = max(1, max(piece * of_a_block, _PIECE) // max(1, batch * kv_heads * piece * block))
    for start in range(0, blocks, piece):
        chosen = slice(start, min(start + piece, blocks))
        of_span = None if spans is None else spans[:, chosen]
        columns = slice(chosen.start * block, chosen.stop * block)
        key = dequantise(_blocks(keys, chosen), key_coding, dtype).flatten(2, 3)
        value = dequantise(_blocks(values, chosen), value_coding, dtype).flatten(2, 3)
        seen = _seen(positions[..., columns], query_positions, window)
        seen = seen.expand(-1, -1, queries, -1).repeat(1, 1, group, 1) if window is not None else seen
        for first in range(0, group * queries, step):
            some = slice(first, first + step)
            part = rows[:, :, some]
            logits = part @ key.mT
            if keys.left is not None and keys.right is not None:
                left, right = keys.left[:, :, chosen].to(dtype), _bases(keys.right, of_span, dtype)
                projected = part[:, :, None] @ right  # [batch, kv_heads, blocks or 1, rows, rank]
                logits += (projected @ left.mT).transpose(2, 3).flatten(3)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            logits.masked_fill_(~(seen[:, :, some] if window is not None else seen), -torch.inf)
            if with_logits:
                kept[:, :, columns] = logits.view(batch, heads, -1)
            risen = torch.maximum(peak[:, :, some], logits.amax(-1, keepdim=True))
            fade = (peak[:, :, some] - risen).exp_()
            weights = logits.sub_(risen).exp_()
            peak[:, :, some] = risen
            total[:, :, some] = total[:, :, some] * fade + weights.sum(-1, keepdim=True)
            found = weights @ value
            if values.left is not None and values.right is not None:
                left, right = values.left[:, :, chosen].to(dtype), _bases(values.right, of_span, dtype)
                gathered = weights.unflatten(-1, (-1, block)).transpose(2, 3) @ left
                found += (gathered @ right.mT).sum(2)
            out[:, :, some] = out[:, :, some] * fade + found
    lse = (peak + total.log()).view(batch, heads, queries)
    out = (out / total.clamp(min=torch.finfo(dtype).tiny)).view(batch, heads, queries, value_dim)
    return out.to(query.dtype), lse.float(), kept


def _bases(right: Tensor, spans: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The basis of each block, [batch, kv_heads, blocks or 1, head_dim, rank]."""
    if spans is None or right.shape[2] == 1:
        return right[:, :, :1].to(dtype)
    batch = torch.arange(len(right), device=right.device)[:, None]
    return right.transpose(1, 2)[batch, spans.long()].transpose(1, 2).to(dtype)
