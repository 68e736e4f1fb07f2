"""Speed of the kernels beside their references and the best alternatives, one row per shape and kernel.

    kvcompress bench kernels                              # this machine's device, shapes to match
    kvcompress bench kernels --only decode --json rows.json

Each row gives the median (20th to 80th percentile) of a call, and what it achieved: GB/s where bandwidth bounds the
kernel, TFLOP/s where arithmetic does, beside the limit of the same kind that this run measured on the same device by
copying a large tensor and by multiplying large matrices. Bytes and flops counted are those the op must move and do,
by the formulas in the kernels' docstrings, for every variant alike; a causal attention does half of the products.

The variants of a row take turns, so that a loaded or throttled machine slows all of them. On a GPU the L2 cache is
filled with other data before each call, and times come from events around the replay of a CUDA graph of the call, so
that they are the device's; beside them stands what the host takes to launch the call. A call that no graph can hold is
timed as it comes, and its row says so. Each result is compared with that of the reference or, where that would need a
queries x tokens tensor of gigabytes, of torch's attention: a row that disagrees says so and the exit status is 1. A
variant that cannot run a shape is left out of its row; where that is the one to compare with, the row says so.
"""

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from kvcompress.evals.bench.attention import DECODE, PREFILL, decode_cases, merge_cases, prefill_cases
from kvcompress.evals.bench.case import Case, MakeCases, Shape
from kvcompress.evals.bench.packed import PACKED, packed_cases
from kvcompress.evals.bench.prefix import PREFIX, prefix_cases
from kvcompress.evals.bench.ragged import RAGGED, ragged_cases
from kvcompress.evals.bench.shadowkv import CONTEXTS, shadow_cases
from kvcompress.evals.bench.swiftkv import PROMPTS, swiftkv_cases
from kvcompress.evals.provenance import provenance, write_results
from kvcompress.evals.timing import Clock, limits
from kvcompress.kernels.common.runtime import HAS_TRITON, INTERPRETED

_ATTEMPTS = {"cuda": 30, "cpu": 7}

# each group of rows, and its shapes by kind of device
CASES: dict[str, tuple[MakeCases, dict[str, list[Shape]]]] = {
    "prefill": (prefill_cases, PREFILL),
    "decode": (decode_cases, DECODE),
    "merge": (merge_cases, PREFILL),
    "packed": (packed_cases, PACKED),
    "ragged": (ragged_cases, RAGGED),
    "shadowkv": (shadow_cases, CONTEXTS),
    "prefix": (prefix_cases, PREFIX),
    "swiftkv": (swiftkv_cases, PROMPTS),
}


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
    # None where what it would be compared with does not fit the device
    agrees: bool | None
    # seconds the host takes to launch each variant, and the variants timed without a graph; both empty on a CPU
    host_seconds: dict[str, float]
    uncaptured: list[str]


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
    agrees = None
    if case.oracle in results:
        agrees = all(_agree(result, results[case.oracle], dtype) for result in results.values())
    host, uncaptured = {}, []
    if clock.device.type == "cuda":
        host = {name: clock.host_seconds(call) for name, call in runnable.items()}
        replays = {name: clock.captured(call) for name, call in runnable.items()}
        uncaptured = [name for name, replay in replays.items() if replay is None]
        runnable = {name: replays[name] or call for name, call in runnable.items()}
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
        host,
        uncaptured,
    )


def print_row(row: Row) -> None:
    shape = Shape(**row.shape)
    print(f"\n{row.kernel}: {shape}, {row.dtype}{_verdict(row)}")
    ours = row.seconds["ours"]["median"]
    for name, times in row.seconds.items():
        print(
            f"  {name:28} {times['median'] * 1e6:12.1f} us ({times['p20'] * 1e6:.1f} to {times['p80'] * 1e6:.1f})"
            f"  {row.achieved[name]:9.4g} {row.unit} {row.achieved[name] / row.limit:6.1%} of {row.limit:.4g}"
            f"  ours takes {ours / times['median']:.2f}x"
            + (f"  host {row.host_seconds[name] * 1e6:.0f} us" if name in row.host_seconds else "")
            + ("  (no graph holds it)" if name in row.uncaptured else ""),
            flush=True,
        )


def _verdict(row: Row) -> str:
    return {True: "", False: "   RESULTS DISAGREE", None: "   NOT COMPARED: that does not fit"}[row.agrees]


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
    if not expected.is_floating_point():
        # one of two that score alike may be taken for the other
        return result.shape == expected.shape and bool((result == expected).float().mean() > 0.99)
    # by the norm: of attention to many tokens every number is small
    error = torch.linalg.vector_norm(result.double() - expected.double())
    size = torch.linalg.vector_norm(expected.double())
    return bool(error <= (1e-4 if dtype == torch.float32 else 3e-2) * size)


def main(
    device: Annotated[str | None, "cpu or cuda; default: a GPU where there is one"] = None,
    dtype: Annotated[str | None, "float32, bfloat16 or float16; default: bfloat16 on a GPU, else float32"] = None,
    only: Annotated[str | None, f"one group of rows: {', '.join(CASES)}"] = None,
    tokens: Annotated[int | None, "only shapes of at most as many tokens"] = None,
    attempts: Annotated[int | None, "calls of each variant", 1] = None,
    json: Annotated[Path | None, "where to write the rows"] = None,
) -> int:
    """Speed of the kernels beside their references and the best alternatives; status 1 where a result is wrong."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for name, value, known in (("only", only, CASES), ("dtype", dtype, kinds)):
        if value is not None and value not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, got {value!r}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = kinds[dtype or ("bfloat16" if place.type == "cuda" else "float32")]
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set: its times mean nothing")
    if place.type == "cuda" and not HAS_TRITON:
        raise ValueError("Triton cannot be imported here: on a GPU the kernels are what is measured")

    random.seed(0)
    torch.manual_seed(0)
    clock = Clock(place)
    limit = limits(clock, kind)
    source = provenance(place)
    print(f"{source['machine']}: copies {limit['GB/s']:.4g} GB/s, multiplies {limit['TFLOP/s']:.4g} TFLOP/s ({kind})")
    rows = []
    with torch.inference_mode():
        for build, shapes in (CASES[only],) if only else CASES.values():
            for shape in shapes[place.type]:
                if shape.tokens <= (tokens or shape.tokens):
                    for case in build(shape, kind, place):
                        rows.append(measure(case, clock, limit, attempts or _ATTEMPTS[place.type], kind))
                        print_row(rows[-1])
    write_results({"provenance": source, "limits": limit, "rows": [asdict(row) for row in rows]}, json)
    return 1 if any(row.agrees is False for row in rows) else 0
