"""Loads lm-eval tasks from your own files, without a network.

    kvcompress eval --tasks local_piqa --metadata '{"data": "/my/data"}' --num_fewshot 5 --cache h2o --budget 0.2

`data` is a folder; a task's file is the first one in it or below with the task's name, such as piqa.jsonl or
piqa.jsonl.gz. Rows of multiple choice are {query, choices, gold}, of WinoGrande {context_options, continuation, gold},
of LAMBADA {context, continuation}, of GSM8K {question, answer}; wikitext-2 is its plain text, with one document per
article. For the same tasks from the hub, use lm-eval's own (piqa, arc_easy, ...): `kvcompress eval` runs any of them.

`local_piqa_same_shots` and the like put the same examples, the file's last documents, before every question: what is
read before "Question:" is then read and compressed once for all.

`local_needle` and the like need no data: they are synthetic (evals/sweep/samples.py), with length and number given as
`--metadata '{"length": 2048, "samples": 20}'`; their question begins on its own line.
"""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

from kvcompress import load_model
from kvcompress.evals.sweep.samples import make_samples

Splits = dict[str, datasets.Dataset]

# the names that a data set's file may have in the folder
_FILES = {
    "piqa": ("piqa",),
    "arc_easy": ("arc_easy",),
    "arc_challenge": ("arc_challenge",),
    "openbookqa": ("openbook_qa", "openbookqa"),
    "copa": ("copa",),
    "boolq": ("boolq",),
    "winogrande": ("winogrande",),
    "lambada": ("lambada_openai", "lambada"),
    "gsm8k": ("gsm8k", "test"),
    "wikitext": ("wiki.test", "wiki.test.raw", "wikitext"),
}
_ENDINGS = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz", ".gz", "")
_TITLE = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE)


def find_file(data: str, name: str) -> Path:
    """The file of a data set below a folder.

    Raises:
        ValueError: no folder was given, or it has no such file.
    """
    if not data:
        raise ValueError(f'local_{name} needs a folder with data: --metadata \'{{"data": "/folder"}}\'')
    wanted = [f"{stem}{ending}" for stem in _FILES[name] for ending in _ENDINGS]
    # a name that many sets share, such as GSM8K's test.jsonl, counts only in the set's own folder
    shared = {f"test{ending}" for ending in _ENDINGS}
    files = sorted(file for file in Path(data).rglob("*") if file.is_file())
    for candidate in wanted:
        for file in files:
            if file.name == candidate and (candidate not in shared or file.parent.name == name):
                return file
    raise ValueError(f"no file for local_{name} below {data}: expected one of {', '.join(wanted)}")


def _read(file: Path) -> str:
    raw = file.read_bytes()
    return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")


def _rows(name: str) -> Callable[..., Splits]:
    def load(data: str = "", **_: Any) -> Splits:
        lines = _read(find_file(data, name)).splitlines()
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines if line.strip()])}

    return load


piqa, arc_easy, arc_challenge, openbookqa, copa, boolq, winogrande, lambada, gsm8k = (
    _rows(name) for name in _FILES if name != "wikitext"
)

# documents that are examples only
_SHOTS = 32


def _same_shots(load: Callable[..., Splits]) -> Callable[..., Splits]:
    def apart(data: str = "", **_: Any) -> Splits:
        rows = load(data)["test"]
        if len(rows) <= _SHOTS:
            raise ValueError(f"a task with the same examples needs more than {_SHOTS} documents, got {len(rows)}")
        asked = len(rows) - _SHOTS
        return {"test": rows.select(range(asked)), "shots": rows.select(range(asked, len(rows)))}

    return apart


piqa_same_shots, arc_easy_same_shots, openbookqa_same_shots = map(_same_shots, (piqa, arc_easy, openbookqa))


def wikitext(data: str = "", **_: Any) -> Splits:
    """The articles of wikitext-2's raw text."""
    text = _read(find_file(data, "wikitext"))
    starts = [match.start() for match in _TITLE.finditer(text)] or [0]
    pages = [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]
    return {"test": datasets.Dataset.from_list([{"page": page} for page in pages if page.strip()])}


def _made(task: str) -> Callable[..., Splits]:
    def load(length: int = 1024, samples: int = 20, seed: int = 0, pretrained: Any = None, **_: Any) -> Splits:
        tokenizer = load_model(pretrained)[1]
        made = make_samples(task, tokenizer, length, samples, seed)
        rows = [
            {
                "context": sample.context,
                "question": sample.question + sample.answer_prefix,
                "answers": list(sample.answers),
            }
            for sample in made
        ]
        return {"test": datasets.Dataset.from_list(rows)}

    return load


needle, kv, variables = _made("needle"), _made("kv"), _made("variables")


def found(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The share of a document's answers that the prediction contains, ignoring case."""
    said = results[0].casefold()
    return {"found": sum(answer.casefold() in said for answer in document["answers"]) / len(document["answers"])}


def partial_contexts(document: dict[str, Any]) -> list[str]:
    """WinoGrande's sentence up to and including each of its two candidates."""
    return list(document["context_options"])


def gold(document: dict[str, Any]) -> int:
    """Which candidate is right."""
    return int(document["gold"])


def continuation(document: dict[str, Any]) -> str:
    """The rest of the sentence."""
    return str(document["continuation"])
