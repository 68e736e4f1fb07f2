"""A run of distillation is measured on what it does not learn from, and leaves what scored best."""

import dataclasses
import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from kvcompress.swiftkv.data import Row
from kvcompress.swiftkv.distill import Distillation, distill, plot_losses
from kvcompress.swiftkv.model import as_teacher, set_own_last, trained_parameters
from kvcompress.swiftkv.probes import HeldOut, Probes, hold_out
from tests.contract.models import prompt
from tests.swiftkv.runs import SMALL, interrupted, rows, student

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("no_precision_of_an_earlier_run")

SETTINGS = Distillation(**{**SMALL, "steps": 8}, save_every=2)
SETTINGS_OF_INTERRUPTED = Distillation(**SMALL, save_every=2)


def held(tokens=24):
    """Texts, and a row of which the last tokens are asked for."""
    asked = Row(prompt(tokens, seed=50)[0].cpu(), torch.arange(tokens) >= tokens - 3)
    return HeldOut({"text": [prompt(tokens, seed=seed)[0].cpu() for seed in (51, 52)]}, [asked])


def trained(model):
    return {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}


def scored(model):
    both = held()
    texts = {**both.texts, "rows that ask": [row.ids for row in both.asked]}
    probes = Probes(
        model, HeldOut(texts, both.asked), [model.config.num_key_value_layers], model.config.swiftkv_own_last
    )
    return probes.score(model, model.config.num_key_value_layers)


@pytest.fixture
def best_in_the_middle(monkeypatch):
    """Scores whose divergence falls to the third, and rises again."""
    score, asked = Probes.score, []

    def scored_so(self, model, first):
        found = score(self, model, first)
        if not model.single_input:
            return found
        asked.append(found)
        return dataclasses.replace(found, divergence=1.0 + abs(2 - (len(asked) - 1) % 5))

    monkeypatch.setattr(Probes, "score", scored_so)


# docs: At the end the model is as it was when it scored best
@pytest.mark.usefixtures("best_in_the_middle")
def test_the_model_is_left_as_it_scored_best(tmp_path):
    model, at = student(), {}

    def keep(score):
        at[score["step"]] = score, trained(model)

    distill(model, rows(), SETTINGS, tmp_path, held_out=held(), on_score=keep)
    assert [*at] == [0, 2, 4, 6, 8]
    written = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert written == [score for score, _ in at.values()]
    for name, value in trained(model).items():
        assert torch.equal(value, at[4][1][name]), name
        assert not torch.equal(value, at[8][1][name]), name


@pytest.mark.parametrize("own_last", [0, 4])
def test_what_is_measured_is_the_model_as_it_is_used(own_last, tmp_path):
    model, scores = student(), []
    if own_last:
        set_own_last(model, own_last)
    distill(model, rows(), SETTINGS, tmp_path, held_out=held(), on_score=scores.append)
    assert model.config.swiftkv_own_last == own_last
    best = min(scores, key=lambda score: score["divergence"])
    assert dataclasses.asdict(scored(model)) == {name: best[name] for name in ("perplexity", "found", "divergence")}
    with torch.no_grad(), as_teacher(model):
        start = 12 if own_last else 0
        lost = [cross_entropy(model(row[None]).logits[0, start:-1], row[start + 1 :]) for row in held().texts["text"]]
    assert scores[0]["teacher"]["perplexity"]["text"] == pytest.approx(float((sum(lost) / 2).exp()), rel=1e-5)


def test_measuring_changes_nothing_of_what_is_learned(tmp_path):
    with_scores, without = student(), student()
    lines = distill(with_scores, rows(), SETTINGS, tmp_path / "with", held_out=held())
    wanted = distill(without, rows(), SETTINGS, tmp_path / "without")
    assert [{**line, "seconds": 0} for line in lines] == [{**line, "seconds": 0} for line in wanted]
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("with", "without")]
    torch.testing.assert_close(states[0]["trained"], states[1]["trained"], rtol=0, atol=0)
    assert not (tmp_path / "without" / "scores.jsonl").exists()


