import pytest
import torch

from kvcompress.kernels.attention import (
    causal_attention,
    causal_attention_reference,
    slot_attention,
    slot_attention_reference,
)
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.merge import merge_states
from tests.kernels.inputs import DEVICE, DTYPES, heads, slot_positions, some_of, tolerance


def padding(batch, tokens):
    """The first row is padded on the left by a third, the second has holes, others have none."""
    visible = torch.ones(batch, tokens, dtype=torch.bool, device=DEVICE)
    visible[0, : tokens // 3 + 1] = False
    visible[1:, 1::3] = False
    return visible


# group, queries, tokens, head_dim, value_dim, options; more than 64 rows of queries and group take the tiled kernel
CAUSAL = [
    (1, 1, 1, 64, 64, {}),
    (3, 7, 7, 80, 80, {}),
    (1, 65, 65, 129, 129, {}),
    (3, 100, 100, 64, 64, {}),
    (4, 70, 133, 96, 96, {}),
    (8, 20, 20, 64, 80, {}),
    (1, 130, 130, 112, 64, {"pads": True}),
    (1, 200, 200, 64, 64, {"window": 40}),
    (3, 90, 131, 80, 80, {"window": 65, "pads": True}),
    (2, 70, 70, 64, 64, {"softcap": 5.0}),
    (4, 1, 600, 64, 64, {}),
    (4, 1, 600, 80, 80, {"window": 300, "pads": True}),
    (2, 5, 300, 256, 256, {"softcap": 5.0, "pads": True}),
]


@pytest.mark.parametrize(("group", "queries", "tokens", "head_dim", "value_dim", "options"), CAUSAL, ids=str)
def test_causal_attention_agrees_with_the_reference(group, queries, tokens, head_dim, value_dim, options):
    check_causal(group, queries, tokens, head_dim, value_dim, torch.float32, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [3, 80])
def test_causal_attention_agrees_with_the_reference_in_16_bits(queries, dtype):
    check_causal(3, queries, 80, 80, 80, dtype)


def check_causal(group, queries, tokens, head_dim, value_dim, dtype, pads=False, **options):
    kv_heads = 1 if tokens > 100 else 2
    query = heads(2, kv_heads * group, queries, head_dim, dtype)
    key, value = heads(2, kv_heads, tokens, head_dim, dtype), heads(2, kv_heads, tokens, value_dim, dtype)
    arguments = (query, key, value, LogitSpec(head_dim**-0.5, **options), padding(2, tokens) if pads else None)
    out, lse = causal_attention(*arguments)
    expected_out, expected_lse = causal_attention_reference(*arguments)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected_out, **tolerance(dtype))
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)


# group, queries, slots, head_dim, value_dim, options
SLOTS = [
    (1, 1, 1, 64, 64, {}),
    (3, 7, 70, 80, 80, {}),
    (4, 1, 600, 64, 64, {}),
    (8, 1, 300, 129, 96, {}),
    (4, 30, 65, 64, 64, {}),
    (3, 1, 300, 64, 64, {"window": 250}),
    (4, 40, 65, 112, 64, {"window": 60, "softcap": 5.0}),
]


@pytest.mark.parametrize(("group", "queries", "slots", "head_dim", "value_dim", "options"), SLOTS, ids=str)
def test_slot_attention_agrees_with_the_reference(group, queries, slots, head_dim, value_dim, options):
    check_slots(group, queries, slots, head_dim, value_dim, torch.float32, options)


def before_nan(tensor):
    """The same, in memory that goes on with NaN behind each head's last token."""
    held = tensor.new_full((*tensor.shape[:2], tensor.shape[2] + 64, tensor.shape[3]), torch.nan)
    held[:, :, : tensor.shape[2]] = tensor
    return held[:, :, : tensor.shape[2]]


