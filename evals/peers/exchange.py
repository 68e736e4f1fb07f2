"""Prompts for libraries that need an environment of their own, and their answers as rows of a sweep.

    kvcompress peers prompts --out prompts --tasks needle,kv --lengths 512,1024 --samples 10
    (in the peer's environment)  python evals/peers/kvpress_answers.py prompts/prompts.jsonl --model ... --out ...
    kvcompress peers rows --prompts prompts --answers prompts/kvpress.jsonl --out results

The tokens, the right answers and the scorer are those of `kvcompress sweep` with the same settings, so the rows can
share one `results.jsonl`, report and plot with its own. Bytes are those of the peer's live tensors when the question
comes, as with our caches; `bytes_after` is what it holds after the answer.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from kvcompress.evals.provenance import provenance
from kvcompress.evals.sweep.points import Point, Settings, of_one_question
from kvcompress.evals.sweep.protocol import PROTOCOLS, Measured, split
from kvcompress.evals.sweep.rows import Results, held, mean_of
from kvcompress.evals.sweep.samples import Prompt, Sample, make_prompt
from kvcompress.evals.sweep.sweep import Sweep
from kvcompress.evals.sweep.synthetic import SyntheticTask, score_answers
from kvcompress.evals.tasks import make_tasks
from kvcompress.hf import layer_heads
from kvcompress.loading import load_model
from kvcompress.registry import FULL

PEER = "kvpress"
_ANSWERED = {*("press", "budget", "id", "tokens", "bytes", "bytes_after", "kept", "masked", "seconds", "where")}

ModelName = Annotated[str | None, "hub id, folder or .gguf file; default: as in kvcompress sweep"]


def write_prompts(sweep: Sweep, folder: Path) -> int:
    """Writes a sweep's prompts as `prompts.jsonl`, and the settings as `settings.json`; returns how many prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for point, samples, prompts in _asked(sweep):
        for name, prompt in zip(_names(point, samples), prompts, strict=True):
            first, last = split(prompt, point.protocol, sweep.settings.hold_back)
            row = {
                "id": name,
                "length": point.length,
                "first": first,
                "last": last,
                "max_new_tokens": prompt.max_new_tokens,
                "stops": sorted(sweep.subject.stops),
            }
            lines.append(json.dumps(row))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "settings.json").write_text(json.dumps(dataclasses.asdict(sweep.settings)))
    return len(lines)


