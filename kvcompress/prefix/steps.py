"""Steps of a compiled model into the suffixes of rows that also attend to nodes."""

import torch
from torch import Tensor

from kvcompress.caches.compiled_steps import CompiledSteps, pin
from kvcompress.kernels.shared_attention import BlockTables, shared_attention
from kvcompress.layer import AttentionInput
from kvcompress.storage.segment import EMPTY


class SharedSteps(CompiledSteps):
    """Positions and lengths count from each row's first token, those in nodes included.

    tables: the nodes, and the rows that pass through them; None while there are none.
    """

    tables: BlockTables | None = None

    def follow(self, lengths: Tensor, tables: BlockTables | None) -> None:
        """Lets the next tokens follow on so many of each row, [batch] int32, and attend to these nodes too."""
        before = (lengths - self.lengths)[:, None]
        self.positions.copy_(torch.where(self.positions == EMPTY, EMPTY, self.positions + before))
        self.lengths.copy_(lengths)
        self.tables = tables
        if tables is not None:
            # nodes are not written to, but CUDA graphs would copy them before every step
            pin(*tables.keys, *tables.values, *tables.tensors())

    def output(self, x: AttentionInput) -> Tensor:
        if self.tables is None:
            return super().output(x)
        keys, values, at = self.segment.keys, self.segment.values, self.lengths[:, None]
        positions = self.positions[:, None].expand(keys.shape[:3])
        return shared_attention(x.query, keys, values, self.tables, x.spec, None, positions, at, x.sinks)
