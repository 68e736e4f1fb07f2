"""Each example runs on the real model, as README says it does."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.fixture
def run(smollm2, monkeypatch):
    """Runs an example's main() with the model that is already loaded."""

    def run(name, **settings):
        path = Path(__file__).parents[1] / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"example_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "load_model", lambda: smollm2)
        return module.main(**settings)

    return run


# README: [examples/](examples) has short programs for the default model
def test_every_example_is_tested_here():
    tested = {
        name.removeprefix("test_the_").removesuffix("_example") for name in globals() if name.endswith("_example")
    }
    assert {path.stem for path in EXAMPLES} == tested


def test_the_h2o_example(run, capsys):
    run("h2o", budget=128, new_tokens=8)
    assert "of the full cache" in capsys.readouterr().out


def test_the_snapkv_example(run):
    answers = run("snapkv", new_tokens=8)
    assert len(set(answers)) == 2


def test_the_kvzip_example(run):
    answers = run("kvzip")
    for question, name in (
        ("What is the large telescope called?", "Halvard"),
        ("What is the name of the cat?", "Pluto"),
    ):
        assert all(name in answer for answer in answers[question])


def test_the_attention_matching_example(run):
    divergences = run("attention_matching")
    assert divergences["AttentionMatchingCache"] < 0.6 * divergences["KVzipCache"]


def test_the_streaming_example(run):
    cache = run("streaming", budget=64, new_tokens=12)
    assert cache.memory().tokens_seen > 64
    assert all((kept <= 64).all() for kept in cache.memory().tokens_kept)


def test_the_shadowkv_example(run):
    report = run("shadowkv", new_tokens=8).memory()
    assert report.device_bytes < report.full_bytes / 2 < report.device_bytes + report.host_bytes
    assert 0 < report.fetched_per_forward < report.host_bytes


def test_the_own_policy_example(run):
    assert all((kept == 64).all() for kept in run("own_policy", new_tokens=4).memory().tokens_kept)


def test_the_dense_example(run, smollm2):
    here, there = run("dense", new_tokens=8)
    _, tokenizer = smollm2
    assert torch.equal(here, there)
    assert here.shape[1] == len(tokenizer("Once upon a time, in a library full of caches,").input_ids) + 16


def test_the_swiftkv_example(run, capsys):
    report = run("swiftkv", steps=2, length=32, new_tokens=4).memory()
    # 20 layers of their own, and 10 that share by twos
    assert len(report.tokens_kept) == 25
    assert "of the full cache" in capsys.readouterr().out


def test_the_gear_example(run, capsys):
    cache = run("gear", new_tokens=8)
    assert cache.memory().ratio < 0.4
    assert "bits per number" in capsys.readouterr().out


def test_the_hydragen_example(run, capsys):
    ours, plain = run("hydragen", questions=3, new_tokens=4)
    assert ours == plain
    lines = capsys.readouterr().out.splitlines()
    sizes = [float(line.split()[-2]) for line in lines if "MiB" in line]
    assert sizes[0] < 0.5 * sizes[1]


def test_the_calibrated_example(run):
    cache = run("calibrated", new_tokens=8)
    report = cache.memory()
    assert report.by_component["codes"] < report.by_component["basis"]


def test_the_ask_example(run):
    found = run("ask", new_tokens=16)
    for answer, name in zip(found.answers, ("Halvard", "archive", "Pluto"), strict=True):
        assert name in answer
    assert found.memory.ratio < 0.7
