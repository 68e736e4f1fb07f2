"""Speed of the kernels beside their references and the best alternatives, one row a shape and kernel.

    python -m kvcompress.evals.bench.kernels                              # this machine's device, shapes to match
    python -m kvcompress.evals.bench.kernels --only decode --json rows.json

Each row gives the median (20th to 80th percentile) of a call, and what it achieved: GB/s where bandwidth bounds the
kernel, TFLOP/s where arithmetic does, beside the limit of the same kind that this run measured on the same device by
copying a large tensor and by multiplying large matrices. Bytes and flops counted are those the op must move and do,
by the formulas in the kernels' docstrings, for every variant alike; a causal attention does half of the products.

The variants of a row take turns, so that a loaded or throttled machine slows all of them. On a GPU the L2 cache is
overwritten before each call, and times come from events. Each result is compared with that of the reference or,
where that would need a queries x tokens tensor of gigabytes, of torch's attention: a row that disagrees says so and
the exit status is 1. A variant that cannot run a shape is left out of its row.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcompress.evals.bench.case import Call, Case, Shape
from kvcompress.evals.bench.prefix import PREFIX, prefix_cases
from kvcompress.evals.bench.shadowkv import CONTEXTS, shadow_cases
from kvcompress.evals.bench.swiftkv import PROMPTS, swiftkv_cases
from kvcompress.evals.provenance import provenance
from kvcompress.kernels.attention import causal_attention, causal_attention_reference, slot_attention
from kvcompress.kernels.column_sums import (
    causal_column_sums,
    causal_column_sums_reference,
    slot_column_maxima,
    slot_column_maxima_reference,
)
from kvcompress.kernels.common.runtime import HAS_TRITON, INTERPRETED
from kvcompress.kernels.decode import decode_attention, decode_attention_reference
from kvcompress.kernels.decode_evict import decode_and_evict, decode_and_evict_reference, decode_then_evict
from kvcompress.kernels.evict import choose_victim, choose_victim_reference
from kvcompress.kernels.low_rank import residual_factors, residual_factors_reference
from kvcompress.kernels.merge import merge_states, merge_states_reference
from kvcompress.kernels.packed_attention import packed_attention
from kvcompress.kernels.quantise import QuantizedTensor, QuantScheme, dequantise, quantise, quantise_reference

# a reference that builds more than this many logits is not run
_MOST_LOGITS = 2**29
_ATTEMPTS = {"cuda": 30, "cpu": 7}


@dataclass
class Row:
    """What was measured."""

    kernel: str
    shape: dict[str, int]
    dtype: str
    seconds: dict[str, dict[str, float]]
    achieved: dict[str, float]
    unit: str
    limit: float
    agrees: bool


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
PACKED = {
    "cuda": [
        Shape(1, 32, 8, 32768, 128),
        Shape(1, 32, 8, 131072, 128),
        Shape(8, 32, 8, 32768, 128),
        Shape(64, 32, 8, 4096, 128),
    ],
    "cpu": [Shape(1, 9, 3, 4096, 64), Shape(8, 9, 3, 4096, 64)],
}


def prefill_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Attention over a prompt, its column sums, both together, and the sums of the last queries only."""
    batch, heads, kv_heads, tokens, head_dim = shape
    scale = head_dim**-0.5
    query = _random(batch, tokens, heads, head_dim, dtype=dtype, device=device).transpose(1, 2)
    key, value = (
        _random(batch, tokens, kv_heads, head_dim, dtype=dtype, device=device).transpose(1, 2) for _ in range(2)
    )
    pairs = batch * heads * tokens * tokens // 2
    has_reference = 2 * pairs <= _MOST_LOGITS

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    def with_scores() -> tuple[Tensor, Tensor]:
        out, lse = causal_attention(query, key, value, scale=scale)
        return out, causal_column_sums(query, key, lse, scale=scale)

    def reference_with_scores() -> tuple[Tensor, Tensor]:
        out, lse = causal_attention_reference(query, key, value, scale=scale)
        return out, causal_column_sums_reference(query, key, lse, scale=scale)

    attention: dict[str, Call] = {"ours": lambda: causal_attention(query, key, value, scale=scale)[0], "sdpa": sdpa}
    both: dict[str, Call] = {"ours": lambda: with_scores(), "sdpa without scores": lambda: (sdpa(), None)}
    if has_reference:
        attention["reference"] = lambda: causal_attention_reference(query, key, value, scale=scale)[0]
        both["reference"] = reference_with_scores
    yield Case("causal_attention", shape, attention, "sdpa", flops=4 * pairs * head_dim)
    both_oracle = "reference" if has_reference else "sdpa without scores"
    yield Case(
        "attention and sums", shape, both, both_oracle, flops=6 * pairs * head_dim,
        compared=(lambda result: result) if has_reference else (lambda result: result[0]),
    )  # fmt: skip

    _, lse = causal_attention(query, key, value, scale=scale)
    recent = min(32, tokens)
    last, last_lse = query[:, :, -recent:], lse[:, :, -recent:].contiguous()
    places = torch.arange(tokens, dtype=torch.int32, device=device).expand(batch, kv_heads, -1)
    behind = torch.arange(tokens, 2 * tokens, dtype=torch.int32, device=device).expand(batch, -1)
    twice = (query, key, places, behind, lse)
    maxima: dict[str, Call] = {"ours": lambda: slot_column_maxima(*twice, scale=scale)}
    if has_reference:
        maxima["reference"] = lambda: slot_column_maxima_reference(*twice, scale=scale)
    yield Case(
        "maxima of a second reading", shape, maxima, "reference" if has_reference else "ours",
        flops=4 * pairs * head_dim,
    )  # fmt: skip
    yield Case(
        "sums of 32 queries",
        shape,
        {
            "ours": lambda: causal_column_sums(last, key, last_lse, scale=scale),
            "reference": lambda: causal_column_sums_reference(last, key, last_lse, scale=scale),
        },
        "reference",
        bytes=batch * kv_heads * tokens * (head_dim * key.element_size() + 4),
    )


