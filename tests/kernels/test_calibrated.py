import pytest
import torch

from kvcompress.kernels import calibrated as module
from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.calibrated import (
    CalibratedScheme,
    KeyDecoder,
    calibrated_attention,
    calibrated_attention_reference,
    calibrated_codes,
    decoded_keys,
    water_filling,
)
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.quantized import QuantScheme
from kvcompress.kernels.quantise import dequantise, quantise
from kvcompress.storage.rope import Rope
from tests.kernels.inputs import DEVICE, DTYPES, blocks, heads, tolerance

# scheme, KV heads, group of heads, block, blocks, head_dim, pairs, pairs are neighbours, options
CASES = [
    (CalibratedScheme(0, 32, 32), 2, 1, 64, 2, 64, 32, False, {}),
    (CalibratedScheme(8, 16, 24), 1, 3, 64, 2, 64, 32, False, {"softcap": 3.0}),
    (CalibratedScheme(0, 0, 40), 2, 2, 16, 9, 64, 16, True, {}),
    (CalibratedScheme(5, 0, 0), 2, 2, 8, 5, 16, 0, False, {"window": 30}),
    (CalibratedScheme(16, 32, 40), 2, 4, 128, 1, 128, 64, True, {}),
    (CalibratedScheme(0, 40, 7), 2, 1, 32, 3, 80, 20, False, {}),
]


