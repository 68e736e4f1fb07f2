"""Attention to packed slots of which each KV head has another number: packed_attention in one launch for all heads.

Blocks lie in rows, head after head in any order; `Extents` says where each head's slots are. A launch splits the heads
into parts of equally many slots, as kernels/ragged.py does for slots that are not packed. Bytes: those of the blocks
there are, and positions only of these.
"""

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.quantized import QuantizedTensor, QuantScheme, block_of, check_coding, empty_packed
from kvcompress.kernels.common.runtime import op, shaped
from kvcompress.kernels.common.split_attention import Extents
from kvcompress.kernels.packed_attention import empty_result, is_launched, launch_packed, packed_attention_reference


@op(fake=lambda query, values, positions, with_logits, **_: empty_result(query, values, positions, with_logits))
def ragged_packed_attention(
    query: Tensor,
    keys: QuantizedTensor,
    values: QuantizedTensor,
    coding: QuantScheme,
    extents: Extents,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    with_logits: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """packed_attention where heads differ in how many slots they have.

    Args:
        query: [batch, heads, queries, head_dim].
        keys, values: packed blocks of all heads, [1, 1, blocks, ...], without factors.
        coding: of both; each token is packed by itself.
        extents: where each head's slots are; starts and capacities are multiples of a block.
        positions: [batch, kv_heads, most slots of a head] int32, a multiple of a block wide, as in packed_attention;
            not read from a head's capacity on.
        query_positions, offsets: as in packed_attention.
        bias: [slots of all heads] float32, added to their logits as in packed_attention.
        with_logits: also returns the logits; for one query.

    Returns:
        The output, [batch, heads, queries, value_dim] in query's dtype, and its log-sum-exp, [batch, heads, queries]
        float32. With logits also [batch, heads, most slots of a head] float32, -inf where unseen.

    Raises:
        ValueError: for shapes or a coding that do not fit together.
    """
    _check(query, keys, values, coding, extents, positions, offsets, bias, with_logits)
    if not is_launched(query, values, positions):
        return ragged_packed_attention_reference(
            query, keys, values, coding, extents, positions, query_positions, spec, offsets, bias, with_logits
        )
    found = launch_packed(
        query, keys, values, coding, coding, positions, query_positions, spec, None, offsets, bias, with_logits, extents
    )
    return found if with_logits else found[:2]


def ragged_packed_attention_reference(
    query: Tensor,
    keys: QuantizedTensor,
    values: QuantizedTensor,
    coding: QuantScheme,
    extents: Extents,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    with_logits: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """What ragged_packed_attention means, in plain PyTorch."""
    block = block_of(keys, coding)
    columns = torch.arange(positions.shape[2], device=positions.device)
    beyond = columns >= extents.capacities[..., None]
    number = torch.arange(positions.shape[2] // block, device=positions.device)
    at = (extents.starts[..., None] // block + number).clamp(max=keys.codes.shape[2] - 1)
    key, value = (
        QuantizedTensor(*(None if part is None else part[0, 0][at] for part in side))  # type: ignore[arg-type]
        for side in (keys, values)
    )
    if bias is not None:
        bias = bias[(extents.starts[..., None] + columns).clamp(max=len(bias) - 1)].masked_fill(beyond, 0.0)
    return packed_attention_reference(
        query, key, value, coding, coding, positions.masked_fill(beyond, -1), query_positions, spec,
        offsets=offsets, bias=bias, with_logits=with_logits,
    )  # fmt: skip


def _check(
    query: Tensor, keys: QuantizedTensor, values: QuantizedTensor, coding: QuantScheme, extents: Extents,
    positions: Tensor, offsets: Tensor | None, bias: Tensor | None, with_logits: bool,
) -> None:  # fmt: skip
    heads, block, slots = positions.shape[:2], block_of(keys, coding), keys.codes.shape[2] * block_of(keys, coding)
    if (
        query.shape[0] != heads[0]
        or query.shape[1] % heads[1]
        or keys.codes.shape[:4] != values.codes.shape[:4]
        or keys.codes.shape[:2] != (1, 1)
        or keys.codes.shape[-1] != query.shape[-1]
        or positions.shape[2] % block
        or any(x.shape != heads or x.dtype != torch.int64 for x in extents)
        or (offsets is not None and offsets.shape != query.shape[:3])
        or (bias is not None and bias.shape != (slots,))
    ):
        raise ValueError(
            "ragged_packed_attention needs query [batch, heads, queries, head_dim], codes [1, 1, blocks, block * bits "
            "/ 8, head_dim], positions [batch, kv_heads, a multiple of block], starts and capacities [batch, kv_heads] "
            "int64, offsets [batch, heads, queries] and bias [blocks * block], with heads a multiple of kv_heads; got "
            f"query {list(query.shape)}, {coding.bits}-bit keys {list(keys.codes.shape)} and values "
            f"{list(values.codes.shape)}, positions {list(positions.shape)}, starts {list(extents.starts.shape)}, "
            f"capacities {list(extents.capacities.shape)}, offsets {None if offsets is None else list(offsets.shape)}, "
            f"bias {None if bias is None else list(bias.shape)}"
        )
    if coding.axis != "token" or coding.zeros != "group" or coding.rank:
        raise ValueError(f"slots are packed a token at a time, with zeros of groups and no factors, got {coding}")
    for packed in (keys, values):
        check_coding(coding, block, packed.codes.shape[-1])
    if with_logits and query.shape[2] != 1:
        raise ValueError(f"ragged_packed_attention reports the logits of one query, got query {list(query.shape)}")


# bits, group, outliers
_AOT_CODINGS = [(4, 64, 0), (2, 64, 0), (3, 32, 2), (8, 64, 0)]


def aot_calls() -> None:
    of_heads = shaped(1, 4, dtype=torch.int64)
    extents, positions = Extents(of_heads, of_heads), shaped(1, 4, 896, dtype=torch.int32)
    for head_dim in (64, 128):
        for bits, group, outliers in _AOT_CODINGS:
            coding = QuantScheme(bits, group, "token", outliers)
            packed = empty_packed(shaped(1, 1, 128, 16, head_dim), coding)
            for queries, spec, bias in ((1, LogitSpec(0.1), None), (4, LogitSpec(0.1, 700, 30.0), shaped(2048))):
                query = shaped(1, 16, queries, head_dim, dtype=torch.bfloat16)
                ragged_packed_attention(
                    query, packed, packed, coding, extents, positions, shaped(1, queries, dtype=torch.int32), spec,
                    offsets=shaped(1, 16, queries), bias=bias, with_logits=queries == 1,
                )  # fmt: skip