def read_rows(sweep: Sweep, answers: Path) -> list[dict[str, Any]]:
    """A row of a sweep for each task, length, protocol, method and budget that a peer answered completely.

    Raises:
        ValueError: an answer to a prompt that is not in the sweep, two answers to one, or only some samples answered.
    """
    found: dict[tuple[str, float, str], dict[str, Any]] = {}
    for number, line in enumerate(answers.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{answers}:{number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not row.keys() >= _ANSWERED:
            raise ValueError(f"{answers}:{number} must be an answer with {', '.join(sorted(_ANSWERED))}")
        key = row["press"], row["budget"], row["id"]
        if key in found:
            raise ValueError(f"{answers} has two answers to {row['id']} by {row['press']} at {row['budget']}")
        found[key] = row
    if not found:
        raise ValueError(f"{answers} holds no answers")
    rows, used = [], 0
    for cell, samples, prompts in _asked(sweep):
        names = _names(cell, samples)
        for press, budget in dict.fromkeys(key[:2] for key in found):
            given = [found[press, budget, name] for name in names if (press, budget, name) in found]
            if not given:
                continue
            if len(given) < len(names):
                raise ValueError(
                    f"{answers} answers {len(given)} of the {len(names)} samples of {cell.task} {cell.length} "
                    f"{cell.protocol} by {press} at {budget}"
                )
            used += len(given)
            point = dataclasses.replace(cell, method=f"{PEER}-{press}", budget=budget)
            rows.append(_row(sweep, point, samples, prompts, given))
    if used < len(found):
        raise ValueError(f"{len(found) - used} answers in {answers} belong to no prompt of these settings")
    return rows


def _row(
    sweep: Sweep, point: Point, samples: list[Sample], prompts: list[Prompt], given: list[dict[str, Any]]
) -> dict[str, Any]:
    every, dtype = layer_heads(sweep.model.config), sweep.model.dtype
    bytes_per_token = sum(own.kv_heads * (own.head_dim + own.value_dim) for own in every) * dtype.itemsize
    seen = [len(split(prompt, point.protocol, sweep.settings.hold_back)[0]) for prompt in prompts]
    measured = [
        Measured(
            sequences=1,
            bytes_held=row["bytes"],
            full_bytes=tokens * bytes_per_token,
            by_component={},
            tokens_seen=tokens,
            tokens_kept=mean_of(row["kept"]),
            least_kept=round(min(row["kept"])),
            most_kept=round(max(row["kept"])),
        )
        for tokens, row in zip(seen, given, strict=True)
    ]
    memory = held(measured, point.budget_tokens(point.context))
    # a peer's tensors are counted together
    del memory["by_component"]
    scores, said = score_answers(sweep.tokenizer, samples, [row["tokens"] for row in given])
    where = {"peer": given[0]["where"] | {"masked": any(row["masked"] for row in given)}}
    return (
        {"key": sweep.key(point), **sweep.facts(point), **where, "status": "ok"}
        | scores
        | memory
        | {"bytes_after": round(mean_of([row["bytes_after"] for row in given]))}
        | said
        | {"seconds": round(sum(row["seconds"] for row in given), 3), "provenance": provenance(sweep.model.device)}
    )


def _asked(sweep: Sweep) -> Iterator[tuple[Point, list[Sample], list[Prompt]]]:
    """For each task, length and protocol, the full cache's point with its samples and their prompts."""
    for point in sweep.points:
        task = sweep.tasks[point.task]
        if not isinstance(task, SyntheticTask):
            raise ValueError(f"a peer can be given synthetic tasks only, got {point.task!r}")
        of_one_question(f"{point.task} of a peer", [point.protocol])
        if point.method == FULL:
            samples = task.samples(sweep.tokenizer, point.context)
            yield point, samples, [make_prompt(sweep.tokenizer, sample) for sample in samples]


def _names(point: Point, samples: list[Sample]) -> list[str]:
    return [f"{point.task}/{point.length}/{point.protocol}/{index}" for index in range(len(samples))]


def _sweep(settings: Settings, model: str | None, folder: Path) -> Sweep:
    return Sweep(settings, make_tasks(settings), *load_model(model), folder)


def prompts(
    out: Annotated[Path, "folder for prompts and settings"],
    model: ModelName = None,
    tasks: Annotated[str, "by commas"] = "needle",
    lengths: Annotated[str, "comma-separated, in tokens"] = "512,1024",
    samples: Annotated[int, "samples of each task and length"] = 10,
    protocols: Annotated[str, "by commas"] = ",".join(PROTOCOLS),
    seed: Annotated[int, "of the tasks"] = 0,
    text: Annotated[str | None, "UTF-8 file for the essay haystacks"] = None,
    documents: Annotated[str | None, "documents for ruler_qa_1 and ruler_qa_2, as kvcompress sweep takes them"] = None,
) -> None:
    """Write the prompts of a sweep for a peer."""
    counts = tuple(int(length) for length in lengths.split(","))
    asked = tuple(protocols.split(","))
    settings = Settings(
        (FULL,), (1.0,), tuple(tasks.split(",")), counts, samples, asked, seed, text=text, documents=documents
    )
    print(f"{write_prompts(_sweep(settings, model, out), out)} prompts")


def rows(
    prompts: Annotated[Path, "folder written by kvcompress peers prompts"],
    answers: Annotated[Path, "file with the peer's answers to them"],
    out: Annotated[Path, "folder of a sweep, whose results.jsonl gets the rows"],
    model: ModelName = None,
) -> None:
    """Score a peer's answers, as rows of a sweep."""
    fields = json.loads((prompts / "settings.json").read_text())
    values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    settings = Settings(**values)
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out)
    for row in read_rows(_sweep(settings, model, out), answers):
        results.append(row)
        print(f"{row['task']} {row['length']} {row['protocol']} {row['method']} {row['budget']}: {row['score']:.2f}")
