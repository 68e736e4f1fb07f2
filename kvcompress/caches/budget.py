"""Budgets: how many tokens, as a count or as a fraction of those seen, and how the layers of a model share them."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

Allocation = Literal["uniform", "pyramid", "heads", "global"]
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "pyramid", "heads", "global")
# heads compete for the budget
COMPETING = ("heads", "global")

# PyramidKV's beta: the last layer gets 1 / 20 of the mean, the first 39 / 20
_STEEPNESS = 20
# positions and counts of tokens are int32, and a layer of a pyramid gets up to twice the mean
_MOST = 1 << 29


def count_or_fraction(given: Any, name: str, unit: str, whole: str) -> int | float:
    """A Python, NumPy or zero-dimensional torch number as a Python int, or as a float within (0, 1].

    Args:
        name, unit, whole: for the errors: the argument, what an int counts, and what a float is a fraction of.

    Raises:
        TypeError: it is not a number.
        ValueError: it is a fraction outside (0, 1].
    """
    number: object = given.item() if getattr(given, "ndim", None) == 0 else given
    error: type[Exception] = TypeError
    if isinstance(number, int | float) and not isinstance(number, bool):
        if isinstance(number, int) or 0.0 < number <= 1.0:
            return number
        error = ValueError
    raise error(f"{name} must be {unit} (int), or a fraction of {whole} in (0, 1] (float), got {given!r}")


@dataclass(frozen=True)
class Budget:
    """Tokens per sequence and KV head: `Budget(512)`, or as a fraction of the tokens seen `Budget(0.2)`.

    amount: the count or the fraction; NumPy and torch numbers become Python's.
    least: the fewest tokens that it may allow. explained: how an error describes them.
    whole: what a fraction is a fraction of, if not the tokens seen.

    Raises:
        TypeError: the amount is not a number.
        ValueError: it is a count below the least or above 2 ** 29, or a fraction outside (0, 1].
    """

    amount: int | float
    least: int = 1
    explained: str = "1 token"
    whole: str = "the tokens seen"

    def __post_init__(self) -> None:
        amount = count_or_fraction(self.amount, "budget", "a count of tokens", self.whole)
        object.__setattr__(self, "amount", amount)
        if isinstance(amount, int) and amount < self.least:
            raise ValueError(f"budget must be at least {self.explained}, got {amount}")
        if isinstance(amount, int) and amount > _MOST:
            raise ValueError(f"budget must be at most {_MOST} tokens, got {amount}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """A budget written on the command line: a count if it is an integer, else a fraction."""
        for read in (int, float):
            try:
                amount = read(text)
            except ValueError:
                continue
            return cls(amount)
        raise ValueError(f"budget must be a count of tokens such as 512, or a fraction such as 0.2, got {text!r}")

    def tokens(self, seen: int) -> int:
        """How many tokens it allows after so many tokens seen."""
        return max(self.least, int(self.amount * seen)) if isinstance(self.amount, float) else self.amount

    def per_layer(self, allocation: Allocation, layers: int) -> list[Self]:
        """Each layer's budget; their mean is this one, up to the rounding of token counts.

        `pyramid` follows PyramidKV (arXiv:2406.02069): early layers attend broadly and get more, late layers less. Of a
        count, every layer gets the least (sinks, recent tokens); the rest decreases linearly from the first layer to
        the last, which gets a twentieth of the mean. A sliding layer keeps no more than its window; the part of its
        share that it cannot use is not given to others.

        Raises:
            ValueError: an unknown allocation.
        """
        if allocation not in ALLOCATIONS:
            raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
        if allocation != "pyramid" or layers == 1:
            return [self] * layers
        amount = self.amount
        if isinstance(amount, int):
            shared = amount - self.least
            line = _line(2 * shared - shared / _STEEPNESS, shared / _STEEPNESS, layers)
            return [replace(self, amount=self.least + round(share)) for share in line]
        # no layer keeps more than the whole prompt; the last layers get what the first ones cannot use
        most = min(1.0, 2 * amount - amount / _STEEPNESS)
        return [replace(self, amount=share) for share in _line(most, 2 * amount - most, layers)]


def _line(first: float, last: float, layers: int) -> list[float]:
    return [first + (last - first) * index / (layers - 1) for index in range(layers)]
