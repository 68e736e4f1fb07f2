"""KeyDiff: keep the keys least like the others (arXiv:2504.15364).

score[j] = -cos(k_j, mean over candidates i of k_i / |k_i|)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.policies.method import register
from kvcompress.policies.policy import Candidates, Policy


@register("keydiff", "keys least like the others", costs="one pass over the kept keys", paper="2504.15364")
@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """No settings of its own; needs no queries, so it works the same in prefill and while decoding."""

    def score(self, candidates: Candidates) -> Tensor:
        directions = torch.nn.functional.normalize(candidates.keys.float(), dim=-1)
        directions = directions.masked_fill((candidates.positions < 0)[..., None], 0.0)
        anchor = torch.nn.functional.normalize(directions.sum(2, keepdim=True), dim=-1)
        return -(directions * anchor).sum(-1)