def decode_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """One decode step over slots: attention alone, with probabilities, and the whole step in place."""
    batch, heads, kv_heads, slots, head_dim = shape
    scale = head_dim**-0.5
    query = _random(batch, heads, 1, head_dim, dtype=dtype, device=device)
    new = _random(batch, kv_heads, 1, head_dim, dtype=dtype, device=device)
    keys, values = (_random(batch, kv_heads, slots, head_dim, dtype=dtype, device=device) for _ in range(2))
    positions = torch.rand(batch, kv_heads, slots, device=device).argsort(-1).int()
    at = torch.full((batch, 1), slots, dtype=torch.int32, device=device)
    stored = 2 * keys.numel() * keys.element_size()

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)

    yield Case(
        "slot_attention",
        shape,
        {
            "ours": lambda: slot_attention(query, keys, values, positions, at, scale=scale)[0],
            "sdpa": sdpa,
        },
        "sdpa",
        bytes=stored,
    )
    yield Case(
        "decode_attention",
        shape,
        {
            "ours": lambda: decode_attention(query, keys, values, positions, at, scale=scale),
            "sdpa without probabilities": lambda: (sdpa(), None),
            "reference": lambda: decode_attention_reference(query, keys, values, positions, at, scale=scale),
        },
        "reference",
        bytes=stored + 8 * positions.numel(),
    )

    # a full cache: each step takes the spare slot and frees another; every variant has a state of its own
    full = torch.where(positions == slots - 1, -1, positions)
    limits = torch.full((batch,), slots - 1, dtype=torch.int32, device=device)
    recents = torch.full((batch,), slots // 2, dtype=torch.int32, device=device)
    first_scores = torch.rand(batch, kv_heads, slots, device=device)

    def stepper(step: Callable[..., Tensor]) -> Call:
        state = (keys.clone(), values.clone(), full.clone(), first_scores.clone(), full.argmin(-1))
        token = torch.full((batch,), slots - 1, dtype=torch.int32, device=device)

        def call() -> tuple[Tensor, ...]:
            out = step(query, new, new, *state, token, limits, recents, scale=scale)
            token.add_(1)
            return out, state[3], state[4]

        return call

    yield Case(
        "decode_and_evict",
        shape,
        {
            "ours": stepper(decode_and_evict),
            "separate ops": stepper(decode_then_evict),
            # attends to other tokens, so that there is nothing to compare
            "sdpa without eviction": lambda: (sdpa(), None)[1],
            "reference": stepper(decode_and_evict_reference),
        },
        "reference",
        bytes=stored + 12 * positions.numel(),
    )
    recent_from = torch.full((batch,), slots // 2, dtype=torch.int32, device=device)
    yield Case(
        "choose_victim",
        shape,
        {
            "ours": lambda: choose_victim(first_scores, positions, recent_from),
            "reference": lambda: choose_victim_reference(first_scores, positions, recent_from),
        },
        "reference",
        bytes=8 * positions.numel(),
    )


def merge_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Merge of two states of a prompt."""
    batch, heads, _, tokens, head_dim = shape
    outs = [_random(batch, heads, tokens, head_dim, dtype=dtype, device=device) for _ in range(2)]
    lses = [torch.randn(batch, heads, tokens, device=device) for _ in range(2)]
    variants = {
        "ours": lambda: merge_states(outs, lses),
        "reference": lambda: merge_states_reference(outs, lses),
    }
    rows = batch * heads * tokens
    yield Case("merge_states", shape, variants, "reference", bytes=3 * rows * (head_dim * outs[0].element_size() + 4))


# names, and of keys and values alike bits, group, outliers and rank
_CODINGS = {"2 bits": (2, 64, 0, 0), "4 bits": (4, 64, 0, 0), "GEAR at 2 bits": (2, 64, 1, 4)}


def packed_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Packing keys, the factors of what that loses, and a decode step's attention to packed keys and values."""
    block = 64 if shape.tokens >= 64 else 8
    blocks = (shape.batch, shape.kv_heads, shape.tokens // block, block, shape.head_dim)
    keys, values = (_random(*blocks, dtype=dtype, device=device) for _ in range(2))
    for name, (bits, group, outliers, rank) in _CODINGS.items():
        key_coding, value_coding = (
            QuantScheme(bits, group, "channel", outliers),
            QuantScheme(bits, group, "token", outliers),
        )
        yield from _packing_cases(name, shape, keys, key_coding, rank)
        yield _packed_step(name, shape, keys, values, key_coding._replace(rank=rank), value_coding._replace(rank=rank))


def _packing_cases(name: str, shape: Shape, keys: Tensor, coding: QuantScheme, rank: int) -> Iterator[Case]:
    owners, block, head_dim = keys.shape[:3].numel(), *keys.shape[3:]
    read, stored = keys.numel() * keys.element_size(), owners * coding.bytes(block, head_dim)
    packed = quantise(keys, coding)

    def error(packed: QuantizedTensor) -> Tensor:
        return (dequantise(packed, coding) - keys).flatten(2).norm(dim=-1)

    # codes of numbers midway between two may differ, scales and the error as a whole may not
    yield Case(
        f"quantise, {name}",
        shape,
        {"ours": lambda: quantise(keys, coding), "reference": lambda: quantise_reference(keys, coding)},
        "reference",
        bytes=read + stored,
        compared=lambda packed: (packed.scales, packed.zeros, error(packed)),
    )
    if rank:
        yield Case(
            f"residual_factors, {name}",
            shape,
            {
                "ours": lambda: residual_factors(keys, packed, coding, rank),
                "reference": lambda: residual_factors_reference(keys, packed, coding, rank),
            },
            "reference",
            bytes=4 * (read + stored),
            compared=lambda factors: error(packed._replace(left=factors[0], right=factors[1][:, :, None])),
        )


def _packed_step(
    name: str, shape: Shape, keys: Tensor, values: Tensor, key_coding: QuantScheme, value_coding: QuantScheme
) -> Case:
    batch, heads, kv_heads, tokens, head_dim = shape
    scale = head_dim**-0.5
    query = _random(batch, heads, 1, head_dim, dtype=keys.dtype, device=keys.device)
    key, value = keys.flatten(2, 3), values.flatten(2, 3)
    positions = torch.arange(key.shape[2], dtype=torch.int32, device=keys.device).repeat(batch, 1, 1)
    at = torch.full((batch, 1), tokens, dtype=torch.int32, device=keys.device)

    def pack(x: Tensor, coding: QuantScheme) -> QuantizedTensor:
        packed = quantise(x, coding)
        if not coding.rank:
            return packed
        left, right = residual_factors(x, packed, coding, coding.rank)
        return packed._replace(left=left, right=right[:, :, None])

    packed_keys, packed_values = pack(keys, key_coding), pack(values, value_coding)

    def sdpa(key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)

    def ours() -> Tensor:
        return packed_attention(
            query, packed_keys, packed_values, key_coding, value_coding, positions, at, scale=scale
        )[0]  # fmt: skip

    def expanded() -> Tensor:
        return sdpa(
            dequantise(packed_keys, key_coding, query.dtype).flatten(2, 3),
            dequantise(packed_values, value_coding, query.dtype).flatten(2, 3),
        )

    # attention to what was packed: there is nothing to compare
    def dense() -> None:
        slot_attention(query, key, value, positions.expand(-1, kv_heads, -1), at, scale=scale)

    def dense_sdpa() -> None:
        sdpa(key, value)

    return Case(
        f"packed_attention, {name}",
        shape,
        {"ours": ours, "dense slot_attention": dense, "dense sdpa": dense_sdpa, "dequantise, then sdpa": expanded},
        "dequantise, then sdpa",
        bytes=sum(part.nbytes for packed in (packed_keys, packed_values) for part in packed if part is not None),
    )


CASES: dict[str, tuple[Callable[[Shape, torch.dtype, torch.device], Iterator[Case]], dict[str, list[Shape]]]] = {
    "prefill": (prefill_cases, PREFILL),
    "decode": (decode_cases, DECODE),
    "merge": (merge_cases, PREFILL),
    "packed": (packed_cases, PACKED),
    "shadowkv": (shadow_cases, CONTEXTS),
    "prefix": (prefix_cases, PREFIX),
    "swiftkv": (swiftkv_cases, PROMPTS),
}


class Clock:
    """Times calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # twice the L2 cache of the largest GPU
        size = 2**28 if device.type == "cuda" else 0
        self.flushed = torch.empty(size, dtype=torch.int8, device=device)

    def seconds(self, call: Call) -> float:
        """Seconds of one call with cold caches (GPU) or as it comes (CPU)."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        # also keeps the device busy while the host launches, so that launches of the host are not what is timed
        self.flushed.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        torch.cuda.synchronize(self.device)
        return before.elapsed_time(after) / 1e3

    def turns(self, calls: dict[str, Call], attempts: int) -> dict[str, dict[str, float]]:
        """Spread of each call's seconds; the calls take turns."""
        taken: dict[str, list[float]] = {name: [] for name in calls}
        order = list(calls)
        for _ in range(attempts):
            # in another order each time: a call pays for what the one before it left in the caches
            random.shuffle(order)
            for name in order:
                taken[name].append(self.seconds(calls[name]))
        return {name: spread(seconds) for name, seconds in taken.items()}


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    if len(seconds) == 1:
        return dict.fromkeys(("median", "p20", "p80"), seconds[0])
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"median": statistics.median(seconds), "p20": cuts[0], "p80": cuts[3]}


def limits(clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """GB/s of a copy (bytes read and written) and TFLOP/s of a matrix product, the best of several."""
    device = clock.device
    big = device.type == "cuda"
    source = torch.zeros(2**30 if big else 2**26, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    side = 8192 if big else 1024
    matrix = _random(side, side, dtype=dtype, device=device)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: matrix @ matrix}
    for call in calls.values():
        call()
    best = {name: min(clock.seconds(call) for _ in range(10)) for name, call in calls.items()}
    return {"GB/s": 2 * source.numel() / best["copy"] / 1e9, "TFLOP/s": 2 * side**3 / best["product"] / 1e12}


def measure(case: Case, clock: Clock, limit: dict[str, float], attempts: int, dtype: torch.dtype) -> Row:
    """Warms every variant up, compares its result with the oracle's, and times all of them in turns."""
    results: dict[str, Any] = {}
    runnable = {}
    for name, call in case.variants.items():
        try:
            results[name] = _clone(case.compared(call()))
        except torch.OutOfMemoryError:
            continue
        runnable[name] = call
    agrees = case.oracle in results and all(_agree(result, results[case.oracle], dtype) for result in results.values())
    seconds = clock.turns(runnable, attempts)
    unit, amount = ("GB/s", case.bytes / 1e9) if case.bytes else ("TFLOP/s", case.flops / 1e12)
    achieved = {name: amount / times["median"] for name, times in seconds.items()}
    return Row(
        case.kernel,
        case.shape._asdict(),
        str(dtype).removeprefix("torch."),
        seconds,
        achieved,
        unit,
        limit[unit],
        agrees,
    )


def print_row(row: Row) -> None:
    shape = Shape(**row.shape)
    print(f"\n{row.kernel}: {shape}, {row.dtype}{'' if row.agrees else '   RESULTS DISAGREE'}")
    ours = row.seconds["ours"]["median"]
    for name, times in row.seconds.items():
        print(
            f"  {name:28} {times['median'] * 1e6:12.1f} us ({times['p20'] * 1e6:.1f} to {times['p80'] * 1e6:.1f})"
            f"  {row.achieved[name]:9.4g} {row.unit} {row.achieved[name] / row.limit:6.1%} of {row.limit:.4g}"
            f"  ours takes {ours / times['median']:.2f}x",
            flush=True,
        )


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def _clone(result: Any) -> Any:
    # the state of a step changes under the results of its first call
    if isinstance(result, Tensor):
        return result.clone()
    return None if result is None else tuple(_clone(part) for part in result)


def _agree(result: Any, expected: Any, dtype: torch.dtype) -> bool:
    if result is None:
        return True
    if isinstance(expected, tuple):
        # an alternative that computes less is compared in what it computes
        return all(_agree(*pair, dtype) for pair in zip(result, expected, strict=False) if None not in pair)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    return torch.allclose(result.float(), expected.float(), rtol=tolerance, atol=tolerance)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--only", choices=CASES, help="one group of rows")
    parser.add_argument("--tokens", type=int, help="only shapes of at most as many tokens")
    parser.add_argument("--attempts", type=int, help="calls of each variant")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: its times mean nothing")
    if device.type == "cuda" and not HAS_TRITON:
        parser.error("Triton cannot be imported here: on a GPU the kernels are what is measured")
    attempts = options.attempts or _ATTEMPTS[device.type]

    random.seed(0)
    torch.manual_seed(0)
    clock = Clock(device)
    limit = limits(clock, dtype)
    source = provenance(device)
    print(f"{source['machine']}: copies {limit['GB/s']:.4g} GB/s, multiplies {limit['TFLOP/s']:.4g} TFLOP/s ({dtype})")
    rows = []
    with torch.inference_mode():
        for build, shapes in (CASES[options.only],) if options.only else CASES.values():
            for shape in shapes[device.type]:
                if shape.tokens <= (options.tokens or shape.tokens):
                    for case in build(shape, dtype, device):
                        rows.append(measure(case, clock, limit, attempts, dtype))
                        print_row(rows[-1])
    if options.json:
        report = {"provenance": source, "limits": limit, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row.agrees for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