# of one tile of rows, and of two, of which the second begins within a query's heads
@some_of(
    {
        "tokens, dtype": [
            *((tokens, torch.float32) for tokens in (32, 33, 95)),
            *((tokens, torch.bfloat16) for tokens in (64, 65)),
        ],
        "options": [{}, {"window": 20, "pads": True}],
        "queries": [1, 20],
    }
)
def test_keys_may_end_anywhere_in_a_tile(tokens, dtype, queries, options):
    """A tile has 32 keys in float32, 64 in 16 bits."""
    options = dict(options)
    visible = padding(2, tokens) if options.pop("pads", False) else None
    spec = LogitSpec(0.125, **options)
    query, key, value = heads(2, 6, queries, 64, dtype), heads(2, 2, tokens, 64, dtype), heads(2, 2, tokens, 64, dtype)
    held = before_nan(key), before_nan(value)
    found = causal_attention(query, *held, spec, visible)
    expected = causal_attention_reference(query, key, value, spec, visible)
    torch.testing.assert_close(found[0], expected[0], **tolerance(dtype))
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-4)
    at = (2 * tokens + torch.arange(2 * queries, device=DEVICE).view(2, queries)).int()
    positions, bias = slot_positions(2, 2, tokens), torch.randn(2, 2, tokens, device=DEVICE)
    for each in (None, bias):
        found = slot_attention(query, *held, positions, at, spec, each)
        expected = slot_attention_reference(query, key, value, positions, at, spec, each)
        torch.testing.assert_close(found[0], expected[0], **tolerance(dtype))
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_slot_attention_agrees_with_the_reference_in_16_bits(dtype):
    check_slots(3, 2, 300, 80, 80, dtype, {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "queries", "slots", "head_dim", "value_dim", "options"), SLOTS[1::3], ids=str)
def test_slot_attention_with_a_bias_agrees_with_the_reference(
    group, queries, slots, head_dim, value_dim, options, dtype
):
    check_slots(group, queries, slots, head_dim, value_dim, dtype, options, 3 * torch.randn(2, 2, slots, device=DEVICE))


def check_slots(group, queries, slots, head_dim, value_dim, dtype, options, bias=None):
    query = heads(2, 2 * group, queries, head_dim, dtype)
    key, value = heads(2, 2, slots, head_dim, dtype), heads(2, 2, slots, value_dim, dtype)
    positions = slot_positions(2, 2, slots)
    query_positions = (2 * slots + torch.arange(2 * queries, device=DEVICE).view(2, queries)).int()
    arguments = (query, key, value, positions, query_positions, LogitSpec(head_dim**-0.5, **options), bias)
    out, lse = slot_attention(*arguments)
    expected_out, expected_lse = slot_attention_reference(*arguments)
    torch.testing.assert_close(out, expected_out, **tolerance(dtype))
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)
    assert lse[-1, -group:].eq(-torch.inf).all()
    assert out[-1, -group:].eq(0).all()


@pytest.mark.parametrize("options", [{}, {"window": 30, "softcap": 5.0}], ids=str)
def test_a_slot_with_a_bias_counts_as_often_as_its_exponential(options):
    query, key, value = heads(2, 4, 3, 64), heads(2, 2, 70, 64), heads(2, 2, 70, 64)
    positions, at = slot_positions(2, 2, 70, 0.9), torch.full((2, 3), 80, dtype=torch.int32, device=DEVICE)
    copies = torch.arange(70, device=DEVICE) % 4 + 1
    bias = copies.log().expand(2, 2, -1)
    often = (x.repeat_interleave(copies, 2) for x in (key, value, positions))
    spec = LogitSpec(0.125, **options)
    biased = slot_attention(query, key, value, positions, at, spec, bias)
    torch.testing.assert_close(biased, slot_attention(query, *often, at, spec), rtol=1e-5, atol=1e-5)


def test_a_bias_of_another_shape_is_refused():
    query, key, at = heads(2, 4, 3, 64), heads(2, 2, 70, 64), torch.zeros(2, 3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"a bias for every slot, \[2, 2, 70\], got \[1, 2, 70\]: expand it"):
        slot_attention(query, key, key, slot_positions(2, 2, 70), at, LogitSpec(0.1), torch.zeros(1, 2, 70))


def test_attending_to_slots_and_chunk_apart_and_merging_equals_attending_to_all():
    query, key, value = heads(2, 4, 70, 64), heads(2, 2, 110, 64), heads(2, 2, 110, 64)
    order = torch.randperm(40, device=DEVICE)
    positions = order.int().expand(2, 2, -1)
    query_positions = torch.arange(40, 110, device=DEVICE).int().expand(2, -1)
    past = slot_attention(query, key[:, :, order], value[:, :, order], positions, query_positions, LogitSpec(0.125))
    chunk = causal_attention(query, key[:, :, 40:], value[:, :, 40:], LogitSpec(0.125))
    merged = merge_states(*map(list, zip(past, chunk, strict=True)))
    torch.testing.assert_close(merged, causal_attention(query, key, value, LogitSpec(0.125)))


