"""The processes that share the attention heads of a tensor-parallel model (`tp_plan`).

A cache holds the KV heads of its own process. Decisions per head need no other process; decisions over all heads of a
layer go through `TPGroup`.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, distributed
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

    def all_heads(self, x: Tensor, empty: float) -> Tensor:
        """The heads of all processes, [batch, kv_heads * size, any], the same on each.

        Args:
            x: [batch, kv_heads, any], whose last dimension may differ from process to process.
            empty: what fills the shorter ones.
        """
        functional = torch.ops._c10d_functional
        width = x.new_tensor([x.shape[-1]], dtype=torch.int64)
        most = int(functional.wait_tensor(functional.all_reduce(width, "max", self.name)))
        wide = torch.nn.functional.pad(x, (0, most - x.shape[-1]), value=empty).transpose(0, 1).contiguous()
        whole: Tensor = functional.wait_tensor(functional.all_gather_into_tensor(wide, self.size, self.name))
        return whole.transpose(0, 1)

    def own_heads(self, x: Tensor, dim: int) -> Tensor:
        """What of a tensor of all heads, which are in this dimension, is of this process's."""
        resolve: Any = distributed.distributed_c10d._resolve_process_group
        return x.chunk(self.size, dim)[distributed.get_rank(resolve(self.name))]
