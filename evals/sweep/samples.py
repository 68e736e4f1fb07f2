"""Synthetic long-context tasks, made from a seed: needles, key-value retrieval, variable tracking, a passkey.

A sample is a context that hides the answer and a question that asks for it. They are kept apart, because there are two
protocols: a cache compresses the context before it has seen the question, or after. Wording and scoring of needles and
of variable tracking follow RULER (arXiv:2404.06654), those of the passkey arXiv:2305.16300:

    score = the share of a sample's answers that the prediction contains, ignoring case

A sample depends only on the seed, the task, the length and its own number, and with an essay on its text.
"""

import bisect
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from string import ascii_uppercase
from typing import Any

# a transformers tokenizer; loosely typed so that a stub will do
Tokenizer = Any

# makes haystack of so many units, which are lines or sentences
Filler = Callable[[int], list[str]]
# makes the sample with so many units of haystack
Sizing = Callable[[int], "Sample"]

# how many variables hold the value asked for
_CHAIN = 3
_BODY = "thebodyofthemessage"
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Sample:
    """One context with its question.

    answer_prefix: the first words of the answer, which the model is given. answers: what a right prediction contains.
    depth: where in the context the answers are, from 0 (start) to 1 (end), on average.
    """

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    depth: float


@dataclass(frozen=True)
class Prompt:
    """A sample in tokens. The model reads the context, then the question with the answer's first words."""

    context: tuple[int, ...]
    question: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Recipe:
    """A kind of sample. build takes a random generator, a depth for the answer and the essay's text."""

    about: str
    build: Callable[[Random, float, str], Sizing]
    reads_text: bool = False


def make_samples(
    task: str, tokenizer: Tokenizer, length: int, samples: int, seed: int = 0, text: str | Path | None = None
) -> list[Sample]:
    """Samples whose contexts, with what the chat template puts before them, take at most `length` tokens.

    The depths of single answers are spread evenly over the samples.

    Args:
        task: one of RECIPES.
        text: a file for the essay haystack; by default Python's own manual.

    Raises:
        ValueError: an unknown task, or a length that cannot hold it.
    """
    if task not in RECIPES:
        raise ValueError(f"task must be one of {', '.join(RECIPES)}, got {task!r}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    source = read_text(text) if RECIPES[task].reads_text else ""
    made = []
    for index in range(samples):
        random = Random(f"{seed}/{task}/{length}/{index}")
        sizing = RECIPES[task].build(random, (index + 0.5) / samples, source)
        made.append(_fit(task, tokenizer, length, sizing))
    return made


def make_prompt(tokenizer: Tokenizer, sample: Sample) -> Prompt:
    """The sample in tokens, as one user message of the model's chat template if it has one."""
    head, tail = _template(tokenizer)
    context = tokenizer.encode(head + sample.context, add_special_tokens=False)
    question = tokenizer.encode(sample.question + tail + sample.answer_prefix, add_special_tokens=False)
    return Prompt(tuple(context), tuple(question), sample.max_new_tokens)


def score(sample: Sample, prediction: str) -> float:
    """The share of the answers that the prediction contains."""
    said = prediction.casefold()
    return sum(answer.casefold() in said for answer in sample.answers) / len(sample.answers)


def read_text(path: str | Path | None = None) -> str:
    """The text of a file; without one, English that comes with every Python: the topics of its manual."""
    if path is not None:
        try:
            return Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"text must be a readable UTF-8 file, got {str(path)!r} ({error})") from None
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def prose(text: str) -> list[str]:
    """The plain sentences of a text, without code, tables and headings."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(paragraph.split())):
            plain = sum(letter.isalpha() or letter in " ,.'-" for letter in sentence) > 0.97 * len(sentence)
            if plain and 6 <= len(sentence.split()) <= 60 and sentence[0].isupper() and sentence[-1] in ".!?":
                found.append(sentence)
    if not found:
        raise ValueError("text must hold at least one sentence of 6 to 60 words")
    return found


def _template(tokenizer: Tokenizer) -> tuple[str, str]:
    """What comes before and after the one user message, up to where the answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.bos_token or "", "\n"
    message = [{"role": "user", "content": _BODY}]
    head, tail = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True).split(_BODY)
    return head, tail