def scene(case, dtype=torch.float32, queries=1):
    scheme, kv_heads, group, block, count, head_dim, pairs, interleaved, options = case
    width = kv_heads * head_dim
    vectors = torch.linalg.qr(torch.randn(width, width))[0].to(DEVICE)
    deviations = torch.linspace(1.0, 0.1, width).to(DEVICE)
    components = torch.randn(2, count, block, width, device=DEVICE) * deviations
    starts = torch.arange(count, dtype=torch.int32, device=DEVICE).mul(block).repeat(2, 1) + 4
    keys = calibrated_codes(components, deviations, scheme, starts)
    used = scheme.components
    rows = (vectors[:, :used] * deviations[:used] * scheme.units(DEVICE) / 2).mT.to(dtype)
    inv_freq = 1e4 ** -(torch.arange(pairs, device=DEVICE) / max(1, pairs)) if pairs else None
    decoder = KeyDecoder(rows.contiguous(), torch.randn(width, device=DEVICE), inv_freq, 1.1, interleaved)
    coding = QuantScheme(2, 256, "token", zeros="none")
    values = quantise(blocks(2, kv_heads, count, block, head_dim, dtype), coding)
    positions = torch.arange(count * block, dtype=torch.int32, device=DEVICE).repeat(2, 1, 1)
    positions[1, :, :block] = -1
    query = heads(2, kv_heads * group, queries, head_dim, dtype)
    places = torch.full((2, queries), count * block, dtype=torch.int32, device=DEVICE)
    return (query, keys, values, decoder, coding, positions, places, LogitSpec(head_dim**-0.5, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_agrees_with_reference(index, dtype, monkeypatch):
    if index % 2:
        # several runs of blocks
        monkeypatch.setattr(module, "_AT_ONCE", {"cpu": 2**12, "cuda": 2**12})
    arguments = scene(CASES[index], dtype, queries=1 + index % 3)
    out, lse = calibrated_attention(*arguments)
    expected, expected_lse = calibrated_attention_reference(*arguments)
    torch.testing.assert_close(out, expected, **tolerance(dtype))
    torch.testing.assert_close(lse, expected_lse, **tolerance(dtype))


def test_reference_is_attention_to_what_the_codes_stand_for():
    case = CASES[0]
    query, keys, values, decoder, coding, positions, places, spec = scene(case)
    # by definition, one component at a time
    scheme, kv_heads, _, block, count, head_dim, *_ = case
    levels = torch.zeros(2, count, block, scheme.components, device=DEVICE)
    for width, codes, some in (
        (4, keys.four, slice(0, scheme.four)),
        (2, keys.two, slice(scheme.four, scheme.components)),
    ):
        per = 8 // width
        for token in range(block):
            rows = codes.shape[3]
            code = codes[:, 0, :, token % rows].int() >> (token // rows * width) & (2**width - 1)
            assert rows * per == block
            levels[:, :, token, some] = (2 * code - (2**width - 1)).float()
    flat = (levels @ decoder.rows) * keys.scales[:, 0].float() + decoder.mean
    key = flat.view(2, count * block, kv_heads, head_dim).transpose(1, 2)
    rope = Rope(*decoder[2:])
    key = rope.rotate(key, torch.arange(count * block, device=DEVICE) + 4)
    value = dequantise(values, coding).flatten(2, 3)
    expected = slot_attention(query, key, value, positions.expand(-1, kv_heads, -1), places, spec)
    found = calibrated_attention_reference(query, keys, values, decoder, coding, positions, places, spec)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_more_bits_lose_less():
    deviations = torch.linspace(2.0, 0.1, 64)
    components = torch.randn(1, 4, 64, 64) * deviations
    starts = torch.zeros(1, 4, dtype=torch.int32)
    decoder = torch.eye(64) * deviations
    lost = []
    for bits in (1, 2, 3, 4, 6):
        scheme = water_filling(deviations.square().tolist(), bits, 8)
        assert scheme.bits <= bits * 64
        keys = calibrated_codes(components, deviations, scheme, starts)
        rows = decoder[: scheme.components] * scheme.units(torch.device("cpu"))[:, None] / 2
        found = decoded_keys(keys, KeyDecoder(rows, torch.zeros(64)), 1, torch.float32)
        lost.append(float((found[:, 0] - components).square().mean() / components.square().mean()))
    assert lost == sorted(lost, reverse=True)
    # evenly spaced levels of as many bits for each component lose 0.119 and 0.0115 of it
    assert lost[1] < 0.08
    assert lost[3] < 0.011


def test_bits_go_where_the_variance_is():
    assert water_filling([1.0] * 8, 2, 4) == (0, 0, 8)
    assert water_filling([100.0] * 4 + [1e-6] * 4, 2, 4) == (0, 4, 0)
    assert water_filling([1.0] * 8, 0.5, 4) == (0, 0, 0)
    assert water_filling([1e4] * 4 + [1.0] * 4, 5, 4) == (4, 0, 4)


def test_a_token_that_is_not_finite_stays_alone():
    scheme, deviations = CalibratedScheme(0, 8, 8), torch.ones(16)
    components = torch.randn(1, 1, 8, 16)
    broken = components.clone()
    broken[0, 0, 3, 5] = torch.nan
    broken[0, 0, 5, 2] = torch.inf
    decoder = KeyDecoder(torch.eye(16), torch.zeros(16))
    found, expected = (
        decoded_keys(
            calibrated_codes(x, deviations, scheme, torch.zeros(1, 1, dtype=torch.int32)), decoder, 1, torch.float32
        )[0, 0, 0]
        for x in (broken, components)
    )
    good = [0, 1, 2, 4, 6, 7]
    assert torch.equal(found[good], expected[good])
    assert bool(found[[3, 5]].isnan().all())


def test_shapes_that_do_not_fit_are_refused():
    query, keys, values, decoder, coding, positions, places, spec = scene(CASES[0])
    with pytest.raises(ValueError, match="rows \\[components, kv_heads \\* head_dim\\]"):
        calibrated_attention(
            query, keys, values, decoder._replace(rows=decoder.rows[1:]), coding, positions, places, spec
        )


def test_no_block_is_no_attention():
    query, keys, values, decoder, coding, positions, places, spec = scene(CASES[0])
    none = slice(0, 0)
    out, lse = calibrated_attention(
        query,
        keys.of_blocks(none),
        values.of_blocks(none),
        decoder,
        coding,
        positions[..., :0],
        places,
        spec,
    )
    assert not out.any()
    assert bool((lse == -torch.inf).all())
