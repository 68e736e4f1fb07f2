"""Keys and values of all later layers of a SwiftKV model, in one launch (arXiv:2410.03960).

    key[j] = RoPE(norm(x @ Wk[j]^T + bk[j]))        value[j] = x @ Wv[j]^T + bv[j]        for every layer j

They are written where each layer's cache has room for them. The norm over a head (Qwen3 has one) is optional. RoPE
pairs dimensions half of head_dim apart, with cosines and sines [tokens, head_dim] as transformers makes them.

Flops 4 * tokens * hidden * kv_heads * head_dim per layer. Bytes: x once per group of programs that share it in the L2
cache, the weights once per group of token blocks, keys and values once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.kernels.common.runtime import AOT_DTYPES, has_wgmma, launch, runs_triton, shaped, tl, triton
from kvcompress.kernels.common.tile import MIN_SIDE, dot, wide


def bulk_key_values(
    x: Tensor,
    key_weights: Sequence[Tensor],
    value_weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    key_biases: Sequence[Tensor] | None = None,
    value_biases: Sequence[Tensor] | None = None,
    norms: Sequence[Tensor] | None = None,
    epsilon: float = 1e-6,
) -> None:
    """Writes the keys and values of some tokens for every layer.

    Args:
        x: [batch, tokens, hidden].
        key_weights, value_weights: of each layer, [kv_heads * head_dim, hidden], in x's dtype.
        cos, sin: [batch or 1, tokens, head_dim], of which the first half is read.
        keys, values: of each layer, [batch, kv_heads, tokens, head_dim], views of the caches with the same strides in
            all layers, contiguous along head_dim.
        key_biases, value_biases: of each layer, [kv_heads * head_dim]; None for none.
        norms: of each layer, the weight of the norm over a key's head, [head_dim]; None for none.
        epsilon: of that norm.

    Raises:
        ValueError: layers differ in number, shape, dtype or strides, or head_dim is odd.
    """
    _check(x, key_weights, value_weights, keys, values)
    if not runs_triton(x) or not keys or not keys[0].numel():
        bulk_key_values_reference(
            x, key_weights, value_weights, cos, sin, keys, values,
            key_biases=key_biases, value_biases=value_biases, norms=norms, epsilon=epsilon,
        )  # fmt: skip
        return
    batch, kv_heads, tokens, head_dim = keys[0].shape
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    addresses = _addresses(key_weights, value_weights, key_biases, value_biases, keys, values, norms)
    aligned = x.element_size() if any(address % 16 for of_layer in addresses for address in of_layer) else 16
    # loading number by number needs registers that the larger tiles do not leave
    larger = has_wgmma(x.device) and aligned == 16 and x.shape[-1] % 16 == 0
    sizes, options = _sizes(head_dim, x.element_size(), larger)
    rows = batch * tokens
    blocks = triton.cdiv(rows, sizes["BLOCK_ROWS"]) * triton.cdiv(kv_heads, sizes["HEADS"])
    launch(
        _bulk_kv_kernel, (blocks * len(keys),),
        x, cos, sin, torch.tensor(addresses).to(x.device, non_blocking=True), x.shape[-1], *keys[0].stride()[:3],
        rows, tokens, kv_heads, len(keys), 0 if cos.shape[0] == 1 else tokens, epsilon,
        HEAD_DIM=head_dim, HAS_KEY_BIAS=key_biases is not None, HAS_VALUE_BIAS=value_biases is not None,
        HAS_NORM=norms is not None, ALIGNED=aligned, WHOLE=x.shape[-1] % sizes["BLOCK_HIDDEN"] == 0,
        **sizes, **options,
    )  # fmt: skip


def _addresses(*operands: Sequence[Tensor] | None) -> list[tuple[int, ...]]:
    """Where each layer's tensors lie, in the order of the operands; 0, which is never read, for one that is None."""
    layers = max(len(operand) for operand in operands if operand is not None)
    columns = [[0] * layers if operand is None else [each.data_ptr() for each in operand] for operand in operands]
    return list(zip(*columns, strict=True))


def bulk_key_values_reference(
    x: Tensor,
    key_weights: Sequence[Tensor],
    value_weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    key_biases: Sequence[Tensor] | None = None,
    value_biases: Sequence[Tensor] | None = None,
    norms: Sequence[Tensor] | None = None,
    epsilon: float = 1e-6,
) -> None:
    """What bulk_key_values means, in plain PyTorch, and its path on a CPU: one product per layer."""
    wide_type = torch.promote_types(x.dtype, torch.float32)
    half = keys[0].shape[-1] // 2 if keys else 0
    cos, sin = (turn[:, None, :, :half].to(wide_type) for turn in (cos, sin))
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        bias = None if value_biases is None else value_biases[layer]
        of_heads = (x.shape[0], x.shape[1], key.shape[1], -1)
        value.copy_(torch.nn.functional.linear(x, value_weights[layer], bias).view(of_heads).transpose(1, 2))
        bias = None if key_biases is None else key_biases[layer]
        made = torch.nn.functional.linear(x, key_weights[layer], bias).view(of_heads).transpose(1, 2).to(wide_type)
        if norms is not None:
            made = made * torch.rsqrt(made.square().mean(-1, keepdim=True) + epsilon) * norms[layer].to(wide_type)
        a, b = made[..., :half], made[..., half:]
        key[..., :half] = (a * cos - b * sin).to(key.dtype)
        key[..., half:] = (b * cos + a * sin).to(key.dtype)


