"""Speed of a cache beside transformers' DynamicCache, both sides in one run: python -m kvcompress.evals.bench.speed

Decode: both caches hold the same context, and their steps take turns. A DynamicCache that saw only `budget` tokens
shows what a cache of that size can reach at best. Prefill: the same prompt through both caches, taking turns.
Peak memory: prefill of growing prompts, each in a process of its own.

Ratios are of medians of one run; times on a shared machine are not comparable between runs.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvcompress import load_model
from kvcompress.evals.provenance import provenance
from kvcompress.evals.sweep.baselines import build
from kvcompress.hf import cache_argument, sizes

Builder = Callable[[], Cache]


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile; of one measurement, that."""
    if len(seconds) == 1:
        seconds = 2 * seconds
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"median": statistics.median(seconds), "p20": cuts[0], "p80": cuts[3]}


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, device work included."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def filled(model: PreTrainedModel, build_cache: Builder, prompt: Tensor, batch: int) -> Cache:
    """A cache of `batch` sequences with the same prompt [1, tokens], which is prefilled once."""
    cache = build_cache()
    model(prompt, **cache_argument(model, cache), logits_to_keep=1)
    if batch > 1:
        cache.batch_repeat_interleave(batch)
    return cache


@torch.no_grad()
def decode_times(
    model: PreTrainedModel, builders: dict[str, tuple[Builder, Tensor]], batch: int, steps: int
) -> dict[str, dict[str, float]]:
    """Seconds of a decode step for each cache, given with the prompt it is filled with; the caches take turns."""
    caches = {name: filled(model, build_cache, prompt, batch) for name, (build_cache, prompt) in builders.items()}
    token = next(iter(builders.values()))[1][:, :1].expand(batch, 1)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for step in range(steps + 2):
        for name, cache in caches.items():
            forward = functools.partial(model, token, **cache_argument(model, cache), logits_to_keep=1)
            took = timed(forward, model.device)
            if step >= 2:
                seconds[name].append(took)
    return {name: spread(times) for name, times in seconds.items()}


@torch.no_grad()
def prefill_times(
    model: PreTrainedModel, builders: dict[str, Builder], prompt: Tensor, repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds of a prefill [batch, tokens] for each cache; the caches take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in builders}
    for repeat in range(repeats + 1):
        for name, build_cache in builders.items():
            cache = build_cache()
            forward = functools.partial(model, prompt, **cache_argument(model, cache), logits_to_keep=1)
            took = timed(forward, model.device)
            if repeat:
                seconds[name].append(took)
    return {name: spread(times) for name, times in seconds.items()}


def prefill_peak(method: str, budget: int, tokens: int, model_name: str | None) -> int:
    """Bytes by which the peak resident memory of a fresh process grows in a prefill of `tokens` tokens."""
    command = [sys.executable, "-m", "kvcompress.evals.bench.speed", "--peak-of", method, "--budget", str(budget)]
    command += ["--context", str(tokens)] + (["--model", model_name] if model_name else [])
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.strip().splitlines()[-1])


def _print_peak(method: str, budget: int, tokens: int, model_name: str | None) -> None:
    model, _ = load_model(model_name)
    with torch.no_grad():
        model(_prompt(model, 64), logits_to_keep=1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model(_prompt(model, tokens), **cache_argument(model, _builder(model, method, budget)()), logits_to_keep=1)
    # Linux counts in KiB
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def _builder(model: PreTrainedModel, method: str, budget: int) -> Builder:
    if method == "dynamic":
        return lambda: DynamicCache(config=model.config)
    return lambda: build(method, model, budget)


def _prompt(model: PreTrainedModel, tokens: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, sizes(model.config).vocabulary, (batch, tokens), generator=generator).to(model.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(name: str, times: dict[str, float], base: dict[str, float], tokens: int) -> str:
    rate = tokens / times["median"]
    return (
        f"  {name:<28} {times['median'] * 1e3:>9.1f} ms [{times['p20'] * 1e3:.1f}, {times['p80'] * 1e3:.1f}] "
        f"{rate:>9.1f} tokens/s   {base['median'] / times['median']:.2f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode and prefill speed beside transformers' DynamicCache.")
    parser.add_argument("--model", help="hub id, folder or .gguf file; default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--methods", default="h2o", help="comma-separated names of caches; quanto:bits=4 for transformers' own"
    )
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8, help="sequences in the decode measurement")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3, help="prefills of each cache")
    parser.add_argument("--memory", default="", help="comma-separated prompt lengths for the peak memory of a prefill")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        _print_peak(options.peak_of, options.budget, options.context, options.model)
        return

    model, _ = load_model(options.model)
    methods = options.methods.split(",")
    prompt = _prompt(model, options.context)
    results: dict[str, Any] = {"settings": vars(options) | {"out": str(options.out)}, **provenance()}

    dynamic = _builder(model, "dynamic", 0)
    caches = {"DynamicCache": (dynamic, prompt)}
    caches |= {method: (_builder(model, method, options.budget), prompt) for method in methods}
    caches[f"DynamicCache, {options.budget} tokens only"] = (dynamic, prompt[:, : options.budget])
    results["decode"] = decode_times(model, caches, options.batch, options.steps)
    print(f"decode step, context {options.context}, batch {options.batch}, budget {options.budget}")
    for name, times in results["decode"].items():
        print(_row(name, times, results["decode"]["DynamicCache"], options.batch))

    builders = {name: build_cache for name, (build_cache, _) in list(caches.items())[:-1]}
    results["prefill"] = prefill_times(model, builders, prompt, options.repeats)
    print(f"prefill, {options.context} tokens, batch 1")
    for name, times in results["prefill"].items():
        print(_row(name, times, results["prefill"]["DynamicCache"], options.context))

    for length in [int(length) for length in options.memory.split(",") if length]:
        row = {name: prefill_peak(name, options.budget, length, options.model) for name in ("dynamic", *methods)}
        results.setdefault("prefill_peak_bytes", {})[length] = row
        print(
            f"prefill of {length}: peak memory grows by",
            {name: f"{size / 2**20:.0f} MiB" for name, size in row.items()},
        )

    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
