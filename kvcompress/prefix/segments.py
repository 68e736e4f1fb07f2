"""The segments of nodes and suffixes in a layer."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.segment import Segment
from kvcompress.storage.transform_coding import Coding


class SuffixSegment(DenseSegment):
    """Each sequence's own tokens; with many sequences spare room adds up, so it is kept small."""

    growth: ClassVar[int] = 16


class NodeSegment(Segment):
    """Every token of a node, or on a sliding layer its last ones. It never changes, so copies share it.

    prefix_keys, prefix_values: [1, kv_heads, tokens, head_dim]. codings: by tensor, how a file had them, if it was a
    lossy one: they are coded so again, and lose next to nothing more.
    """

    tensor_names = ("prefix_keys", "prefix_values")

    prefix_keys: Tensor
    prefix_values: Tensor
    codings: Mapping[str, Coding] = MappingProxyType({})

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.prefix_keys, self.prefix_values = keys, values

    @property
    def tokens(self) -> int:
        return self.prefix_keys.shape[2]

    def kept(self) -> Tensor:
        return torch.full(self.prefix_keys.shape[:2], self.tokens, device=self.prefix_keys.device)
