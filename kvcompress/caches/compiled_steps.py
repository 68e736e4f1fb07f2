"""Steps of a compiled model into a full cache's buffers: what changes from step to step is counted on the device."""

import torch
from torch import Tensor

from kvcompress.kernels.attention import slot_attention
from kvcompress.layer import AttentionInput
from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.segment import EMPTY


class CompiledSteps:
    """Where the next tokens of a segment go, in tensors that stay where they are, as CUDA graphs need it.

    positions: [batch, room] int32, of each column's token in its own sequence; EMPTY for padding and for room.
    lengths: [batch] int32, real tokens held. column: [1] int64, which column comes next.
    """

    def __init__(self, dense: DenseSegment) -> None:
        self.dense = dense
        self.positions, self.lengths, self.column = self._counted()
        self.pin()

    def tensors(self) -> list[Tensor]:
        return [self.positions, self.lengths, self.column]

    def pin(self) -> None:
        """Tells the compiler that tensors stay where they are: else CUDA graphs refuse to write to them."""
        for tensor in (self.dense.keys, self.dense.values, *self.tensors()):
            # unguarded: another cache of the same shapes records a graph, and compiles nothing
            torch._dynamo.mark_static_address(tensor, guard=False)

    def catch_up(self) -> None:
        """Counts anew, after the segment was changed by other means."""
        counted = self._counted()
        if [each.shape for each in counted] != [each.shape for each in self.tensors()]:
            self.positions, self.lengths, self.column = counted
        else:
            for held, fresh in zip(self.tensors(), counted, strict=True):
                held.copy_(fresh)
        self.pin()

    def _counted(self) -> tuple[Tensor, Tensor, Tensor]:
        keys, _, visible = self.dense.held()
        batch, room = keys.shape[0], self.dense.keys.shape[2]
        if visible is None:
            visible = torch.ones(batch, self.dense.length, dtype=torch.bool, device=keys.device)
        positions = torch.full((batch, room), EMPTY, dtype=torch.int32, device=keys.device)
        counted = visible.cumsum(-1, dtype=torch.int32) - 1
        positions[:, : self.dense.length] = counted.masked_fill(~visible, EMPTY)
        column = torch.full((1,), self.dense.length, dtype=torch.int64, device=keys.device)
        return positions, visible.sum(-1, dtype=torch.int32), column

    def store(self, x: AttentionInput) -> None:
        """Writes a token, with which `attend` counts from now on; RuntimeError: there is no room."""
        torch._assert_async(
            (self.column < self.positions.shape[1]).all(),
            "a compiled step has no room for its token: call cache.reserve() with as many steps as will come",
        )
        self.dense.keys.index_copy_(2, self.column, x.key)
        self.dense.values.index_copy_(2, self.column, x.value)
        at = self.lengths if x.visible is None else torch.where(x.visible[:, 0], self.lengths, EMPTY)
        self.positions.index_copy_(1, self.column, at[:, None])

    def attend(self, x: AttentionInput) -> tuple[Tensor, Tensor]:
        """Attention of one token to all that is held, its own among it, and the log-sum-exp."""
        keys = self.dense.keys
        positions = self.positions[:, None].expand(keys.shape[:3])
        return slot_attention(x.query, keys, self.dense.values, positions, self.lengths[:, None], x.spec)

    def count(self, x: AttentionInput) -> None:
        """Counts the token that `store` wrote."""
        self.lengths.add_(x.real_tokens)
        self.column.add_(1)

    def take_in(self, tokens: int) -> None:
        """Tells the segment of so many tokens that compiled steps wrote, of which the host knows nothing else."""
        length = self.dense.length + tokens
        shown = self.positions[:, self.dense.length : length] != EMPTY
        self.dense.length = length
        if self.dense.visible is not None or not bool(shown.all()):
            self.dense.show(self.positions[:, :length] != EMPTY)
