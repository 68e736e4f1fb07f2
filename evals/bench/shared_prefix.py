"""Many prompts with one beginning: HydragenCache beside DynamicCache, kvcompress bench shared-prefix

Time to first token: the whole prompts through DynamicCache in one forward; for HydragenCache finding the prefix,
running it once, and feeding what differs. Decode: both caches hold the same prompts, and their steps take turns.
Bytes: live storages after the first token and after the last of `--new` tokens. The first token's logits of both are
compared. Beside the ratios stand what arithmetic and bytes allow at best.

`--switch` measures where a node pays: a decode step with a prefix of so many tokens in a node, over one with the same
tokens in every row (DenseCache), by length and batch. From this comes HydragenCache's default of min_tokens.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvcompress import DenseCache, HydragenCache, load_model
from kvcompress.evals.bench.speed import decode_times
from kvcompress.evals.provenance import provenance, write_results
from kvcompress.evals.sweep.samples import read_text
from kvcompress.evals.timing import timed
from kvcompress.hf import cache_argument


def prompts(tokenizer: Any, prefix: int, suffix: int, batch: int) -> Tensor:
    """Questions about one document, [batch, prefix + suffix] token ids."""
    document = tokenizer(read_text(), return_tensors="pt").input_ids[0]
    generator = torch.Generator().manual_seed(0)
    # their words do not matter, but that they differ
    questions = document[torch.randint(prefix, len(document), (batch, suffix), generator=generator)]
    return torch.cat([document[:prefix].expand(batch, -1), questions], 1)


@torch.no_grad()
def first_tokens(model: PreTrainedModel, ids: Tensor) -> tuple[dict[str, Any], HydragenCache]:
    """Seconds to the first token of both caches, their agreement, and the filled HydragenCache."""
    logits: dict[str, Tensor] = {}
    kept: list[HydragenCache] = []

    def shared() -> None:
        cache = HydragenCache(model, ids)
        logits["hydragen"] = model(
            ids[:, cache.get_seq_length() :], **cache_argument(model, cache), logits_to_keep=1
        ).logits
        kept.append(cache)

    def whole() -> None:
        logits["dynamic"] = model(
            ids, **cache_argument(model, DynamicCache(config=model.config)), logits_to_keep=1
        ).logits

    seconds = {"hydragen": timed(shared, model.device), "dynamic": timed(whole, model.device)}
    difference = (logits["hydragen"] - logits["dynamic"]).abs().max()
    tokens = logits["hydragen"].argmax(-1), logits["dynamic"].argmax(-1)
    return {
        "seconds": seconds,
        "same_first_tokens": float((tokens[0] == tokens[1]).float().mean()),
        "largest_logit_difference": float(difference),
    }, kept[0]


def step_times(model: PreTrainedModel, caches: dict[str, Cache], batch: int, steps: int) -> dict[str, dict[str, float]]:
    """Seconds of a step of each cache; they take turns."""
    token = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    return decode_times(model, caches, token, steps, warm_up=1)


@torch.no_grad()
def repeated(model: PreTrainedModel, cache: Cache, ids: Tensor, prefix: int) -> Cache:
    """The cache filled with the prefix once, repeated to the batch, and with the rows' own tokens."""
    model(ids[:1, :prefix], **cache_argument(model, cache), logits_to_keep=1)
    cache.batch_repeat_interleave(len(ids))
    model(ids[:, prefix:], **cache_argument(model, cache), logits_to_keep=1)
    return cache


