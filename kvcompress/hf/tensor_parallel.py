"""The processes that share the attention heads of a tensor-parallel model (`tp_plan`).

A cache holds the KV heads of its own process. Decisions per head need no other process; decisions over all heads of a
layer go through `TPGroup`.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf


@dataclass(frozen=True)
class TPGroup:
    """A group of processes with equally many heads each. name: torch's name of the group. size: how many they are."""

    name: str
    size: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self | None:
        """The group that shares the model's heads; None if one process has them all."""
        group = hf.head_group(model)
        return None if group is None else cls(*group)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of the processes' tensors, the same on each."""
        # functional operations stay in a compiled graph
        functional = torch.ops._c10d_functional
        return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", self.name)) / self.size
