import json

import pytest
import torch

from kvcompress.cli import main
from kvcompress.evals.bench import kernels as bench
from kvcompress.kernels.common.runtime import INTERPRETED

SMALL = bench.Shape(2, 4, 2, 40, 16)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is not timed")
def test_every_row_agrees_and_is_written_with_its_provenance(tmp_path, monkeypatch, capsys):
    shapes = {name: (build, {"cpu": [SMALL]}) for name, (build, _) in bench.CASES.items()}
    monkeypatch.setattr(bench, "CASES", shapes)
    path = tmp_path / "rows.json"
    assert main(["bench", "kernels", "--device", "cpu", "--attempts", "2", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert {row["kernel"] for row in report["rows"]} >= {"causal_attention", "decode_and_evict", "merge_states"}
    for row in report["rows"]:
        assert row["agrees"]
        assert row["achieved"].keys() == row["seconds"].keys() >= {"ours"}
        assert row["limit"] == report["limits"][row["unit"]]
    assert "versions" in report["provenance"]
    assert "ours takes 1.00x" in capsys.readouterr().out


def row(variants, oracle="reference", **amount):
    case = bench.Case("kernel", SMALL, variants, oracle, **amount)
    clock = bench.Clock(torch.device("cpu"))
    return bench.measure(case, clock, {"GB/s": 10.0, "TFLOP/s": 1.0}, attempts=3, dtype=torch.float32)


def test_a_wrong_result_is_said_and_is_the_exit_status(capsys):
    one, two = torch.ones(3), torch.full((3,), 2.0)
    assert row({"ours": lambda: one, "reference": lambda: one}, bytes=1).agrees
    wrong = row({"ours": lambda: two, "reference": lambda: one}, bytes=1)
    assert not wrong.agrees
    bench.print_row(wrong)
    assert "RESULTS DISAGREE" in capsys.readouterr().out
    # of the pairs of a tuple, what an alternative does not compute is not compared
    assert row({"ours": lambda: (one, two), "sdpa": lambda: (one, None)}, oracle="ours", bytes=1).agrees
    assert not row({"ours": lambda: (one, two), "reference": lambda: (one, one)}, bytes=1).agrees


def test_results_agree_by_their_norm_and_indices_by_their_number():
    small = torch.full((1000,), 1e-6)
    assert row({"ours": lambda: small + 1e-11, "reference": lambda: small}, bytes=1).agrees
    assert not row({"ours": lambda: 1.01 * small, "reference": lambda: small}, bytes=1).agrees
    indices = torch.arange(1000)
    for first, agrees in ((5, True), (20, False)):
        turned = {"ours": lambda first=first: torch.cat([indices[:first].flip(0), indices[first:]])}
        assert row(turned | {"reference": lambda: indices}, bytes=1).agrees is agrees


def too_large():
    raise torch.OutOfMemoryError


def test_a_variant_that_runs_out_of_memory_leaves_the_row():
    found = row({"ours": lambda: torch.ones(1), "reference": too_large}, oracle="ours", bytes=1)
    assert found.seconds.keys() == {"ours"}
    assert found.agrees


def test_where_the_oracle_runs_out_of_memory_the_row_says_that_nothing_was_compared(capsys):
    found = row({"ours": lambda: torch.ones(1), "reference": too_large}, bytes=1)
    assert found.agrees is None
    bench.print_row(found)
    assert "NOT COMPARED" in capsys.readouterr().out


def test_what_bounds_a_kernel_is_its_unit():
    call = {"ours": lambda: torch.ones(1), "reference": lambda: torch.ones(1)}
    assert row(call, bytes=10**9).unit == "GB/s"
    fast = row(call, flops=10**12)
    assert fast.unit == "TFLOP/s"
    assert fast.achieved["ours"] == pytest.approx(1 / fast.seconds["ours"]["median"])
