"""ExpectedAttention: keep what the queries to come are expected to attend to (arXiv:2510.00636).

Queries before rotation are taken to be Gaussian. Their mean and covariance, over all queries seen so far, turned by
the average rotation R over the next `future` positions, give the expected attention of a future query to a key in
closed form:

    mu = R mean          S = R covariance R^T
    logit[j] = scale * mu . k_j + scale^2 / 2 * k_j^T S k_j          (the log of E exp(scale * q . k_j))
    score[j] = (mean over the group of softmax(logit)[j] + epsilon) * |v_j|

The softmax runs over the candidates other than sinks, and the first tokens' queries, which are outliers, are left
out of the statistics, as in the authors' code. There the statistics come from the prompt, once; here decoding keeps
updating them. They take heads * (head_dim^2 + head_dim) floats per layer, of which the covariance is as large as the
16-bit keys and values of group * head_dim tokens; scoring costs heads * head_dim^2 multiplications per candidate.
`covariance=False` saves both.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvcompress.policies.method import register
from kvcompress.policies.policy import Candidates
from kvcompress.policies.second_stage import SecondStage


@register(
    "expected",
    "what future queries should attend to",
    costs="query statistics",
    paper="2510.00636",
    aliases=("expected_attention",),
)
@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(SecondStage):
    """The authors' defaults.

    future: how many positions after the newest token the queries to come are spread over.
    covariance: use the second moment too, not only the mean.
    value_norm: weigh by the norm of the value; left to the second stage where there is one.
    epsilon: added to the attention before it is weighted.
    """

    uses_rotary: ClassVar[bool] = True
    compares: ClassVar[Literal["no", "heads", "layers"]] = "heads"

    sinks: int = 4
    future: int = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future < 1:
            raise ValueError(f"future must be at least 1 position, got {self.future}")
        if self.epsilon < 0.0:
            raise ValueError(f"epsilon must be 0 or more, got {self.epsilon}")

    @property
    def queries_needed(self) -> int | None:
        return None

    def state_bytes(self, heads: int, head_dim: int) -> int:
        # float32, and a count
        return 4 * (heads * (head_dim + head_dim**2 * self.covariance) + 1)

    def score(self, candidates: Candidates) -> Tensor:
        self._learn(candidates)
        mean, covariance = self._foresee(candidates)
        keys = candidates.keys.float()
        mean = mean.unflatten(1, (keys.shape[1], -1))
        group = mean.shape[2]
        logits = candidates.scale * (mean @ keys.mT)  # [batch, kv_heads, group, candidates]
        if covariance is not None:
            covariance = covariance.unflatten(1, (-1, group))
            # head by head: a group at once would hold the keys `group` times over
            for head in range(group):
                spread = ((keys @ covariance[:, :, head]) * keys).sum(-1)
                logits[:, :, head] += candidates.scale**2 / 2 * spread
        left_out = candidates.positions < self.sinks
        # finite, so that a head that has only sinks gets a flat softmax instead of NaN
        logits = logits.masked_fill(left_out[:, :, None], torch.finfo(logits.dtype).min)
        expected: Tensor = logits.softmax(-1).mean(2) + self.epsilon
        if self.value_norm and not self.second_stage:
            expected = expected * candidates.values.float().norm(dim=-1)
        return expected

    def _learn(self, candidates: Candidates) -> None:
        """Brings the statistics up to date with this forward's queries."""
        query = candidates.query.float()
        if candidates.rotary is not None:
            query = candidates.rotary.unrotate(query, candidates.query_positions[:, None])
        visible = candidates.visible
        if visible is None:
            visible = torch.ones_like(query[:, 0, :, 0], dtype=torch.bool)
        # how many of its sequence's tokens precede a query
        places = candidates.lengths[:, None] - visible.flip(-1).cumsum(-1).flip(-1)
        weight = (visible & (places >= self.sinks))[:, None, :, None].float()

        # Chan's update: the statistics of a union, from those of its parts
        fresh = weight.sum(2)  # [batch, 1, 1]
        fresh_mean = (query * weight).sum(2) / fresh.clamp(min=1)  # [batch, heads, head_dim]
        state = candidates.state
        if not state:
            state["query_count"] = torch.zeros_like(fresh)
            state["query_mean"] = torch.zeros_like(fresh_mean)
            if self.covariance:
                state["query_scatter"] = query.new_zeros(*fresh_mean.shape, fresh_mean.shape[-1])
        seen, mean = state["query_count"], state["query_mean"]
        total = (seen + fresh).clamp(min=1)
        step = fresh_mean - mean
        if self.covariance:
            off = (query - fresh_mean[:, :, None]) * weight
            between = step[..., None] * step[..., None, :] * (seen * fresh / total)[..., None]
            state["query_scatter"].add_(off.mT @ off + between)
        mean.add_(step * (fresh / total))
        seen.add_(fresh)

    def _foresee(self, candidates: Candidates) -> tuple[Tensor, Tensor | None]:
        """Mean [batch, heads, head_dim] and covariance [batch, heads, head_dim, head_dim] of the queries to come."""
        state, rotary = candidates.state, candidates.rotary
        mean = state["query_mean"]
        covariance = None
        if self.covariance:
            covariance = state["query_scatter"] / state["query_count"].clamp(min=1)[..., None]
        if rotary is not None:
            first = candidates.query_positions.amax(-1)[:, None] + 1  # [batch, 1]
            mean = rotary.rotate_average(mean, first, self.future)
            if covariance is not None:
                covariance = rotary.rotate_average(covariance, first[..., None], self.future)
                covariance = rotary.rotate_average(covariance.mT, first[..., None], self.future)
        return mean, covariance
