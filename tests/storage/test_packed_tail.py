"""Tokens that wait to be packed in blocks, each by itself in 8 bits."""

import pytest
import torch

from kvcompress.kernels.attention import slot_attention_reference
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.quantized import QuantScheme
from kvcompress.storage.packed_tail import PackedTail
from kvcompress.storage.segment import EMPTY
from kvcompress.storage.tail import TailSegment

SPEC = LogitSpec(0.3)


def tokens(count, batch=2, kv_heads=3, head_dim=64, seed=0):
    torch.manual_seed(seed)
    return tuple(torch.randn(batch, kv_heads, count, head_dim) for _ in range(2))


def coding(head_dim):
    return QuantScheme(8, max(8, 1 << (head_dim - 1).bit_length()), "token")


def tail_of(key, value, held, room=16, rotates=True):
    """A tail of each row's first `held` tokens, at positions 5, 6, ..."""
    tail = PackedTail(key, value, room, coding(key.shape[-1]), rotates)
    tail.refill(key, value, [0] * len(held), list(held), [5 + count for count in held])
    return tail


def codes(tail):
    """What is stored of each row's tokens, in order."""
    return [
        {name: tensor[row, :, :held].clone() for name, tensor in tail._of_tokens().items()}
        for row, held in enumerate(tail.held)
    ]


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        for name, tensor in other.items():
            assert torch.equal(one[name], tensor), name


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("head_dim", [1, 20, 64, 80, 128])
def test_a_number_is_within_a_step_of_what_came(head_dim, rotates):
    key, value = tokens(11, head_dim=head_dim)
    tail = tail_of(key, value, [11, 7], rotates=rotates)
    for found, came in zip(tail.contents(), (key, value), strict=True):
        error = (found[:, :, :7] - came[:, :, :7]).abs().amax(-1)
        # half a step of each of its numbers, where these are what came
        spread = came[:, :, :7].amax(-1) - came[:, :, :7].amin(-1)
        most = spread / 255 * 0.51 if not rotates else came[:, :, :7].norm(dim=-1) / 255
        assert (error <= most + 3e-6).all()


# docs: each by itself in 8 bits and rotated
def test_a_large_channel_costs_the_others_little_where_keys_are_rotated():
    key, value = tokens(8)
    key[..., 5] = 60.0
    lost = {
        rotates: (tail_of(key, value, [8, 8], rotates=rotates).contents(8)[0] - key)[..., 6:].square().mean()
        for rotates in (True, False)
    }
    assert lost[True] < 0.2 * lost[False]


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("queries", [1, 3])
def test_attention_is_that_to_what_the_codes_stand_for(queries, rotates):
    key, value = tokens(11)
    tail = tail_of(key, value, [11, 7], rotates=rotates)
    query, at = torch.randn(2, 6, queries, 64), torch.full((2, queries), 40, dtype=torch.int32)
    keys, values = tail.contents()
    places = tail.positions[:, None].expand(keys.shape[:3])
    wanted = slot_attention_reference(query, keys, values, places, at, SPEC)
    torch.testing.assert_close(tail.attend(query, at, SPEC), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tail.attend_beside([], query, at, SPEC), wanted, rtol=1e-4, atol=1e-5)
    # and others, as they came, which one row has none of
    more_key, more_value = tokens(3, seed=1)
    more_at = torch.tensor([[0, 1, 2], [EMPTY] * 3], dtype=torch.int32)
    places = torch.cat([more_at, tail.positions], 1)[:, None].expand(2, 3, -1)
    keys, values = torch.cat([more_key, keys], 2), torch.cat([more_value, values], 2)
    wanted = slot_attention_reference(query, keys, values, places, at, SPEC)
    found = tail.attend_beside([(more_key, more_value, more_at)], query, at, SPEC)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_tail_that_packs_none_attends_beside_others_too():
    key, value = tokens(6)
    tail = TailSegment(key, value, 8)
    tail.refill(key, value, [0, 2], [4, 4], [4, 4])
    query, at = torch.randn(2, 6, 1, 64), torch.full((2, 1), 40, dtype=torch.int32)
    wanted = slot_attention_reference(
        query, torch.cat([key[:, :, 4:], tail.keys], 2), torch.cat([value[:, :, 4:], tail.values], 2),
        torch.cat([torch.tensor([[0, EMPTY]] * 2, dtype=torch.int32), tail.positions], 1)[:, None].expand(2, 3, -1),
        at, SPEC,
    )  # fmt: skip
    others = [(key[:, :, 4:], value[:, :, 4:], torch.tensor([[0, EMPTY]] * 2, dtype=torch.int32))]
    torch.testing.assert_close(tail.attend_beside(others, query, at, SPEC), wanted)


@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_has_the_codes_that_it_would_have_alone(dtype, head_dim):
    key, value = (x.to(dtype) for x in tokens(13, head_dim=head_dim))
    whole = codes(tail_of(key, value, [13, 6]))
    for row, held in enumerate([13, 6]):
        alone = tail_of(key[row : row + 1, :, :held], value[row : row + 1, :, :held], [held])
        assert_same([whole[row]], codes(alone))
        # and those that it has where it comes after others, one by one
        single = PackedTail(key[:1], value[:1], 16, coding(head_dim), True)
        for place in range(held):
            single.put(key[row : row + 1, :, [place]], value[row : row + 1, :, [place]], [1], [place])
        assert_same([whole[row]], codes(single))


