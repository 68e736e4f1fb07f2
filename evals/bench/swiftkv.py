"""Rows of kvcompress bench kernels for SwiftKV: keys and values of all later layers, from one layer's input.

Half of the model's layers, its hidden size that of its query heads. Flops are those of the products. Bytes are x, the
weights, keys and values once each: what an ideal cache between programs would leave.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvcompress.evals.bench.case import Case, Shape, make_random
from kvcompress.evals.timing import Call
from kvcompress.kernels.bulk_kv import bulk_key_values, bulk_key_values_reference

# Llama-3.1-8B on a GPU, SmolLM2-135M on a CPU
PROMPTS = {
    "cuda": [Shape(1, 32, 8, 4096, 128), Shape(1, 32, 8, 32768, 128), Shape(8, 32, 8, 4096, 128)],
    "cpu": [Shape(1, 9, 3, 512, 64), Shape(1, 9, 3, 4096, 64)],
}


def swiftkv_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """All later layers at once, beside a product a layer."""
    batch, heads, kv_heads, tokens, head_dim = shape
    hidden, layers = heads * head_dim, 16 if device.type == "cuda" else 15
    random = make_random(dtype, device)
    x = random(batch, tokens, hidden)
    weights = [[random(kv_heads * head_dim, hidden) / hidden**0.5 for _ in range(layers)] for _ in range(2)]
    inv_freq = 1.0 / 500000 ** (torch.arange(head_dim // 2, device=device) * 2 / head_dim)
    angles = (torch.arange(tokens, device=device)[:, None] * inv_freq).repeat(1, 2)[None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def projecting(project: Callable[..., None]) -> Call:
        keys, values = ([random(batch, kv_heads, tokens, head_dim) for _ in range(layers)] for _ in range(2))

        def call() -> Tensor:
            project(x, *weights, cos, sin, keys, values)
            return torch.stack([keys[-1], values[0]])

        return call

    yield Case(
        "bulk_key_values",
        shape,
        {"ours": projecting(bulk_key_values), "a product a layer": projecting(bulk_key_values_reference)},
        "a product a layer",
        bytes=dtype.itemsize * (x.numel() + 2 * layers * kv_heads * head_dim * (hidden + batch * tokens)),
        flops=4 * batch * tokens * hidden * kv_heads * head_dim * layers,
    )
