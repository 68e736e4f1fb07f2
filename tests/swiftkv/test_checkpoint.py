"""A run that was interrupted goes on as if it had not, and no other run goes on in its place."""

import pytest
import torch

from kvcompress.swiftkv.conversion import convert
from kvcompress.swiftkv.distill import Distillation, distill
from tests.contract.models import build
from tests.swiftkv.runs import SMALL, interrupted, rows, student

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("no_precision_of_an_earlier_run")


def test_a_run_that_stopped_goes_on_as_if_it_had_not(tmp_path):
    settings = Distillation(**SMALL, save_every=2)
    whole, halves = student(), student()
    expected = distill(whole, rows(), settings, tmp_path / "whole")

    def stop(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(halves, rows(), settings, tmp_path / "halves", stop)
    lines = distill(student(), rows(), settings, tmp_path / "halves")
    for line, wanted in zip(lines, expected, strict=True):
        assert {**line, "seconds": 0} == {**wanted, "seconds": 0}
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "halves")]
    for name in ("trained", "optimiser", "step"):
        torch.testing.assert_close(states[1][name], states[0][name], rtol=0, atol=0)
    with pytest.raises(ValueError, match="holds another run, which differs in learning_rate"):
        distill(student(), rows(), Distillation(**{**SMALL, "learning_rate": 1.0}), tmp_path / "whole")


def test_a_run_killed_between_its_two_files_goes_on_as_if_it_had_not(tmp_path):
    """The checkpoint is written first, and says by itself how many updates are in it."""
    settings = Distillation(**SMALL, save_every=2)
    expected = distill(student(), rows(), settings, tmp_path / "whole")
    interrupted(tmp_path / "halves", 2)
    losses = tmp_path / "halves" / "losses.jsonl"
    before = losses.read_text()
    interrupted(tmp_path / "halves", 4)
    losses.write_text(before)
    lines = distill(student(), rows(), settings, tmp_path / "halves")
    assert [{**line, "seconds": 0} for line in lines] == [{**line, "seconds": 0} for line in expected]
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "halves")]
    for name in ("trained", "optimiser", "step"):
        torch.testing.assert_close(states[1][name], states[0][name], rtol=0, atol=0)
    # at the very end too
    losses.write_text(before)
    distill(student(), rows(), settings, tmp_path / "halves")
    assert losses.read_text().count("\n") == 6


def test_a_run_goes_on_with_the_model_and_the_data_that_it_began_with(tmp_path):
    interrupted(tmp_path)
    settings = Distillation(**SMALL, save_every=2)
    other = convert(build("llama", num_hidden_layers=4, seed=1), 1)
    with pytest.raises(ValueError, match=r"the run in .* was made with Llama.*differ in weights"):
        distill(other, rows(), settings, tmp_path)
    assert all(parameter.requires_grad for parameter in other.parameters())
    with pytest.raises(ValueError, match=r"other data: 12 rows of 192 tokens, \w+, got 13 rows of 208 tokens"):
        distill(student(), rows(13), settings, tmp_path)
    changed = rows()
    changed[5].answered[3] = False
    with pytest.raises(ValueError, match="other data"):
        distill(student(), changed, settings, tmp_path)
    assert len(distill(student(), rows(), settings, tmp_path)) == 6


def test_a_damaged_checkpoint_is_refused(tmp_path):
    interrupted(tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    weight = torch.load(path, weights_only=True)["trained"]["model.norm_swiftkv.weight"].numpy().tobytes()
    data = bytearray(whole)
    data[whole.index(weight)] ^= 1
    for damaged in (bytes(data), whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint.pt is damaged"):
            distill(student(), rows(), Distillation(**SMALL, save_every=2), tmp_path)


def test_a_checkpoint_of_an_earlier_release_goes_on(tmp_path):
    settings = Distillation(**SMALL, save_every=2)
    expected = distill(student(), rows(), settings, tmp_path / "whole")
    interrupted(tmp_path / "halves")
    path = tmp_path / "halves" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save({name: state[name] for name in ("trained", "optimiser", "scaler", "settings", "step")}, path)
    with pytest.warns(UserWarning, match="earlier kvcompress"):
        lines = distill(student(), rows(), settings, tmp_path / "halves")
    assert [{**line, "seconds": 0} for line in lines] == [{**line, "seconds": 0} for line in expected]
