"""RULER's questions about documents: the one that answers, among others that do not.

Nothing is downloaded. The documents are a file, or a folder with RULER's own names, `squad.json` for qa_1 and
`hotpotqa.json` for qa_2, in one of three formats:

* SQuAD's JSON; a question's other documents are first the other paragraphs of its article;
* HotpotQA's JSON, whose questions have ten documents of their own;
* a JSON object a line, {"context": ..., "question": ..., "answers": [...]}.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from kvcompress.evals.sweep.recipes.recipe import ANY, Draw, Question, Recipe, Sample, Sizing, make_sample

# the files of a folder, by task
_FILES = {"ruler_qa_1": "squad.json", "ruler_qa_2": "hotpotqa.json"}
_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


@dataclass(frozen=True)
class Asked:
    """A question with its own documents, and those that are near it."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    near: tuple[str, ...] = ()


def documents_file(task: str, path: str | None) -> Path:
    """The file that a task reads.

    Raises:
        ValueError: none was named, or there is none.
    """
    wanted = _FILES[task]
    if path is None:
        raise ValueError(
            f"the task {task} needs documents: name a file of SQuAD, HotpotQA or JSON lines, or a folder that has "
            f"{wanted} (--documents)"
        )
    found = Path(path) / wanted if Path(path).is_dir() else Path(path)
    if not found.is_file():
        raise ValueError(f"the task {task} needs documents, and there is no file {found}")
    return found


def documents_hash(task: str, path: str | None) -> str:
    """A hash of what the file holds."""
    file = documents_file(task, path)
    return _hash(file, file.stat().st_mtime_ns)


@functools.lru_cache(4)
def _hash(file: Path, changed: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


@functools.lru_cache(4)
def read_documents(file: Path) -> tuple[Asked, ...]:
    """The questions of a file, in its order.

    Raises:
        ValueError: it has none of the three formats, or no question.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        found = _read(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} must be SQuAD's JSON, HotpotQA's JSON, or lines of JSON with context, question and answers "
            f"({type(error).__name__}: {error})"
        ) from None
    if not found:
        raise ValueError(f"{file} holds no question that has an answer")
    return tuple(found)


def _read(text: str) -> list[Asked]:
    try:
        whole = json.loads(text)
    except ValueError:
        return [_line(json.loads(line)) for line in text.split("\n") if line.strip()]
    if isinstance(whole, list):
        return [_hotpot(each) for each in whole]
    return _squad(whole) if "data" in whole else [_line(whole)]


def _line(row: dict[str, Any]) -> Asked:
    answers = row["answers"]
    if isinstance(answers, dict):
        # as SQuAD is published in columns
        answers = answers["text"]
    if not isinstance(answers, list):
        raise TypeError(f"answers must be a list of at least one text, got {answers!r}")
    return Asked(_text(row["question"]), _answers(answers), (_text(row["context"]),))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"contexts, questions and answers must be text that is not empty, got {value!r}")
    return value


def _answers(found: Sequence[Any]) -> tuple[str, ...]:
    if not found:
        raise TypeError("answers must be a list of at least one text, got none")
    return tuple(dict.fromkeys(map(_text, found)))


def _hotpot(row: dict[str, Any]) -> Asked:
    documents = tuple(f"{title}\n{''.join(sentences)}" for title, sentences in row["context"])
    if not documents:
        raise TypeError(f"a question of HotpotQA must have documents, got none for {row['question']!r}")
    return Asked(_text(row["question"]), _answers([row["answer"]]), documents)


def _squad(whole: dict[str, Any]) -> list[Asked]:
    found = []
    for article in whole["data"]:
        contexts = list(dict.fromkeys(paragraph["context"] for paragraph in article["paragraphs"]))
        for paragraph in article["paragraphs"]:
            own = paragraph["context"]
            near = tuple(context for context in contexts if context != own)
            for each in paragraph["qas"]:
                if each["answers"] and not each.get("is_impossible", False):
                    answers = _answers([answer["text"] for answer in each["answers"]])
                    found.append(Asked(_text(each["question"]), answers, (_text(own),), near))
    return found


def _choose(task: str, draw: Draw) -> list[Asked]:
    """The questions of a sample; samples of one seed have different ones, until there are no more."""
    found = read_documents(documents_file(task, draw.documents))
    groups: dict[tuple[str, ...], list[Asked]] = {}
    for each in found:
        groups.setdefault(each.documents, []).append(each)
    if draw.questions == 1:
        chosen = [[each] for each in found]
    else:
        chosen = [group for group in groups.values() if len(group) >= draw.questions]
    if not chosen:
        most = max(map(len, groups.values()))
        raise ValueError(
            f"the task {task} must have {draw.questions} questions about one document, and its documents have {most} "
            "at most"
        )
    order = Random(draw.order).sample(range(len(chosen)), len(chosen))
    return draw.random.sample(chosen[order[draw.index % len(order)]], draw.questions)


def _qa(task: str) -> Callable[[Draw], Sizing]:
    def build(draw: Draw) -> Sizing:
        random, asked = draw.random, _choose(task, draw)
        own, near = asked[0].documents, asked[0].near
        every = dict.fromkeys(
            document for each in read_documents(documents_file(task, draw.documents)) for document in each.documents
        )
        far = sorted(every.keys() - {*own, *near})
        others = [*random.sample(near, len(near)), *random.sample(far, len(far))]
        # where the own documents end up, and in what order all come
        order = random.random()
        head = f"{_INSTRUCTION}\n\nThe following are given documents.\n\n"
        questions = [
            Question(f"\n\n{_INSTRUCTION}\n\nQuestion: {each.question}", " Answer:", each.answers, 32, ANY)
            for each in asked
        ]

        def sizing(units: int) -> Sample:
            documents = [*own, *others[: units - 1]]
            Random(order).shuffle(documents)
            body = "\n\n".join(f"Document {number}:\n{each}" for number, each in enumerate(documents, 1))
            depths = [body.index(each) / len(body) for each in own]
            return make_sample(head, body, questions, sum(depths) / len(depths))

        return sizing

    return build


RECIPES = {
    "ruler_qa_1": Recipe(
        "a question about one of several documents (SQuAD)", _qa("ruler_qa_1"), asks_several=True, reads_documents=True
    ),
    "ruler_qa_2": Recipe(
        "a question about two of several documents (HotpotQA)",
        _qa("ruler_qa_2"),
        asks_several=True,
        reads_documents=True,
    ),
}