def _check(
    x: Tensor,
    key_weights: Sequence[Tensor],
    value_weights: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> None:
    if not len(key_weights) == len(value_weights) == len(keys) == len(values):
        raise ValueError(
            "bulk_key_values needs, for every layer, weights of keys and values and a place for both, got "
            f"{len(key_weights)}, {len(value_weights)}, {len(keys)} and {len(values)}"
        )
    if not keys:
        return
    batch, kv_heads, tokens, head_dim = keys[0].shape
    layout = keys[0].shape, keys[0].stride(), keys[0].dtype
    weight = torch.Size([kv_heads * head_dim, x.shape[-1]])
    same = all((place.shape, place.stride(), place.dtype) == layout for place in (*keys, *values))
    made = all((w.shape, w.dtype) == (weight, x.dtype) and w.is_contiguous() for w in (*key_weights, *value_weights))
    if not same or not made or x.shape[:2] != (batch, tokens) or head_dim % 2 or keys[0].stride(-1) != 1:
        raise ValueError(
            "bulk_key_values needs x [batch, tokens, hidden], weights [kv_heads * head_dim, hidden] of its dtype and, "
            "alike in all layers, keys and values [batch, kv_heads, tokens, head_dim] with an even head_dim; got x "
            f"{list(x.shape)}, weights {list(key_weights[0].shape)}, keys {list(keys[0].shape)}"
        )


def _sizes(head_dim: int, element_size: int, larger: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Sides of a program's tiles, and its launch options; float32 is multiplied without matrix units, from operands in
    registers."""
    side = max(MIN_SIDE, triton.next_power_of_2(head_dim // 2))
    if element_size == 2:
        # at least 256 columns, 64 of each half of keys and of values: a step's product takes longer than its load from
        # the L2 cache
        width = max(64, side)
        rows, hidden, stages = (8192 // width, 64, 4) if larger else (4096 // width, 32, 3)
        stages -= width > 64
    else:
        width, rows, hidden, stages = side, 16, 16, 2
    sizes = {"BLOCK_ROWS": rows, "BLOCK_HIDDEN": hidden, "SIDE": side, "HEADS": width // side, "GROUP": 16}
    return sizes, {"num_warps": 8, "num_stages": stages}


@triton.jit(do_not_specialize=["rows", "tokens", "kv_heads", "layers", "turn_tokens"])
def _bulk_kv_kernel(
    x_ptr, cos_ptr, sin_ptr, addresses_ptr,
    hidden_stride, batch_stride, head_stride, token_stride,
    rows, tokens, kv_heads, layers, turn_tokens, epsilon,
    HEAD_DIM: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
    HAS_VALUE_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    SIDE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    # one program owns some tokens of some heads of one layer's keys and values: one product of x for both, no branch
    # between them. GROUP blocks of tokens go through all heads together: x stays in the L2 cache, and the weights are
    # read once per group
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = HEADS * SIDE
    head_blocks = tl.cdiv(kv_heads, HEADS)
    columns = layers * head_blocks
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    group = tl.program_id(0) // (GROUP * columns)
    members = tl.minimum(row_blocks - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * columns)
    block = group * GROUP + within % members
    column = within // members
    layer = column // head_blocks
    first_head = column % head_blocks * HEADS
    addresses_ptr += layer * 7

    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_ok = row < rows
    # a tile's columns: both halves of the heads' keys, then both halves of their values
    place = tl.arange(0, 4 * WIDTH)
    head, dim = first_head + place % WIDTH // SIDE, place % SIDE
    # what is past the last row, head or dimension is read from there, and not stored: no mask but that of the hidden
    # dimension is left in the loop
    weight_row = wide(tl.minimum(head, kv_heads - 1)) * HEAD_DIM + place // WIDTH % 2 * HALF + tl.minimum(dim, HALF - 1)
    # addresses of memory of each column's own, whose alignment the launch has seen
    weight_ptr = tl.load(addresses_ptr + place // (2 * WIDTH)).to(x_ptr.dtype)
    weight_ptr = tl.multiple_of(weight_ptr, [ALIGNED]) + weight_row * hidden_stride
    x_ptrs = x_ptr + wide(tl.minimum(row, rows - 1)) * hidden_stride
    made = tl.zeros([BLOCK_ROWS, 4 * WIDTH], tl.float32)
    for start in range(0, hidden_stride, BLOCK_HIDDEN):
        k = start + tl.arange(0, BLOCK_HIDDEN)
        # of a whole number of blocks none overruns
        k_ok = (k < hidden_stride) | WHOLE
        left = tl.load(x_ptrs[:, None] + k[None, :], mask=k_ok[None, :], other=0.0)
        right = tl.load(weight_ptr[None, :] + k[:, None], mask=k_ok[:, None], other=0.0)
        made = dot(left, right, made)

    token = row % tokens
    sequence = row // tokens
    place = tl.arange(0, WIDTH)
    head, dim = first_head + place // SIDE, place % SIDE
    place_ok = (head < kv_heads) & (dim < HALF)
    ok = row_ok[:, None] & place_ok[None, :]
    out = wide(sequence) * batch_stride + wide(token) * token_stride
    out = out[:, None] + (wide(head) * head_stride + dim)[None, :]
    keys, values = _halves(made, BLOCK_ROWS, 2 * WIDTH)

    a, b = _halves(values, BLOCK_ROWS, WIDTH)
    if HAS_VALUE_BIAS:
        bias_ptr = tl.load(addresses_ptr + 3).to(x_ptr.dtype) + head * HEAD_DIM + dim
        a += tl.load(bias_ptr, mask=place_ok, other=0.0).to(tl.float32)[None, :]
        b += tl.load(bias_ptr + HALF, mask=place_ok, other=0.0).to(tl.float32)[None, :]
    out_ptr = tl.multiple_of(tl.load(addresses_ptr + 5).to(x_ptr.dtype), ALIGNED)
    tl.store(out_ptr + out, a.to(x_ptr.dtype.element_ty), mask=ok)
    tl.store(out_ptr + out + HALF, b.to(x_ptr.dtype.element_ty), mask=ok)

    a, b = _halves(keys, BLOCK_ROWS, WIDTH)
    if HAS_KEY_BIAS:
        bias_ptr = tl.load(addresses_ptr + 2).to(x_ptr.dtype) + head * HEAD_DIM + dim
        a += tl.load(bias_ptr, mask=place_ok, other=0.0).to(tl.float32)[None, :]
        b += tl.load(bias_ptr + HALF, mask=place_ok, other=0.0).to(tl.float32)[None, :]
    if HAS_NORM:
        norm_ptr = tl.load(addresses_ptr + 6).to(x_ptr.dtype) + dim
        square = tl.where((dim < HALF)[None, :], a * a + b * b, 0.0)
        square = tl.sum(tl.reshape(square, [BLOCK_ROWS, HEADS, SIDE]), 2) / HEAD_DIM
        spread = tl.rsqrt(square + epsilon)[:, :, None].broadcast_to(BLOCK_ROWS, HEADS, SIDE)
        spread = tl.reshape(spread, [BLOCK_ROWS, WIDTH])
        a = a * spread * tl.load(norm_ptr, mask=place_ok, other=0.0).to(tl.float32)[None, :]
        b = b * spread * tl.load(norm_ptr + HALF, mask=place_ok, other=0.0).to(tl.float32)[None, :]
    turn = (wide(sequence) * turn_tokens + token)[:, None] * HEAD_DIM + dim[None, :]
    cos = tl.load(cos_ptr + turn, mask=ok, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + turn, mask=ok, other=0.0).to(tl.float32)
    out_ptr = tl.multiple_of(tl.load(addresses_ptr + 4).to(x_ptr.dtype), ALIGNED)
    tl.store(out_ptr + out, (a * cos - b * sin).to(x_ptr.dtype.element_ty), mask=ok)
    tl.store(out_ptr + out + HALF, (b * cos + a * sin).to(x_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    # the first and the last columns of a tile, which each thread has of its rows
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, WIDTH]), (0, 2, 1)))


def aot_calls() -> None:
    for head_dim in (64, 80, 96, 128, 256):
        for dtype in AOT_DTYPES:
            x, weight = shaped(2, 100, 2048, dtype=dtype), shaped(8 * head_dim, 2048, dtype=dtype)
            turn, place = (shaped(*shape, head_dim, dtype=dtype) for shape in ((1, 100), (2, 8, 100)))
            arguments = x, [weight] * 4, [weight] * 4, turn, turn, [place] * 4, [place] * 4
            bulk_key_values(*arguments)
            if head_dim == 96:
                # what does not begin at a multiple of 16 bytes
                weights = [shaped(weight.numel() + 1, dtype=dtype)[1:].view_as(weight)] * 4
                bulk_key_values(x, weights, weights, *arguments[3:])
                # a hidden dimension that is no whole number of blocks
                weights = [shaped(8 * head_dim, 2000, dtype=dtype)] * 4
                bulk_key_values(shaped(2, 100, 2000, dtype=dtype), weights, weights, *arguments[3:])
            if (head_dim, dtype) == (128, torch.bfloat16):
                biases = [shaped(8 * head_dim, dtype=dtype)] * 4
                bulk_key_values(*arguments, key_biases=biases, value_biases=biases)
                bulk_key_values(*arguments, norms=[shaped(head_dim, dtype=dtype)] * 4)
