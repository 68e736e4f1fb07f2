"""Rows of kvcompress bench kernels for attention of many rows to a prefix that they share."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcompress.evals.bench.case import Case, Shape, make_random
from kvcompress.evals.timing import Call
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.shared_blocks import KeyBlocks, Sharing
from kvcompress.kernels.prefix import prefix_attention, prefix_attention_reference

# rows that decode over one prefix; Llama-3.1-8B on a GPU, SmolLM2-135M on a CPU
PREFIX = {
    "cuda": [Shape(batch, 32, 8, tokens, 128) for batch in (8, 256, 1024) for tokens in (1024, 16384)],
    "cpu": [Shape(batch, 9, 3, 2048, 64) for batch in (4, 32)],
}
# a reference that builds more logits is not run
_MOST_LOGITS = 2**26


def prefix_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """One decode step of many rows over a prefix that they share, beside sdpa with all rows' queries as one row's,
    and with the prefix expanded to every row; and a tree of two levels over the same number of tokens."""
    batch, heads, kv_heads, tokens, head_dim = shape
    spec = LogitSpec(head_dim**-0.5)
    random = make_random(dtype, device)
    query = random(batch, heads, 1, head_dim)
    key, value = (random(kv_heads, tokens, head_dim) for _ in range(2))
    flat, together = KeyBlocks([key], [value]), Sharing([range(batch)], batch)
    # the first half for all, and halves of the second for half of the rows each
    cuts = [slice(0, tokens // 2), slice(tokens // 2, 3 * tokens // 4), slice(3 * tokens // 4, tokens)]
    tree = KeyBlocks([key[:, cut] for cut in cuts], [value[:, cut] for cut in cuts])
    halves = Sharing([range(batch), range(batch // 2), range(batch // 2, batch)], batch)

    def folded() -> Tensor:
        queries = query.transpose(0, 2)
        out = scaled_dot_product_attention(queries, key[None], value[None], scale=spec.scale, enable_gqa=True)
        return out.transpose(0, 2)

    def expanded() -> Tensor:
        keys, values = (tensor.expand(batch, -1, -1, -1) for tensor in (key, value))
        return scaled_dot_product_attention(query, keys, values, scale=spec.scale, enable_gqa=True)

    stored, pairs = 2 * key.numel() * key.element_size(), batch * heads * tokens
    answers = 2 * query.numel() * query.element_size()
    # flops a byte: above, arithmetic bounds
    flops, moved = 4 * pairs * head_dim, stored + answers + 4 * batch * heads
    flops, moved = (flops, 0) if flops > 200 * moved else (0, moved)
    variants: dict[str, Call] = {
        "ours": lambda: prefix_attention(query, flat, together, spec)[0],
        "sdpa, rows as one": folded,
        "sdpa, prefix expanded": expanded,
    }
    yield Case("prefix_attention", shape, variants, "sdpa, rows as one", moved, flops)
    if batch > 1:
        branches: dict[str, Call] = {"ours": lambda: prefix_attention(query, tree, halves, spec)[0]}
        if pairs <= _MOST_LOGITS:
            branches["reference"] = lambda: prefix_attention_reference(query, tree, halves, spec)[0]
            yield Case("prefix_attention of a tree", shape, branches, "reference", flops=3 * pairs * head_dim)
