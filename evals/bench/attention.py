"""Rows of kvcompress bench kernels for attention: over a prompt, a decode step with what it evicts, and merges."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcompress.evals.bench.case import Case, Shape, beside_reference, make_random
from kvcompress.evals.timing import Call
from kvcompress.kernels.attention import causal_attention, causal_attention_reference, slot_attention
from kvcompress.kernels.column_sums import (
    causal_column_sums,
    causal_column_sums_reference,
    slot_column_maxima,
    slot_column_maxima_reference,
)
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.decode import decode_attention, decode_attention_reference
from kvcompress.kernels.decode_evict import Slots, decode_and_evict, decode_and_evict_reference, decode_then_evict
from kvcompress.kernels.evict import choose_victim, choose_victim_reference
from kvcompress.kernels.merge import merge_states, merge_states_reference

# Llama-3.1-8B on a GPU, SmolLM2-135M on a CPU
PREFILL = {
    "cuda": [Shape(1, 32, 8, tokens, 128) for tokens in (4096, 8192, 32768, 131072)],
    "cpu": [Shape(1, 9, 3, 512, 64), Shape(1, 9, 3, 2048, 64)],
}
DECODE = {
    "cuda": [
        Shape(batch, 32, 8, tokens, 128)
        for batch in (1, 8, 64)
        for tokens in (1024, 4096, 32768, 131072)
        if batch * tokens <= 2**22
    ],
    "cpu": [Shape(1, 9, 3, 512, 64), Shape(8, 9, 3, 512, 64), Shape(8, 9, 3, 4096, 64)],
}
# a reference that builds more than this many logits is not run
_MOST_LOGITS = 2**29


def prefill_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Attention over a prompt, its column sums, both together, and the sums of the last queries only."""
    batch, heads, kv_heads, tokens, head_dim = shape
    spec = LogitSpec(head_dim**-0.5)
    random = make_random(dtype, device)
    query, key, value = (random(batch, tokens, each, head_dim).transpose(1, 2) for each in (heads, kv_heads, kv_heads))
    pairs = batch * heads * tokens * tokens // 2
    has_reference = 2 * pairs <= _MOST_LOGITS

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=spec.scale, enable_gqa=True)

    def with_sums(attend: Callable[..., tuple[Tensor, Tensor]], sum_columns: Callable[..., Tensor]) -> Call:
        def call() -> tuple[Tensor, Tensor]:
            out, lse = attend(query, key, value, spec)
            return out, sum_columns(query, key, lse, spec)

        return call

    attention: dict[str, Call] = {"ours": lambda: causal_attention(query, key, value, spec)[0], "sdpa": sdpa}
    both: dict[str, Call] = {
        "ours": with_sums(causal_attention, causal_column_sums),
        "sdpa without scores": lambda: (sdpa(), None),
    }
    _, lse = causal_attention(query, key, value, spec)
    places = torch.arange(tokens, dtype=torch.int32, device=device).expand(batch, kv_heads, -1)
    behind = torch.arange(tokens, 2 * tokens, dtype=torch.int32, device=device).expand(batch, -1)
    twice = (query, key, places, behind, lse)
    maxima: dict[str, Call] = {"ours": lambda: slot_column_maxima(*twice, spec)}
    if has_reference:
        attention["reference"] = lambda: causal_attention_reference(query, key, value, spec)[0]
        both["reference"] = with_sums(causal_attention_reference, causal_column_sums_reference)
        maxima["reference"] = lambda: slot_column_maxima_reference(*twice, spec)
    yield Case("causal_attention", shape, attention, "sdpa", flops=4 * pairs * head_dim)
    yield Case(
        "attention and sums", shape, both, "reference" if has_reference else "sdpa without scores",
        flops=6 * pairs * head_dim,
        compared=(lambda result: result) if has_reference else (lambda result: result[0]),
    )  # fmt: skip
    yield Case(
        "maxima of a second reading", shape, maxima, "reference" if has_reference else "ours",
        flops=4 * pairs * head_dim,
    )  # fmt: skip
    recent = min(32, tokens)
    yield beside_reference(
        "sums of 32 queries", shape, causal_column_sums, causal_column_sums_reference,
        query[:, :, -recent:], key, lse[:, :, -recent:].contiguous(), spec,
        bytes=batch * kv_heads * tokens * (head_dim * key.element_size() + 4),
    )  # fmt: skip


def decode_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """One decode step over slots: attention alone, with probabilities, and the whole step in place."""
    batch, heads, kv_heads, slots, head_dim = shape
    spec = LogitSpec(head_dim**-0.5)
    random = make_random(dtype, device)
    query, new = random(batch, heads, 1, head_dim), random(batch, kv_heads, 1, head_dim)
    keys, values = (random(batch, kv_heads, slots, head_dim) for _ in range(2))
    positions = torch.rand(batch, kv_heads, slots, device=device).argsort(-1).int()
    stored = 2 * keys.nbytes

    def of_rows(number: int) -> Tensor:
        return torch.full((batch,), number, dtype=torch.int32, device=device)

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(query, keys, values, scale=spec.scale, enable_gqa=True)

    given = (query, keys, values, positions, of_rows(slots)[:, None])
    yield Case(
        "slot_attention", shape, {"ours": lambda: slot_attention(*given, spec)[0], "sdpa": sdpa}, "sdpa",
        bytes=stored,
    )  # fmt: skip
    attention = beside_reference(
        "decode_attention", shape, decode_attention, decode_attention_reference, *given, spec,
        bytes=stored + 8 * positions.numel(),
    )  # fmt: skip
    attention.variants["sdpa without probabilities"] = lambda: (sdpa(), None)
    yield attention

    # a full cache: each step takes the spare slot and frees another; every variant has a state of its own
    full = torch.where(positions == slots - 1, -1, positions)
    limits, recents = of_rows(slots - 1), of_rows(slots // 2)
    first_scores = torch.rand(batch, kv_heads, slots, device=device)

    def stepper(step: Callable[..., Tensor]) -> Call:
        held = Slots(keys.clone(), values.clone(), full.clone(), first_scores.clone(), full.argmin(-1))
        token = of_rows(slots - 1)

        def call() -> tuple[Tensor, ...]:
            out = step(query, new, new, held, token, limits, recents, spec)
            token.add_(1)
            return out, held.scores, held.spare

        return call

    steps: dict[str, Call] = {
        "ours": stepper(decode_and_evict),
        "separate ops": stepper(decode_then_evict),
        # attends to other tokens, so that there is nothing to compare
        "sdpa without eviction": lambda: (sdpa(), None)[1],
        "reference": stepper(decode_and_evict_reference),
    }
    yield Case("decode_and_evict", shape, steps, "reference", bytes=stored + 12 * positions.numel())
    yield beside_reference(
        "choose_victim", shape, choose_victim, choose_victim_reference, first_scores, positions, of_rows(slots // 2),
        bytes=8 * positions.numel(),
    )  # fmt: skip


def merge_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Merge of two states of a prompt."""
    batch, heads, _, tokens, head_dim = shape
    outs = [make_random(dtype, device)(batch, heads, tokens, head_dim) for _ in range(2)]
    lses = [torch.randn(batch, heads, tokens, device=device) for _ in range(2)]
    moved = 3 * batch * heads * tokens * (head_dim * dtype.itemsize + 4)
    yield beside_reference("merge_states", shape, merge_states, merge_states_reference, outs, lses, bytes=moved)