@pytest.mark.usefixtures("best_in_the_middle")
def test_a_run_that_stopped_leaves_the_best_of_both_halves(tmp_path):
    whole = student()
    distill(whole, rows(), SETTINGS, tmp_path / "whole", held_out=held())

    def stop(line):
        if line["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(student(), rows(), SETTINGS, tmp_path / "halves", stop, held_out=held())
    goes_on = student()
    distill(goes_on, rows(), SETTINGS, tmp_path / "halves", held_out=held())
    for name, value in trained(goes_on).items():
        assert torch.equal(value, trained(whole)[name]), name
    scores = [(tmp_path / name / "scores.jsonl").read_text() for name in ("halves", "whole")]
    assert scores[0] == scores[1]
    # a finished run leaves it again
    again = student()
    distill(again, rows(), SETTINGS, tmp_path / "whole", held_out=held())
    for name, value in trained(again).items():
        assert torch.equal(value, trained(whole)[name]), name


def test_what_was_measured_on_other_rows_is_not_compared(tmp_path):
    interrupted(tmp_path, 3, held_out=held())
    with pytest.raises(ValueError, match="holds a run that was measured on other rows"):
        distill(student(), rows(), SETTINGS_OF_INTERRUPTED, tmp_path, held_out=held(30))
    # one that was not measured so far is from there on, to its end
    distill(student(), rows(), SETTINGS_OF_INTERRUPTED, tmp_path)
    scores = []
    distill(student(), rows(), SETTINGS_OF_INTERRUPTED, tmp_path, held_out=held(), on_score=scores.append)
    assert [score["step"] for score in scores] == [6]
    written = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [score["step"] for score in written] == [0, 2, 6]
    assert [score["best"] for score in written] == [True, True, True]


def test_the_first_score_is_in_the_folder_before_the_first_update(tmp_path):
    interrupted(tmp_path, 1, held_out=held())
    (line,) = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 0
    assert len(distill(student(), rows(), SETTINGS_OF_INTERRUPTED, tmp_path, held_out=held())) == 6
    (tmp_path / "checkpoint.pt").unlink()
    distill(student(), rows(), SETTINGS_OF_INTERRUPTED, tmp_path)
    assert not (tmp_path / "scores.jsonl").exists()


def test_what_own_last_leaves_nothing_of_is_not_measured(tmp_path):
    model = student()
    set_own_last(model, 12)
    before = trained(model)
    with pytest.raises(
        ValueError, match=r"nothing to measure of text, rows that ask: .* texts of more than twice own_last=12"
    ):
        distill(model, rows(), SETTINGS, tmp_path, held_out=held())
    assert model.config.swiftkv_own_last == 12
    assert all(torch.equal(value, before[name]) for name, value in trained(model).items())
    long = HeldOut({"text": [*held(40).texts["text"], *held(8).texts["text"]]}, held(40).asked)
    probes = Probes(model, long, [1], 12)
    alone = Probes(model, held(40), [1], 12)
    assert probes.score(model, 1) == alone.score(model, 1)
    assert probes.score(model, 1).divergence > 0


def test_a_row_that_asks_at_its_first_token_alone_is_left_out():
    first = Row(prompt(20, seed=60)[0].cpu(), torch.arange(20) < 1)
    model = student()
    one = Probes(model, HeldOut(held().texts, [*held().asked, first]), [1]).score(model, 1)
    assert one == Probes(model, held(), [1]).score(model, 1)
    assert Probes(model, HeldOut(held().texts, ()), [1]).score(model, 1).found is None


def test_a_start_that_is_better_than_all_updates_stays(tmp_path):
    """A score that is no number is never best."""
    model = student()
    before = trained(model)
    settings = Distillation(**{**SMALL, "steps": 4, "learning_rate": 1e12, "warmup": 0.0}, save_every=2)
    distill(model, rows(), settings, tmp_path, held_out=held())
    for name, value in trained(model).items():
        assert torch.equal(value, before[name]), name


def test_what_is_held_out_is_not_learned_from(smollm2):
    _, tokenizer = smollm2
    data = [
        Row(torch.tensor(tokenizer.encode(f"Row {number} says that foxes jump. " * 12)), torch.ones(0))
        for number in range(6)
    ]
    left, measured = hold_out(data, tokenizer, tokens=60, length=128)
    assert len(left) == 5
    assert all(one is other for one, other in zip(left, data[:5], strict=True))
    assert torch.equal(torch.cat(measured.texts["held out"]), data[-1].ids[:60])
    assert sum(len(row.ids) for row in measured.asked) >= 240
    left, measured = hold_out(data, tokenizer, texts={"other": data[:1]}, tokens=50, length=128)
    assert len(left) == 6
    assert list(measured.texts) == ["other"]
    with pytest.raises(ValueError, match="the 6 rows have too few tokens to hold out 9000 of them: hold out fewer"):
        hold_out(data, tokenizer, tokens=9000)
    with pytest.raises(ValueError, match="there is nothing to measure"):
        HeldOut({}, [])


def test_the_plot_shows_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    lines = distill(student(), rows(), SETTINGS, tmp_path / "run", held_out=held())
    scores = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert plot_losses(lines, tmp_path / "with.png", scores)
    assert plot_losses(lines, tmp_path / "without.png")
    assert (tmp_path / "run" / "losses.png").read_bytes() == (tmp_path / "with.png").read_bytes()
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()
