"""Spans of tokens that see one another both ways, such as those of an image, within causal attention.

    a token of a span sees   what causal attention shows it   and   the span's later tokens

The second part is causal attention again, over the span from its end to its beginning, where each token sees those that
come before it there, without itself. Both parts are merged by their log-sum-exps, so no queries x keys matrix is built.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.kernels.attention import causal_attention
from kvcompress.kernels.column_sums import causal_column_sums
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.layer import AttentionInput


@dataclass(frozen=True)
class Spans:
    """The spans of a forward's tokens.

    row: [spans] int64, the sequence of each. column: [spans, longest] int64, its tokens from the last one to the first,
    and before them any. real: [spans, longest] bool, which are its tokens.
    """

    row: Tensor
    column: Tensor
    real: Tensor

    @classmethod
    def of(cls, x: AttentionInput) -> "Spans | None":
        """Those of a forward; None if there are none, or none of several tokens."""
        if x.spans is None:
            return None
        numbers = x.spans if x.visible is None else x.spans.masked_fill(~x.visible, 0)
        row, column = numbers.nonzero(as_tuple=True)
        names = row * (numbers.max() + 1) + numbers[row, column]
        # by spans, and within them from the last token to the first
        order = names.flip(0).argsort(stable=True)
        row, column = row.flip(0)[order], column.flip(0)[order]
        _, span, counts = names.flip(0)[order].unique_consecutive(return_inverse=True, return_counts=True)
        longest = int(counts.max()) if len(counts) else 0
        if longest < 2:
            return None
        place = torch.arange(len(span), device=span.device) - counts.cumsum(0)[span] + longest
        shape = (len(counts), longest)
        columns = torch.zeros(shape, dtype=torch.int64, device=span.device)
        real = torch.zeros(shape, dtype=torch.bool, device=span.device)
        columns[span, place], real[span, place] = column, True
        return cls(row[counts.cumsum(0) - 1], columns, real)

    def attend(self, x: AttentionInput) -> tuple[Tensor, Tensor]:
        """Attention to the later tokens of a query's span, [batch, heads, queries, value_dim], and its log-sum-exp,
        -inf where there are none."""
        query, key, value, spec = self._of(x)
        out, lse = causal_attention(query, key, value, spec, self.real[:, :-1])
        whole = out.new_zeros(*x.query.shape[:3], out.shape[-1])
        weight = lse.new_full(x.query.shape[:3], -torch.inf)
        at, is_query = (self.row[:, None], self.column[:, 1:]), self.real[:, 1:]
        row, column = (index.expand_as(is_query)[is_query] for index in at)
        whole[row, :, column] = out.transpose(1, 2)[is_query]
        weight[row, :, column] = lse.transpose(1, 2)[is_query]
        return whole, weight

    def column_sums(self, x: AttentionInput, lse: Tensor) -> Tensor:
        """The attention that tokens received from earlier ones of their spans, [batch, kv_heads, tokens] float32.

        Args:
            lse: [batch, heads, queries], of queries over all that they see, inf for those that do not count.
        """
        query, key, _, spec = self._of(x)
        of_spans = lse.transpose(1, 2)[self.row[:, None], self.column[:, 1:]].transpose(1, 2)
        of_spans = of_spans.masked_fill(~self.real[:, None, 1:], torch.inf)
        sums = causal_column_sums(query, key, of_spans.contiguous(), spec, self.real[:, :-1])
        whole = sums.new_zeros(x.key.shape[0], x.key.shape[1], x.tokens)
        is_key = self.real[:, :-1]
        row, column = self.row[:, None].expand_as(is_key)[is_key], self.column[:, :-1][is_key]
        whole[row, :, column] = sums.transpose(1, 2)[is_key]
        return whole

    def _of(self, x: AttentionInput) -> tuple[Tensor, Tensor, Tensor, LogitSpec]:
        """Queries, and the keys and values that come before them, of each span from its end, [spans, heads, longest -
        1, any]; and how logits are made."""
        row = self.row[:, None]
        query = x.query.transpose(1, 2)[row, self.column[:, 1:]].transpose(1, 2)
        key, value = (side.transpose(1, 2)[row, self.column[:, :-1]].transpose(1, 2) for side in (x.key, x.value))
        # a span's later tokens are in every window
        return query, key, value, x.spec._replace(window=None)


def attend_ahead(x: AttentionInput, spans: Spans | None) -> list[tuple[Tensor, Tensor]]:
    """What is to be merged with causal attention for the later tokens of spans: nothing where there are none."""
    return [] if spans is None else [spans.attend(x)]
