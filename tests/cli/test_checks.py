"""The command check: a head, a row for each cache, and a status."""

import sys

import pytest
import torch

import kvcompress.evals.provenance
from kvcompress.caches.dense import DenseLayer
from kvcompress.check.outcome import FULL
from kvcompress.cli import main
from tests.check.test_check import after, forget_the_last
from tests.cli.test_cli import folder  # noqa: F401


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_command_prints_a_head_and_a_row_for_each_cache(capsys):
    assert main(["check", "--model", "llama", "--caches", "none, gear:bits=2"]) == 0
    head, table, end = capsys.readouterr().out.strip().split("\n\n")
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in head.splitlines()}
    assert list(lines) == [
        "kvcompress", "torch", "transformers", "triton", "python", "system", "device", "command", "model",
    ]  # fmt: skip
    assert lines["torch"] == torch.__version__
    assert lines["python"] == sys.version.split()[0]
    assert lines["device"].startswith("cpu: ")
    assert lines["model"].startswith("llama (LlamaForCausalLM), 4 layers")
    assert lines["model"].endswith("tiny, with random weights")
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["cache", "difference", "lost"]
    assert [row[:2] for row in rows[1:]] == [["none", "OK"], ["gear:bits=2", "OK"], [FULL, "OK"]]
    assert [len(row) for row in rows[1:]] == [3, 4, 3]
    assert end.startswith("3 OK, 0 refused, 0 at fault\n")


def test_what_is_not_installed_is_said(monkeypatch, capsys):
    monkeypatch.setattr(kvcompress.evals.provenance, "_version", lambda package: None)
    monkeypatch.setattr(kvcompress.evals.provenance, "_commit", lambda: None)
    assert main(["check", "--model", "bloom", "--caches", "none"]) == 0
    out = capsys.readouterr().out
    assert "triton        not installed\n" in out
    assert "commit" not in out
    assert "0 OK, 1 refused, 0 at fault" in out


@pytest.mark.parametrize("verbose", [False, True])
def test_a_fault_makes_the_status_1_and_has_its_reason_in_the_row(verbose, monkeypatch, capsys):
    monkeypatch.setattr(DenseLayer, "_drop", after(DenseLayer._drop, forget_the_last))
    more = ["--verbose"] if verbose else []
    assert main(["check", "--model", "llama", "--caches", "none", *more]) == 1
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if line.startswith("none ")]
    assert "FAULT" in row
    assert row.endswith("of the largest, where they must be equal")
    assert ("Traceback" in out) == verbose


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caches", "h3o"], "unknown method 'h3o'; did you mean h2o? known: "),
        (["--caches", "h2o:"], "settings must be written as h2o:setting=value"),
        (["--caches", ","], "--caches names no cache"),
        (["--caches", "h2o:budget=3"], "a check gives caches its own budgets: leave budget= out of h2o:budget=3"),
        (["--caches", "h2o:sizes=3"], "the method h2o does not take these settings: sizes"),
        (
            ["--caches", "none,gear:basis=b.safetensors"],
            "gear:basis=b.safetensors: what was measured of",
        ),
        (["--caches", "h2o:allocation=p.safetensors"], "the tiny random one that is checked without"),
        (["--model", "llama", "--dtype", "float16"], "--dtype is of the model itself: give --weights too"),
        (["--model", "llama", "--device", "meta"], "device meta was requested, but torch cannot use it here"),
        (["--model", "/nowhere"], "there is no folder /nowhere"),
        (["--model", "/nowhere", "--weights"], "there is no folder /nowhere"),
        (["--model", "t5"], "t5 is an encoder-decoder model; kvcompress supports decoder-only models"),
        (["--model", "llama", "--device", "gpu"], "device must be one that torch knows"),
        (["--model", "llama", "--weights", "--dtype", "int8"], "--dtype must be one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys):
    assert main(["check", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert len(error.splitlines()) == 1
    assert message in error


def test_a_folder_is_checked_by_its_config_or_with_its_weights(folder, capsys):  # noqa: F811
    assert main(["check", "--model", folder, "--caches", "none"]) == 0
    assert "llama (LlamaForCausalLM), 2 layers, hidden size 32, 2 query heads" in capsys.readouterr().out
    assert main(["check", "--model", folder, "--caches", "none,h2o", "--weights"]) == 0
    out = capsys.readouterr().out
    assert "vocabulary 260, float32\n" in out
    assert "3 OK" in out
