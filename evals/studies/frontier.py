"""What SwiftKV conversions cost and keep, fitted only, for each first layer skipped: kvcompress study frontier

The frontier is that of kvcompress/swiftkv/frontier.py, whose probes that ask are of the same making as what the fit
reads. So one conversion, the elbow or that of `--examined`, also sits the exam of quality.py beside the model: RULER's
needles, answered greedily, and the perplexity of texts. The file is written after each part.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import torch

from kvcompress import load_model
from kvcompress.evals.provenance import provenance, write_results
from kvcompress.evals.studies.quality import Exam, measure
from kvcompress.swiftkv.data import read_rows
from kvcompress.swiftkv.frontier import Point, diagnose


def main(
    fit: Annotated[list[Path], "texts to fit conversions to"],
    text: Annotated[list[Path], "texts to measure"],
    model: Annotated[str | None, "hub id, folder or .gguf file; default: SmolLM2-135M-Instruct"] = None,
    firsts: Annotated[list[int] | None, "first layers; default: from a third of the layers on"] = None,
    share: Annotated[list[int] | None, "layers that share keys and values; default: 1"] = None,
    fit_tokens: int = 32768,
    retrieval: Annotated[float, "share of generated rows in them"] = 0.5,
    probe_tokens: Annotated[int, "of each text, and of rows that ask, for the frontier"] = 2048,
    text_tokens: Annotated[int, "last tokens of each text, for the exam"] = 4096,
    window: int = 512,
    own_last: Annotated[int, "last tokens of prompts with keys and values of their own"] = 0,
    skip_between: Annotated[tuple[int, int] | None, "layers that prompts skip too: first, and the one behind"] = None,
    needles: Annotated[list[int] | None, "lengths of contexts that hide a needle, for the exam"] = None,
    samples: Annotated[int, "needles of each length"] = 24,
    examined: Annotated[int | None, "first layer of the conversion that sits the exam; default: the elbow's"] = None,
    out: Annotated[Path | None, "JSON file"] = None,
    device: Annotated[str | None, "default: a GPU if there is one"] = None,
) -> None:
    """The frontier of SwiftKV conversions, and the exam of one of them."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = load_model(model, device=device)
    results: dict[str, Any] = {"provenance": provenance(device)}
    results |= {"command": results["provenance"]["command"], "machine": results["provenance"]["machine"]}
    seconds: dict[str, dict[str, float]] = {}
    marks = [_now()]

    def lap(name: str) -> None:
        marks.append(_now())
        seconds[name] = {kind: round(marks[-1][kind] - marks[-2][kind], 1) for kind in marks[-1]}
        write_results(results | {"seconds": seconds}, out)

    def show(point: Point) -> None:
        print(f"layer {point.first}: {point.fitted}", flush=True)

    rows = read_rows(fit, tokenizer, window)
    texts = {path.stem: read_rows([path], tokenizer, window) for path in text}
    marks = [_now()]
    frontier, survey = diagnose(
        base, tokenizer, rows, texts=texts, firsts=firsts, shares=tuple(share or (1,)), fit_tokens=fit_tokens,
        probe_tokens=probe_tokens, length=window, retrieval=retrieval, own_last=own_last,
        skip_between=skip_between, on_point=show,
    )  # fmt: skip
    results["frontier"] = frontier.facts()
    results["fit_seconds"] = round(survey.seconds, 3)
    lap("frontier")
    print(frontier.table(), flush=True)
    elbow = frontier.elbow()
    first = elbow.first if examined is None and elbow is not None else examined
    if first is None or not (needles or text_tokens):
        return
    last = {name: torch.cat([row.ids for row in each])[-text_tokens:] for name, each in texts.items()}
    prompt = window // 2 if own_last else 0
    exam = Exam(last if text_tokens else {}, window, tuple(needles or ()), samples, prompt=prompt)
    results["exam"] = []
    for name, one in (("base", base), (f"fitted, from layer {first} on", survey.converted(first, own_last=own_last))):
        results["exam"].append(measure(name, one, tokenizer, exam).row())
        lap(name)
        print(results["exam"][-1], flush=True)


def _now() -> dict[str, float]:
    return {"wall": time.perf_counter(), "cpu": time.process_time()}
