"""Speed of a cache beside transformers' DynamicCache, both sides in one run: kvcompress bench speed

Decode: both caches hold the same context, and their steps take turns. A DynamicCache that saw only `budget` tokens
shows what a cache of that size can reach at best. Prefill: the same prompt through both caches, taking turns.
Peak memory: prefill of growing prompts, each in a process of its own.

Ratios are of medians of one run; times on a shared machine are not comparable between runs.
"""

import functools
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvcompress import load_model
from kvcompress.evals.provenance import provenance, write_results
from kvcompress.evals.sweep.baselines import build
from kvcompress.evals.timing import spread, take_turns, timed
from kvcompress.hf import cache_argument, sizes

Builder = Callable[[], Cache]


def filled(model: PreTrainedModel, build_cache: Builder, prompt: Tensor, batch: int) -> Cache:
    """A cache of `batch` sequences with the same prompt [1, tokens], which is prefilled once."""
    cache = build_cache()
    model(prompt, **cache_argument(model, cache), logits_to_keep=1)
    if batch > 1:
        cache.batch_repeat_interleave(batch)
    return cache


@torch.no_grad()
def decode_times(
    model: PreTrainedModel, caches: dict[str, Cache], token: Tensor, steps: int, warm_up: int = 2
) -> dict[str, dict[str, float]]:
    """Seconds of a decode step of each cache, which is fed token [batch, 1]; the caches take turns."""
    calls = {
        name: functools.partial(model, token, **cache_argument(model, cache), logits_to_keep=1)
        for name, cache in caches.items()
    }
    return {name: spread(times) for name, times in take_turns(calls, model.device, steps, warm_up).items()}


@torch.no_grad()
def prefill_times(
    model: PreTrainedModel, builders: dict[str, Builder], prompt: Tensor, repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds of a prefill [batch, tokens] for each cache; the caches take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in builders}
    for repeat in range(repeats + 1):
        for name, build_cache in builders.items():
            # a cache is built outside of what is timed
            given = cache_argument(model, build_cache())
            took = timed(functools.partial(model, prompt, **given, logits_to_keep=1), model.device)
            if repeat:
                seconds[name].append(took)
    return {name: spread(times) for name, times in seconds.items()}


def prefill_peak(method: str, budget: int, tokens: int, model_name: str | None) -> int:
    """Bytes by which the peak resident memory of a fresh process grows in a prefill of `tokens` tokens."""
    command = [sys.executable, "-m", "kvcompress", "bench", "speed", "--peak-of", method, "--budget", str(budget)]
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


def _prompt(model: PreTrainedModel, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, sizes(model.config).vocabulary, (1, tokens), generator=generator).to(model.device)


def _print_rows(rows: dict[str, dict[str, float]], tokens: int) -> None:
    base = rows["DynamicCache"]["median"]
    for name, times in rows.items():
        print(
            f"  {name:<28} {times['median'] * 1e3:>9.1f} ms [{times['p20'] * 1e3:.1f}, {times['p80'] * 1e3:.1f}] "
            f"{tokens / times['median']:>9.1f} tokens/s   {base / times['median']:.2f}x"
        )


def main(
    model: Annotated[str | None, "hub id, folder or .gguf file; default: SmolLM2-135M-Instruct"] = None,
    methods: Annotated[str, "names of caches, by commas; quanto:bits=4 for transformers' own"] = "h2o",
    context: Annotated[int, None, 1] = 4096,
    batch: Annotated[int, "sequences in the decode measurement", 1] = 8,
    budget: int = 512,
    steps: Annotated[int, None, 2] = 15,
    repeats: Annotated[int, "prefills of each cache", 2] = 3,
    memory: Annotated[str, "prompt lengths for the peak memory of a prefill, by commas"] = "",
    out: Annotated[Path | None, "JSON file for the results"] = None,
    peak_of: Annotated[str | None, "only this: by how many bytes a prefill through this cache grows the peak"] = None,
) -> None:
    """Decode and prefill speed beside transformers' DynamicCache."""
    settings = dict(locals())
    if peak_of:
        _print_peak(peak_of, budget, context, model)
        return
    loaded, _ = load_model(model)
    names = methods.split(",")
    prompt = _prompt(loaded, context)
    results: dict[str, Any] = {"settings": settings, **provenance()}

    dynamic = _builder(loaded, "dynamic", 0)
    builders = {"DynamicCache": dynamic, **{name: _builder(loaded, name, budget) for name in names}}
    with torch.no_grad():
        caches = {name: filled(loaded, build_cache, prompt, batch) for name, build_cache in builders.items()}
        caches[f"DynamicCache, {budget} tokens only"] = filled(loaded, dynamic, prompt[:, :budget], batch)
    results["decode"] = decode_times(loaded, caches, prompt[:, :1].expand(batch, 1), steps)
    del caches
    print(f"decode step, context {context}, batch {batch}, budget {budget}")
    _print_rows(results["decode"], batch)

    results["prefill"] = prefill_times(loaded, builders, prompt, repeats)
    print(f"prefill, {context} tokens, batch 1")
    _print_rows(results["prefill"], context)

    for length in [int(length) for length in memory.split(",") if length]:
        row = {name: prefill_peak(name, budget, length, model) for name in ("dynamic", *names)}
        results.setdefault("prefill_peak_bytes", {})[length] = row
        print(
            f"prefill of {length}: peak memory grows by",
            {name: f"{size / 2**20:.0f} MiB" for name, size in row.items()},
        )
    write_results(results, out)
