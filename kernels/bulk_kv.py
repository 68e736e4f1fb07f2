"""Keys and values of all later layers of a SwiftKV model, in one launch (arXiv:2410.03960).

    key[j] = RoPE(norm(x @ Wk[j]^T + bk[j]))        value[j] = x @ Wv[j]^T + bv[j]        for every layer j

They are written where each layer's cache has room for them. The norm over a head, of Qwen3, may be left out. RoPE pairs
dimensions half of head_dim apart, with cosines and sines [tokens, head_dim] as transformers makes them.

Flops 4 * tokens * hidden * kv_heads * head_dim a layer. Bytes: x once a group of programs that share it in the L2
cache, the weights once a group of token blocks, keys and values once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.kernels.common.runtime import AOT_DTYPES, launch, runs_triton, shaped, tl, triton
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
            all layers, head_dim next to each other.
        key_biases, value_biases: of each layer, [kv_heads * head_dim]; None for none.
        norms: of each layer the weight of the norm over a key's head, [head_dim]; None for none.
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
    # an address of 0 is never read
    absent = [0] * len(keys)
    columns = [
        [weight.data_ptr() for weight in key_weights],
        [weight.data_ptr() for weight in value_weights],
        absent if key_biases is None else [bias.data_ptr() for bias in key_biases],
        absent if value_biases is None else [bias.data_ptr() for bias in value_biases],
        [key.data_ptr() for key in keys],
        [value.data_ptr() for value in values],
        absent if norms is None else [norm.data_ptr() for norm in norms],
    ]
    addresses = torch.tensor(list(zip(*columns, strict=True)), dtype=torch.int64).to(x.device, non_blocking=True)
    sizes = _sizes(head_dim, x.element_size())
    rows = batch * tokens
    row_blocks = triton.cdiv(rows, sizes["BLOCK_ROWS"])
    launch(
        _bulk_kv_kernel, (row_blocks * len(keys) * kv_heads * 2,),
        x, cos, sin, addresses, x.shape[-1], *keys[0].stride()[:3],
        rows, tokens, kv_heads, len(keys), 0 if cos.shape[0] == 1 else tokens, epsilon,
        HEAD_DIM=head_dim, HAS_KEY_BIAS=key_biases is not None, HAS_VALUE_BIAS=value_biases is not None,
        HAS_NORM=norms is not None, **sizes, num_warps=_WARPS, num_stages=_stages(x.element_size()),
    )  # fmt: skip


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
    """What bulk_key_values means, in plain PyTorch, and its path on a CPU: a product a layer."""
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
            "bulk_key_values needs a weight and a place of keys and of values for every layer, got "
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


_WARPS = 8


def _stages(element_size: int) -> int:
    return 3 if element_size == 2 else 2


def _sizes(head_dim: int, element_size: int) -> dict[str, int]:
    """Sides of a program's tiles; float32 is multiplied without matrix units, by operands in registers."""
    half = head_dim // 2
    side = max(MIN_SIDE, triton.next_power_of_2(half))
    # the epilogue holds both halves, their turns and where they go
    return {
        "BLOCK_ROWS": (4096 // side if side <= 64 else 16) if element_size == 2 else (32 if side <= 64 else 16),
        "BLOCK_HIDDEN": (64 if side <= 64 else 32) if element_size == 2 else 16,
        "SIDE": side,
        "GROUP": 8,
    }


@triton.jit
def _pointer(addresses_ptr, layer, COLUMN: tl.constexpr, like_ptr):
    # the address in a column of the layer's line, as a pointer to what like_ptr points to
    return tl.load(addresses_ptr + layer * 7 + COLUMN).to(like_ptr.dtype)


@triton.jit(do_not_specialize=["rows", "tokens", "kv_heads", "layers", "turn_tokens"])
def _bulk_kv_kernel(
    x_ptr, cos_ptr, sin_ptr, addresses_ptr,
    hidden_stride, batch_stride, head_stride, token_stride,
    rows, tokens, kv_heads, layers, turn_tokens, epsilon,
    HEAD_DIM: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
    HAS_VALUE_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    SIDE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    # one program owns some tokens of one head of one layer's keys, or values. GROUP blocks of tokens go through all
    # heads together: x stays in the L2 cache, and the weights are read once a group
    HALF: tl.constexpr = HEAD_DIM // 2
    columns = layers * kv_heads * 2
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    group = tl.program_id(0) // (GROUP * columns)
    members = tl.minimum(row_blocks - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * columns)
    block = group * GROUP + within % members
    column = within // members
    is_key = column % 2 == 0
    head = (column // 2) % kv_heads
    layer = column // (2 * kv_heads)

    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_ok = row < rows
    dim = tl.arange(0, SIDE)
    dim_ok = dim < HALF
    if is_key:
        weight_ptr = _pointer(addresses_ptr, layer, 0, x_ptr)
        out_ptr = _pointer(addresses_ptr, layer, 4, x_ptr)
    else:
        weight_ptr = _pointer(addresses_ptr, layer, 1, x_ptr)
        out_ptr = _pointer(addresses_ptr, layer, 5, x_ptr)
    weight_ptr = tl.multiple_of(weight_ptr, 16)
    weight_row = wide(head * HEAD_DIM) + dim
    x_row = wide(row) * hidden_stride
    a = tl.zeros([BLOCK_ROWS, SIDE], tl.float32)
    b = tl.zeros([BLOCK_ROWS, SIDE], tl.float32)
    for start in range(0, hidden_stride, BLOCK_HIDDEN):
        k = start + tl.arange(0, BLOCK_HIDDEN)
        k_ok = k < hidden_stride
        left = tl.load(x_ptr + x_row[:, None] + k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        ok = k_ok[:, None] & dim_ok[None, :]
        right = tl.load(weight_ptr + (weight_row * hidden_stride)[None, :] + k[:, None], mask=ok, other=0.0)
        a = dot(left, right, a)
        right = tl.load(weight_ptr + ((weight_row + HALF) * hidden_stride)[None, :] + k[:, None], mask=ok, other=0.0)
        b = dot(left, right, b)

    if HAS_KEY_BIAS:
        if is_key:
            bias_ptr = _pointer(addresses_ptr, layer, 2, x_ptr) + head * HEAD_DIM + dim
            a += tl.load(bias_ptr, mask=dim_ok, other=0.0).to(tl.float32)[None, :]
            b += tl.load(bias_ptr + HALF, mask=dim_ok, other=0.0).to(tl.float32)[None, :]
    if HAS_VALUE_BIAS:
        if not is_key:
            bias_ptr = _pointer(addresses_ptr, layer, 3, x_ptr) + head * HEAD_DIM + dim
            a += tl.load(bias_ptr, mask=dim_ok, other=0.0).to(tl.float32)[None, :]
            b += tl.load(bias_ptr + HALF, mask=dim_ok, other=0.0).to(tl.float32)[None, :]
    token = row % tokens
    sequence = row // tokens
    if is_key:
        if HAS_NORM:
            norm_ptr = _pointer(addresses_ptr, layer, 6, x_ptr) + dim
            spread = tl.rsqrt(tl.sum(a * a + b * b, 1) / HEAD_DIM + epsilon)[:, None]
            a = a * spread * tl.load(norm_ptr, mask=dim_ok, other=0.0).to(tl.float32)[None, :]
            b = b * spread * tl.load(norm_ptr + HALF, mask=dim_ok, other=0.0).to(tl.float32)[None, :]
        turn = (wide(sequence) * turn_tokens + token)[:, None] * HEAD_DIM + dim[None, :]
        ok = row_ok[:, None] & dim_ok[None, :]
        cos = tl.load(cos_ptr + turn, mask=ok, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + turn, mask=ok, other=0.0).to(tl.float32)
        turned = a * cos - b * sin
        b = b * cos + a * sin
        a = turned
    out = wide(sequence) * batch_stride + wide(head) * head_stride + wide(token) * token_stride
    ok = row_ok[:, None] & dim_ok[None, :]
    tl.store(out_ptr + out[:, None] + dim[None, :], a.to(x_ptr.dtype.element_ty), mask=ok)
    tl.store(out_ptr + out[:, None] + HALF + dim[None, :], b.to(x_ptr.dtype.element_ty), mask=ok)


def aot_calls() -> None:
    for head_dim in (64, 80, 96, 128, 256):
        for dtype in AOT_DTYPES:
            x, weight = shaped(2, 100, 2048, dtype=dtype), shaped(8 * head_dim, 2048, dtype=dtype)
            turn, place = (shaped(*shape, head_dim, dtype=dtype) for shape in ((1, 100), (2, 8, 100)))
            arguments = x, [weight] * 4, [weight] * 4, turn, turn, [place] * 4, [place] * 4
            bulk_key_values(*arguments)
            if (head_dim, dtype) == (128, torch.bfloat16):
                biases = [shaped(8 * head_dim, dtype=dtype)] * 4
                bulk_key_values(*arguments, key_biases=biases, value_biases=biases)
                bulk_key_values(*arguments, norms=[shaped(head_dim, dtype=dtype)] * 4)
