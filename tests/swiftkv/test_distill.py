"""Distillation: what trains, and that a run may be cut into forwards and spread over processes."""

import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvcompress.cli import main
from kvcompress.swiftkv.conversion import convert
from kvcompress.swiftkv.data import Row
from kvcompress.swiftkv.distill import Distillation, distill
from kvcompress.swiftkv.model import as_teacher, trained_parameters
from kvcompress.swiftkv.probes import HeldOut
from tests.contract.models import build, prompt
from tests.swiftkv.runs import SMALL, rows, student

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("no_precision_of_an_earlier_run")


ROOT = Path(__file__).parents[2]


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tmp_path):
    # the weights that begin the last layer are its own, and its input is what the common norm takes
    model = student(first=3)
    lines = distill(model, rows(), Distillation(**{**SMALL, "steps": 1}), tmp_path)
    assert lines[0]["divergence"] == pytest.approx(0, abs=1e-9)
    assert lines[0]["hidden"] == 0


# docs: `kvcompress distill` trains what the conversion added
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_what_was_added_trains_and_the_loss_falls(checkpointing, tmp_path):
    model = student(2, first=2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad(), as_teacher(model):
        taught = model(prompt(16, 2)).logits
    lines = distill(model, rows(), Distillation(**{**SMALL, "steps": 30, "checkpointing": checkpointing}), tmp_path)
    for name, parameter in model.named_parameters():
        changes = name in trained_parameters(model)
        assert torch.equal(parameter, before[name]) != changes, name
        assert parameter.requires_grad
    assert sum(line["loss"] for line in lines[-5:]) < 0.7 * sum(line["loss"] for line in lines[:5])
    with torch.no_grad(), as_teacher(model):
        assert torch.equal(model(prompt(16, 2)).logits, taught)


def test_forwards_accumulate_to_what_one_large_forward_gives(tmp_path):
    one, several = student(), student()
    distill(one, rows(), Distillation(**{**SMALL, "batch": 4}), tmp_path / "one")
    distill(several, rows(), Distillation(**{**SMALL, "batch": 1, "accumulate": 4}), tmp_path / "several")
    for parameter, other in zip(trained_parameters(one).values(), trained_parameters(several).values(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-4)


def test_every_token_weighs_the_same_however_rows_of_several_lengths_are_cut_into_forwards(tmp_path):
    data = [
        Row(row.ids[: 3 + 4 * (index % 4)], row.answered[: 3 + 4 * (index % 4)]) for index, row in enumerate(rows())
    ]
    settings = {**SMALL, "steps": 2}
    one, several = student(), student()
    wanted = distill(one, data, Distillation(**{**settings, "batch": 4}), tmp_path / "one")
    found = distill(several, data, Distillation(**{**settings, "batch": 2, "accumulate": 2}), tmp_path / "several")
    for name in ("divergence", "hidden", "tokens"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in wanted], rel=1e-4), name
    for parameter, other in zip(trained_parameters(one).values(), trained_parameters(several).values(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-5)


def test_mixed_precision_trains_float32_weights(tmp_path):
    model = student(dtype=torch.bfloat16)
    lines = distill(model, rows(), Distillation(**SMALL, precision="bf16"), tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in trained_parameters(model).values())
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"length": 1}, "length must be at least 2"),
        ({"fit_tokens": -1}, "fit_tokens must be 0 or more"),
        ({"precision": "fp8"}, "precision must be"),
        ({"temperature": 0.0}, "above 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**wrong)


def test_a_model_without_later_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no later layers"):
        distill(convert(build("llama", num_hidden_layers=2), 1.0), rows(), Distillation(**SMALL), tmp_path)


WORKER = """
import sys, torch
from pathlib import Path
from kvcompress.swiftkv.distill import Distillation, distill
from kvcompress.swiftkv.model import trained_parameters
from tests.swiftkv.runs import SMALL, rows, student
torch.set_num_threads(1)
model = student()
distill(model, rows(), Distillation(**{**SMALL, "batch": 1}), Path(sys.argv[1]))
"""


# docs: alone or under `accelerate launch -m`
@pytest.mark.slow
def test_two_processes_under_accelerate_launch_train_as_one_with_twice_the_rows(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--num_cpu_threads_per_process", "1",
        str(tmp_path / "worker.py"), str(tmp_path / "two"),
    ]  # fmt: skip
    # the launcher of several processes on one machine, each on the CPU
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert_trained_as_one(tmp_path)


def as_launched(rank, port, folder):
    """What a process that accelerate launched does; this one is a fork, and need not import anything."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in launched.items()} | {"ACCELERATE_USE_CPU": "1"}
    torch.set_num_threads(1)
    held = HeldOut({"text": [rows(14)[-1].ids]}, ())
    for _ in range(2):
        # the second finds the first one's folder
        distill(student(), rows(), Distillation(**{**SMALL, "batch": 1}), folder, held_out=held)


def test_two_processes_train_as_one_with_twice_the_rows(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=as_launched, args=(rank, port, tmp_path / "two")) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    assert_trained_as_one(tmp_path)


def assert_trained_as_one(folder):
    """What two processes left in a folder is what one leaves that takes the rows of both."""
    distill(student(), rows(), Distillation(**SMALL), folder / "one")
    two, one = (torch.load(folder / name / "checkpoint.pt", weights_only=True) for name in ("two", "one"))
    torch.testing.assert_close(two["trained"], one["trained"], rtol=1e-3, atol=1e-4)
    losses = [(folder / name / "losses.jsonl").read_text().splitlines() for name in ("two", "one")]
    for line, wanted in zip(*(map(json.loads, lines) for lines in losses), strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
        assert line["tokens"] == wanted["tokens"]


# docs: The folder it writes loads like any model: `load_model("swiftkv")`
def test_the_command_line_leaves_a_model_that_loads(smollm2, tmp_path, capsys):
    _, tokenizer = smollm2
    build("llama", num_hidden_layers=4, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    command = ["distill", str(tmp_path / "text.txt"), "--model", str(tmp_path / "base"), "--out", str(tmp_path / "out")]
    rest = ["--steps", "2", "--length", "32", "--share", "2", "--fit-tokens", "64", "--hidden-weight", "0.5"]
    assert main([*command, *rest]) == 2
    assert "too few tokens to hold out 2048 of them: hold out fewer, or give texts" in capsys.readouterr().err
    assert main([*command, *rest, "--held-out", "64"]) == 2
    assert "at least 128 tokens to hide something and ask for it, got 32" in capsys.readouterr().err
    assert main([*command, *rest, "--retrieval", "0", "--held-out", "32"]) == 0
    printed = capsys.readouterr().out
    assert "2/2  loss" in printed
    assert "found" not in printed
    settings = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["settings"]
    assert (settings["fit_tokens"], settings["hidden_weight"], settings["length"]) == (64, 0.5, 32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (loaded.config.num_key_value_layers, loaded.config.key_value_group_size) == (2, 2)
    assert (tmp_path / "out" / "losses.jsonl").read_text().count("\n") == 2
    assert main(["distill", str(tmp_path / "none.txt")]) == 2
    assert main([*command, "--skip-from", "half"]) == 2
    assert "--skip-from must be a layer" in capsys.readouterr().err
    for given in (["--text", str(tmp_path / "text.txt")], ["--held-out", "64"]):
        assert main([*command, *given, "--steps", "0"]) == 2
        assert f"{given[0]} is what training, --diagnose and --skip-from auto measure on" in capsys.readouterr().err
    assert main([*command, "--text", str(tmp_path / "text.txt"), "--held-out", "0"]) == 2
    assert "--held-out 0 measures nothing" in capsys.readouterr().err
    assert main([*command, "--diagnose", "--held-out", "0"]) == 2
    assert "--held-out 0 leaves nothing" in capsys.readouterr().err
    assert main([*command, "--steps", "-1"]) == 2
    assert "--steps must be 0 or more, got -1" in capsys.readouterr().err
    assert main([*command, "--steps", "0", "--fit-tokens", "0"]) == 2
    assert "leaves nothing to do" in capsys.readouterr().err
    # half of what it learns from is generated, unless told otherwise
    (tmp_path / "longer.txt").write_text("The quick brown fox jumps over the lazy dog. " * 120)
    learned = {}
    for share in ("0.5", "0"):
        out = tmp_path / share
        given = ["distill", str(tmp_path / "longer.txt"), *command[2:4], "--out", str(out), "--retrieval", share]
        capsys.readouterr()
        assert main([*given, "--steps", "3", "--batch", "2", "--length", "128", "--held-out", "128"]) == 0
        printed = capsys.readouterr().out
        found = r"found: \d.*  " if float(share) else ""
        assert re.search(rf"0/3  perplexity of held out: \d+\.\d+ \(the model's .*\)  {found}KL: \d", printed)
        assert re.search(r"the model as it was after [03] updates, which scored best", printed)
        rows_of = torch.load(out / "checkpoint.pt", weights_only=True)["rows"]
        learned[share] = int(re.search(r"rows of (\d+) tokens", rows_of)[1])
    assert learned["0.5"] == pytest.approx(2 * learned["0"], rel=0.2)
