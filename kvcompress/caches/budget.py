"""Numbers that a caller gives as a count or as a fraction, such as budgets."""

from typing import Any


def count_or_fraction(given: Any, name: str, unit: str, whole: str) -> int | float:
    """The number as Python's own int, or float within (0, 1], where NumPy's or a tensor of no dimension was given.

    Args:
        name, unit, whole: for the errors: of the argument, what an int counts, and what a float is a fraction of.

    Raises:
        TypeError: it is no number.
        ValueError: it is a fraction outside of (0, 1].
    """
    number = given.item() if getattr(given, "ndim", None) == 0 else given
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{name} must be {unit} (int) or a fraction of {whole} (float), got {given!r}")
    if isinstance(number, float) and not 0.0 < number <= 1.0:
        raise ValueError(f"{name} as a fraction of {whole} must be in (0, 1], got {number}")
    return number
