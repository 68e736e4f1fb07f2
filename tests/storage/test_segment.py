"""Segments by themselves: slots that are overwritten in place, and tokens in order."""

import pytest
import torch

from kvcompress.kernels.attention import causal_attention_reference, slot_attention_reference
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.segment import EMPTY
from kvcompress.storage.slots import SlotSegment

SPEC = LogitSpec(0.3)


def tokens(count, batch=2, kv_heads=3, head_dim=8):
    return torch.randn(batch, kv_heads, count, head_dim), torch.randn(batch, kv_heads, count, head_dim)


def filled(slots=5, count=4):
    """Slots with `count` tokens at positions 0, 1, ...; the keys and values they came from."""
    key, value = tokens(count)
    segment = SlotSegment(key, value, slots)
    positions = torch.arange(count, dtype=torch.int32).expand(2, 3, -1)
    scores = torch.zeros(2, 3, slots + count)
    scores[..., slots:] = torch.arange(count)
    kept = torch.cat([torch.zeros(2, 3, slots, dtype=torch.bool), torch.ones(2, 3, count, dtype=torch.bool)], -1)
    segment.replace(key, value, positions, scores, kept)
    return segment, key, value


def in_order(segment):
    """Positions, scores, keys and values of what is held, by position; as many of each head."""
    order = segment.positions.argsort(-1)[..., -int(segment.kept().max()) :]
    wide = order[..., None].expand(-1, -1, -1, segment.keys.shape[-1])
    return (
        segment.positions.gather(2, order),
        segment.scores.gather(2, order),
        segment.keys.gather(2, wide),
        segment.values.gather(2, wide),
    )


def test_fresh_slots_are_empty():
    key, value = tokens(1)
    segment = SlotSegment(key, value, 5)
    assert segment.kept().tolist() == [[0, 0, 0]] * 2
    out, lse = segment.attend(torch.randn(2, 6, 2, 8), torch.zeros(2, 2, dtype=torch.int32), SPEC)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


def test_replaced_slots_hold_what_was_kept_with_its_score():
    segment, key, value = filled()
    positions, scores, keys, values = in_order(segment)
    assert positions.tolist() == [[[0, 1, 2, 3]] * 3] * 2
    assert scores.tolist() == [[[0.0, 1.0, 2.0, 3.0]] * 3] * 2
    assert torch.equal(keys, key)
    assert torch.equal(values, value)


def test_a_chunk_takes_the_slots_of_what_was_let_go_and_leaves_the_rest_where_it_is():
    segment, key, value = filled()
    before = segment.positions.clone()
    new_key, new_value = tokens(3)
    kept = torch.zeros(2, 3, 5 + 3, dtype=torch.bool)
    stays = torch.isin(before, torch.tensor([1, 3], dtype=torch.int32))
    kept[..., :5] = stays
    kept[..., 5:] = torch.tensor([False, False, True])
    positions = torch.tensor([4, 5, 6], dtype=torch.int32).expand(2, 3, -1)
    segment.replace(new_key, new_value, positions, torch.arange(8.0).expand(2, 3, -1), kept)
    assert torch.equal(segment.positions[stays], before[stays])
    held, scores, keys, values = in_order(segment)
    assert held.tolist() == [[[1, 3, 6]] * 3] * 2
    assert scores[..., 2:].tolist() == [[[7.0]] * 3] * 2
    assert torch.equal(keys, torch.cat([key[:, :, [1, 3]], new_key[:, :, [2]]], 2))
    assert torch.equal(values, torch.cat([value[:, :, [1, 3]], new_value[:, :, [2]]], 2))
    assert (segment.positions.gather(2, segment.spare[..., None]) == EMPTY).all()


# README: the next token takes the slot of an evicted one
def test_a_token_takes_the_spare_slot_and_its_victim_leaves_the_next():
    segment, *_ = filled()
    new_key, new_value = tokens(1)
    segment.put(new_key, new_value, torch.tensor([4, 4], dtype=torch.int32))
    assert segment.kept().tolist() == [[5, 5, 5]] * 2
    victims = (segment.positions == 2).int().argmax(-1)
    over = torch.tensor([[True, True, False], [True, False, True]])
    segment.free(victims, over)
    assert segment.kept().tolist() == [[4, 4, 5], [4, 5, 4]]
    for row, head in over.nonzero().tolist():
        assert segment.spare[row, head] == victims[row, head]
        assert sorted(segment.positions[row, head].tolist()) == [EMPTY, 0, 1, 3, 4]


