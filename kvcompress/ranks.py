"""The processes that share a model's attention heads, where it is tensor parallel (`tp_plan`).

A cache holds the KV heads of its own process. What a method decides head by head needs no other process; what it
decides over all heads of a layer goes through `Ranks`.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

# projections that make keys, by themselves or with queries and values
_MAKES_KEYS = ("k_proj", "qkv_proj", "query_key_value")


@dataclass(frozen=True)
class Ranks:
    """A group of processes that hold equally many heads each. name: torch's name of the group. size: processes."""

    name: str
    size: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self | None:
        """Who shares the model's heads; None where one process has them all."""
        mesh = getattr(model, "_device_mesh", None)
        size = getattr(model, "_tp_size", None) or 1
        plan = getattr(model, "_tp_plan", None) or {}
        splits = any(rule.rpartition(".")[2] in _MAKES_KEYS and "colwise" in how for rule, how in plan.items())
        if mesh is None or size == 1 or not splits:
            return None
        group = mesh.get_group("tp") if "tp" in (mesh.mesh_dim_names or ()) else mesh.get_group()
        return cls(group.group_name, size)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of the processes' tensors, the same on each."""
        # as functional operations a compiled graph keeps them
        functional = torch.ops._c10d_functional
        return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", self.name)) / self.size
