"""Our own retrieval tasks: needles, key-value retrieval, a chain of variables, a passkey.

Wording and scoring of needles and of variable tracking follow RULER (arXiv:2404.06654), those of the passkey
arXiv:2305.16300. They differ from RULER's own tasks (ruler.py) in their parameters, and in how short they may be.
"""

from collections.abc import Callable
from itertools import pairwise
from random import Random
from string import ascii_uppercase

from kvcompress.evals.sweep.recipes.haystack import NOISE, essay, noise, sentences
from kvcompress.evals.sweep.recipes.recipe import Draw, Filler, Question, Recipe, Sample, Sizing, hide, make_sample
from kvcompress.evals.sweep.recipes.words import names

# how many variables hold the value asked for
_CHAIN = 3


def _needle(
    make_filler: Callable[[Random, str], Filler], joint: str, keys: int = 1, values: int = 1
) -> Callable[[Draw], Sizing]:
    """RULER's needles: `keys` names, each with `values` magic numbers; a question asks for one name's numbers."""

    def build(draw: Draw) -> Sizing:
        random, hidden = draw.random, max(keys, draw.questions)
        filler = make_filler(random, draw.text)
        known = random.sample(names(), hidden)
        numbers = [str(number) for number in random.sample(range(1_000_000, 10_000_000), hidden * values)]
        needles = [
            (depth, f"One of the special magic numbers for {known[place // values]} is: {number}.")
            for place, (depth, number) in enumerate(zip(draw.depths(len(numbers)), numbers, strict=True))
        ]
        many = hidden * values > 1
        head = (
            f"{'Some special magic numbers are' if many else 'A special magic number is'} hidden within the following "
            f"text. Make sure to memorize it. I will quiz you about the {'numbers' if many else 'number'} afterwards.\n"
        )

        def question(name: str, answers: list[str]) -> Question:
            asked = f"special magic number{'s' if values > 1 else ''} for {name} mentioned in the provided text"
            words = f"\nWhat {'are all' if values > 1 else 'is'} the {asked}?"
            prefix = f" The {asked} {'are' if values > 1 else 'is'}"
            return Question(words, prefix, tuple(answers), 12 * values + 4)

        questions = [
            question(known[place], numbers[place * values : (place + 1) * values]) for place in range(draw.questions)
        ]
        return lambda units: make_sample(head, hide(filler(units), needles, joint), questions)

    return build


def _passkey(draw: Draw) -> Sizing:
    key = str(draw.random.randrange(10_000, 100_000))
    head = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.\n"
    )
    needles = [(draw.depth, f"The pass key is {key}. Remember it. {key} is the pass key.")]
    question = Question("\nWhat is the pass key?", " The pass key is", (key,), 12)
    return lambda units: make_sample(head, hide([NOISE] * units, needles, " "), [question])


def _key_value(draw: Draw) -> Sizing:
    random, count = draw.random, draw.questions
    known = random.sample(names(), len(names()))
    values = random.sample(range(10_000, 100_000), len(known))
    lines = [f'"{key}": "{number}"' for key, number in zip(known, values, strict=True)]
    # the questions ask for the first pairs, which go to their depths
    needles = list(zip(draw.depths(count), lines[:count], strict=True))
    questions = [
        Question(f'\n\nKey: "{key}"\nCorresponding value:', f' "{key}": "', (str(value),), 8)
        for key, value in zip(known[:count], values[:count], strict=True)
    ]
    head = "Extract the value corresponding to the specified key in the JSON object below.\n\n"

    def sizing(units: int) -> Sample:
        pairs = units - 1 + count
        if pairs > len(known):
            raise ValueError(f"the task kv has {len(known)} names, too few for this length")
        return make_sample(head, "{" + hide(lines[count:pairs], needles, ",\n") + "}", questions)

    return sizing


def _variables(draw: Draw) -> Sizing:
    """A solved chain of assignments, then one in noise: the question asks for all variables that hold its value."""
    random = draw.random
    codes = ["".join(random.choice(ascii_uppercase) for _ in range(5)) for _ in range(2 * _CHAIN)]
    values = [str(value) for value in random.sample(range(10_000, 100_000), 2)]

    def chain(held_by: list[str], value: str, depths: list[float], units: int) -> tuple[str, str, str]:
        lines = [f"VAR {held_by[0]} = {value}", *(f"VAR {to} = VAR {name}" for name, to in pairwise(held_by))]
        body = hide([NOISE] * units, list(zip(depths, lines, strict=True)), "\n")
        question = f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
        prefix = (
            " Answer: According to the chain of variable assignment in the text above, "
            f"{_CHAIN} variables are assigned the value {value}, they are:"
        )
        return body, question, prefix

    head = "Memorize and track the chain of variable assignment hidden in the following text.\n\n"
    solved = codes[_CHAIN:]
    example = "".join(chain(solved, values[1], [0.2, 0.5, 0.8], 3)) + " " + " ".join(solved) + "\n\n"
    # the chain is in order, wherever its lines are
    depths = sorted(random.random() for _ in range(_CHAIN))
    asked = codes[:_CHAIN]

    def sizing(units: int) -> Sample:
        body, question, prefix = chain(asked, values[0], depths, units)
        return make_sample(head + example + head, body, [Question(question, prefix, tuple(asked), 24)])

    return sizing


RECIPES = {
    "needle": Recipe("one magic number in repeated noise (RULER niah_single_1)", _needle(noise, "\n")),
    "needle_sentences": Recipe("one magic number among made-up sentences", _needle(sentences, " ")),
    "needle_essay": Recipe("one magic number in prose (RULER niah_single_2)", _needle(essay, " "), reads_text=True),
    "multikey": Recipe(
        "one of four magic numbers in prose (niah_multikey_1)",
        _needle(essay, " ", keys=4),
        reads_text=True,
        asks_several=True,
    ),
    "multivalue": Recipe("the four magic numbers of one name in prose", _needle(essay, " ", values=4), True),
    "kv": Recipe("the value of one key in a JSON object", _key_value, asks_several=True),
    "variables": Recipe("the variables of a chain of assignments in noise (RULER vt)", _variables),
    "passkey": Recipe("a pass key in repeated noise", _passkey),
}
