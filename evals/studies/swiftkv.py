"""What a SwiftKV conversion saves in prefill, and what it costs in quality: python -m kvcompress.evals.studies.swiftkv

    flops of the projections, a prompt of S tokens, one position's logits:
        2 S first (q + k + v + o + mlp) + 2 S (layers - first) / share (k + v) + 2 (layers - first) (q + o + mlp)

Base and converted model take turns in one run, and the ratio is that of the medians. Quality (evals/sweep/quality.py)
is that of the base model, the conversion as it begins, the conversion fitted to texts by least squares, and each
distilled folder that is named; with it stands how much of the perplexity that the conversion lost is back.
"""

import argparse
import json
import pydoc_data.topics
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kvcompress import convert, load_model
from kvcompress.evals.provenance import provenance
from kvcompress.evals.sweep.quality import Exam, Quality, measure
from kvcompress.hf import sizes
from kvcompress.swiftkv.data import first_rows, read_rows
from kvcompress.swiftkv.least_squares import fit


def projection_flops(config: Any, tokens: int, first: int | None = None, share: int = 1, logits: int = 1) -> int:
    """Flops of all projections of a prefill, by formula; `first` is the first layer skipped, None for no conversion."""
    of = sizes(config)
    hidden, layers = of.hidden, of.layers
    query = hidden * of.heads * of.head_dim
    key_value = 2 * hidden * of.kv_heads * of.head_dim
    rest = 2 * query + 3 * hidden * of.intermediate
    first = layers if first is None else first
    head = 2 * logits * hidden * of.vocabulary
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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prefill time, flops and quality of a SwiftKV conversion.")
    parser.add_argument("--model", help="hub id, folder or .gguf file; default: SmolLM2-135M-Instruct")
    parser.add_argument("--distilled", type=Path, nargs="*", default=[], help="folders of kvcompress distill")
    parser.add_argument("--skip-from", type=float, default=0.5)
    parser.add_argument("--share", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt that is timed; 0 for none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fit", type=Path, nargs="*", default=[], help="texts to fit a conversion to")
    parser.add_argument("--fit-tokens", type=int, default=32768, help="of them, in rows of --window")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="for perplexity; default: Python's manual")
    parser.add_argument("--text-tokens", type=int, default=8192, help="of each that are read, its last; 0 for none")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--needles", type=int, nargs="*", default=[], help="lengths of contexts that hide one")
    parser.add_argument("--samples", type=int, default=8, help="needles of each length")
    parser.add_argument("--tasks", nargs="*", default=[], help="of lm-eval, or local_piqa and its like")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--limit", type=int, default=100, help="questions of each task")
    parser.add_argument("--data", default="", help="folder of the local tasks' files")
    parser.add_argument("--out", type=Path, help="JSON; the rows of an earlier call with these settings stay")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    base, tokenizer = load_model(options.model, device=options.device)
    origin = provenance(options.device)
    print(f"{origin['machine']}, {origin['threads']} threads, {origin['versions']}")
    texts = {path.stem: path.read_text("utf-8") for path in options.text}
    if not texts:
        topics = pydoc_data.topics.topics
        texts = {"python's documentation": "\n\n".join(topics[name] for name in sorted(topics))}
    ids = {name: tokenizer(text, return_tensors="pt").input_ids[0] for name, text in texts.items()}
    if options.tokens:
        prompt = next(iter(ids.values()))[None, : options.tokens].to(base.device)
        _show_prefill(base, convert(base, options.skip_from, options.share), prompt, options.repeats)
    if not (options.text_tokens or options.needles or options.tasks):
        return
    exam = Exam(
        {name: text[-options.text_tokens :] for name, text in ids.items()} if options.text_tokens else {},
        options.window, tuple(options.needles), options.samples,
        tuple(options.tasks), options.shots, options.limit, options.data,
    )  # fmt: skip
    kept = _Kept(options, origin)
    for name, model in _models(options, base, tokenizer, kept):
        kept.add(measure(name, model, tokenizer, exam))


