"""Some cases of the fuzzer, and proof that it finds what is broken. `make fuzz` plays 5,000."""

import copy

import pytest

from kvcompress.cache import CompressedCache
from kvcompress.dense import DenseLayer
from kvcompress.evicting_layer import EvictingLayer
from tests.contract.caches import ENTRIES
from tests.fuzz.__main__ import failure, main
from tests.fuzz.cases import draw
from tests.fuzz.play import play

CASES = 40


@pytest.mark.parametrize("seed", range(CASES))
def test_a_random_case_equals_the_oracle(seed):
    # every cache twice, in turn
    play(draw(seed, ENTRIES[seed % len(ENTRIES)].name))


def test_a_seed_draws_one_case():
    assert str(draw(7)) == str(draw(7))
    assert len({str(draw(seed)) for seed in range(50)}) == 50
    assert {draw(seed).entry.name for seed in range(300)} == {entry.name for entry in ENTRIES}


def broken(capsys, cache, cases=25):
    """What the fuzzer prints of a broken cache, and the command that it says plays the failing case again."""
    assert main(["--cases", str(cases), "--cache", cache, "--stop"]) == 1
    lines = capsys.readouterr().out.splitlines()
    command = next(line for line in lines if "python -m tests.fuzz" in line)
    return "\n".join(lines), command.split("tests.fuzz ")[1].split()


def test_rows_that_leave_their_scores_behind_are_found(capsys, monkeypatch):
    whole = EvictingLayer.map_tensors

    def rows_without_scores(layer, change):
        scores = layer.slots and layer.slots.scores
        whole(layer, change)
        if layer.slots is not None and len(scores) == len(layer.slots.scores):
            layer.slots.scores = scores

    monkeypatch.setattr(EvictingLayer, "map_tensors", rows_without_scores)
    text, command = broken(capsys, "h2o")
    assert "KeptDifferentlyError" in text
    # what is left of the case is little, and fails on its own
    assert len(command[-1].split(",")) <= 4
    with pytest.raises(AssertionError):
        main(command)
    monkeypatch.undo()
    assert main(command) == 0


def test_a_crop_of_one_token_too_many_is_found(capsys, monkeypatch):
    crop = DenseLayer._crop

    def crop_more(layer, tokens):
        crop(layer, tokens)
        if layer.dense.length > 1:
            layer.dense.drop_last(1)

    monkeypatch.setattr(DenseLayer, "_crop", crop_more)
    text, command = broken(capsys, "dense")
    # hiding tokens takes them back too
    assert "crop" in text or "hide" in text
    monkeypatch.undo()
    assert main(command) == 0


def test_a_clone_that_shares_its_tensors_is_found(capsys, monkeypatch):
    def shallow(cache):
        segments = [segment for layer in cache.layers for segment in layer.segments()]
        return copy.deepcopy(cache, {id(tensor): tensor for each in segments for tensor in each.tensors().values()})

    monkeypatch.setattr(CompressedCache, "clone", shallow)
    _, command = broken(capsys, "tova", 60)
    monkeypatch.undo()
    assert main(command) == 0


def test_a_case_without_end_is_found(monkeypatch):
    monkeypatch.setattr("tests.fuzz.__main__.HANGS", 1)
    monkeypatch.setattr("tests.fuzz.__main__.play", lambda case: [None for _ in iter(int, 1)])
    assert isinstance(failure(draw(0)), TimeoutError)
