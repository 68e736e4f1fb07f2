"""What a SwiftKV conversion saves in prefill, and what it costs in perplexity: python -m kvcompress.evals.swiftkv

    flops of the projections, a prompt of S tokens, one position's logits:
        2 S first (q + k + v + o + mlp) + 2 S (layers - first) / share (k + v) + 2 (layers - first) (q + o + mlp)

Base and converted model take turns in one run, and the ratio is that of the medians. Perplexity is that of a text cut
into windows, for the base model, the conversion as it begins, and each distilled folder that is named.
"""

import argparse
import pydoc_data.topics
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kvcompress import convert, load_model
from kvcompress.evals.provenance import provenance


def projection_flops(config: Any, tokens: int, first: int | None = None, share: int = 1, logits: int = 1) -> int:
    """Flops of all projections of a prefill, by formula; `first` is the first layer skipped, None for no conversion."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query = hidden * config.num_attention_heads * head_dim
    key_value = 2 * hidden * config.num_key_value_heads * head_dim
    rest = 2 * query + 3 * hidden * config.intermediate_size
    first = layers if first is None else first
    head = 2 * logits * hidden * config.vocab_size
    early = 2 * tokens * first * (rest + key_value)
    later = 2 * tokens * ((layers - first) // share) * key_value + 2 * logits * (layers - first) * rest
    return early + later + head


@torch.no_grad()
def counted_flops(model: Any, ids: Tensor) -> int:
    """Flops of the matrix products of a prefill for its last logits, as torch counts them; attention left out."""
    with FlopCounterMode(display=False) as counter:
        model(ids, logits_to_keep=1)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if str(op) in ("aten.mm", "aten.addmm", "aten.bmm"))


@torch.no_grad()
def prefill_seconds(models: dict[str, Any], ids: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of each model's prefill for its last logits, the models taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            _wait(ids.device)
            start = time.perf_counter()
            model(ids, logits_to_keep=1)
            _wait(ids.device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, window: int) -> float:
    """Of a text [tokens], in windows read one by one."""
    losses, count = 0.0, 0
    for part in ids.split(window):
        if len(part) < 2:
            continue
        logits = model(part[None].to(model.device)).logits[0, :-1].float()
        losses += torch.nn.functional.cross_entropy(logits, part[1:].to(model.device), reduction="sum").item()
        count += len(part) - 1
    return float(torch.tensor(losses / count).exp())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prefill time, flops and perplexity of a SwiftKV conversion.")
    parser.add_argument("--model", help="hub id, folder or .gguf file; default: SmolLM2-135M-Instruct")
    parser.add_argument("--distilled", type=Path, nargs="*", default=[], help="folders of kvcompress distill")
    parser.add_argument("--skip-from", type=float, default=0.5)
    parser.add_argument("--share", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt that is timed; 0 for none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--text", type=Path, help="UTF-8 file for perplexity; default: Python's own documentation")
    parser.add_argument("--text-tokens", type=int, default=8192, help="of it that are read, its last; 0 for none")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    base, tokenizer = load_model(options.model, device=options.device)
    converted = convert(base, options.skip_from, options.share)
    origin = provenance(options.device)
    print(f"{origin['machine']}, {origin['threads']} threads, {origin['versions']}")
    if options.text is not None:
        text = options.text.read_text("utf-8")
    else:
        text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    if options.tokens:
        _show_prefill(base, converted, ids[None, : options.tokens].to(base.device), options.repeats)
    if options.text_tokens:
        read = ids[-options.text_tokens :]
        models = {"base": base, "converted, not trained": converted}
        for name, model in models.items():
            print(f"perplexity {perplexity(model, read, options.window):10.3f}  {name}", flush=True)
        for folder in options.distilled:
            model, _ = load_model(folder, device=options.device)
            print(f"perplexity {perplexity(model, read, options.window):10.3f}  {folder}", flush=True)


def _show_prefill(base: Any, converted: Any, ids: Tensor, repeats: int) -> None:
    config = converted.config
    first, share = config.num_key_value_layers, config.key_value_group_size
    tokens = ids.shape[1]
    formula = [projection_flops(base.config, tokens), projection_flops(config, tokens, first, share)]
    counted = [counted_flops(model, ids) for model in (base, converted)]
    for name, wanted, found in zip(("base", "converted"), formula, counted, strict=True):
        print(f"flops {name:<10} {found / 1e9:10.1f} G counted {wanted / 1e9:10.1f} G by formula")
    print(f"flops ratio {counted[1] / counted[0]:.3f} (attention itself: {first / config.num_hidden_layers:.3f})")
    seconds = prefill_seconds({"base": base, "converted": converted}, ids, repeats)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, each in seconds.items():
        print(f"prefill of {tokens} tokens, {name:<10} {medians[name]:8.3f} s  ({', '.join(f'{s:.3f}' for s in each)})")
    print(f"time ratio {medians['converted'] / medians['base']:.3f}", flush=True)


if __name__ == "__main__":
    main()