def _fit(task: str, tokenizer: Tokenizer, length: int, sizing: Sizing) -> Sample:
    """The sample with the most haystack that stays within the length."""
    head, _ = _template(tokenizer)

    def tokens(units: int) -> int:
        return len(tokenizer.encode(head + sizing(units).context, add_special_tokens=False))

    if tokens(1) > length:
        raise ValueError(f"length must be at least {tokens(1)} tokens for the task {task}, got {length}")
    most = 2
    while tokens(most) <= length:
        most *= 2
    return sizing(bisect.bisect_right(range(most), length, key=tokens) - 1)


def _noise(random: Random, text: str) -> Filler:
    return lambda units: [_NOISE] * units


def _sentences(random: Random, text: str) -> Filler:
    made: list[str] = []

    def filler(units: int) -> list[str]:
        while len(made) < units:
            made.append(" ".join(random.choice(part) for part in _GRAMMAR) + ".")
        return made[:units]

    return filler


def _essay(random: Random, text: str) -> Filler:
    sentences = prose(text)
    start = random.randrange(len(sentences))
    return lambda units: [sentences[(start + unit) % len(sentences)] for unit in range(units)]


def _hide(filler: list[str], needles: list[tuple[float, str]], joint: str) -> str:
    """The filler with each needle inserted at its depth."""
    parts = list(filler)
    # deepest first, so that it does not move those before it
    for depth, needle in sorted(needles, reverse=True):
        parts.insert(round(depth * len(filler)), needle)
    return joint.join(parts)


def _sample(head: str, body: str, question: str, prefix: str, answers: list[str], max_new_tokens: int) -> Sample:
    """The sample; its depth follows from where its answers are in the body."""
    depths = [body.index(answer) / len(body) for answer in answers]
    return Sample(head + body, question, prefix, tuple(answers), max_new_tokens, sum(depths) / len(depths))


def _needle(make_filler: Callable[[Random, str], Filler], joint: str, keys: int = 1, values: int = 1) -> Callable:
    """RULER's needles: `keys` names, each with `values` magic numbers; the question asks for one name's numbers."""

    def build(random: Random, depth: float, text: str) -> Sizing:
        filler = make_filler(random, text)
        names = random.sample(_names(), keys)
        numbers = [str(number) for number in random.sample(range(1_000_000, 10_000_000), keys * values)]
        depths = [depth, *(random.random() for _ in numbers[1:])]
        needles = [
            (depths[place], f"One of the special magic numbers for {names[place // values]} is: {number}.")
            for place, number in enumerate(numbers)
        ]
        many = keys * values > 1
        head = (
            f"{'Some special magic numbers are' if many else 'A special magic number is'} hidden within the following "
            f"text. Make sure to memorize it. I will quiz you about the {'numbers' if many else 'number'} afterwards.\n"
        )
        asked = f"special magic number{'s' if values > 1 else ''} for {names[0]} mentioned in the provided text"
        question = f"\nWhat {'are all' if values > 1 else 'is'} the {asked}?"
        prefix = f" The {asked} {'are' if values > 1 else 'is'}"

        def sizing(units: int) -> Sample:
            body = _hide(filler(units), needles, joint)
            return _sample(head, body, question, prefix, numbers[:values], 12 * values + 4)

        return sizing

    return build


def _passkey(random: Random, depth: float, text: str) -> Sizing:
    key = str(random.randrange(10_000, 100_000))
    head = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.\n"
    )
    needles = [(depth, f"The pass key is {key}. Remember it. {key} is the pass key.")]

    def sizing(units: int) -> Sample:
        body = _hide([_NOISE] * units, needles, " ")
        return _sample(head, body, "\nWhat is the pass key?", " The pass key is", [key], 12)

    return sizing


def _key_value(random: Random, depth: float, text: str) -> Sizing:
    names = random.sample(_names(), len(_names()))
    values = random.sample(range(10_000, 100_000), len(names))

    def sizing(units: int) -> Sample:
        pairs = list(zip(names, values, strict=True))[:units]
        if units > len(names):
            raise ValueError(f"the task kv has {len(names)} names, too few for this length")
        name, value = names[0], str(values[0])
        # the question asks for the first pair, which goes to its depth
        pairs.insert(round(depth * (len(pairs) - 1)), pairs.pop(0))
        body = "{" + ",\n".join(f'"{key}": "{number}"' for key, number in pairs) + "}"
        head = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        question = f'\n\nKey: "{name}"\nCorresponding value:'
        return _sample(head, body, question, f' "{name}": "', [value], 8)

    return sizing


