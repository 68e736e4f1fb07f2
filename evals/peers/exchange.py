"""Prompts for libraries that need an environment of their own, and their answers as rows of a sweep.

    python -m kvcompress.evals.peers.exchange prompts --out prompts --tasks needle,kv --lengths 512,1024 --samples 10
    (in the peer's environment)  python evals/peers/kvpress_answers.py prompts/prompts.jsonl --model ... --out ...
    python -m kvcompress.evals.peers.exchange rows --prompts prompts --answers prompts/kvpress.jsonl --out results

The tokens, the answers that count and the scorer are those of `kvcompress sweep` with the same settings, and so are
the rows, beside which they stand in one `results.jsonl`, report and plot. Bytes are those of the peer's live tensors
when the question comes, as with our caches; `bytes_after` adds what it holds after the answer.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvcompress.evals.provenance import provenance
from kvcompress.evals.sweep.points import Point, Settings
from kvcompress.evals.sweep.protocol import PROTOCOLS, split
from kvcompress.evals.sweep.rows import Results, mean_of, standard_error
from kvcompress.evals.sweep.sweep import Sweep
from kvcompress.evals.sweep.tasks import Sample, Tokenizer, make_prompt, make_samples, score
from kvcompress.loading import load_model

PEER = "kvpress"
_FULL = "none"


def write_prompts(sweep: Sweep, folder: Path) -> int:
    """Writes every prompt of a sweep as `prompts.jsonl`, and the settings as `settings.json`; gives their number."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for task, length, protocol in _cells(sweep.settings):
        for index, sample in enumerate(_samples(sweep, task, length)):
            prompt = make_prompt(sweep.tokenizer, sample)
            first, last = split(prompt, protocol, sweep.settings.hold_back)
            row = {
                "id": _name(task, length, protocol, index),
                "length": length,
                "first": first,
                "last": last,
                "max_new_tokens": prompt.max_new_tokens,
                "stops": sorted(sweep.stops),
            }
            lines.append(json.dumps(row))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "settings.json").write_text(json.dumps(dataclasses.asdict(sweep.settings)))
    return len(lines)


def read_rows(sweep: Sweep, answers: Path) -> list[dict[str, Any]]:
    """A row of a sweep for each task, length, protocol, method and budget that a peer answered in full.

    Raises:
        ValueError: an answer to a prompt that the sweep has not, or twice to one; or one to a part of the samples.
    """
    found: dict[tuple[str, float, str], dict[str, Any]] = {}
    for line in answers.read_text().splitlines():
        row = json.loads(line)
        key = row["press"], row["budget"], row["id"]
        if key in found:
            raise ValueError(f"{answers} answers {row['id']} twice by {row['press']} at {row['budget']}")
        found[key] = row
    points = list(dict.fromkeys(key[:2] for key in found))
    rows, used = [], 0
    for task, length, protocol in _cells(sweep.settings):
        samples = _samples(sweep, task, length)
        names = [_name(task, length, protocol, index) for index in range(len(samples))]
        for press, budget in points:
            given = [found[press, budget, name] for name in names if (press, budget, name) in found]
            if not given:
                continue
            if len(given) < len(names):
                raise ValueError(
                    f"{answers} answers {len(given)} of the {len(names)} samples of {task} {length} {protocol} by "
                    f"{press} at {budget}"
                )
            used += len(given)
            rows.append(_row(sweep, Point(task, length, protocol, f"{PEER}-{press}", budget), samples, given))
    if used < len(found):
        raise ValueError(f"{len(found) - used} answers in {answers} are to no prompt of these settings")
    return rows


