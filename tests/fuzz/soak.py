"""Decodes for long through caches of fixed capacity, in constant memory: python -m tests.fuzz.soak --steps 100000

A tiny model picks its own tokens. After a warm-up, neither the bytes of the cache nor those of the process may grow,
every logit is a number, and the cache goes on keeping its budget.
"""

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvcompress import EvictingCache, H2OCache, StreamingLLMCache
from kvcompress.hf import cache_argument
from kvcompress.policies.gear import GEAR
from tests.contract.models import build, prompt

BUDGET, BATCH = 16, 2
# what the allocator and the interpreter may take without anything leaking, in bytes
SLACK = 8 << 20

CACHES: dict[str, Any] = {
    "h2o": lambda model: H2OCache(model, budget=BUDGET),
    "h2o_packed": lambda model: H2OCache(model, budget=BUDGET, packed=GEAR(bits=4, group_size=8)),
    "h2o_rolled": lambda model: H2OCache(model, budget=BUDGET, rerotated=True),
    "streaming": lambda model: StreamingLLMCache(model, budget=BUDGET, sinks=2),
    "streaming_rolled": lambda model: StreamingLLMCache(model, budget=BUDGET, sinks=2, rerotated=True),
}


def resident() -> int:
    """Bytes of the process in memory now, not at its peak."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@torch.no_grad()
def soak(model: PreTrainedModel, cache: EvictingCache, steps: int, every: int = 1000) -> dict[str, Any]:
    """Decodes so many steps; what was measured.

    Raises:
        AssertionError: memory grew, or a logit is not a number.
    """
    ids = prompt(2 * BUDGET, BATCH)
    model(ids, **cache_argument(model, cache))
    ids = ids[:, -1:]
    held, first, most = cache.memory().total_bytes, 0, 0
    storages = {tensor.data_ptr() for layer in cache.layers for tensor in layer.slots.tensors().values()}
    warm = min(steps // 10, 2000)
    began = time.monotonic()
    for step in range(1, steps + 1):
        logits = model(ids, **cache_argument(model, cache)).logits[:, -1]
        # the second best too, else few different tokens would ever be fed
        ids = logits.topk(2).indices[:, step % 2 : step % 2 + 1]
        if step % every == 0 or step in (warm, steps):
            assert torch.isfinite(logits).all(), f"step {step}: a logit is not a number"
            assert cache.memory().total_bytes == held, f"step {step}: {cache.memory().total_bytes} bytes of {held}"
            gc.collect()
            first = first or (resident() if step >= warm else 0)
            most = max(most, resident())
            assert not first or resident() <= first + SLACK, f"step {step}: the process grew by {resident() - first}"
    assert cache.get_seq_length() == 2 * BUDGET + steps
    for layer, kept in zip(cache.layers, cache.memory().tokens_kept, strict=True):
        assert (kept == BUDGET).all()
        newest = layer.slots.positions.amax(-1)
        assert (newest == 2 * BUDGET + steps - 1).all(), "the newest token is gone"
    after = {tensor.data_ptr() for layer in cache.layers for tensor in layer.slots.tensors().values()}
    assert after == storages, "slots are written in place"
    return {"steps": steps, "seconds": time.monotonic() - began, "cache_bytes": held, "grown": most - first}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.soak", description="Long decoding, constant memory.")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--caches", default=",".join(CACHES))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = build("llama", num_hidden_layers=1, max_position_embeddings=1 << 20, initializer_range=0.1)
    for name in options.caches.split(","):
        row = soak(model, CACHES[name](model), options.steps)
        print(
            f"{name:<18}{row['steps']:>8} steps {row['seconds']:7.1f} s {row['cache_bytes']:>8} bytes held, "
            f"process grew by {row['grown'] / 1024:.0f} KiB after the warm-up",
            flush=True,
        )


if __name__ == "__main__":
    main()
