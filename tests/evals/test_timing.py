import pytest
import torch

from kvcompress.evals.timing import spread, take_turns


def test_a_spread_is_of_quantiles():
    assert spread([1.0]) == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx({"median": 3.5, "p20": 2.0, "p80": 5.0})


def test_calls_take_turns_and_the_first_ones_do_not_count():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = take_turns(calls, torch.device("cpu"), repeats=3, warm_up=2)
    assert "".join(called) == "ab" * 5
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}
