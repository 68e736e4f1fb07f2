"""The eval of SwiftKV: flops are the formula's, to the last one, and every model sits the same exam once."""

import json

import pytest

from kvcompress import cli, convert
from kvcompress.evals.studies import swiftkv
from kvcompress.evals.studies.swiftkv import counted_flops, prefill_seconds, projection_flops
from tests.contract.models import build, prompt


@pytest.mark.parametrize(("first", "share"), [(1, 1), (2, 3), (5, 1), (1, 4)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_flops_of_a_prefill_are_those_of_the_formula(family, first, share):
    model = build(family, num_hidden_layers=5)
    converted = convert(model, first, share)
    assert counted_flops(model, prompt(40)) == projection_flops(model.config, 40)
    assert counted_flops(converted, prompt(40)) == projection_flops(model.config, 40, first, share)


def test_models_take_turns():
    model = build("llama")
    seconds = prefill_seconds({"base": model, "other": convert(model, 1)}, prompt(20), 3)
    assert [len(each) for each in seconds.values()] == [3, 3]
    assert all(second > 0 for each in seconds.values() for second in each)


@pytest.mark.slow
def test_it_prints_what_it_measures(capsys):
    sizes = ["--tokens", "64", "--text-tokens", "128", "--window", "64"]
    assert cli.main(["study", "swiftkv", "--repeats", "1", *sizes, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for part in ("flops ratio", "time ratio", "perplexity", "converted, not trained"):
        assert part in printed


def test_rows_of_an_earlier_call_stay_and_folders_are_measured_again(smollm2, tmp_path, monkeypatch, capsys):
    _, tokenizer = smollm2
    base = build("llama", num_hidden_layers=4, vocab_size=len(tokenizer))
    for name, model in (("base", base), ("trained", convert(base, 2))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    measured = []
    measure = swiftkv.measure
    monkeypatch.setattr(swiftkv, "measure", lambda name, *rest: measured.append(name) or measure(name, *rest))
    text, out, trained = (str(tmp_path / name) for name in ("text.txt", "out.json", "trained"))
    command = [
        "study",
        "swiftkv",
        "--model",
        str(tmp_path / "base"),
        "--tokens",
        "0",
        "--window",
        "32",
        "--device",
        "cpu",
        "--out",
        out,
    ]
    command += ["--text", text, "--fit", text, "--fit-tokens", "128"]
    assert cli.main(command) == 0
    names = ["base", "converted, not trained", "converted, fitted"]
    assert measured == names
    assert cli.main([*command, "--distilled", trained]) == 0
    assert measured == [*names, trained]
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert list(rows) == measured
    # that folder holds the conversion as it begins
    assert rows[trained]["perplexity"] == pytest.approx(rows[names[1]]["perplexity"], rel=1e-5)
    assert rows[names[2]]["perplexity"] != pytest.approx(rows[names[1]]["perplexity"], rel=1e-5)
    assert "recovered" in capsys.readouterr().out
    assert cli.main([*command, "--text-tokens", "64"]) == 2
    assert "rows with other settings" in capsys.readouterr().err
