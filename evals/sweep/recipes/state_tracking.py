"""State that changes step by step, written down after each step: a task whose answer is long.

The context has the values of four counters and a list of steps, each of which sets one counter. The answer is a line
per step, with the step and all four counters after it:

    Start: A=3 B=7 C=1 D=4
    Step 1: set B to 5.
    ...
    answer: Step 1: set B to 5. A=3 B=5 C=1 D=4

The first half of a line is to be had from the context alone, the second from it and the line before, so a cache that
evicts while it decodes loses either. The score is the share of the lines that are right.

As small models cannot do this by themselves, there is a forced form too: the model is given the right answer token by
token, and the score is the share of the steps' counters and values, and of the counters after them, that it would have
chosen (`evals/sweep/forced.py`).
"""

import re
from random import Random

from kvcompress.evals.sweep.recipes.recipe import LINES, Draw, Question, Recipe, Sample, Sizing, make_sample

_COUNTERS = "ABCD"
# what a transcript's pieces are: of the step, which the context has, or of the state after it
STEP, STATE = "step", "state"
_SCORED = re.compile(r"( [A-D](?= to )|(?<= to )\d|(?<==)\d)")
# tokens that an answer may take beyond the right one
_SPARE = 8


class _Steps:
    """Steps at random, drawn when they are needed."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        start = _digits(draw.random, len(_COUNTERS))
        self.states = [start]
        self.steps: list[str] = []
        # tokens of the right answer's lines
        self.sizes: list[int] = []

    def take(self, count: int) -> list[str]:
        """The first so many steps."""
        while len(self.steps) < count:
            random, state = self._draw.random, list(self.states[-1])
            place = random.randrange(len(state))
            state[place] = random.choice([digit for digit in "0123456789" if digit != state[place]])
            self.states.append(state)
            self.steps.append(f"Step {len(self.steps) + 1}: set {_COUNTERS[place]} to {state[place]}.")
            self.sizes.append(self._draw.count(f"{self.line(len(self.steps))}\n"))
        return self.steps[:count]

    def line(self, number: int) -> str:
        """The state after a step, or at the start."""
        name = self.steps[number - 1] if number else "Start:"
        pairs = zip(_COUNTERS, self.states[number], strict=True)
        return f"{name} {' '.join(f'{counter}={value}' for counter, value in pairs)}"


def _digits(random: Random, count: int) -> list[str]:
    return [str(random.randrange(10)) for _ in range(count)]


def _track(draw: Draw) -> Sizing:
    drawn = _Steps(draw)
    head = (
        f"Below are the values of the counters {', '.join(_COUNTERS[:-1])} and {_COUNTERS[-1]} at the start, and steps "
        "that change them. Each step sets one counter to another value.\n"
    )

    def sizing(units: int) -> Sample:
        body = "\n".join([drawn.line(0), *drawn.take(units)])
        sizes = drawn.sizes[:units]
        asked = 0
        while asked < units and sum(sizes[: asked + 1]) + _SPARE <= draw.transcript:
            asked += 1
        if not asked:
            raise ValueError(
                f"transcript must be at least {sizes[0] + _SPARE} tokens, which one line takes, got {draw.transcript}"
            )
        lines = tuple(drawn.line(number) for number in range(1, asked + 1))
        question = Question(
            f"\nWrite down each step and all counters after it, from step 1 to step {asked}, one line per step.",
            f"{drawn.line(0)}\nStep 1:",
            lines,
            sum(sizes[:asked]) + _SPARE,
            LINES,
        )
        return make_sample(head, body, [question], 0.5)

    return sizing


def transcript(sample: Sample) -> list[tuple[str, str | None]]:
    """The right answer after the answer's first words, in pieces: STEP, STATE, or None for the text between them."""
    text = "\n".join(sample.answers).removeprefix(sample.answer_prefix.splitlines()[-1])
    found: list[tuple[str, str | None]] = []
    for number, piece in enumerate(_SCORED.split(text)):
        before = found[-1][0] if found else ""
        kind = None if number % 2 == 0 else STATE if before.endswith("=") else STEP
        found += [(piece, kind)] if piece else []
    return found


RECIPES = {
    "state_tracking": Recipe("many steps and four counters after each, as a long answer", _track),
    "state_tracking_forced": Recipe(
        "the same, where the right answer is given and its steps and states predicted", _track, is_forced=True
    ),
}
