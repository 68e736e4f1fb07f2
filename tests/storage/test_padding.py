"""The record of padding: what it learns from masks, and how places move when a mask changes its mind."""

import pytest
import torch

from kvcompress.storage.padding import PaddingRecord
from kvcompress.storage.segment import EMPTY


def mask(*rows):
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def test_without_padding_nothing_is_kept():
    record = PaddingRecord()
    record.read(None, 2, 0, 5)
    record.read(mask("xxxxxxx", "xxxxxxx"), 2, 5, 2)
    assert record.visible is None
    assert record.remap is None


def test_padding_is_joined_to_what_was_read_before():
    record = PaddingRecord()
    record.read(mask("..xx", "xxxx"), 2, 0, 4)
    record.read(mask("..xxx", "xxxxx"), 2, 4, 1)
    record.read(None, 2, 5, 2)
    assert torch.equal(record.visible, mask("..xxxxx", "xxxxxxx"))
    assert record.remap is None


def test_the_mask_of_the_new_tokens_alone_is_enough():
    record = PaddingRecord()
    record.read(mask("..xx", "xxxx"), 2, 0, 4)
    record.read(mask("x.", "xx"), 2, 4, 2)
    assert torch.equal(record.visible, mask("..xxx.", "xxxxxx"))


def test_steps_that_left_no_record_were_visible():
    record = PaddingRecord()
    record.read(mask(".xx", "xxx"), 2, 0, 3)
    record.read(None, 2, 7, 1)
    assert torch.equal(record.visible, mask(".xxxxxxx", "xxxxxxxx"))


def test_hiding_cached_tokens_moves_the_places_of_those_behind_them():
    record = PaddingRecord()
    record.read(mask(".xxxx", "xxxxx"), 2, 0, 5)
    record.read(mask(".x.xxx", "xxx..x"), 2, 5, 1)
    # row 0 had places 0 to 3 in columns 1 to 4, and loses column 2
    assert record.remap.tolist() == [[0, EMPTY, 1, 2, EMPTY], [0, 1, 2, EMPTY, EMPTY]]
    assert torch.equal(record.visible, mask(".x.xxx", "xxx..x"))
    record.read(mask(".x.xxxx", "xxx..xx"), 2, 6, 1)
    assert record.remap is None


def test_a_first_mask_that_hides_cached_tokens_moves_them_too():
    record = PaddingRecord()
    record.read(None, 1, 0, 4)
    record.read(mask("..xxx"), 1, 4, 1)
    assert record.remap.tolist() == [[EMPTY, EMPTY, 0, 1]]


def test_padding_cannot_come_back():
    record = PaddingRecord()
    record.read(mask("..xx"), 1, 0, 4)
    with pytest.raises(ValueError, match="shows tokens that were padding when they were cached"):
        record.read(mask("xxxxx"), 1, 4, 1)


@pytest.mark.parametrize("shape", [(2, 4), (1, 7), (2, 7)])
def test_a_mask_of_the_wrong_size_is_refused(shape):
    record = PaddingRecord()
    record.read(None, 2, 0, 5)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch=2, tokens seen=8\]"):
        record.read(torch.ones(shape, dtype=torch.bool), 2, 5, 3)


class OnAGPU(torch.Tensor):
    is_cuda = True


# docs: on a GPU no step of one token checks positions
def test_a_step_of_one_token_on_a_gpu_compares_no_positions():
    record = PaddingRecord()
    record.read(None, 1, 0, 3, torch.arange(3)[None])
    with pytest.raises(ValueError, match="continue from"):
        record.read(None, 1, 3, 1, torch.tensor([[2]]))
    record.read(None, 1, 3, 1, torch.tensor([[2]]).as_subclass(OnAGPU))
    with pytest.raises(ValueError, match="continue from"):
        record.read(None, 1, 3, 2, torch.tensor([[1, 2]]).as_subclass(OnAGPU))


def test_cropping_forgets_the_last_tokens():
    record = PaddingRecord()
    record.crop(1, 0)
    record.read(mask("..xxx"), 1, 0, 5)
    record.crop(2, 3)
    assert torch.equal(record.visible, mask("..x"))


def test_columns_that_compiled_steps_fed_are_not_recorded_and_count_as_real():
    record = PaddingRecord()
    assert record.real_of_last(3, 5) is None
    record.read(mask("..xxx", "xxxxx"), 2, 0, 5)
    # four more came
    assert record.real_of_last(2, 9) == [2, 2]
    assert record.real_of_last(8, 9) == [7, 8]
    record.crop(2, 7)
    assert record.visible.shape == (2, 5)
    record.crop(3, 4)
    assert torch.equal(record.visible, mask("..xx", "xxxx"))
