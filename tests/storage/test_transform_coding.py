"""Keys and values in few bits: as many as asked for, closer with more, and what cannot be coded is not lost."""

import dataclasses

import pytest
import torch

from kvcompress.storage import transform_coding
from kvcompress.storage.rope import Rope
from kvcompress.storage.transform_coding import SINKS, Places, Transform, decode, encode

KV_HEADS, HEAD_DIM = 2, 16
WIDTH = KV_HEADS * HEAD_DIM
TOKENS = 900


def rope():
    return Rope(1 / 100.0 ** (torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))


def transform(side="keys", seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))
    return Transform(3 * torch.randn(WIDTH, generator=generator), vectors, rope() if side == "keys" else None, "basis")


def held(places, side="keys", batch=2, columns=TOKENS, seed=0):
    """Keys or values that vary most in few of the transform's directions, and as their basis says."""
    generator = torch.Generator().manual_seed(seed + 1)
    spread = torch.linspace(2.0, -6.0, WIDTH).exp2()[:, None]
    known = transform(side)
    tensor = torch.zeros(batch, KV_HEADS, columns, HEAD_DIM)
    for row in range(batch):
        y = spread * torch.randn(WIDTH, columns, generator=generator)
        at = torch.arange(columns) + places.shift[row] + places.first[row]
        tensor[row] = known.backward(y, at, KV_HEADS).transpose(0, 1)
    return tensor


def plain(length=TOKENS, side="keys", visible=None, batch=2):
    return Places(side, length, visible, [0] * batch, [0] * batch)


def there_and_back(tensor, places, bits, **more):
    known = transform(places.side)
    payload = encode(tensor, places, known, bits)
    found, coding = decode(memoryview(payload), tensor.dtype, list(tensor.shape), known, torch.device("cpu"))
    return found, coding, payload


def error(found, wanted):
    return float((found - wanted).double().norm() / wanted.double().norm())


@pytest.mark.parametrize("side", ["keys", "values"])
def test_bits_are_at_most_those_asked_for_and_more_are_closer(side):
    places = plain(side=side)
    tensor = held(places, side)
    errors = []
    for bits in (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 11.0):
        found, _, payload = there_and_back(tensor, places, bits)
        measured = 8 * (len(payload) + transform_coding._IN_HEADER) / tensor.numel()
        assert 0.96 * bits < measured <= bits
        errors.append(error(found, tensor))
    assert errors == sorted(errors, reverse=True)
    # a bit halves the error where no component is zero
    assert errors[4] / errors[5] == pytest.approx(4, rel=0.2)
    assert errors[1] < 0.05
    assert errors[-1] < 2e-4


def test_what_a_number_comes_back_as_is_within_a_step():
    places = plain(side="values")
    tensor = held(places, "values")
    found, coding, _ = there_and_back(tensor, places, 4.0)
    known = transform("values")
    at = torch.zeros(TOKENS - SINKS)
    for row in range(2):
        y, z = (known.forward(x[row, :, SINKS:].transpose(0, 1), at) for x in (tensor, found))
        sizes = coding.sizes.view(2, -1)[row]
        assert ((y - z).abs() / (coding.step * transform_coding._scale(sizes))).max() < 0.85


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16])
def test_sinks_are_kept_in_16_bits_and_padding_and_room_are_zeros(kept):
    visible = torch.ones(2, 600, dtype=torch.bool)
    visible[1, :200] = False
    visible[0, 300] = False
    places = plain(600, visible=visible)
    tensor = held(places).to(kept)
    found, _, _ = there_and_back(tensor, places, 3.0)
    assert found.dtype == kept
    wanted = tensor[0, :, :SINKS], tensor[1, :, 200 : 200 + SINKS]
    for ours, theirs in zip((found[0, :, :SINKS], found[1, :, 200 : 200 + SINKS]), wanted, strict=True):
        assert torch.equal(ours, theirs.half().float() if kept == torch.float32 else theirs)
    hidden = torch.zeros(2, TOKENS, dtype=torch.bool)
    hidden[:, :600] = visible
    assert not found.transpose(1, 2)[~hidden].any()
    assert found.transpose(1, 2)[hidden].all(-1).any(-1).all()