def _variables(random: Random, depth: float, text: str) -> Sizing:
    """A solved chain of assignments, then one in noise: the question asks for all variables that hold its value."""
    codes = ["".join(random.choice(ascii_uppercase) for _ in range(5)) for _ in range(2 * _CHAIN)]
    values = [str(value) for value in random.sample(range(10_000, 100_000), 2)]

    def chain(names: list[str], value: str, depths: list[float], units: int) -> tuple[str, str, str]:
        lines = [f"VAR {names[0]} = {value}", *(f"VAR {to} = VAR {name}" for name, to in pairwise(names))]
        body = _hide([_NOISE] * units, list(zip(depths, lines, strict=True)), "\n")
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
    names = codes[:_CHAIN]

    def sizing(units: int) -> Sample:
        body, question, prefix = chain(names, values[0], depths, units)
        return _sample(head + example + head, body, question, prefix, names, 24)

    return sizing


def _names() -> list[str]:
    return [f"{adjective}-{noun}" for adjective in _ADJECTIVES for noun in _NOUNS]


_ADJECTIVES, _NOUNS = (
    words.split()
    for words in (
        "amber ancient bitter bold brave bright calm clever cold crimson curious dark distant dusty eager early fancy "
        "fierce gentle golden grand green happy hidden hollow humble icy jolly lively lonely lucky mellow misty noble "
        "odd pale plain proud quick quiet rapid rough round rusty secret shiny silent silver simple slow small smooth "
        "soft solid sour steady strange strong sunny sweet swift tall tender tiny vivid warm wild wise wooden young",
        "anchor apple arrow badge basket beacon bell blanket bottle branch bridge brush bucket cabin candle carpet "
        "castle chain chair cherry circle clock cloud coin comet copper crown desert diamond dragon drum eagle engine "
        "falcon feather fiddle forest fountain garden glacier hammer harbor helmet island jacket kettle ladder lantern "
        "lemon letter lion marble meadow mirror mountain needle ocean orchard otter paddle pebble pencil piano pillow "
        "planet pocket puzzle rabbit ribbon river rocket saddle shadow spider spoon stone sword temple thunder tiger "
        "tower train tunnel turtle valley violin wagon whistle willow window winter",
    )
)
_GRAMMAR = tuple(
    part.split("|")
    for part in (
        "The old fisherman|A young teacher|My neighbour|The tired baker|One of the students|The village doctor|"
        "A travelling musician|The night watchman|Her younger brother|The retired sailor|A visiting scientist",
        "carried|repaired|painted|described|sold|borrowed|cleaned|forgot about|looked for|admired|wrapped up",
        "a wooden boat|the broken radio|an unusual map|two heavy baskets|the blue bicycle|a collection of stamps|"
        "the kitchen table|an old photograph|the garden fence|a pair of boots|the family recipe|a small telescope",
        "near the harbour|behind the church|in the crowded market|at the edge of the forest|on the train to the coast|"
        "beside the river|in front of the library|across the valley|under the stone bridge|at the end of the road",
        "before the storm came|while the children slept|on the first day of spring|after a long discussion|"
        "without telling anybody|as the bells began to ring|although nobody had asked|because the winter was near|"
        "during the summer festival|just before midnight",
    )
)

RECIPES: dict[str, Recipe] = {
    "needle": Recipe("one magic number in repeated noise (RULER niah_single_1)", _needle(_noise, "\n")),
    "needle_sentences": Recipe("one magic number among made-up sentences", _needle(_sentences, " ")),
    "needle_essay": Recipe("one magic number in prose (RULER niah_single_2)", _needle(_essay, " "), reads_text=True),
    "multikey": Recipe("one of four magic numbers in prose (niah_multikey_1)", _needle(_essay, " ", keys=4), True),
    "multivalue": Recipe("the four magic numbers of one name in prose", _needle(_essay, " ", values=4), True),
    "kv": Recipe("the value of one key in a JSON object", _key_value),
    "variables": Recipe("the variables of a chain of assignments in noise (RULER vt)", _variables),
    "passkey": Recipe("a pass key in repeated noise", _passkey),
}