BASE, CONVERTED, FITTED = "base", "converted, not trained", "converted, fitted"


def _models(options: argparse.Namespace, base: Any, tokenizer: Any, kept: "_Kept") -> Iterator[tuple[str, Any]]:
    """What is to be measured; a folder always, as it may hold another model by now."""
    if not kept.has(BASE):
        yield BASE, base
    if not kept.has(CONVERTED):
        yield CONVERTED, convert(base, options.skip_from, options.share)
    if options.fit and not kept.has(FITTED):
        converted = convert(base, options.skip_from, options.share)
        fit(converted, first_rows(read_rows(options.fit, tokenizer, options.window), options.fit_tokens))
        yield FITTED, converted
    for folder in options.distilled:
        yield str(folder), load_model(folder, device=options.device)[0]


class _Kept:
    """The rows, in a file if one is named."""

    def __init__(self, options: argparse.Namespace, origin: dict[str, Any]) -> None:
        self.path: Path | None = options.out
        passing = ("out", "distilled", "device", "tokens", "repeats")
        self.settings = {
            name: json.loads(json.dumps(value, default=str))
            for name, value in vars(options).items()
            if name not in passing
        }
        self.origin = origin
        self.rows: dict[str, Quality] = {}
        self.origins: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            found = json.loads(self.path.read_text("utf-8"))
            if found["settings"] != self.settings:
                raise SystemExit(f"{self.path} holds rows of other settings; name another file")
            for row in found["rows"]:
                self.origins[row["name"]] = row.pop("provenance")
                self.rows[row["name"]] = Quality(**row)
        for row in self.rows.values():
            self._show(row)

    def has(self, name: str) -> bool:
        return name in self.rows

    def add(self, row: Quality) -> None:
        self.rows[row.name], self.origins[row.name] = row, self.origin
        self._show(row)
        if self.path is not None:
            rows = [own.row() | {"provenance": self.origins[name]} for name, own in self.rows.items()]
            self.path.write_text(json.dumps({"settings": self.settings, "rows": rows}, indent=1) + "\n", "utf-8")

    def _show(self, row: Quality) -> None:
        print(row.name)
        back = row.recovered(self.rows[BASE], self.rows[CONVERTED]) if row.name not in (BASE, CONVERTED) else {}
        for text, value in row.perplexity.items():
            shares = "  recovered {:.1%} of the perplexity, {:.1%} of its log".format(*back[text]) if back else ""
            print(f"  perplexity {value:10.3f}  {text}{shares}")
        for length, share in row.needles.items():
            print(f"  needles    {share:10.2f}  of {length} tokens")
        for task, share in row.accuracy.items():
            print(f"  accuracy   {share:10.3f}  {task}, standard error {row.errors[task]:.3f}", flush=True)


def _show_prefill(base: Any, converted: Any, ids: Tensor, repeats: int) -> None:
    config = converted.config
    first, share = config.num_key_value_layers, config.key_value_group_size
    tokens = ids.shape[1]
    formula = [projection_flops(base.config, tokens), projection_flops(config, tokens, first, share)]
    counted = [counted_flops(model, ids) for model in (base, converted)]
    for name, wanted, found in zip(("base", "converted"), formula, counted, strict=True):
        print(f"flops {name:<10} {found / 1e9:10.1f} G counted {wanted / 1e9:10.1f} G by formula")
    print(f"flops ratio {counted[1] / counted[0]:.3f} (attention itself: {first / sizes(config).layers:.3f})")
    seconds = prefill_seconds({"base": base, "converted": converted}, ids, repeats)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, each in seconds.items():
        print(f"prefill of {tokens} tokens, {name:<10} {medians[name]:8.3f} s  ({', '.join(f'{s:.3f}' for s in each)})")
    print(f"time ratio {medians['converted'] / medians['base']:.3f}", flush=True)


if __name__ == "__main__":
    main()