def test_codes_stay_while_rows_and_padding_change():
    # packed again from what they stand for in bfloat16 they would be others
    key, value = (x.bfloat16() for x in tokens(9))
    tail = tail_of(key, value, [9, 5])
    before = codes(tail)
    tail.map_tensors(lambda x: x[[1, 0, 1]])
    assert_same(codes(tail), [before[1], before[0], before[1]])
    tail.grow(40)
    tail.trim(0)
    assert tail.room == 16
    assert_same(codes(tail), [before[1], before[0], before[1]])
    # what is dropped at the end, and moved to the front
    tail.drop_last([1, 2, 0])
    more = tuple(x[[1, 0, 1]].bfloat16() for x in tokens(4, seed=3))
    behind = (torch.cat(sides, 2) for sides in zip(tail.contents(9), more, strict=True))
    # of row 0 two that it had, and two that come 9 columns from the first, as of row 1 that has 7; of row 2 none
    tail.refill(*behind, [2, 2, 12], [2, 5, 1], [30, 30, 30], own=[2, 2, 9])
    ends = [[2, 4], [2, 7], [9, 9]]
    for row, (start, stop) in enumerate(ends):
        source = before[[1, 0, 1][row]]
        for name, tensor in tail._of_tokens().items():
            assert torch.equal(tensor[row, :, : stop - start], source[name][:, start:stop]), name
    # behind them come others
    fresh = tail_of(*more, [4, 4, 4])
    assert torch.equal(tail.codes[2, :, :1], fresh.codes[2, :, 3:4])
    assert tail.positions[1, :6].tolist() == [25, 26, 27, 28, 29, EMPTY]


def test_hidden_tokens_leave_no_gap():
    key, value = tokens(9)
    tail = tail_of(key, value, [9, 5])
    before = codes(tail)
    # places 7 and 8 of row 0 become padding, and so do the first five, which are packed elsewhere, of none
    remap = torch.arange(14, dtype=torch.int32).repeat(2, 1)
    remap[0, 7:9] = EMPTY
    remap[0, 9:] -= 2
    tail.remap(remap, [12, 10])
    assert tail.held == [7, 5]
    stay = [0, 1, 4, 5, 6, 7, 8]
    assert_same(codes(tail)[:1], [{name: x[:, stay] for name, x in before[0].items()}])
    assert_same(codes(tail)[1:], before[1:])
    assert tail.positions[0, :8].tolist() == [5, 6, 7, 8, 9, 10, 11, EMPTY]


def test_bytes_are_those_of_the_live_storages():
    for room, head_dim in ((8, 64), (16, 80), (32, 16), (64, 128), (70, 64)):
        key, value = tokens(1, head_dim=head_dim)
        tail = PackedTail(key, value, room, coding(head_dim), True)
        live = sum(tensor.untyped_storage().nbytes() for tensor in tail.tensors().values())
        assert live == PackedTail.nbytes_for(2, 3, head_dim, coding(head_dim), room)
        assert {tensor.dtype for name, tensor in tail.tensors().items()} <= {torch.uint8, torch.float16, torch.int32}


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("widths", [(96, 64), (16, 40)])
def test_keys_and_values_of_two_widths_are_what_they_were(widths, rotates):
    key, value = (tokens(11, head_dim=width, seed=width)[0] for width in widths)
    tail = PackedTail(key, value, 16, coding(max(widths)), rotates)
    tail.refill(key, value, [0, 0], [11, 7], [16, 12])
    assert [x.shape[-1] for x in (*tail.contents(), *tail.like())] == [*widths, *widths]
    for found, came in zip(tail.contents(), (key, value), strict=True):
        torch.testing.assert_close(found[:, :, :7], came[:, :, :7], rtol=0, atol=0.05)
    again = PackedTail.load(*tail.dump(), coding=tail.coding, rotates=rotates, dtype=tail.dtype)
    query, at = torch.randn(2, 6, 1, widths[0]), torch.full((2, 1), 30, dtype=torch.int32)
    more = tuple(tokens(2, head_dim=width, seed=1)[0] for width in widths)
    for each in (tail, again):
        key, value = each.contents(11)
        places = each.positions[:, None, :11].expand(key.shape[:3])
        wanted = slot_attention_reference(query, key, value, places, at, SPEC)
        for found, expected in zip(each.attend(query, at, SPEC), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        beside = (*more, torch.tensor([[1, 2], [1, EMPTY]], dtype=torch.int32))
        keys, values, positions = (
            torch.cat([x, y], d)
            for x, y, d in zip(beside, (key, value, each.positions[:, :11]), (2, 2, 1), strict=True)
        )
        wanted = slot_attention_reference(query, keys, values, positions[:, None].expand(keys.shape[:3]), at, SPEC)
        for found, expected in zip(each.attend_beside([beside], query, at, SPEC), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