def test_tokens_whose_first_ones_are_gone_have_no_sinks_and_keep_their_positions():
    places = Places("keys", TOKENS, None, [0, 70], [0, 9])
    tensor = held(places)
    found, coding, _ = there_and_back(tensor, places, 3.0)
    assert len(coding.sizes) == 2 * TOKENS - SINKS
    assert error(found[1], tensor[1]) < 0.02
    # at other positions, the mean of keys is rotated away
    other, _, _ = there_and_back(tensor, Places("keys", TOKENS, None, [0, 0], [0, 0]), 3.0)
    assert error(other[1], tensor[1]) > 2 * error(found[1], tensor[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_comes_back_so_and_spoils_no_other(bad):
    places = plain()
    tensor = held(places)
    wanted = tensor.clone()
    tensor[0, 1, 500, 3] = bad
    tensor[1, 0, 2, 0] = bad
    found, _, _ = there_and_back(tensor, places, 3.0)
    assert not found[0, :, 500].isfinite().any()
    assert torch.equal(found[1, 0, 2, 0].isfinite(), torch.tensor(False))
    fine = tensor.isfinite().all(-1, keepdim=True).all(1, keepdim=True)
    assert found.masked_select(fine).isfinite().all()
    clean, _, _ = there_and_back(wanted, places, 3.0)
    assert error(found.masked_select(fine), tensor.masked_select(fine)) < 1.1 * error(clean, wanted)


def test_no_finite_token_is_coded_as_another_kind():
    places = plain(40)
    tensor = torch.full((2, KV_HEADS, 40, HEAD_DIM), torch.nan)
    found, _, _ = there_and_back(tensor, places, 3.0)
    assert found.isnan().all()


@pytest.mark.parametrize("factor", [1e-25, 1e-12, 1e-3, 1e5, 1e12, 1e25])
def test_any_size_of_numbers_will_do(factor):
    places = plain(side="values")
    known = transform("values")._replace(mean=torch.zeros(WIDTH))
    tensor = (held(places, "values") - transform("values").mean.view(KV_HEADS, 1, HEAD_DIM)) * factor
    payload = encode(tensor, places, known, 4.0)
    found, _ = decode(memoryview(payload), tensor.dtype, list(tensor.shape), known, torch.device("cpu"))
    # squares of such numbers are not float32's
    for some in (slice(None, SINKS), slice(SINKS, None)):
        assert error(found[:, :, some], tensor[:, :, some]) < 0.03


@pytest.mark.parametrize("large", [3e4, 1e18, 1e30, 3e38])
@pytest.mark.parametrize("tokens", [[77], [4, 500, 899], range(100, 108)], ids=["one", "three", "eight"])
def test_a_few_large_numbers_make_no_others_small(large, tokens):
    places = plain(side="values")
    tensor = held(places, "values")
    clean, _, payload = there_and_back(tensor, places, 3.0)
    spoilt = tensor.clone()
    for at in tokens:
        spoilt[0, 1, at, 3] = large
    found, coding, more = there_and_back(spoilt, places, 3.0)
    others = [at for at in range(TOKENS) if at not in tokens]
    assert error(found[:, :, others], tensor[:, :, others]) < 1.2 * error(clean, tensor)
    assert error(found[0, :, list(tokens)], spoilt[0, :, list(tokens)]) < 0.3
    # what is larger than all sizes comes back as it was
    apart = (coding.sizes == transform_coding._AS_IT_CAME).nonzero().flatten().tolist()
    assert apart == ([at - SINKS for at in tokens] if large > 3e4 else [])
    for at in apart:
        assert torch.equal(found[0, :, at + SINKS], spoilt[0, :, at + SINKS])
    assert len(more) <= len(payload) + 16
    again, _, same = there_and_back(found, dataclasses.replace(places, coding=coding), 1.0)
    assert again.equal(found)
    assert same == more


@pytest.mark.parametrize("kept", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_finite_stays_finite(kept):
    generator = torch.Generator().manual_seed(3)
    largest = torch.finfo(kept).max
    signs = torch.randint(0, 2, (2, KV_HEADS, 60, HEAD_DIM), generator=generator) * 2 - 1
    for side in ("keys", "values"):
        tensor = signs.to(kept) * largest
        # some tokens are as others are
        tensor[:, :, 30:45] = 1.0
        assert tensor.isfinite().all()
        found, _, _ = there_and_back(tensor, plain(60, side), 4.0)
        assert found.isfinite().all()
        assert (found[:, :, SINKS:30].double().sign() == signs[:, :, SINKS:30]).all()


def test_most_tokens_may_be_nothing_beside_their_mean():
    places = plain(side="values")
    tensor = transform("values").mean.view(1, KV_HEADS, 1, HEAD_DIM).expand(2, -1, TOKENS, -1).clone()
    tensor[:, :, ::3] = held(places, "values")[:, :, ::3]
    assert error(there_and_back(tensor, places, 3.0)[0], tensor) < 0.02


def test_equal_tokens_and_a_token_far_larger_than_others_are_coded():
    places = plain(side="values")
    tensor = held(places, "values")
    tensor[:] = tensor[:, :, 5:6]
    assert error(there_and_back(tensor, places, 2.0)[0], tensor) < 0.1
    tensor = held(places, "values")
    tensor[0, :, 77] *= 3000
    found, _, _ = there_and_back(tensor, places, 3.0)
    assert error(found[0, :, 77], tensor[0, :, 77]) < 0.3
    assert error(found[1], tensor[1]) < 0.3


@pytest.mark.parametrize("tokens", [0, 1, SINKS, SINKS + 1, 7, 30])
def test_a_few_tokens_are_coded_though_they_take_more_bits(tokens):
    places = plain(tokens)
    tensor = held(places, columns=tokens)
    found, _, _ = there_and_back(tensor, places, 4.0)
    assert found.shape == tensor.shape
    if tokens:
        assert error(found, tensor) < 0.2


def test_a_search_that_looks_at_some_tokens_may_find_only_zeros_there(monkeypatch):
    monkeypatch.setattr(transform_coding, "_TOKENS", 8)
    y = torch.zeros(WIDTH, 300)
    y[:, 1::2] = torch.randn(WIDTH, 150, generator=torch.Generator().manual_seed(0))
    step = transform_coding._step(torch.cat([torch.zeros(WIDTH, 1), y * (torch.arange(300) % 38 == 1)], 1), 500.0)
    assert 0 < step < 2


def test_pieces_of_a_long_text_give_what_the_whole_does(monkeypatch):
    places = plain()
    tensor = held(places)
    whole, coding, _ = there_and_back(tensor, places, 3.0)
    monkeypatch.setattr(transform_coding, "_TOKENS", 64)
    pieces, again, payload = there_and_back(tensor, places, 3.0)
    assert 8 * len(payload) / tensor.numel() <= 3.0
    assert again.step == pytest.approx(coding.step, rel=0.02)
    assert error(pieces, tensor) == pytest.approx(error(whole, tensor), rel=0.02)


@pytest.mark.parametrize("bits", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_what_is_coded_again_as_it_was_is_the_same(bits, kept):
    places = plain(batch=1)
    tensor = held(places, batch=1).to(kept)
    found, coding, payload = there_and_back(tensor, places, bits)
    for asked in (bits, 1.0, 6.0):
        again, _, second = there_and_back(found, Places("keys", TOKENS, None, [0], [0], coding), asked)
        if kept == torch.float32:
            assert again.equal(found)
            assert second == payload
        # rounded to 8 bits, a number may lie beyond the edge of a fine step
        assert error(again, found) < 0.2 * error(found, tensor)
    # the beginning of it too
    cut = found[:, :, :500].contiguous()
    again, _, _ = there_and_back(cut, Places("keys", 500, None, [0], [0], coding), 1.0)
    assert error(again, cut) < 0.01 * error(found, tensor) + (0.01 if kept == torch.bfloat16 else 0)


@pytest.mark.parametrize("radix", [1, 2, 3, 5, 6, 7, 16, 17, 256, 257, 300, 65536, 70000])
@pytest.mark.parametrize("tokens", [1, 8, 41])
def test_codes_of_any_number_of_values_come_back(radix, tokens):
    generator = torch.Generator().manual_seed(radix)
    for low in (-(radix // 2), 0):
        codes = torch.randint(low, low + radix, (3, tokens), generator=generator, dtype=torch.int32)
        packed = transform_coding._packed(codes, low, radix)
        found = transform_coding._unpacked(map(memoryview, packed), low, radix, (3, tokens))
        assert torch.equal(found, codes)


def test_a_group_keeps_what_is_cut_off_from_its_codes():
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 0.4, 1.0, 3.0, 40.0, 3000.0):
        y = spread * torch.randn(37, 211, generator=generator)
        y[3, 7], y[20, 9] = 90 * spread, -700 * spread
        groups, frames = transform_coding._frames(y, 1.0, shifted=True)
        found, left = torch.empty_like(y), map(memoryview, frames)
        for part, group in zip(found.split(16), groups, strict=True):
            transform_coding._read_group(part, left, group)
        assert next(left, None) is None
        assert (found - y).abs().max() < 0.86
