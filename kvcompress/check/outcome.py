"""What came of checking a cache."""

from dataclasses import dataclass
from typing import Literal

# the cache that a model has without kvcompress
FULL = "DynamicCache"

Outcome = Literal["OK", "REFUSED", "FAULT"]


@dataclass(frozen=True)
class Checked:
    """What came of one cache.

    outcome: OK; REFUSED: the model has what the cache does not serve, and it said so; FAULT: it went wrong.
    reason: of a refusal or a fault, in one line.
    difference: the largest seen between logits that must be equal, over the largest logit; None: none were compared.
    lost: by a packing cache, as a share of what the prompt is worth; None for others.
    trace: of a refusal or a fault.
    """

    cache: str
    outcome: Outcome
    reason: str = ""
    difference: float | None = None
    lost: float | None = None
    trace: str = ""


class Fault(Exception):  # noqa: N818 (it is what a check finds, told in the words of a report)
    """A promise that a cache does not keep."""
