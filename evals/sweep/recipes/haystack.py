"""Haystacks: repeated noise, made-up sentences, or the sentences of a text."""

import functools
import re
import textwrap
from pathlib import Path
from random import Random

from kvcompress.evals.sweep.recipes.recipe import Filler
from kvcompress.evals.sweep.recipes.words import sentence

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def noise(random: Random, text: str) -> Filler:
    """The same five sentences, over and over."""
    return lambda units: [NOISE] * units


def sentences(random: Random, text: str) -> Filler:
    """Sentences made up of a few parts."""
    made: list[str] = []

    def filler(units: int) -> list[str]:
        while len(made) < units:
            made.append(sentence(random))
        return made[:units]

    return filler


def essay(random: Random, text: str) -> Filler:
    """The sentences of a text, from one of them on, and from the first again after the last."""
    found = prose(text)
    start = random.randrange(len(found))
    return lambda units: [found[(start + unit) % len(found)] for unit in range(units)]


def read_text(path: str | Path | None = None) -> str:
    """The text of a file; without one, English that comes with every Python: the topics of its manual."""
    if path is not None:
        try:
            return Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            # whoever gave a text itself need not read all of it again
            reason = error.strerror if isinstance(error, OSError) else error
            given = repr(textwrap.shorten(str(path), 200, placeholder=" ..."))
            raise ValueError(f"text must be a readable UTF-8 file, got {given} ({reason})") from None
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@functools.lru_cache(maxsize=4)
def prose(text: str) -> tuple[str, ...]:
    """The plain sentences of a text, without code, tables and headings."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        for each in re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(paragraph.split())):
            plain = sum(letter.isalpha() or letter in " ,.'-" for letter in each) > 0.97 * len(each)
            if plain and 6 <= len(each.split()) <= 60 and each[0].isupper() and each[-1] in ".!?":
                found.append(each)
    if not found:
        raise ValueError("text must hold at least one sentence of 6 to 60 words")
    return tuple(found)
