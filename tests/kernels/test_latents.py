"""Attention to latents, whose first numbers are the values: one tile is key and value."""

import pytest
import torch

from kvcompress.kernels.attention import (
    causal_attention,
    causal_attention_reference,
    slot_attention,
    slot_attention_reference,
)
from kvcompress.kernels.common import split_attention
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.split_attention import splits_in_triton
from kvcompress.kernels.decode import decode_attention, decode_attention_reference
from tests.kernels.inputs import DEVICE, DTYPES, heads, needs_triton, slot_positions, tolerance

# rank, shared, heads
CASES = [(512, 64, 16), (256, 32, 40), (480, 96, 3)]
OPTIONS = [{}, {"window": 40, "softcap": 5.0}]


def latents(rank, shared, tokens, dtype=torch.bfloat16):
    both = heads(2, 1, tokens, rank + shared, dtype)
    return both, both[..., :rank]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rank", "shared", "count"), CASES)
def test_a_chunk_agrees_with_the_reference(rank, shared, count, options, dtype):
    key, value = latents(rank, shared, 90, dtype)
    query, spec = heads(2, count, 7, rank + shared, dtype), LogitSpec(0.05, **options)
    visible = torch.rand(2, 90, device=DEVICE) < 0.8
    for mask in (None, visible):
        found = causal_attention(query, key, value, spec, mask)
        torch.testing.assert_close(found, causal_attention_reference(query, key, value, spec, mask), **tolerance(dtype))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rank", "shared", "count"), CASES)
def test_slots_agree_with_the_reference(rank, shared, count, options):
    key, value = latents(rank, shared, 90)
    query, spec = heads(2, count, 3, rank + shared, torch.bfloat16), LogitSpec(0.05, **options)
    places = torch.tensor([[180, 181, 182], [190, 191, 192]], dtype=torch.int32, device=DEVICE)
    held = slot_positions(2, 1, 90), places
    found = slot_attention(query, key, value, *held, spec)
    expected = slot_attention_reference(query, key, value, *held, spec)
    torch.testing.assert_close(found, expected, **tolerance(torch.bfloat16))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("rank", "shared", "count"), CASES)
def test_a_step_agrees_with_the_reference(rank, shared, count, splits, monkeypatch):
    monkeypatch.setattr(split_attention, "even_parts", lambda *_: (splits, -(-90 // splits // 32) * 32))
    key, value = latents(rank, shared, 90)
    query = heads(2, count, 1, rank + shared, torch.bfloat16)
    held = slot_positions(2, 1, 90), torch.tensor([[180], [190]], dtype=torch.int32, device=DEVICE)
    out, probabilities = decode_attention(query, key, value, *held, LogitSpec(0.05))
    expected_out, expected = decode_attention_reference(query, key, value, *held, LogitSpec(0.05))
    torch.testing.assert_close(out, expected_out, **tolerance(torch.bfloat16))
    torch.testing.assert_close(probabilities, expected, rtol=1e-3, atol=1e-4)


@needs_triton
def test_a_kernel_takes_latents_in_16_bits_and_no_other_wide_heads():
    key, value = latents(512, 64, 9)
    query = heads(2, 4, 1, 576, torch.bfloat16)
    assert splits_in_triton(query, key, value)
    assert splits_in_triton(query[..., :128], key, value[..., :128])
    # elsewhere than in the keys, in 32 bits, with too much behind them
    assert not splits_in_triton(query, key, value.clone())
    assert not splits_in_triton(query, key, key[..., 64:])
    assert not splits_in_triton(query.float(), key.float(), value.float())
    assert not splits_in_triton(*(heads(2, 1, 9, 700, torch.bfloat16) for _ in range(2)), value)
