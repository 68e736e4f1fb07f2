"""Some cases of the fuzzer, and proof that it finds what is broken. `make fuzz` plays 5,000."""

import copy

import pytest

from kvcompress.cache import CompressedCache
from kvcompress.caches.dense import DenseLayer
from kvcompress.caches.evicting_layer import EvictingLayer
from kvcompress.layer import CompressedLayer
from kvcompress.storage.padding import PaddingRecord
from tests.contract.caches import ENTRIES, KINDS
from tests.fuzz.cases import CALLS, LEVELS, draw
from tests.fuzz.play import play
from tests.fuzz.run import failure, main

# every cache once, in turn, and one of each kind twice
CASES = [
    pytest.param(
        seed, marks=() if seed < len(ENTRIES) or ENTRIES[seed % len(ENTRIES)].name in KINDS else pytest.mark.slow
    )
    for seed in range(2 * len(ENTRIES))
]


@pytest.mark.parametrize("seed", CASES)
def test_a_random_case_equals_the_oracle(seed):
    play(draw(seed, ENTRIES[seed % len(ENTRIES)].name))


def test_a_seed_draws_one_case():
    assert str(draw(7)) == str(draw(7))
    assert len({str(draw(seed)) for seed in range(50)}) == 50
    cases = [draw(seed) for seed in range(300)]
    assert {case.entry.name for case in cases} == {entry.name for entry in ENTRIES}
    assert {case.positions for case in cases} == {"counted", "shifted", "gaps"}
    for kind in ("ends", "shows_filler", "spoils", "inference", "autocast"):
        assert any(getattr(case, kind) for case in cases)
    assert {call.name for case in cases for call in case.calls} == {*CALLS, *LEVELS}


def broken(capsys, cache, cases=25, first=0):
    """What the fuzzer prints of a broken cache, and the command that it says plays the failing case again.

    first: shortly before one that fails; those before it take time, and are found well.
    """
    assert main(["--cases", str(cases), "--first", str(first), "--cache", cache, "--stop", "--jobs", "1"]) == 1
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
    text, command = broken(capsys, "h2o", first=23)
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
    _, command = broken(capsys, "tova", 60, first=4)
    monkeypatch.undo()
    assert main(command) == 0


def test_ended_rows_that_evict_are_found(capsys, monkeypatch):
    monkeypatch.setattr(PaddingRecord, "note_fed", lambda record, *fed: None)
    text, command = broken(capsys, "h2o", first=8)
    assert "ends True" in text
    monkeypatch.undo()
    assert main(command) == 0


def test_a_gap_that_is_taken_for_none_is_found(capsys, monkeypatch):
    monkeypatch.setattr(PaddingRecord, "_check_even", lambda record, *positions: None)
    text, command = broken(capsys, "h2o_rolled", first=2)
    assert "positions gaps" in text
    monkeypatch.undo()
    assert main(command) == 0


def test_what_is_no_number_and_vanishes_is_found(capsys, monkeypatch):
    attend = CompressedLayer.attend
    monkeypatch.setattr(CompressedLayer, "attend", lambda *args, **how: attend(*args, **how).nan_to_num(0.0))
    text, command = broken(capsys, "gear", first=27)
    assert "gave numbers where there are none" in text
    monkeypatch.undo()
    assert main(command) == 0


def test_a_copy_made_in_inference_mode_that_cannot_be_written_to_is_found(capsys, monkeypatch):
    monkeypatch.setattr(CompressedCache, "__deepcopy__", CompressedCache.__deepcopy__.__wrapped__)
    text, command = broken(capsys, "tova", first=85)
    assert "Inplace update to inference tensor" in text
    monkeypatch.undo()
    assert main(command) == 0


def test_a_case_without_end_is_found(monkeypatch):
    monkeypatch.setattr("tests.fuzz.run.HANGS", 1)
    monkeypatch.setattr("tests.fuzz.run.play", lambda case: [None for _ in iter(int, 1)])
    assert isinstance(failure(draw(0)), TimeoutError)