def test_padding_put_into_a_slot_leaves_it_empty():
    segment, *_ = filled()
    segment.put(*tokens(1), torch.tensor([4, EMPTY], dtype=torch.int32))
    assert segment.kept().tolist() == [[5] * 3, [4] * 3]


def test_the_score_of_a_new_token_starts_at_zero():
    segment, *_ = filled()
    segment.scores.fill_(7.0)
    segment.put(*tokens(1), torch.tensor([4, 4], dtype=torch.int32))
    assert (segment.scores.gather(2, segment.spare[..., None]) == 0.0).all()


@pytest.mark.parametrize("window", [None, 3])
def test_slots_attend_as_the_tokens_they_hold_would(window):
    segment, key, value = filled(slots=9)
    query = torch.randn(2, 6, 2, 8)
    at = torch.tensor([[4, 5], [4, 5]], dtype=torch.int32)
    spec = SPEC._replace(window=window)
    out, lse = segment.attend(query, at, spec)
    expected = slot_attention_reference(query, key, value, torch.arange(4).expand(2, 3, -1), at, spec)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])
    sums = segment.column_sums(query, at, lse, spec)
    # of a whole softmax each query gives one unit a head, where it sees anything
    torch.testing.assert_close(sums.sum(-1), 2.0 * lse.isfinite().sum(-1)[:, ::2].float())


def test_a_segment_of_its_tensors_is_the_same_segment():
    segment, *_ = filled()
    again = SlotSegment.load(*segment.dump())
    assert set(again.tensors()) == set(SlotSegment.tensor_names)
    assert all(again.tensors()[name] is tensor for name, tensor in segment.tensors().items())
    again.map_tensors(lambda tensor: tensor[1:])
    assert again.keys.shape[0] == 1
    assert segment.keys.shape[0] == 2


def test_dense_tokens_stay_in_order_while_their_room_grows():
    segment, parts = DenseSegment(*tokens(1)), [tokens(count) for count in (3, 1, 700, 1, 300)]
    for key, value in parts:
        segment.append(key, value, None)
    keys, values, visible = segment.held()
    assert torch.equal(keys, torch.cat([key for key, _ in parts], 2))
    assert torch.equal(values, torch.cat([value for _, value in parts], 2))
    assert visible is None


def test_dense_padding_is_remembered_from_the_first_pad_on():
    segment = DenseSegment(*tokens(1))
    segment.append(*tokens(3), None)
    segment.append(*tokens(2), torch.tensor([[False, True], [True, True]]))
    segment.append(*tokens(1), None)
    assert segment.held()[2].tolist() == [[True, True, True, False, True, True], [True] * 6]


def test_dense_tokens_can_be_dropped_at_both_ends():
    segment, (key, value) = DenseSegment(*tokens(1)), tokens(10)
    segment.append(key, value, torch.tensor([[False] * 4 + [True] * 6, [True] * 10]))
    segment.drop_last(2)
    segment.drop_first(3)
    keys, values, visible = segment.held()
    assert torch.equal(keys, key[:, :, 3:8])
    assert torch.equal(values, value[:, :, 3:8])
    assert visible.tolist() == [[False] + [True] * 4, [True] * 5]
    # the memory of the first ones went with them
    assert segment.keys.shape[2] == 5


def test_dense_tokens_attend_as_a_causal_past():
    segment, (key, value) = DenseSegment(*tokens(1)), tokens(6)
    visible = torch.tensor([[False, True, False, False, True, True], [True] * 6])
    segment.append(key, value, visible)
    query = torch.randn(2, 6, 1, 8)
    at = visible.sum(-1, keepdim=True).int()
    out, lse = segment.attend(query, at, SPEC)
    expected = causal_attention_reference(query, key, value, SPEC, visible)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])
