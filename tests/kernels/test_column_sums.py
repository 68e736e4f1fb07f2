import math

import pytest
import torch

from kvcompress.kernels.attention import causal_attention_reference, slot_attention_reference
from kvcompress.kernels.column_sums import (
    causal_column_sums,
    causal_column_sums_reference,
    slot_column_maxima,
    slot_column_maxima_reference,
    slot_column_sums,
    slot_column_sums_reference,
)
from kvcompress.kernels.common.logits import LogitSpec
from tests.kernels.inputs import DEVICE, heads, slot_positions, some_of
from tests.kernels.test_attention import padding

# a sum over many probabilities in another order
LOOSE = {"rtol": 1e-5, "atol": 1e-5}

# group, queries, tokens, head_dim, options
CAUSAL = [
    (1, 1, 1, 64, {}),
    (3, 7, 7, 80, {}),
    (1, 65, 65, 129, {}),
    (3, 100, 100, 64, {}),
    (4, 16, 133, 96, {}),
    (8, 1, 300, 64, {}),
    (1, 130, 130, 112, {"pads": True}),
    (1, 300, 300, 64, {"window": 40}),
    (3, 90, 131, 80, {"window": 65, "pads": True}),
    (2, 200, 200, 64, {"window": 150}),
    # the last query of the first tokens' window begins a block of rows
    (1, 193, 193, 64, {"window": 66}),
    (2, 70, 70, 256, {"softcap": 5.0}),
]


@some_of(
    {"group, queries, tokens, head_dim, options": CAUSAL, "dtype": [torch.float32, torch.bfloat16]},
    at_once=1,
)
def test_causal_sums_agree_with_the_reference(group, queries, tokens, head_dim, options, dtype):
    query, key = heads(2, 2 * group, queries, head_dim, dtype), heads(2, 2, tokens, head_dim, dtype)
    options = dict(options)
    visible = padding(2, tokens) if options.pop("pads", False) else None
    spec = LogitSpec(head_dim**-0.5, **options)
    _, lse = causal_attention_reference(query, key, key, spec, visible)
    sums = causal_column_sums(query, key, lse, spec, visible)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, causal_column_sums_reference(query, key, lse, spec, visible), **LOOSE)
    if visible is not None:
        assert sums.masked_select(~visible[:, None]).eq(0).all()


# group, queries, slots, head_dim, options
SLOTS = [
    (1, 1, 1, 64, {}),
    (3, 7, 70, 80, {}),
    (4, 32, 150, 64, {}),
    (3, 1, 300, 64, {"window": 250}),
    (4, 40, 65, 129, {"window": 60, "softcap": 5.0}),
]


@pytest.mark.parametrize(
    ("take", "reference"),
    [(slot_column_sums, slot_column_sums_reference), (slot_column_maxima, slot_column_maxima_reference)],
    ids=["sums", "maxima"],
)
@pytest.mark.parametrize(("group", "queries", "slots", "head_dim", "options"), SLOTS, ids=str)
def test_slot_sums_and_maxima_agree_with_the_reference(group, queries, slots, head_dim, options, take, reference):
    query, key = heads(2, 2 * group, queries, head_dim), heads(2, 2, slots, head_dim)
    positions = slot_positions(2, 2, slots)
    query_positions = (2 * slots + torch.arange(2 * queries, device=DEVICE).view(2, queries)).int()
    spec = LogitSpec(head_dim**-0.5, **options)
    _, lse = slot_attention_reference(query, key, key, positions, query_positions, spec)
    found = take(query, key, positions, query_positions, lse, spec)
    expected = reference(query, key, positions, query_positions, lse, spec)
    torch.testing.assert_close(found, expected, **LOOSE)
    assert found[positions < 0].eq(0).all()


