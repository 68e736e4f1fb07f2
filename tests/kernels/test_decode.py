import pytest
import torch

from kvcompress.kernels.common import split_attention
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.decode import decode_attention, decode_attention_reference
from tests.kernels.inputs import DEVICE, DTYPES, heads, slot_positions, tolerance

# group, slots, head_dim, value_dim, options; sinks: one learned logit a head
CASES = [
    (1, 1, 64, 64, {}),
    (3, 70, 80, 80, {}),
    (4, 600, 64, 96, {}),
    (8, 300, 129, 64, {"window": 250}),
    (2, 1100, 64, 64, {"window": 900, "softcap": 5.0}),
    (3, 300, 64, 64, {"sinks": torch.linspace(-1.0, 4.0, 6, device=DEVICE)}),
]


def step(group, slots, head_dim, value_dim, dtype):
    query = heads(2, 2 * group, 1, head_dim, dtype)
    key, value = heads(2, 2, slots, head_dim, dtype), heads(2, 2, slots, value_dim, dtype)
    query_positions = torch.tensor([[2 * slots], [2 * slots + 3]], dtype=torch.int32, device=DEVICE)
    return query, key, value, slot_positions(2, 2, slots), query_positions


def asked(head_dim, sinks=None, **options):
    return LogitSpec(head_dim**-0.5, **options), sinks


@pytest.mark.parametrize(("group", "slots", "head_dim", "value_dim", "options"), CASES, ids=str)
def test_a_step_agrees_with_the_reference(group, slots, head_dim, value_dim, options):
    arguments = step(group, slots, head_dim, value_dim, torch.float32)
    spec, sinks = asked(head_dim, **options)
    found = decode_attention(*arguments, spec, sinks)
    torch.testing.assert_close(found, decode_attention_reference(*arguments, spec, sinks))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_step_agrees_with_the_reference_in_16_bits(dtype):
    arguments = step(3, 300, 80, 80, dtype)
    out, probabilities = decode_attention(*arguments, LogitSpec(0.1))
    expected_out, expected = decode_attention_reference(*arguments, LogitSpec(0.1))
    torch.testing.assert_close(out, expected_out, **tolerance(dtype))
    torch.testing.assert_close(probabilities, expected)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_large_logits_are_not_rounded_to_16_bits(dtype):
    """Of some hundreds, of products up to 4e6, as keys with an outlier channel make them."""
    query, key, *rest = step(3, 300, 64, 64, dtype)
    arguments = (query * 100 + 100, key * 100 + 100, *rest)
    found = decode_attention(*arguments, LogitSpec(1e-4))
    wide = [x.float() if x.is_floating_point() else x for x in arguments]
    expected = decode_attention_reference(*wide, LogitSpec(1e-4))
    torch.testing.assert_close(found[0].float(), expected[0], **tolerance(dtype))
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("group", [2, 64])
def test_a_step_of_many_splits_agrees_with_the_reference(group, monkeypatch):
    monkeypatch.setattr(split_attention, "core_count", lambda device: 100)
    monkeypatch.setattr(split_attention, "_LEAST_SPLIT", 64)
    query, key, value, positions, query_positions = step(group, 2600, 64, 64, torch.float32)
    if group > 32:
        # one KV head, so that the interpreter is done sooner
        query, key, value, positions = query[:1, :group], key[:1, :1], value[:1, :1], positions[:1, :1]
    arguments = (8 * query, key, value, positions, query_positions[: len(query)])
    assert split_attention.split_keys(len(query) * key.shape[1], 2600, 64, DEVICE)[0] == 41
    torch.testing.assert_close(
        decode_attention(*arguments, LogitSpec(0.125)),
        decode_attention_reference(*arguments, LogitSpec(0.125)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_sink_is_one_more_key_without_a_value():
    query, key, value, positions, query_positions = step(2, 70, 64, 64, torch.float32)
    sinks = torch.tensor([0.5, 3.0, -2.0, 1.0], device=DEVICE)
    out, probabilities = decode_attention(query, key, value, positions, query_positions, LogitSpec(0.1), sinks)
    bias = torch.zeros(2, 4, 1, 71, device=DEVICE)
    bias[..., :70].masked_fill_((positions < 0).repeat_interleave(2, 1)[:, :, None], -torch.inf)
    bias[..., 70] = sinks[:, None]
    one_more = [torch.cat([x, torch.zeros_like(x[:, :, :1])], 2).repeat_interleave(2, 1) for x in (key, value)]
    weights = (query @ one_more[0].mT * 0.1 + bias).softmax(-1)
    torch.testing.assert_close(out, weights @ one_more[1], rtol=1e-4, atol=1e-5)
    expected = weights[..., :70].unflatten(1, (2, 2)).sum(2)[:, :, 0]
    torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-6)


def test_the_probabilities_of_a_head_sum_to_its_group():
    _, probabilities = decode_attention(*step(3, 70, 64, 64, torch.float32), LogitSpec(0.125))
    torch.testing.assert_close(probabilities.sum(-1), torch.tensor([[3.0, 3.0], [3.0, 0.0]], device=DEVICE))


def test_two_queries_are_refused():
    query, *rest = step(1, 5, 64, 64, torch.float32)
    with pytest.raises(ValueError, match=r"one query per sequence, got query \[2, 2, 2, 64\]"):
        decode_attention(torch.cat([query, query], 2), *rest, LogitSpec(1.0))


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize(("group", "slots", "head_dim", "value_dim", "options"), CASES, ids=str)
def test_nan_comes_through_to_outputs_and_probabilities(where, group, slots, head_dim, value_dim, options):
    arguments = step(group, slots, head_dim, value_dim, torch.float32)
    arguments[3][1, 0, 0] = 2 * slots
    arguments[("query", "key", "value").index(where)][1, 0, 0, 3] = torch.nan
    spec, sinks = asked(head_dim, **options)
    found = decode_attention(*arguments, spec, sinks)
    expected = decode_attention_reference(*arguments, spec, sinks)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert expected[0].isnan().any()
    assert expected[1].isnan().any() == (where != "value")
