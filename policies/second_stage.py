"""CriticalKV: part of the budget goes to tokens that change the layer's output most (arXiv:2502.03805).

    score2[j] = (score[j] / sum over candidates of score + 1e-4) * mean over the heads h of j's group of |W_O,h v_j|_1

Attention to a token matters little where its value is small, or is mapped to little. The paper bounds the change of a
layer's output by score2, provided that a first part of the budget has gone to the highest scores alone. Both stages end
every forward of several tokens. Single tokens that follow are judged by their scores: to map all values that are held
would cost more than the step.
"""

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from kvcompress.policies.policy import Policy

_EPSILON = 1e-4
# numbers of mapped values held at a time
_BLOCK = 2**22


@dataclass(frozen=True, kw_only=True)
class SecondStage(Policy):
    """A policy whose scores are attention, so that what a token adds to the output can be told.

    second_stage: share of a head's budget that is chosen in the second stage; 0.5 in the paper, 0 for none.
    """

    second_stage: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.second_stage <= 1.0:
            raise ValueError(f"second_stage must be a share of the budget, from 0 to 1, got {self.second_stage}")


def has_second_stage(policy: Policy) -> TypeGuard[SecondStage]:
    """Whether some of the budget is chosen by what values add to the output."""
    return isinstance(policy, SecondStage) and policy.second_stage > 0.0


def second_scores(scores: Tensor, norms: Tensor) -> Tensor:
    """By what the second stage chooses, [batch, kv_heads, candidates] float32.

    Args:
        scores: [batch, kv_heads, candidates] float32, the policy's, 0 where there is no token.
        norms: what `output_norms` gives for the candidates' values.
    """
    # what is not a number stays one, and counts in no other's share
    total = scores.nan_to_num(nan=0.0).sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return (scores / total + _EPSILON) * norms


@torch.no_grad()
def output_norms(value: Tensor, weight: Tensor) -> Tensor:
    """L1 norms of what values add to the layer's output at an attention of 1, averaged over the heads of a group.

    Args:
        value: [batch, kv_heads, tokens, value_dim].
        weight: of the output projection, [heads, value_dim, hidden].

    Returns:
        [batch, kv_heads, tokens] float32.
    """
    batch, kv_heads, tokens, _ = value.shape
    dtype = torch.promote_types(weight.dtype, value.dtype)
    of_heads = weight.to(dtype).unflatten(0, (kv_heads, -1))
    block = max(1, _BLOCK // (batch * kv_heads * weight.shape[-1]))
    norms = torch.zeros(batch, kv_heads, tokens, dtype=torch.float32, device=value.device)
    for part, into in zip(value.to(dtype).split(block, 2), norms.split(block, 2), strict=True):
        for head in of_heads.unbind(1):
            into += (part @ head).abs().sum(-1, dtype=torch.float32)
    norms /= of_heads.shape[1]
    return norms