def held_bytes(cache: Cache) -> int:
    if isinstance(cache, HydragenCache):
        return cache.memory().total_bytes
    layers: list[Any] = cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def compare(
    model: PreTrainedModel, tokenizer: Any, prefix: int, suffix: int, batch: int, steps: int, new: int
) -> dict[str, Any]:
    """One shape: time to first token, decode steps and bytes of both caches, and the ratios."""
    ids = prompts(tokenizer, prefix, suffix, batch).to(model.device)
    first, hydragen = first_tokens(model, ids)
    caches: dict[str, Cache] = {"hydragen": hydragen}
    caches["dynamic"] = repeated(model, DynamicCache(config=model.config), ids, prefix)
    begun = {name: held_bytes(cache) for name, cache in caches.items()}
    seconds = step_times(model, caches, batch, steps)
    del caches["dynamic"]
    token = ids[:, :1]
    with torch.no_grad():
        while hydragen.get_seq_length() < prefix + suffix + new - 1:
            model(token, **cache_argument(model, hydragen), logits_to_keep=1)
    each = begun["dynamic"] // (batch * (prefix + suffix))
    # the last token is answered and never fed
    ended = {"hydragen": held_bytes(hydragen), "dynamic": each * batch * (prefix + suffix + new - 1)}
    medians = {name: times["median"] for name, times in seconds.items()}
    whole = {name: first["seconds"][name] + (new - 1) * medians[name] for name in medians}
    return {
        "prefix": prefix,
        "suffix": suffix,
        "batch": batch,
        "new": new,
        "first_token": first,
        "decode_seconds": seconds,
        "tokens_per_second": {name: batch / median for name, median in medians.items()},
        "bytes_after_prompt": begun,
        "bytes_after_answer": ended,
        "ratios": {
            "decode": medians["dynamic"] / medians["hydragen"],
            "first_token": first["seconds"]["dynamic"] / first["seconds"]["hydragen"],
            "answer": whole["dynamic"] / whole["hydragen"],
            "bytes": ended["dynamic"] / ended["hydragen"],
        },
        "bounds": {
            "first_token": batch * (prefix + suffix) / (prefix + batch * suffix),
            "bytes": batch * (prefix + suffix + new - 1) / (prefix + batch * (suffix + new - 1)),
        },
    }


def find_switch(
    model: PreTrainedModel, tokenizer: Any, lengths: list[int], batches: list[int], steps: int
) -> list[dict]:
    """Where a node pays: seconds of a decode step with the prefix in a node over those with it in every row."""
    rows = []
    for batch in batches:
        for length in lengths:
            ids = prompts(tokenizer, length, 8, batch).to(model.device)
            node = HydragenCache.from_prefix(model, ids[0, :length])
            with torch.no_grad():
                model(ids[:, length:], **cache_argument(model, node), logits_to_keep=1)
            caches: dict[str, Cache] = {"node": node, "rows": repeated(model, DenseCache(model), ids, length)}
            seconds = step_times(model, caches, batch, steps)
            ratio = seconds["node"]["median"] / seconds["rows"]["median"]
            rows.append({"batch": batch, "prefix": length, "seconds": seconds, "node_over_rows": ratio})
            print(f"batch {batch:4}, prefix {length:5}: a step with a node takes {ratio:.2f}x", flush=True)
    return rows


def main(
    model: Annotated[str | None, "hub id, folder or .gguf file; default: SmolLM2-135M-Instruct"] = None,
    prefix: Annotated[int, None, 1] = 2048,
    suffix: Annotated[int, None, 1] = 16,
    batch: Annotated[int, None, 1] = 32,
    new: Annotated[int, "tokens of an answer", 1] = 32,
    steps: Annotated[int, "decode steps measured of each cache", 2] = 7,
    decode: Annotated[bool, "measure decode steps only, which take a minute"] = False,
    switch: Annotated[bool, "measure where a node pays instead"] = False,
    out: Annotated[Path | None, "JSON file for the results"] = None,
) -> None:
    """Prompts with one beginning: HydragenCache beside DynamicCache."""
    results: dict[str, Any] = {"settings": dict(locals()), **provenance()}
    loaded, tokenizer = load_model(model)
    began = time.perf_counter()
    if switch:
        results["switch"] = find_switch(loaded, tokenizer, [16, 32, 64, 128, 256], [1, 2, 8, 32], steps)
    elif decode:
        ids = prompts(tokenizer, prefix, suffix, batch).to(loaded.device)
        builders: dict[str, Cache] = {"hydragen": HydragenCache(loaded), "dynamic": DynamicCache(config=loaded.config)}
        filled = {name: repeated(loaded, cache, ids, prefix) for name, cache in builders.items()}
        results["decode_seconds"] = step_times(loaded, filled, batch, steps)
        medians = {name: times["median"] for name, times in results["decode_seconds"].items()}
        print(f"a step: {medians}, {medians['dynamic'] / medians['hydragen']:.1f}x")
    else:
        row = compare(loaded, tokenizer, prefix, suffix, batch, steps, new)
        results["row"] = row
        for name, ratio in row["ratios"].items():
            bound = f"   (at most {row['bounds'][name]:.1f})" if name in row["bounds"] else ""
            print(f"{name:12} {ratio:6.1f}x{bound}")
        print({name: row[name] for name in ("first_token", "tokens_per_second", "bytes_after_answer")})
    results["took_seconds"] = time.perf_counter() - began
    write_results(results, out)
