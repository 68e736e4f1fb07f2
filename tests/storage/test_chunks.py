"""Chunked attention: a token sees those of its own chunk."""

import pytest
import torch

from kvcompress.kernels.attention import causal_attention
from kvcompress.kernels.column_sums import causal_column_sums
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.storage.chunks import attend_in_chunks, ends_of, sums_in_chunks

SPEC = LogitSpec(0.3, window=5, softcap=4.0)


def scene(tokens=23, queries=23):
    torch.manual_seed(0)
    query = torch.randn(3, 6, queries, 16)
    key, value = (torch.randn(3, 2, tokens, width) for width in (16, 8))
    # rows that begin at other places, one after some padding, one with some in between
    visible = torch.ones(3, tokens, dtype=torch.bool)
    visible[1, :7] = False
    visible[2, 9:12] = False
    places = torch.tensor([[3], [0], [11]]) + visible.cumsum(-1) - 1
    return query, key, value, visible, places.clamp(min=0)


def by_mask(query, key, value, seen):
    """Attention by a mask [batch, queries, tokens], its log-sum-exp and the weights."""
    key, value = (x.repeat_interleave(3, 1) for x in (key, value))
    logits = SPEC.cap_(query @ key.mT * SPEC.scale).masked_fill(~seen[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weights = logits.softmax(-1).nan_to_num(0.0)
    return weights @ value, lse, weights


@pytest.mark.parametrize("chunk", [1, 4, 5, 16, 100])
@pytest.mark.parametrize("queries", [23, 9, 1])
def test_a_token_sees_its_own_chunk(chunk, queries):
    query, key, value, visible, places = scene(queries=queries)
    of_chunk, column = places // chunk, torch.arange(23)
    seen = (of_chunk[:, :, None] == of_chunk[:, None]) & (column <= column[:, None]) & visible[:, None]
    seen = seen[:, -queries:]
    out, lse, weights = by_mask(query, key, value, seen)
    found, found_lse = attend_in_chunks(query, key, value, SPEC, visible, places, chunk)
    torch.testing.assert_close(found, out)
    torch.testing.assert_close(found_lse, lse)
    real = visible[:, None, -queries:]
    # a query that is padding gives nothing
    shown = lse.masked_fill(~real, torch.inf)
    wanted = (weights * real[..., None]).unflatten(1, (2, 3)).sum((2, 3))
    torch.testing.assert_close(sums_in_chunks(query, key, shown, SPEC, visible, places, chunk), wanted)


def test_without_padding_only_the_columns_of_a_chunk_are_read():
    query, key, value, _, _ = scene()
    places, chunk = torch.arange(2, 25)[None], 8
    out, lse = attend_in_chunks(query, key, value, SPEC, None, places, chunk)
    sums = sums_in_chunks(query, key, lse, SPEC, None, places, chunk)
    plain = SPEC._replace(window=None)
    for start, stop in ((0, 6), (6, 14), (14, 22), (22, 23)):
        own = [x[:, :, start:stop] for x in (query, key, value)]
        for found, wanted in zip((out, lse), causal_attention(*own, plain), strict=True):
            torch.testing.assert_close(found[:, :, start:stop], wanted)
        wanted = causal_column_sums(*own[:2], lse[:, :, start:stop], plain)
        torch.testing.assert_close(sums[:, :, start:stop], wanted)


def test_a_chunk_is_a_window_that_ends_with_it():
    positions = torch.arange(-1, 30, dtype=torch.int32)
    ends = ends_of(positions, 8)
    assert ends.dtype == torch.int32
    for query, end in zip(positions[1:].tolist(), ends[1:].tolist(), strict=True):
        seen = [place for place in range(query + 1) if place > end - 8]
        assert seen == [place for place in range(query + 1) if place // 8 == query // 8]


def test_rows_may_share_their_places():
    query, key, value, _, _ = scene(queries=1)
    places = torch.arange(2, 25)[None]
    found = attend_in_chunks(query, key, value, SPEC, None, places, 5)
    wanted = attend_in_chunks(query, key, value, SPEC, torch.ones(3, 23, dtype=torch.bool), places.expand(3, -1), 5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
