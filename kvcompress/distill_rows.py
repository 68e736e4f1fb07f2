"""Rows of tokens that a distillation learns from: texts and chats from files."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """Tokens to learn from. ids: [tokens] int64. answered: [tokens] bool, False for those nobody need predict."""

    ids: Tensor
    answered: Tensor


def read_rows(paths: Sequence[str | os.PathLike[str]], tokenizer: Any, length: int) -> list[Row]:
    """Rows of at most `length` tokens from text files and .jsonl files.

    A line of a .jsonl is {"messages": [{"role", "content"}, ...]}, a chat, of which the assistant's tokens count, or
    {"text": ...}. Texts are joined and cut to rows; a chat is a row, cut at its end.

    Raises:
        ValueError: a file holds neither, or nothing; file and line are named.
    """
    rows: list[Row] = []
    for path in map(Path, paths):
        before = len(rows)
        if path.suffix == ".jsonl":
            texts = []
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                if not line.strip():
                    continue
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("messages"), list):
                    row = chat_row(entry["messages"], tokenizer, length)
                    if bool(row.answered.any()):
                        rows.append(row)
                elif isinstance(entry, dict) and isinstance(entry.get("text"), str):
                    texts.append(entry["text"])
                else:
                    raise ValueError(f'{path}:{number} must be {{"messages": [...]}} or {{"text": ...}}')
            text = "\n\n".join(texts)
        else:
            text = path.read_text("utf-8")
        if text:
            ids = tokenizer(text, return_tensors="pt").input_ids[0]
            rows += [Row(part, torch.ones_like(part, dtype=torch.bool)) for part in ids.split(length) if len(part) > 1]
        if len(rows) == before:
            raise ValueError(f"{path} holds nothing to learn from")
    return rows


def chat_row(messages: list[dict[str, str]], tokenizer: Any, length: int) -> Row:
    """A conversation in the model's chat template, of which the assistant's turns count."""

    def tokens(count: int, begins: bool = False) -> list[int]:
        encoded = tokenizer.apply_chat_template(messages[:count], add_generation_prompt=begins, return_dict=True)
        ids = encoded["input_ids"]
        return ids[0] if ids and isinstance(ids[0], list) else ids

    ids = torch.tensor(tokens(len(messages)))
    answered = torch.zeros(len(ids), dtype=torch.bool)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(tokens(index, begins=True)) if index else 0
            answered[start : len(tokens(index + 1))] = True
    return Row(ids[:length], answered[:length])


def first_rows(rows: Sequence[Row], tokens: int, seed: int = 0) -> list[Tensor]:
    """Token ids of the rows that a run of this seed reads first: so many tokens in all, or all there are."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    left = tokens
    for index in torch.randperm(len(rows), generator=generator).tolist():
        if left <= 0:
            break
        found.append(rows[index].ids[:left])
        left -= len(found[-1])
    return found
