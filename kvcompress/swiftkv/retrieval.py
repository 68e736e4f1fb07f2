"""Generated rows that ask for what they hold: facts hidden in prose, keys and their values, passages that come again.

What a conversion is fitted to decides whether it still retrieves: prose hardly ever looks anything up. Their prose, and
the words in their facts and keys, are those of the rows that are given.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import torch

from kvcompress.swiftkv.data import Row
from kvcompress.template import around_message, between_messages

# of each part of a row, its tokens and whether they say again what the row holds
_Parts = Iterator[tuple[list[int], bool]]

# how a fact is told and asked for, and how the answer begins; the value follows on the first and the last
_FACTS = (
    ("The access code of the {name} is", "What is the access code of the {name}?", "The access code is"),
    ("Remember the locker of {name}:", "Which locker does {name} have?", "It is locker"),
    ("Note: the {name} file has the reference", "What is the reference of the {name} file?", "The reference is"),
    ("If you look for {name}, call", "Whom do I call to look for {name}?", "Call"),
    ("The password that {name} chose was", "Which password did {name} choose?", "{name} chose"),
)
# how a key and its value are written: what is before, between and after them
_PAIRS = (('"', '": "', '",'), ("", " =", ""), ("- ", ":", ""), ("| ", " |", " |"), ("<", ">", "</>"))
# pairs that are looked up in a row
_ASKED = 4
# rows whose words are used
_SAMPLE = 64


def retrieval_rows(prose: Sequence[Row], tokenizer: Any, tokens: int, length: int, seed: int = 0) -> list[Row]:
    """Rows of at most `length` tokens, `tokens` in all or just above, that hide something and say it again.

    What they say again is `answered`: the values of facts and of keys, and all of a passage but its first tokens.

    Args:
        prose: rows whose text hides them, as of `read_rows`.
        tokenizer: the model's; its chat template, if it has one, is around what asks.

    Raises:
        ValueError: there is no prose or it has no words, or length is below 128.
    """
    if length < 128:
        raise ValueError(f"length must be at least 128 tokens to hide something and ask for it, got {length}")
    text = _Text(prose, tokenizer, Random(seed))
    kinds: tuple[Callable[[_Text, int], _Parts], ...] = (_facts, _pairs, _passages)
    made: list[Row] = []
    left = tokens
    while left > 0:
        room = text.random.randrange(length // 4, length + 1)
        parts = [*kinds[len(made) % len(kinds)](text, room)]
        ids = torch.tensor([token for part, _ in parts for token in part])
        said = torch.tensor([again for part, again in parts for _ in part])
        # of a row that is too long, what is asked for stays
        made.append(Row(ids[-length:], said[-length:]))
        left -= len(made[-1].ids)
    return made


def with_retrieval(rows: Sequence[Row], tokenizer: Any, length: int, share: float, seed: int = 0) -> list[Row]:
    """The rows, and so many generated ones that these have about this share of all tokens.

    Raises:
        ValueError: share is not from 0 to below 1, or as `retrieval_rows`.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share of generated rows must be in [0, 1), got {share}")
    tokens = round(sum(len(row.ids) for row in rows) * share / (1 - share))
    return [*rows, *(retrieval_rows(rows, tokenizer, tokens, length, seed) if tokens else ())]


class _Text:
    """The prose of some rows, the words in it, and what a template puts around a question."""

    def __init__(self, prose: Sequence[Row], tokenizer: Any, random: Random) -> None:
        self.random = random
        self.prose = prose
        self._tokenizer = tokenizer
        sample = random.sample(range(len(prose)), min(len(prose), _SAMPLE))
        found = {
            word for index in sample for word in re.findall(r"\b[A-Za-z]{4,12}\b", tokenizer.decode(prose[index].ids))
        }
        if len(found) < 2:
            raise ValueError(f"the {len(prose)} rows of prose hold {len(found)} words; facts need at least two")
        self.words = sorted(found)
        self.head, self.tail = (self.encode(part) for part in around_message(tokenizer))
        self.between = self.encode(between_messages(tokenizer))

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []

    def filler(self, tokens: int) -> list[int]:
        """A passage of so many tokens, or fewer where rows are short."""
        ids = self.random.choice(self.prose).ids
        start = self.random.randrange(max(1, len(ids) - tokens + 1))
        passage: list[int] = ids[start : start + tokens].tolist()
        return passage

    def name(self) -> str:
        return " ".join(self.random.choice(self.words) for _ in range(self.random.choice((1, 2))))

    def value(self) -> str:
        if self.random.random() < 0.3:
            return self.random.choice(self.words)
        return str(self.random.randrange(100, 10 ** self.random.randrange(3, 8)))


def _facts(text: _Text, room: int) -> _Parts:
    """Some facts in prose, each asked for at the end, in another order."""
    facts, asked = [], []
    for told, question, answer in text.random.choices(_FACTS, k=text.random.randrange(1, 4)):
        name, value = text.name(), text.encode(f" {text.value()}")
        facts.append([*text.encode(f" {told.format(name=name)}"), *value, *text.encode(".")])
        asked.append((text.encode(question.format(name=name)), text.encode(answer.format(name=name)), value))
    text.random.shuffle(asked)
    around = len(text.between) + len(text.tail)
    used = len(text.head) + sum(map(len, facts)) + sum(around + sum(map(len, each)) for each in asked)
    of_filler = max(1, (room - used) // (len(facts) + 1))
    yield text.head, False
    for fact in facts:
        yield text.filler(of_filler), False
        yield fact, False
    yield text.filler(of_filler), False
    for index, (asking, begun, said) in enumerate(asked):
        yield text.between if index else text.encode("\n"), False
        yield [*asking, *text.tail, *begun], False
        yield said, True


def _pairs(text: _Text, room: int) -> _Parts:
    """A list of keys and values, of which some are looked up at the end."""
    before, between, after = text.random.choice(_PAIRS)
    space = "" if between.endswith('"') else " "
    pairs: list[tuple[list[int], list[int], list[int]]] = []
    left = room - len(text.head) - len(text.tail)
    while left > 0:
        key = text.encode(f"\n{before}{text.name()}{between}")
        pairs.append((key, text.encode(f"{space}{text.value()}"), text.encode(after)))
        # those that are looked up come twice
        left -= sum(map(len, pairs[-1])) * (2 if len(pairs) <= _ASKED else 1)
    yield text.head, False
    yield [token for pair in pairs for part in pair for token in part], False
    yield text.tail, False
    for key, value, end in text.random.sample(pairs, min(_ASKED, len(pairs))):
        yield key, False
        yield value, True
        yield end, False


def _passages(text: _Text, room: int) -> _Parts:
    """A passage, others, and the first once more."""
    size = text.random.randrange(room // 8, room // 3)
    passage = text.filler(size)
    yield passage, False
    yield text.filler(room - 2 * size), False
    # nothing tells that it comes again, or which of its like does
    known = min(8, len(passage) // 2)
    yield passage[:known], False
    yield passage[known:], True
