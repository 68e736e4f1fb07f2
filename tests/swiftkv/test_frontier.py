"""The frontier: its fits are those of `fit`, its scores those of whole forwards, its elbow what was asked for."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcompress import DenseCache, convert
from kvcompress.cli import main
from kvcompress.hf import cache_argument
from kvcompress.swiftkv.data import Row
from kvcompress.swiftkv.frontier import Frontier, Point, Score, Survey, best_conversion, diagnose, projection_flops
from kvcompress.swiftkv.least_squares import fit
from kvcompress.swiftkv.model import as_teacher, trained_parameters
from kvcompress.swiftkv.retrieval import retrieval_rows
from tests.contract.models import build, prompt
from tests.swiftkv.test_data import letters
from tests.swiftkv.test_model import base, seen_columns
from tests.swiftkv.test_retrieval import PROSE, prose


def rows(count=20, tokens=24):
    return [prompt(tokens, seed=seed)[0].cpu() for seed in range(count)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "granite", "olmo2", "phi3"])
def test_the_fits_of_all_first_layers_come_from_one_pass_and_are_those_of_fit(family):
    model = base(family, kinds=[0, 1, 1, 1], num_hidden_layers=4)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    calls = []
    hooks = [
        layer.register_forward_hook(lambda *_, at=at: calls.append(at)) for at, layer in enumerate(model.model.layers)
    ]
    survey = Survey(model, rows())
    assert survey.firsts == [1, 2, 3]
    assert len(calls) == 4 * len(rows())
    for hook in hooks:
        hook.remove()
    for first, share in ((1, 1), (1, 3), (2, 1), (2, 2), (3, 1)):
        ours, theirs = survey.converted(first, share), convert(model, first, share)
        fit(theirs, rows())
        assert ours.config.num_key_value_layers == first
        assert ours.config.key_value_group_size == share
        for (name, one), other in zip(
            trained_parameters(ours).items(), trained_parameters(theirs).values(), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "smollm3"])
def test_scores_are_those_of_whole_forwards(family):
    model = base(family, kinds=[0, 1, 1, 1], num_hidden_layers=4)
    survey = Survey(model, rows(), [1, 2])
    texts = {"one": rows(2, 30), "two": [prompt(17, seed=40)[0].cpu()]}
    # of a row that says again what it holds: the last tokens are those of the model, and then they are not
    ids = prompt(30, seed=50)[0]
    with torch.no_grad():
        for at in (20, 21, 22, 27, 28):
            ids[at] = model(ids[None, :at]).logits[0, -1].argmax()
    ids[28] = (ids[28] + 1) % 500
    answered = torch.zeros(30, dtype=torch.bool)
    answered[20:23] = answered[27:29] = True
    frontier = survey.measure(texts, [Row(ids.cpu(), answered)], (1, 3), prompt=100)
    assert [(point.first, point.share) for point in frontier.points] == [(1, 1), (1, 3), (2, 1)]
    assert frontier.base.found == 0.5
    assert frontier.base.divergence == pytest.approx(0, abs=1e-6)

    def whole(student):
        """Perplexities, and the share of the two answers found, of forwards of everything."""
        with torch.no_grad():
            lost, divergence, tokens = {}, 0.0, 0
            for name, parts in texts.items():
                each = []
                for part in parts:
                    ours, theirs = (
                        one(part[None].to(ids.device)).logits[0].log_softmax(-1) for one in (student, model)
                    )
                    each.append(-ours[:-1].gather(1, part[1:, None].to(ids.device)))
                    divergence += float((theirs.exp() * (theirs - ours)).sum())
                    tokens += len(part)
                lost[name] = float(torch.cat(each).mean().exp())
            right = student(ids[None]).logits[0, :-1].argmax(-1) == ids[1:]
        return lost, (float(right[19:22].all()) + float(right[26:28].all())) / 2, divergence / tokens

    assert frontier.base.perplexity == pytest.approx(whole(model)[0], rel=1e-4)
    for point in frontier.points:
        for score, student in (
            (point.converted, convert(model, point.first, point.share)),
            (point.fitted, survey.converted(point.first, point.share)),
        ):
            perplexity, found, divergence = whole(student)
            assert score.perplexity == pytest.approx(perplexity, rel=1e-3)
            assert score.found == found
            assert score.divergence == pytest.approx(divergence, rel=1e-3, abs=1e-5)
        assert point.prefill == projection_flops(model.config, 100, point.first, point.share) / projection_flops(
            model.config, 100
        )
        assert point.kv == (point.first + (4 - point.first) / point.share) / 4
    # a conversion that is fitted is nearer, on what it was fitted to
    seen = survey.measure({"fitted to": rows(4)}, [Row(ids.cpu(), answered)])
    assert all(point.fitted.divergence < point.converted.divergence for point in seen.points)


@pytest.mark.parametrize(("right", "found"), [(8, 1.0), (7, 0.0)])
def test_of_a_long_answer_the_first_eight_tokens_count(right, found):
    model = build("llama", num_hidden_layers=4)
    ids = prompt(30, seed=50)[0]
    with torch.no_grad():
        for at in range(15, 15 + right):
            ids[at] = model(ids[None, :at]).logits[0, -1].argmax()
        ids[15 + right] = (model(ids[None, : 15 + right]).logits[0, -1].argmax() + 1) % 500
    answered = torch.zeros(30, dtype=torch.bool)
    answered[15:27] = True
    frontier = Survey(model, rows(2), [3]).measure({"text": rows(1)}, [Row(ids.cpu(), answered)])
    assert frontier.base.found == found


def point(first, found, perplexity, share=1):
    score = Score({"text": 10 * perplexity, "code": 5 * perplexity}, 0.8 * found, 0.1)
    return Point(first, share, first / 10, first / 10 + 0.1 / share, None, score)


def test_the_elbow_is_the_cheapest_that_keeps_enough():
    points = (point(5, 0.2, 1.3), point(6, 1.0, 1.2), point(7, 0.97, 1.1), point(7, 0.96, 1.11, 2), point(8, 1.0, 1.01))
    frontier = Frontier(10, 4096, Score({"text": 10.0, "code": 5.0}, 0.8, 0.0), points)
    assert frontier.perplexity(points[2].fitted) == pytest.approx(1.1)
    assert frontier.found(points[2].fitted) == pytest.approx(0.97)
    assert frontier.elbow() is points[3]
    assert frontier.elbow(perplexity=1.25) is points[1]
    assert frontier.elbow(found=0.99) is points[4]
    assert frontier.elbow(found=1.1) is None
    lines = frontier.table().splitlines()
    assert [line.startswith("| **") for line in lines[2:]] == [False, False, False, True, False]
    assert lines[3].startswith("| 6 of 10 | 1 | 0.600x | 0.700x | 1.200x | 1.00x | 0.100 |")
    facts = json.loads(json.dumps(frontier.facts()))
    assert facts["elbow"] == {"first": 7, "share": 2}
    assert facts["points"][0]["fitted"]["perplexity"] == {"text": 13.0, "code": 6.5}


def test_its_plot_marks_the_elbow(tmp_path):
    pytest.importorskip("matplotlib")
    points = (point(5, 0.2, 1.3), point(7, 0.97, 1.1), point(5, 0.1, 1.4, 2))
    frontier = Frontier(10, 4096, Score({"text": 10.0, "code": 5.0}, 0.8, 0.0), points)
    assert frontier.plot(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def taught():
    """A tiny model and a tokenizer of bytes, and rows of prose."""
    tokenizer = letters(None)
    return build("llama", num_hidden_layers=4), tokenizer, prose(tokenizer, 12)


QUICK = {"fit_tokens": 1500, "probe_tokens": 600, "length": 256}


def test_a_diagnosis_holds_out_what_it_measures(taught, monkeypatch):
    model, tokenizer, given = taught
    read = []
    whole = Survey.__init__
    monkeypatch.setattr(
        Survey,
        "__init__",
        lambda self, model, rows, *more, **how: read.extend(rows) or whole(self, model, rows, *more, **how),
    )
    told = []
    # each row begins as no other does
    given = [
        Row(torch.cat([torch.tensor([at + 1]), row.ids]), torch.ones(len(row.ids) + 1).bool())
        for at, row in enumerate(given)
    ]
    frontier, survey = diagnose(model, tokenizer, given, firsts=[2, 3], shares=(1, 2), on_point=told.append, **QUICK)
    assert list(frontier.points) == told
    assert [(each.first, each.share) for each in told] == [(2, 1), (2, 2), (3, 1)]
    assert isinstance(survey.converted(2), type(convert(model, 2)))
    assert frontier.base.perplexity.keys() == {"held out"}
    # half of the tokens are prose, from the rows that are not held out
    begun = {
        int(ids[0])
        for ids in read
        if len(ids) > 1 and int(ids[0]) <= 12 and torch.equal(ids[1:], given[0].ids[1 : len(ids)])
    }
    assert begun
    assert not begun & {12}
    assert 1500 <= sum(map(len, read)) <= 1500 + 256


# docs: `convert(model, skip_from="auto", rows=rows, tokenizer=tokenizer)`
def test_auto_takes_the_elbow_or_says_that_there_is_none(taught, monkeypatch):
    model, tokenizer, given = taught
    found = {}

    def elbow(self, *limits):
        found["points"] = self.points
        return self.points[1]

    monkeypatch.setattr(Frontier, "elbow", elbow)
    converted = best_conversion(model, tokenizer, given, **QUICK)
    assert converted.config.num_key_value_layers == found["points"][1].first == 2
    monkeypatch.setattr(
        "kvcompress.swiftkv.frontier.diagnose", lambda *args, **how: diagnose(*args, **{**how, **QUICK})
    )
    again = convert(model, skip_from="auto", rows=given, tokenizer=tokenizer)
    for one, other in zip(trained_parameters(again).values(), trained_parameters(converted).values(), strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr(Frontier, "elbow", lambda self, *limits: None)
    with pytest.raises(ValueError, match="no conversion with share=1 finds .* from layer . on, finds"):
        convert(model, skip_from="auto", rows=given, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"skip_from": "auto"}, "needs rows"),
        ({"skip_from": 1, "rows": [1]}, 'rows are for skip_from="auto"'),
    ],
)
def test_auto_takes_rows_and_nothing_else_does(wrong, message):
    with pytest.raises(ValueError, match=message):
        convert(build("llama"), **wrong)


def test_what_cannot_be_measured_is_refused(taught):
    model, tokenizer, given = taught
    with pytest.raises(ValueError, match=r"skip_between=\(2, 3\) leaves no layer behind it"):
        Survey(model, [given[0].ids], skip_between=(2, 3))
    for firsts in ([], [0, 1], [3, 4]):
        with pytest.raises(ValueError, match="first layers must be from 1 to 3, got"):
            Survey(model, rows(1), firsts)
    with pytest.raises(ValueError, match="no rows"):
        Survey(model, [])
    with pytest.raises(ValueError, match="got GPTNeoXForCausalLM"):
        Survey(build("gpt_neox"), rows(1))
    survey = Survey(model, rows(1))
    with pytest.raises(ValueError, match="nothing to measure"):
        survey.measure({"text": rows(1)}, [])
    with pytest.raises(ValueError, match="too few tokens to hold out"):
        diagnose(model, tokenizer, given, probe_tokens=10**6)


@pytest.fixture
def folder(taught, tmp_path):
    model, tokenizer, _ = taught
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(PROSE * 30)
    return tmp_path


# docs: prints a table, and writes it to `frontier.json` and `frontier.png`
def test_the_command_tells_what_conversions_would_cost(folder, capsys):
    pytest.importorskip("accelerate")
    command = ["distill", str(folder / "text.txt"), "--model", str(folder / "model"), "--out", str(folder / "out")]
    command += ["--length", "256", "--fit-tokens", "1500", "--share", "3"]
    assert main([*command, "--diagnose", "--text", str(folder / "text.txt")]) == 0
    said = capsys.readouterr().out
    facts = json.loads((folder / "out" / "frontier.json").read_text())
    assert [(each["first"], each["share"]) for each in facts["points"]] == [(1, 1), (1, 3), (2, 1), (3, 1)]
    assert "| 2 of 4 | 1 | " in said
    assert "4/4  layer 3, share 1: measured" in said
    assert (folder / "out" / "frontier.png").exists()
    # of random weights nothing is found
    assert main([*command, "--skip-from", "auto", "--steps", "0"]) != 0
    assert "no conversion with share=3" in capsys.readouterr().err


# docs: `--steps 0` leaves it at the fit
def test_the_command_fits_without_training(folder, taught):
    pytest.importorskip("accelerate")
    command = ["distill", str(folder / "text.txt"), "--model", str(folder / "model"), "--out", str(folder / "out")]
    command += ["--length", "256", "--fit-tokens", "1500", "--skip-from", "2", "--steps", "0"]
    assert main(command) == 0
    model = taught[0]
    begun, saved = convert(model, 2).state_dict(), load_file(folder / "out" / "model.safetensors")
    changed = {name for name, tensor in saved.items() if not torch.equal(tensor, begun[name].cpu())}
    assert {name.split(".", 3)[3] for name in changed} == {f"self_attn.{kind}_proj_swiftkv.weight" for kind in "kv"}
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out").eval()
    with torch.no_grad(), as_teacher(loaded):
        torch.testing.assert_close(loaded(prompt(20)).logits, model(prompt(20)).logits)
    assert main([*command[:-2], "--steps", "0", "--fit-tokens", "0"]) != 0
    assert main([*command, "--own-last", "3", "--out", str(folder / "own")]) == 0
    assert AutoModelForCausalLM.from_pretrained(folder / "own").config.swiftkv_own_last == 3


# docs: `--skip-between 12 14` of the command
def test_the_command_skips_a_span_too(folder, capsys):
    pytest.importorskip("accelerate")
    command = ["distill", str(folder / "text.txt"), "--model", str(folder / "model"), "--out", str(folder / "out")]
    command += ["--length", "256", "--fit-tokens", "1500", "--skip-from", "3", "--skip-between", "1", "2"]
    assert main([*command, "--own-last", "3", "--steps", "0"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert loaded.config.swiftkv_skip_between == [1, 2]
    assert float(loaded.model.between_swiftkv.map.weight.abs().max()) > 0
    diagnosed = [*command, "--own-last", "3", "--diagnose", "--text", str(folder / "text.txt")]
    assert main(diagnosed) == 0
    facts = json.loads((folder / "out" / "frontier.json").read_text())
    assert (facts["skip_between"], [each["first"] for each in facts["points"]]) == ([1, 2], [3])
    capsys.readouterr()
    for wrong, said in ((["--steps", "0"], "it needs --own-last"), (["--own-last", "3"], "it needs --steps 0")):
        assert main([*command, *wrong]) != 0
        assert said in capsys.readouterr().err
    again = [*command, "--model", str(folder / "out"), "--own-last", "3", "--steps", "0"]
    assert main(again) != 0
    assert "makes another conversion" in capsys.readouterr().err


def test_the_command_goes_on_with_a_converted_model_as_it_was_converted(folder, capsys):
    pytest.importorskip("accelerate")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    convert(base, 2, 2).save_pretrained(folder / "shared")
    convert(base, 2).save_pretrained(folder / "plain")
    for name in ("shared", "plain"):
        AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / name)
    command = ["distill", str(folder / "text.txt"), "--length", "256", "--fit-tokens", "1500", "--steps", "0"]
    out = ["--out", str(folder / "out")]
    for name, wrong, said in (
        ("shared", ["--own-last", "3"], "which share=2 layers cannot have in common"),
        ("plain", ["--own-last", "-3"], "own_last must be a number of tokens, 0 or more, got -3"),
        ("plain", ["--skip-from", "3"], "--skip-from makes another conversion"),
        ("plain", ["--share", "2"], "--share makes another conversion"),
    ):
        assert main([*command, "--model", str(folder / name), *wrong, *out]) == 2
        assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (folder / "out" / "config.json").exists()
    assert main([*command, "--model", str(folder / "plain"), "--own-last", "3", *out]) == 0
    assert AutoModelForCausalLM.from_pretrained(folder / "out").config.swiftkv_own_last == 3


def test_answers_are_looked_up_on_the_fast_path():
    tokenizer = letters(None)
    model = base("llama", num_hidden_layers=4)
    (row, *_) = retrieval_rows(prose(tokenizer), tokenizer, 200, 256)
    student = Survey(model, rows(4), [2]).converted(2)
    at = row.answered.nonzero()[:, 0] - 1
    columns = seen_columns(student, row.ids[None].to(student.device), logits_to_keep=at.to(student.device))
    assert columns[1] == [len(row.ids)]
    assert columns[2] == [len(at)]
    with torch.no_grad():
        cached = student(row.ids[None].to(student.device), **cache_argument(student, DenseCache(student))).logits
        plain = student(row.ids[None].to(student.device)).logits
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=2e-4)
