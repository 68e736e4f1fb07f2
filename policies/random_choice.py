"""Random: keep a uniform random sample of the tokens, the baseline that any other choice must beat.

    score[j] = hash(seed, place of j in its sequence)

Scores never change, so at any length what is kept is a sample without replacement of all tokens so far, as in
reservoir sampling. A token's score depends on nothing else: a row keeps the same tokens alone, in any batch and behind
any padding, and so does every head of every layer.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvcompress.policies.method import register
from kvcompress.policies.policy import Candidates, Policy

_LOW = 2**32 - 1


@register("random", "a random sample of all tokens", costs="nothing: the sanity baseline", tried={"seed": (0, 7)})
@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """The same seed makes the same choice.

    seed: of the hash, any integer.
    """

    seed: int = 0
    static: ClassVar[bool] = True

    def score(self, candidates: Candidates) -> Tensor:
        # a 32-bit hash in int64, whose factors are below 2^31: no product overflows
        x = (candidates.positions.long() + self.seed * 0x9E3779B9 % 2**32) & _LOW
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW
        x = ((x ^ (x >> 15)) * 0x735A2D97) & _LOW
        # float32 holds 24 bits exactly
        return ((x ^ (x >> 15)) >> 8).float()