def _row(sweep: Sweep, point: Point, samples: list[Sample], given: list[dict[str, Any]]) -> dict[str, Any]:
    tokenizer, length = sweep.tokenizer, point.length
    assert length is not None
    predictions = [tokenizer.decode(row["tokens"], skip_special_tokens=True) for row in given]
    scores = [score(sample, said) for sample, said in zip(samples, predictions, strict=True)]
    prompts = [make_prompt(tokenizer, sample) for sample in samples]
    seen = [len(split(prompt, point.protocol, sweep.settings.hold_back)[0]) for prompt in prompts]
    kept = [count for row in given for count in row["kept"]]
    full = mean_of(seen) * _bytes_a_token(sweep.model)
    size = mean_of([row["bytes"] for row in given])
    facts = sweep.facts(point) | {"peer": given[0]["where"] | {"masked": any(row["masked"] for row in given)}}
    return {
        "key": sweep.key(point),
        **facts,
        "status": "ok",
        "metric": "answers found",
        "score": mean_of(scores),
        "stderr": standard_error(scores),
        "budget_tokens": point.budget_tokens(length),
        "bytes": round(size),
        "full_bytes": round(full),
        "ratio": round(size / full, 5),
        "device_bytes": round(size),
        "host_bytes": 0,
        "fetched_bytes": 0,
        "bytes_after": round(mean_of([row["bytes_after"] for row in given])),
        "tokens_seen": mean_of(seen),
        "tokens_kept": round(mean_of(kept), 2),
        "least_kept": round(min(kept)),
        "most_kept": round(max(kept)),
        "compressed": size < full,
        "scores": scores,
        "depths": [round(sample.depth, 3) for sample in samples],
        "answers": [list(sample.answers) for sample in samples],
        "predictions": predictions,
        "seconds": round(sum(row["seconds"] for row in given), 3),
        "provenance": provenance(sweep.model.device),
    }


def _bytes_a_token(model: PreTrainedModel) -> int:
    from kvcompress.hf import sizes

    of = sizes(model.config)
    return 2 * of.kv_heads * of.head_dim * of.layers * model.dtype.itemsize


def _cells(settings: Settings) -> list[tuple[str, int, str]]:
    return [
        (task, length, protocol)
        for task in settings.tasks
        for length in settings.lengths
        for protocol in settings.protocols
    ]


def _name(task: str, length: int, protocol: str, index: int) -> str:
    return f"{task}/{length}/{protocol}/{index}"


def _samples(sweep: Sweep, task: str, length: int) -> list[Sample]:
    settings = sweep.settings
    return make_samples(task, sweep.tokenizer, length, settings.samples, seed=settings.seed, text=settings.text)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _sweep(settings: Settings, model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> Sweep:
    return Sweep(settings, model, tokenizer, folder)


def main() -> None:
    """The two commands."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="hub id, folder or .gguf file; by default the one of kvcompress sweep")
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts")
    prompts.add_argument("--out", type=Path, required=True)
    prompts.add_argument("--tasks", default="needle")
    prompts.add_argument("--lengths", default="512,1024")
    prompts.add_argument("--samples", type=int, default=10)
    prompts.add_argument("--protocols", default=",".join(PROTOCOLS))
    prompts.add_argument("--seed", type=int, default=0)
    prompts.add_argument("--text")
    rows = commands.add_parser("rows")
    rows.add_argument("--prompts", type=Path, required=True)
    rows.add_argument("--answers", type=Path, required=True)
    rows.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, tokenizer = load_model(given.model)
    if given.command == "prompts":
        settings = Settings(
            (_FULL,),
            (1.0,),
            tuple(given.tasks.split(",")),
            tuple(int(length) for length in given.lengths.split(",")),
            given.samples,
            tuple(given.protocols.split(",")),
            given.seed,
            text=given.text,
        )
        print(f"{write_prompts(_sweep(settings, model, tokenizer, given.out), given.out)} prompts")
        return
    fields = json.loads((given.prompts / "settings.json").read_text())
    settings = Settings(**{name: _tuple(value) for name, value in fields.items()})
    given.out.mkdir(parents=True, exist_ok=True)
    results = Results(given.out)
    for row in read_rows(_sweep(settings, model, tokenizer, given.out), given.answers):
        results.append(row)
        print(f"{row['task']} {row['length']} {row['protocol']} {row['method']} {row['budget']}: {row['score']:.2f}")


if __name__ == "__main__":
    main()
