"""The tasks of RULER (arXiv:2404.06654) that need no file: needles, variable tracking, common and frequent words.

Templates, parameters, the numbers of tokens to generate and the scoring are the published generator's. What differs:

* the context alone takes the length; RULER counts the question and the answer too. Any length will do, and between
  RULER's steps of 5 to 500 lines or words the one that fits best;
* words are names of our own lists, or for cwe made of two syllables, in place of those of wonderwords; the essay is the
  sweep's text, in place of Paul Graham's essays;
* the depths of single needles are spread evenly over the samples, and no two keys of a context are the same;
* below 1024 tokens the example of vt is shorter, and cwe repeats words less.

The line feed before a question belongs to the question, and the space before an answer's first words to these.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from random import Random
from string import ascii_lowercase, ascii_uppercase

from kvcompress.evals.sweep.recipes.haystack import NOISE, essay, noise
from kvcompress.evals.sweep.recipes.recipe import Draw, Filler, Question, Recipe, Sample, Sizing, hide, make_sample
from kvcompress.evals.sweep.recipes.words import NUMBERS, UUIDS, WORDS, fresh, syllables

_NOISE, _ESSAY, _NEEDLES = "noise", "essay", "needles"

# below it, examples are shorter than RULER's
_SHORT = 1024
_HOPS = 4
_COMMON = 10
# of cwe, from a length on: how many other words its example has, how often common and other words come in the example,
# and in the list; RULER's own but for the last
_REPEATS = ((4096, 30, (10, 3), (30, 3)), (_SHORT, 10, (3, 1), (6, 1)), (0, 3, (2, 1), (3, 1)))
_FREQUENT = 3
# the exponent of the frequencies of coded words, and how many must be drawn for the third to come before the fourth
_ALPHA = 2.0
_LEAST_CODED = 80


def _niah(
    haystack: str, key: str = WORDS, value: str = NUMBERS, keys: int = 1, values: int = 1, queries: int = 1
) -> Callable[[Draw], Sizing]:
    """Needles in a haystack: `queries` of the `keys` are asked for, each with `values` values."""

    def build(draw: Draw) -> Sizing:
        random = draw.random
        # asked one by one, or all at once
        per_question = 1 if draw.questions > 1 else queries
        hidden = max(keys, queries, draw.questions)
        some_keys, some_values = fresh(key, random), fresh(value, random)
        known = [next(some_keys) for _ in range(hidden)]
        numbers = [[next(some_values) for _ in range(values)] for _ in known]
        lines = [_line(value, name, number) for name, each in zip(known, numbers, strict=True) for number in each]
        needles = list(zip(draw.depths(len(lines)), lines, strict=True))
        if haystack == _NEEDLES:
            filler = _needles(value, some_keys, some_values)
        else:
            filler = (essay if haystack == _ESSAY else noise)(random, draw.text)
        one = per_question * values == 1
        kind = value if one else f"{value}s"
        head = (
            f"{'A' if one else 'Some'} special magic {kind} {'is' if one else 'are'} hidden within the following text. "
            f"Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
        )

        def question(first: int) -> Question:
            asked = slice(first, first + per_question)
            whose = f"special magic {kind} for {_listed(known[asked])} mentioned in the provided text"
            words = f"\nWhat {'is' if one else 'are all'} the {whose}?"
            answers = tuple(number for each in numbers[asked] for number in each)
            return Question(words, f" The {whose} {'is' if one else 'are'}", answers, 128)

        questions = [question(place) for place in range(draw.questions)]
        joint = " " if haystack == _ESSAY else "\n"
        return lambda units: make_sample(head, hide(filler(units), needles, joint), questions)

    return build


def _line(value: str, name: str, number: str) -> str:
    return f"One of the special magic {value}s for {name} is: {number}."


def _listed(known: list[str]) -> str:
    return known[0] if len(known) == 1 else f"{', '.join(known[:-1])}, and {known[-1]}"


def _needles(value: str, keys: Iterator[str], values: Iterator[str]) -> Filler:
    """A haystack of other needles."""
    made: list[str] = []

    def filler(units: int) -> list[str]:
        while len(made) < units:
            made.append(_line(value, next(keys), next(values)))
        return made[:units]

    return filler


def _tracking(draw: Draw) -> Sizing:
    """vt: a chain of assignments in noise, after a solved one whose names are shorter."""
    random = draw.random
    solved, asked = _codes(random, 3, _HOPS + 1), _codes(random, 5, _HOPS + 1)
    values = [str(value) for value in random.sample(range(10_000, 99_999), 2)]
    places = [sorted(random.random() for _ in range(_HOPS + 1)) for _ in range(2)]
    shown = _chain(solved, values[0], places[0], 4 if draw.length < _SHORT else 10)
    example = "".join(shown) + " " + " ".join(solved) + "\n\n\n\n"

    def sizing(units: int) -> Sample:
        head, body, question, prefix = _chain(asked, values[1], places[1], units)
        return make_sample(example + head, body, [Question(question, prefix, tuple(asked), 30)])

    return sizing


def _codes(random: Random, letters: int, count: int) -> list[str]:
    made: dict[str, None] = {}
    while len(made) < count:
        made["".join(random.choices(ascii_uppercase, k=letters))] = None
    return list(made)


def _chain(variables: list[str], value: str, depths: list[float], units: int) -> tuple[str, str, str, str]:
    """Head, body, question and answer prefix of a chain."""
    lines = [f"VAR {variables[0]} = {value}", *(f"VAR {to} = VAR {name} " for name, to in pairwise(variables))]
    body = hide([f"{NOISE}\n"] * units, list(zip(depths, lines, strict=True)), " ").replace(". \n", ".\n")
    return (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        body,
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(variables)} variables are assigned the value {value}, they are: ",
    )


def _common_words(draw: Draw) -> Sizing:
    """cwe: a numbered list in which ten words come more often than the others, after a solved one."""
    random = draw.random
    _, others, in_example, in_list = next(each for each in _REPEATS if draw.length >= each[0])
    words = syllables(random)
    shown = [next(words) for _ in range(_COMMON + others)]
    common = [next(words) for _ in range(_COMMON)]
    uncommon: list[str] = []
    order = random.random()
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    question = Question(
        "\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        tuple(common),
        120,
    )
    solved = _numbered(_repeated(shown[:_COMMON], shown[_COMMON:], in_example, order))
    example = head + solved + question.text + question.answer_prefix + _numbered(shown[:_COMMON]) + "\n"

    def sizing(units: int) -> Sample:
        while len(uncommon) < units:
            uncommon.append(next(words))
        listed = _repeated(common, uncommon[:units], in_list, order)
        return make_sample(example + head, _numbered(listed), [question])

    return sizing


def _repeated(common: list[str], others: list[str], times: tuple[int, int], order: float) -> list[str]:
    words = common * times[0] + others * times[1]
    Random(order).shuffle(words)
    return words


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _frequent_words(draw: Draw) -> Sizing:
    """fwe: coded words whose frequencies fall as 1 / rank^2, after dots, which are the most frequent."""
    random = draw.random
    made: dict[str, None] = {}
    while len(made) < max(draw.length // 50, 2 + _FREQUENT):
        made["".join(random.choices(ascii_lowercase, k=6))] = None
    codes = ["...", *list(made)[1:]]
    order = random.random()
    head = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. "
    )
    question = Question(
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        tuple(codes[1 : 1 + _FREQUENT]),
        50,
    )
    # of all ranks there are, where there is no end to them: zeta(2)
    total = math.pi**2 / 6

    def sizing(units: int) -> Sample:
        drawn = _LEAST_CODED - 1 + units
        words = [code for rank, code in enumerate(codes, 1) for _ in range(int(drawn * rank**-_ALPHA / total))]
        Random(order).shuffle(words)
        return make_sample(head, " ".join(words), [question])

    return sizing


RECIPES = {
    "ruler_niah_single_1": Recipe("a number for a word, in repeated noise", _niah(_NOISE)),
    "ruler_niah_single_2": Recipe("a number for a word, in an essay", _niah(_ESSAY), reads_text=True),
    "ruler_niah_single_3": Recipe("a UUID for a word, in an essay", _niah(_ESSAY, value=UUIDS), reads_text=True),
    "ruler_niah_multikey_1": Recipe(
        "one of four needles, in an essay", _niah(_ESSAY, keys=4), reads_text=True, asks_several=True
    ),
    "ruler_niah_multikey_2": Recipe("one line of nothing but needles", _niah(_NEEDLES), asks_several=True),
    "ruler_niah_multikey_3": Recipe(
        "a UUID for a UUID, one line of nothing but needles", _niah(_NEEDLES, UUIDS, UUIDS), asks_several=True
    ),
    "ruler_niah_multivalue": Recipe(
        "the four numbers of one word, in an essay", _niah(_ESSAY, values=4), reads_text=True
    ),
    "ruler_niah_multiquery": Recipe(
        "the numbers of four words, in an essay", _niah(_ESSAY, queries=4), reads_text=True, asks_several=True
    ),
    "ruler_vt": Recipe("the five variables of a chain of assignments", _tracking),
    "ruler_cwe": Recipe("the ten most common words of a list", _common_words),
    "ruler_fwe": Recipe("the three most frequent coded words", _frequent_words),
}
