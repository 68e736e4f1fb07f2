import pytest
import torch

from kvcompress.kernels import sparse_attention as module
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.sparse_attention import (
    sparse_attention,
    sparse_attention_reference,
    sparse_column_sums,
    sparse_column_sums_reference,
)
from tests.kernels.inputs import DEVICE, DTYPES, heads, tolerance

SPEC = LogitSpec(0.3, softcap=5.0)
# batch, heads, kv_heads, queries, tokens, choices: few of many are gathered, else all pairs are computed
SHAPES = [(2, 4, 1, 9, 60, 6), (2, 4, 2, 9, 60, 6), (2, 4, 2, 5, 20, 30), (1, 3, 3, 1, 70, 16), (2, 2, 1, 4, 0, 3)]


def inputs(batch, of_queries, kv_heads, queries, tokens, choices, dtype=torch.float32):
    """Tokens in any order, some places without one; choices that are partly elsewhere, and a query without any."""
    query = heads(batch, of_queries, queries, 24, dtype)
    key, value = heads(batch, kv_heads, tokens, 24, dtype), heads(batch, kv_heads, tokens, 16, dtype)
    places = torch.stack([torch.randperm(90)[:tokens] for _ in range(batch)]).int().to(DEVICE)
    chosen = torch.stack([torch.randperm(90)[:choices] for _ in range(batch * queries)]).int().to(DEVICE)
    chosen = chosen.view(batch, queries, choices)
    places[:, 3:5] = -1
    chosen[:, :, -1] = -1
    chosen[0, -1] = -1
    return query, key, value, places, chosen


@pytest.mark.parametrize("at_a_time", [1, 2**22], ids=["one query at a time", "all at once"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_agrees_with_the_reference(monkeypatch, shape, at_a_time):
    monkeypatch.setattr(module, "_MOST", at_a_time)
    query, key, value, places, chosen = inputs(*shape)
    out, lse = sparse_attention(query, key, value, places, chosen, SPEC)
    wanted, of_all = sparse_attention_reference(query, key, value, places, chosen, SPEC)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, of_all)
    assert bool((out[0, :, -1] == 0).all())
    assert bool((lse[0, :, -1] == -torch.inf).all())
    # a query that is left out gives nothing
    lse[:, :, 0] = torch.inf
    given = sparse_column_sums(query, key, places, chosen, lse, SPEC)
    torch.testing.assert_close(given, sparse_column_sums_reference(query, key, places, chosen, lse, SPEC))


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_heads_hold_and_choose_tokens_of_their_own(shape):
    batch, of_queries, kv_heads, queries, tokens, choices = shape
    query, key, value, _, _ = inputs(*shape)
    # as so many sequences of one KV head
    alone = inputs(batch * kv_heads, of_queries // kv_heads, 1, queries, tokens, choices)[3:]
    places, chosen = (each.unflatten(0, (batch, kv_heads)) for each in alone)
    out, lse = sparse_attention(query, key, value, places, chosen, SPEC)
    wanted, of_all = sparse_attention_reference(query, key, value, places, chosen, SPEC)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, of_all)
    given = sparse_column_sums(query, key, places, chosen, lse, SPEC)
    torch.testing.assert_close(given, sparse_column_sums_reference(query, key, places, chosen, lse, SPEC))
    # either may be the same for all
    for mine, theirs in ((places[:, 0], chosen), (places, chosen[:, 0])):
        out, _ = sparse_attention(query, key, value, mine, theirs, SPEC)
        torch.testing.assert_close(out, sparse_attention_reference(query, key, value, mine, theirs, SPEC)[0])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_it_agrees_with_the_reference_in_16_bits(shape, dtype):
    given = inputs(*shape, dtype)
    torch.testing.assert_close(
        sparse_attention(*given, SPEC)[0], sparse_attention_reference(*given, SPEC)[0], **tolerance(dtype)
    )


def test_all_that_precede_chosen_is_causal_attention():
    query, key, value, _, _ = inputs(2, 4, 2, 9, 9, 9)
    place = torch.arange(9, device=DEVICE, dtype=torch.int32)
    chosen = torch.where(place <= place[:, None], place, -1).expand(2, -1, -1)
    out, _ = sparse_attention(query, key, value, place[None], chosen, LogitSpec(0.3))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out, wanted)
