"""The processes that share a model's attention heads, where it is tensor parallel (`tp_plan`).

A cache holds the KV heads of its own process. What a method decides head by head needs no other process; what it
decides over all heads of a layer goes through `TPGroup`.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf


@dataclass(frozen=True)
class TPGroup:
    """A group of processes that hold equally many heads each. name: torch's name of the group. size: processes."""

    name: str
    size: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self | None:
        """Who shares the model's heads; None where one process has them all."""
        group = hf.head_group(model)
        return None if group is None else cls(*group)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of the processes' tensors, the same on each."""
        # as functional operations a compiled graph keeps them
        functional = torch.ops._c10d_functional
        return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", self.name)) / self.size
