"""Chunked attention (Llama 4): a token sees those of its own chunk, `position // chunk`, and none of earlier ones.

For what precedes all queries, a chunk is a window that ends where the chunk does: a query at position p sees what one
at `ends_of(p)` would see within a window of `chunk` tokens. New tokens attend to one another in pieces that end where a
chunk of some row ends, so that within a piece each row has one chunk, and causal attention to what is visible of it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcompress.kernels.attention import causal_attention
from kvcompress.kernels.column_sums import causal_column_sums
from kvcompress.kernels.common.logits import LogitSpec


def ends_of(positions: Tensor, chunk: int) -> Tensor:
    """The last position of the chunk of each position, in the same dtype."""
    return torch.div(positions, chunk, rounding_mode="floor") * chunk + (chunk - 1)


def attend_in_chunks(
    query: Tensor, key: Tensor, value: Tensor, spec: LogitSpec, visible: Tensor | None, places: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Attention as `causal_attention` gives it, to the tokens of a query's own chunk.

    Args:
        query: [batch, heads, queries, head_dim], of the last tokens. key, value: [batch, kv_heads, tokens, head_dim].
        visible: [batch, tokens] bool, False for padding; None if nothing is padded.
        places: [batch or 1, tokens], positions of the tokens in their sequences; of padding that of the token before.
    """
    answers = []
    for rows, columns, shown in _pieces(query, visible, places, chunk):
        own = query[:, :, rows], key[:, :, columns], value[:, :, columns]
        answers.append(causal_attention(*own, spec._replace(window=None), shown))
    outs, lses = zip(*answers, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def sums_in_chunks(
    query: Tensor, key: Tensor, lse: Tensor, spec: LogitSpec, visible: Tensor | None, places: Tensor, chunk: int
) -> Tensor:
    """The attention that tokens receive from such queries, [batch, kv_heads, tokens] float32, as `causal_column_sums`.

    Args:
        lse: [batch, heads, queries], of all that each query sees. The others as in `attend_in_chunks`.
    """
    sums = key.new_zeros(key.shape[:3], dtype=torch.float32)
    for rows, columns, shown in _pieces(query, visible, places, chunk):
        own = query[:, :, rows], key[:, :, columns], lse[:, :, rows]
        sums[:, :, columns] += causal_column_sums(*own, spec._replace(window=None), shown)
    return sums


def _pieces(
    query: Tensor, visible: Tensor | None, places: Tensor, chunk: int
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Which queries, of the last columns, have one chunk in each row; the columns that some of them see; and of these
    the ones that each row sees, [batch, columns] bool, None for all."""
    queries, tokens = query.shape[2], places.shape[1]
    of_chunk = torch.div(places, chunk, rounding_mode="floor").expand(query.shape[0], -1)
    first = tokens - queries
    if queries == 1:
        # a step waits for no device
        shown = of_chunk == of_chunk[:, -1:]
        yield slice(0, 1), slice(0, tokens), shown if visible is None else shown & visible
        return
    changes = (of_chunk[:, first + 1 :] != of_chunk[:, first:-1]).any(0)
    cuts = (changes.nonzero()[:, 0] + first + 1).tolist()
    for start, stop in zip([first, *cuts], [*cuts, tokens], strict=True):
        shown = of_chunk[:, :stop] == of_chunk[:, start : start + 1]
        if visible is not None:
            shown = shown & visible[:, :stop]
        # at least the piece's own columns
        low = min(start, int(shown.any(0).to(torch.uint8).argmax()))
        shown = shown[:, low:]
        hides = visible is not None or not bool(shown.all())
        yield slice(start - first, stop - first), slice(low, stop), shown if hides else None
