"""What a SwiftKV conversion saves in prefill, and what it costs in quality: kvcompress study swiftkv

Base and converted model take turns in one run, and the ratio is that of the medians. Quality (quality.py) is measured
for the base model, the untrained conversion, the conversion fitted to texts by least squares, and each distilled folder
named; with how much of the perplexity that the conversion lost is recovered.
"""

import functools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kvcompress import convert, load_model
from kvcompress.evals.provenance import provenance, write_results
from kvcompress.evals.studies.quality import Exam, Quality, measure
from kvcompress.evals.sweep.samples import read_text
from kvcompress.evals.timing import take_turns
from kvcompress.hf import sizes
from kvcompress.swiftkv.data import first_rows, read_rows
from kvcompress.swiftkv.frontier import projection_flops
from kvcompress.swiftkv.least_squares import fit as fit_layers


@torch.no_grad()
def counted_flops(model: Any, ids: Tensor) -> int:
    """Flops of the matrix products of a prefill for its last logits, as torch counts them, without attention and the
    angles of positions, which releases of transformers compute as a product or not."""
    with FlopCounterMode(display=False) as counter:
        model(ids, logits_to_keep=1)
    # by the name of each module, and of all
    counts = {
        name: sum(count for op, count in ops.items() if str(op) in ("aten.mm", "aten.addmm", "aten.bmm"))
        for name, ops in counter.get_flop_counts().items()
    }
    return counts["Global"] - sum(count for name, count in counts.items() if name.endswith(".rotary_emb"))


@torch.no_grad()
def prefill_seconds(models: dict[str, Any], ids: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of each model's prefill for its last logits, the models taking turns."""
    calls = {name: functools.partial(model, ids, logits_to_keep=1) for name, model in models.items()}
    return take_turns(calls, ids.device, repeats, warm_up=0)


def main(
    model: Annotated[str | None, "hub id, folder or .gguf file; default: SmolLM2-135M-Instruct"] = None,
    distilled: Annotated[list[Path] | None, "folders of kvcompress distill"] = None,
    skip_from: float = 0.5,
    share: int = 1,
    tokens: Annotated[int, "length of the prompt that is timed; 0 for none"] = 4096,
    repeats: int = 3,
    fit: Annotated[list[Path] | None, "texts to fit a conversion to"] = None,
    fit_tokens: Annotated[int, "tokens to read of them, in rows of --window"] = 32768,
    text: Annotated[list[Path] | None, "texts for perplexity; default: Python's manual"] = None,
    text_tokens: Annotated[int, "last tokens of each that are read; 0 for none"] = 8192,
    window: int = 512,
    needles: Annotated[list[int] | None, "lengths of contexts that hide a needle"] = None,
    samples: Annotated[int, "needles of each length"] = 8,
    tasks: Annotated[list[str] | None, "tasks of lm-eval, or local_piqa and the like"] = None,
    shots: int = 5,
    limit: Annotated[int, "questions of each task"] = 100,
    data: Annotated[str, "folder of the local tasks' files"] = "",
    out: Annotated[Path | None, "JSON file; rows of an earlier call with the same settings stay"] = None,
    device: Annotated[str | None, "default: a GPU if there is one"] = None,
) -> None:
    """Prefill time, flops and quality of a SwiftKV conversion."""
    # lists as they stand in a file of rows
    settings = {name: [] if name in _LISTS and not value else value for name, value in locals().items()}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = load_model(model, device=device)
    origin = provenance(device)
    print(f"{origin['machine']}, {origin['threads']} threads, {origin['versions']}")
    texts = {path.stem: read_text(path) for path in text or ()} or {"python's documentation": read_text()}
    ids = {name: tokenizer(words, return_tensors="pt").input_ids[0] for name, words in texts.items()}
    if tokens:
        prompt = next(iter(ids.values()))[None, :tokens].to(base.device)
        _show_prefill(base, convert(base, skip_from, share), prompt, repeats)
    if not (text_tokens or needles or tasks):
        return
    exam = Exam(
        {name: whole[-text_tokens:] for name, whole in ids.items()} if text_tokens else {},
        window, tuple(needles or ()), samples, tuple(tasks or ()), shots, limit, data,
    )  # fmt: skip
    kept = _Kept(out, settings, origin)

    def models() -> Iterator[tuple[str, Any]]:
        """The models to measure; a folder always, as it may hold another model by now."""
        if not kept.has(BASE):
            yield BASE, base
        if not kept.has(CONVERTED):
            yield CONVERTED, convert(base, skip_from, share)
        if fit and not kept.has(FITTED):
            converted = convert(base, skip_from, share)
            fit_layers(converted, first_rows(read_rows(fit, tokenizer, window), fit_tokens))
            yield FITTED, converted
        for folder in distilled or ():
            yield str(folder), load_model(folder, device=device)[0]

    for name, one in models():
        kept.add(measure(name, one, tokenizer, exam))


BASE, CONVERTED, FITTED = "base", "converted, not trained", "converted, fitted"
_LISTS = ("distilled", "fit", "text", "needles", "tasks")
# what may differ between the rows of a file
_PASSING = ("out", "distilled", "device", "tokens", "repeats")


class _Kept:
    """The rows, in a file if one is named."""

    def __init__(self, path: Path | None, settings: dict[str, Any], origin: dict[str, Any]) -> None:
        self.path = path
        lasting = {name: value for name, value in settings.items() if name not in _PASSING}
        self.settings = json.loads(json.dumps(lasting, default=str))
        self.origin = origin
        self.rows: dict[str, Quality] = {}
        self.origins: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            found = json.loads(self.path.read_text("utf-8"))
            if found["settings"] != self.settings:
                raise ValueError(f"{self.path} holds rows with other settings; name another file")
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
        rows = [own.row() | {"provenance": self.origins[name]} for name, own in self.rows.items()]
        write_results({"settings": self.settings, "rows": rows}, self.path)

    def _show(self, row: Quality) -> None:
        print(row.name)
        back = row.recovered(self.rows[BASE], self.rows[CONVERTED]) if row.name not in (BASE, CONVERTED) else {}
        for text, value in row.perplexity.items():
            shares = "  recovered {:.1%} of the perplexity, {:.1%} of its log".format(*back[text]) if back else ""
            print(f"  perplexity {value:10.3f}  {text}{shares}")
        for length, share in row.needles.items():
            print(f"  needles    {share:10.2f}  of {length} tokens")
        for task, share in row.accuracy.items():
            error = row.errors[task]
            spread = "" if error is None else f", standard error {error:.3f}"
            print(f"  accuracy   {share:10.3f}  {task}{spread}", flush=True)


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
