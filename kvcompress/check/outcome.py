"""The result of checking a cache."""

from dataclasses import dataclass
from typing import Literal

# the cache that a model has without kvcompress
FULL = "DynamicCache"

Outcome = Literal["OK", "REFUSED", "FAULT"]


@dataclass(frozen=True)
class Checked:
    """The result for one cache.

    outcome: OK; REFUSED: the cache does not support something about the model, and said so; FAULT: it went wrong.
    reason: of a refusal or a fault, on one line.
    difference: the largest difference of logits that must be equal, over the largest logit; None: none were compared.
    lost: what a packing cache loses, as a share of what the prompt is worth; None for others.
    trace: the traceback of a refusal or a fault.
    limits: what the model cannot do with any cache, so that it was not asked of this one either.
    """

    cache: str
    outcome: Outcome
    reason: str = ""
    difference: float | None = None
    lost: float | None = None
    trace: str = ""
    limits: str = ""


class Fault(Exception):  # noqa: N818 (it is what a check finds, told in the words of a report)
    """A promise that a cache does not keep."""
