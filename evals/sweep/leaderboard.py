"""A sweep's rows of RULER's tasks as the folders that kvpress's evaluation writes and its leaderboard reads.

    <folder>/ruler__4096__<model>__<method>__<ratio>/predictions.csv    a line for each sample
                                                     metrics.json       {task: {"string_match": 0 to 100}}
                                                     config.yaml        what was run, and the bytes it held

One folder for each model, length, protocol, method and budget; `__compressed_questions` ends the name of those that saw
the question first. string_match is RULER's (arXiv:2404.06654): the share of the answers that a prediction contains,
ignoring case; for the tasks qa_1 and qa_2, whether it contains any.

kvpress's compression_ratio is nominal: the share of the context's tokens that a method is asked to drop. So is ours; of
methods that drop none, it is the share of the bytes that they save. What was measured stands beside it in config.yaml,
which is JSON, a subset of YAML.
"""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from kvcompress.evals.sweep.intervals import Row
from kvcompress.evals.sweep.panels import describe, one_each, share
from kvcompress.evals.sweep.protocol import AGNOSTIC, AWARE
from kvcompress.evals.sweep.rows import mean_of

TASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
_COLUMNS = ("task", "length", "answer", "predicted_answer", "compression_ratio")
# what kvpress deletes from a prediction before it looks for answers
_CONTROL = re.compile(r"[\x00-\x1f]")


def write_leaderboard(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Writes a folder for each model, length, protocol, method and budget, and returns their paths.

    Raises:
        ValueError: no row is of one of RULER's tasks and such a protocol, or one lacks its predictions; then nothing is
            written.
    """
    runs: dict[tuple[object, ...], list[Row]] = {}
    of_ruler = [row | {"task": _task(row)} for row in rows if _task(row) in TASKS]
    for row in one_each([row for row in of_ruler if row["protocol"] in (AGNOSTIC, AWARE)]):
        run = (row["model"], row["length"], row["protocol"], row["method"], row["budget"], type(row["budget"]))
        runs.setdefault(run, []).append(row)
    done = [own for members in runs.values() if (own := [row for row in members if row["status"] == "ok"])]
    if not done:
        raise ValueError(f"a leaderboard needs {_needed(of_ruler)}")
    for row in (row for members in done for row in members):
        _check(row)
    places = [folder / _name(members[0]) for members in done]
    for place, members in zip(places, done, strict=True):
        place.mkdir(parents=True, exist_ok=True)
        _write_run(sorted(members, key=lambda row: TASKS.index(row["task"])), place)
    return places


def _needed(rows: Sequence[Row]) -> str:
    """What a leaderboard needs, though there are these rows of RULER's tasks."""
    if any(row["status"] == "ok" for row in rows):
        protocols = ", ".join(dict.fromkeys(row["protocol"] for row in rows if row["status"] == "ok"))
        return f"rows of the protocol {AGNOSTIC} or {AWARE}; those of RULER's tasks that succeeded are of {protocols}"
    known = ", ".join(f"ruler_{task}" for task in TASKS)
    return f"rows of RULER's tasks that succeeded, of the protocol {AGNOSTIC} or {AWARE}; the tasks are {known}"


def _task(row: Row) -> str:
    """A task's name as the leaderboard has it."""
    return str(row["task"]).removeprefix("ruler_")


def string_match(task: str, answers: Sequence[Sequence[str]], predictions: Sequence[str]) -> float:
    """RULER's score of a task's predictions, from 0 to 100."""
    scores = []
    for references, prediction in zip(answers, predictions, strict=True):
        said = _CONTROL.sub("", prediction.strip()).strip().lower()
        hits = [float(reference.lower() in said) for reference in references]
        scores.append(max(hits) if task.startswith("qa") else mean_of(hits))
    return round(100 * mean_of(scores), 2)


def _check(row: Row) -> None:
    answers, predictions = row.get("answers"), row.get("predictions")
    if not predictions or not answers:
        lacking = "predictions" if not predictions else "answers"
        raise ValueError(f"a leaderboard needs what was answered, but the row {describe(row)} has no {lacking}")
    if len(answers) != len(predictions):
        raise ValueError(
            f"the row {describe(row)} must have a prediction for each of its {len(answers)} samples, "
            f"got {len(predictions)}"
        )


def _write_run(rows: Sequence[Row], folder: Path) -> None:
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for row in rows:
            for answers, prediction in zip(row["answers"], row["predictions"], strict=True):
                line = (row["task"], row["length"], list(answers), prediction, _ratio(row))
                writer.writerow(dict(zip(_COLUMNS, line, strict=True)))
    metrics = {
        row["task"]: {"string_match": string_match(row["task"], row["answers"], row["predictions"])} for row in rows
    }
    _write_json(folder / "metrics.json", metrics)
    _write_json(folder / "config.yaml", _config(rows))


def _config(rows: Sequence[Row]) -> Row:
    """kvpress's own fields first, then ours."""
    first = rows[0]
    shares = [one for row in rows if (one := share(row)) is not None]
    return {
        "dataset": "ruler",
        "data_dir": str(first["length"]),
        "model": first["model"],
        "device": first.get("device"),
        "press_name": first["method"],
        "compression_ratio": _ratio(first),
        "compress_questions": first["protocol"] == AWARE,
        "seed": first.get("seed"),
        "library": "kvcompress",
        "method": first["method"],
        "budget": first["budget"],
        "budget_tokens": first.get("budget_tokens"),
        "dtype": first.get("dtype"),
        "samples_per_task": {row["task"]: len(row["predictions"]) for row in rows},
        "tasks_not_run": [task for task in TASKS if task not in {row["task"] for row in rows}],
        "bytes": round(mean_of([row["bytes"] for row in rows])),
        "bytes_share_of_full_cache": round(mean_of(shares), 5) if shares else None,
        "commit": first["provenance"].get("commit"),
        "versions": first["provenance"].get("versions"),
    }


def _ratio(row: Row) -> float | None:
    """The share of the context that was to be dropped; without a budget, that of the bytes that were saved."""
    if row["budget"] is None:
        held = share(row)
        return None if held is None else round(max(0.0, 1.0 - held), 4)
    kept = row["budget"] if isinstance(row["budget"], float) else row["budget"] / row["length"]
    return round(max(0.0, 1.0 - kept), 4)


def _name(row: Row) -> str:
    budget = "" if row["budget"] is None else f"{row['budget']:g}{'_tokens' * isinstance(row['budget'], int)}"
    parts = ["ruler", str(row["length"]), row["model"].replace("/", "--"), row["method"]]
    parts += [f"budget_{budget}"] if budget else []
    parts += ["compressed_questions"] if row["protocol"] == AWARE else []
    # a colon only ever ends a method or one of its settings
    return "__".join(quote(part.replace(":", "_"), safe="=,+") for part in parts)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")
