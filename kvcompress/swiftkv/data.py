"""Rows of tokens that a distillation learns from: texts and chats from files."""

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """Tokens to learn from. ids: [tokens] int64. answered: [tokens] bool, False for those not to predict."""

    ids: Tensor
    answered: Tensor


def read_rows(paths: Sequence[str | os.PathLike[str]], tokenizer: Any, length: int) -> list[Row]:
    """Rows of at most `length` tokens from text files and .jsonl files, in UTF-8.

    A line of a .jsonl file is a chat, {"messages": [{"role", "content"}, ...]}, in which the assistant's tokens count,
    or {"text": ...}. Texts are joined and cut into rows; a chat is one row, with its end cut off if it is too long.

    Raises:
        ValueError: a file holds neither, or nothing, or is not UTF-8; the message names file and line.
    """
    rows: list[Row] = []
    for path in map(Path, paths):
        before = len(rows)
        text = read_text(path)
        if path.suffix == ".jsonl":
            texts = []
            # not splitlines: JSON strings may hold other characters that Python takes for line ends
            for number, line in enumerate(text.split("\n"), 1):
                if not line.strip():
                    continue
                entry = _read_entry(line, f"{path}:{number}")
                if isinstance(entry, str):
                    texts.append(entry)
                    continue
                try:
                    row = chat_row(entry, tokenizer, length)
                except Exception as error:
                    # templates may raise anything
                    raise ValueError(f"{path}:{number} cannot be rendered: {error}") from error
                if bool(row.answered.any()):
                    rows.append(row)
            text = "\n\n".join(texts)
        if text:
            # it is cut into rows: that it is long needs no warning
            ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
            rows += [Row(part, torch.ones_like(part, dtype=torch.bool)) for part in ids.split(length) if len(part) > 1]
        if len(rows) == before:
            raise ValueError(f"{path} holds nothing to learn from")
    return rows


def read_text(path: Path) -> str:
    """The text of a file, with line breaks as they are on Unix.

    Raises:
        ValueError: it is not UTF-8; the message says where.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line} is not UTF-8: byte 0x{data[error.start]:02x} at byte {error.start} of the file; "
            "write the file in UTF-8"
        ) from error
    return text.replace("\r\n", "\n")


def _read_entry(line: str, place: str) -> str | list[dict[str, str]]:
    """The text or the messages in a line of a .jsonl file."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error.msg} at column {error.colno}") from error
    if isinstance(entry, dict) and isinstance(entry.get("text"), str) and "messages" not in entry:
        return entry["text"]
    if not isinstance(entry, dict) or not isinstance(entry.get("messages"), list):
        raise ValueError(f'{place} must be {{"messages": [...]}} or {{"text": ...}}')
    for index, message in enumerate(entry["messages"]):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            has = sorted(message) if isinstance(message, dict) else type(message).__name__
            raise ValueError(f"{place}: message {index} must have a role and a content, both strings; got {has}")
    return entry["messages"]


def chat_row(messages: list[dict[str, str]], tokenizer: Any, length: int) -> Row:
    """A conversation in the model's chat template, in which the assistant's turns count.

    For an earlier answer, a template may leave out what the last one begins with (Qwen3: its thoughts, or an empty
    block for them): such an answer counts as rendered in the whole conversation.

    Raises:
        ValueError: the template renders an earlier answer in yet another way.
    """

    def render(count: int, begins: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], add_generation_prompt=begins, tokenize=False)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    whole = render(len(messages))
    ids = torch.tensor(encode(whole))
    answered = torch.zeros(len(ids), dtype=torch.bool)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            begun, last = render(index, begins=True) if index else "", render(index + 1)
            start = _in_common(whole, begun)
            stop = (
                len(last) if whole.startswith(last) else _end_of_answer(whole, start, begun, last, message["content"])
            )
            answered[len(encode(whole[:start])) : len(encode(whole[:stop]))] = True
    return Row(ids[:length], answered[:length])


def _in_common(text: str, other: str) -> int:
    """Letters with which both texts begin."""
    pairs = zip(text, other, strict=False)
    return next((at for at, (one, two) in enumerate(pairs) if one != two), min(len(text), len(other)))


def _end_of_answer(whole: str, start: int, begun: str, last: str, content: str) -> int:
    """Where an answer ends that begins at `start` of a conversation, and as the last one is rendered otherwise."""
    answer = last[_in_common(last, begun) :]
    said = content.rpartition("</think>")[2].strip()
    for skipped in range(answer.rfind(said) + 1):
        if whole.startswith(answer[skipped:], start):
            return start + len(answer) - skipped
    raise ValueError(
        f"the chat template renders the answer {content[:40]!r} differently within the conversation and at its end, so "
        "its tokens cannot be found; cut the conversation after it"
    )


def batches(rows: Sequence[Row], batch: int, rank: int, world: int, seed: int = 0) -> Iterator[list[Row]]:
    """The rows that one process of a run is fed, forward by forward, endlessly: each epoch in its own order."""
    count, at = batch * world, 0
    order: list[int] = []
    epoch = 0
    while True:
        while len(order) - at < count:
            generator = torch.Generator().manual_seed(seed + epoch)
            order, at, epoch = order[at:] + torch.randperm(len(rows), generator=generator).tolist(), 0, epoch + 1
        yield [rows[index] for index in order[at + rank : at + count : world]]
        at += count


def first_rows(rows: Sequence[Row], tokens: int, seed: int = 0) -> list[Tensor]:
    """Token ids of the rows that a run with this seed reads first: so many tokens in all, or all there are."""
    found: list[Tensor] = []
    left = tokens
    for (row,) in itertools.islice(batches(rows, 1, 0, 1, seed), len(rows)):
        if left <= 0:
            break
        found.append(row.ids[:left])
        left -= len(found[-1])
    return found