def test_the_maximum_is_over_queries_and_the_heads_of_a_group():
    """Query 1 of head 3 alone looks at slot 2, and query 0 of head 2 at slot 5."""
    key = torch.eye(8, device=DEVICE)[None, None].repeat(1, 2, 1, 2)
    query = torch.zeros(1, 4, 2, 16, device=DEVICE)
    query[0, 3, 1, 2], query[0, 2, 0, 5] = 4.0, 3.0
    positions = torch.arange(8, device=DEVICE).int().expand(1, 2, -1)
    query_positions = torch.full((1, 2), 8, dtype=torch.int32, device=DEVICE)
    _, lse = slot_attention_reference(query, key, key, positions, query_positions, LogitSpec(1.0))
    found = slot_column_maxima(query, key, positions, query_positions, lse, LogitSpec(1.0))
    wanted = torch.full((2, 8), 1 / 8)
    wanted[1, 2], wanted[1, 5] = math.e**4 / (math.e**4 + 7), math.e**3 / (math.e**3 + 7)
    torch.testing.assert_close(found[0].cpu(), wanted)


def test_every_query_gives_out_an_attention_of_one():
    query, key = heads(2, 6, 90, 64), heads(2, 2, 90, 64)
    _, lse = causal_attention_reference(query, key, key, LogitSpec(0.125))
    sums = causal_column_sums(query, key, lse, LogitSpec(0.125))
    torch.testing.assert_close(sums.sum(-1), torch.full((2, 2), 3 * 90.0, device=DEVICE))


@pytest.mark.parametrize("left_out", [torch.inf, -torch.inf])
def test_a_query_with_an_infinite_lse_is_left_out(left_out):
    query, key = heads(2, 2, 70, 64), heads(2, 1, 70, 64)
    _, lse = causal_attention_reference(query, key, key, LogitSpec(0.125))
    positions = torch.arange(70, device=DEVICE).int().expand(2, 1, -1)
    query_positions = torch.full((2, 70), 70, dtype=torch.int32, device=DEVICE)
    masked = lse.clone()
    masked[:, :, :69] = left_out
    torch.testing.assert_close(
        causal_column_sums(query, key, masked, LogitSpec(0.125)),
        causal_column_sums_reference(query[:, :, 69:], key, lse[:, :, 69:], LogitSpec(0.125)),
    )
    torch.testing.assert_close(
        slot_column_sums(query, key, positions, query_positions, masked, LogitSpec(0.125)),
        slot_column_sums_reference(
            query[:, :, 69:], key, positions, query_positions[:, 69:], lse[:, :, 69:], LogitSpec(0.125)
        ),
    )


def test_sums_are_the_same_every_time():
    query, key = heads(2, 4, 150, 64), heads(2, 2, 150, 64)
    _, lse = causal_attention_reference(query, key, key, LogitSpec(0.125))
    once, again = (causal_column_sums(query, key, lse, LogitSpec(0.125)) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("queries", [3, 70])
def test_a_query_whose_lse_is_nan_gives_nan_to_all_it_sees(queries):
    query, key = heads(2, 4, queries, 64), heads(2, 2, 70, 64)
    _, lse = causal_attention_reference(query, key, key, LogitSpec(0.125))
    lse[1, 2, 1] = torch.nan
    found = causal_column_sums(query, key, lse, LogitSpec(0.125))
    torch.testing.assert_close(found, causal_column_sums_reference(query, key, lse, LogitSpec(0.125)), equal_nan=True)
    assert found[1, 1].isnan().sum() == 70 - queries + 2
    assert found[1, 0].isfinite().all()
    positions, at = slot_positions(2, 2, 70), torch.full((2, queries), 140, dtype=torch.int32, device=DEVICE)
    for take, reference in (
        (slot_column_sums, slot_column_sums_reference),
        (slot_column_maxima, slot_column_maxima_reference),
    ):
        found, expected = (each(query, key, positions, at, lse, LogitSpec(0.125)) for each in (take, reference))
        torch.testing.assert_close(found, expected, equal_nan=True)
        found, expected = (
            each(query, key, positions, at, lse, LogitSpec(0.125, window=90)) for each in (take, reference)
        )
        torch.testing.assert_close(found, expected, equal_nan=True)