def test_what_a_hidden_token_holds_does_not_matter():
    query, key, value = heads(2, 4, 70, 64), heads(2, 2, 70, 64), heads(2, 2, 70, 64)
    visible = padding(2, 70)
    before = causal_attention(query, key, value, LogitSpec(0.125), visible)
    hidden = ~visible[:, None, :, None]
    after = causal_attention(
        query, key.masked_fill(hidden, 1e3), value.masked_fill(hidden, 1e3), LogitSpec(0.125), visible
    )
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_query_before_all_visible_tokens_sees_nothing():
    query, key = heads(2, 2, 70, 64), heads(2, 2, 70, 64)
    out, lse = causal_attention(query, key, key, LogitSpec(0.125), padding(2, 70))
    assert lse[0, :, :24].eq(-torch.inf).all()
    assert out[0, :, :24].eq(0).all()
    assert lse[0, :, 24:].isfinite().all()


def test_a_window_as_long_as_the_chunk_is_no_window():
    query, key = heads(2, 2, 70, 64), heads(2, 1, 70, 64)
    whole = causal_attention(query, key, key, LogitSpec(0.125))
    torch.testing.assert_close(causal_attention(query, key, key, LogitSpec(0.125, window=70)), whole)
    torch.testing.assert_close(
        causal_attention(query, key, key, LogitSpec(0.125, window=1))[0], key.repeat_interleave(2, 1)
    )


def test_mismatched_shapes_are_named_in_the_error():
    query, key = heads(2, 3, 5, 64), heads(2, 2, 5, 64)
    with pytest.raises(ValueError, match=r"heads a multiple of kv_heads.*query \[2, 3, 5, 64\], key \[2, 2, 5, 64\]"):
        causal_attention(query, key, key, LogitSpec(1.0))
    with pytest.raises(ValueError, match="at most as many queries as tokens, got 5 and 4"):
        causal_attention(key, key[:, :, :4], key[:, :, :4], LogitSpec(1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_do_not_overflow(dtype):
    query, key = 30 * heads(1, 1, 70, 64, dtype), heads(1, 1, 70, 64, dtype)
    out, lse = causal_attention(query, key, key, LogitSpec(1.0))
    assert out.isfinite().all()
    torch.testing.assert_close(
        lse, causal_attention_reference(query, key, key, LogitSpec(1.0))[1], rtol=1e-5, atol=1e-3
    )


@some_of(
    {
        "options": [{}, {"softcap": 5.0}, {"window": 30}, {"pads": True}],
        "queries, tokens": [(1, 1), (3, 3), (2, 40), (40, 40), (80, 90), (1, 600)],
        "where": ["query", "key", "every key", "value"],
    }
)
def test_nan_comes_through_where_it_is_seen(where, queries, tokens, options):
    """torch's fused attention takes a query all of whose logits are NaN for one that sees nothing."""
    query, key, value = heads(2, 4, queries, 64), heads(2, 2, tokens, 64), heads(2, 2, tokens, 64)
    options = dict(options)
    visible = padding(2, tokens) if options.pop("pads", False) else None
    if where == "value":
        # what a value nobody sees does to a sum is left open: its weight of 0 times NaN is NaN
        options.pop("window", None)
    at = {"query": (query, -1), "key": (key, 0), "every key": (key, slice(None)), "value": (value, 0)}
    tensor, token = at[where]
    tensor[1, 0, token, 3] = torch.nan
    spec = LogitSpec(0.125, **options)
    expected = causal_attention_reference(query, key, value, spec, visible)
    torch.testing.assert_close(causal_attention(query, key, value, spec, visible), expected, equal_nan=True)
    positions = slot_positions(2, 2, tokens, 0.9)
    positions[1, 0, token] = 5
    at = torch.full((2, queries), 2 * tokens, dtype=torch.int32, device=DEVICE)
    arguments = (query, key, value, positions, at, spec)
    expected = slot_attention_reference(*arguments)
    torch.testing.assert_close(slot_attention(*arguments), expected, equal_nan=True)
    assert where == "value" or spec.window is not None or expected[1].isnan().any()


@pytest.mark.parametrize("spec", [LogitSpec(0.3), LogitSpec(0.3, window=5), LogitSpec(0.3, softcap=2.0)])
def test_attention_to_no_slots_at_all_is_nothing_and_no_crash(spec):
    query, nothing = torch.randn(2, 4, 3, 16), torch.empty(2, 2, 0, 16)
    at = torch.zeros(2, 3, dtype=torch.int32)
    out, lse = slot_attention(query, nothing, nothing, torch.empty(2, 2, 0, dtype=torch.int32), at, spec)
    assert out.shape == query.shape
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
