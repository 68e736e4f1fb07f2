"""The study of the frontier: one file with the frontier, the exam of one conversion, and what made them."""

import json

from kvcompress import cli
from tests.contract.models import build
from tests.swiftkv.test_retrieval import PROSE


def test_the_file_has_the_frontier_and_the_exam_of_one_conversion(smollm2, tmp_path, monkeypatch):
    _, tokenizer = smollm2
    base = build("llama", num_hidden_layers=4, vocab_size=len(tokenizer))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for name in ("fit", "text"):
        (tmp_path / f"{name}.txt").write_text(PROSE * 30)
    asked = []
    monkeypatch.setattr(
        "kvcompress.evals.studies.quality.needles",
        lambda model, tokenizer, length, samples: asked.append((type(model).__name__, length, samples)) or 0.5,
    )
    command = ["study", "frontier", "--model", str(tmp_path / "base"), "--device", "cpu", "--window", "128"]
    command += ["--fit", str(tmp_path / "fit.txt"), "--text", str(tmp_path / "text.txt"), "--fit-tokens", "600"]
    command += ["--probe-tokens", "200", "--text-tokens", "200", "--firsts", "2", "3", "--needles", "160"]
    assert cli.main([*command, "--samples", "3", "--out", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert [point["first"] for point in results["frontier"]["points"]] == [2, 3]
    # of random weights nothing is found, so there is no elbow
    assert results["frontier"]["elbow"] is None
    assert not asked
    assert cli.main([*command, "--examined", "3", "--samples", "3", "--out", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in results["exam"]] == ["base", "fitted, from layer 3 on"]
    assert asked == [("LlamaForCausalLM", 160, 3), ("LlamaSwiftKVForCausalLM", 160, 3)]
    # the only later layer keeps its own keys and values
    one, other = (row["perplexity"]["text"] for row in results["exam"])
    assert abs(one - other) < 1e-2 * one
    assert results["command"]
    assert results["machine"]
    assert results["fit_seconds"] > 0
    assert results["seconds"].keys() == {"frontier", "base", "fitted, from layer 3 on"}
