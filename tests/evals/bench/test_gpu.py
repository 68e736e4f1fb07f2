import json
import subprocess
import sys

import pytest

from kvcompress.evals.bench import gpu, gpu_report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "kvcompress.evals.bench.gpu", "--tiny", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    log = (folder / "log.txt").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log}"
    return folder, done.stdout, json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_the_whole_script_runs_and_leaves_every_result(run):
    folder, printed, results = run
    assert results["tests"]["kernels"]["counts"]["passed"] > 0
    assert results["kernels"]["limits"]["limits"]["GB/s"] > 0
    kinds = {row["kind"] for row in results["endtoend"].values()}
    assert kinds == {"prefill", "decode", "compiled", "largest batch", "generate"}
    assert not gpu_report.errors(results)
    assert (folder / "summary.md").read_text().strip() in printed


@pytest.mark.slow
def test_compiled_decoding_is_one_graph_there(run):
    rows = [row for row in run[2]["endtoend"].values() if row["kind"] == "compiled"]
    assert rows
    for row in rows:
        assert row["graphs"] == {"compiled": 1, "cudagraph_skips": 0, "breaks": 0}


class Fails:
    def names(self):
        return ["good", "bad", "late"]

    def measure(self, name):
        if name == "bad":
            raise ValueError("as a kernel may")
        return {"value": name}


def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "cases_of", lambda step, results, tiny: Fails())
    assert gpu.run_step("kernels", tmp_path, 100, True) == 0
    rows = gpu.Results(tmp_path).of("kernels")
    assert rows["good"]["value"] == "good"
    assert rows["late"]["value"] == "late"
    assert rows["bad"]["error"] == "ValueError: as a kernel may"
    assert gpu_report.errors(gpu.Results(tmp_path).all) == {"kernels: bad": "ValueError: as a kernel may"}


def test_a_step_started_again_goes_on_behind_what_it_died_at(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "cases_of", lambda step, results, tiny: Fails())
    gpu.Results(tmp_path).record("kernels", "good", {"error": "the process died here"})
    gpu.run_step("kernels", tmp_path, 100, True)
    rows = gpu.Results(tmp_path).of("kernels")
    assert list(rows) == ["good", "bad", "late"]
    assert rows["good"] == {"error": "the process died here"}


def test_what_there_is_no_time_for_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "cases_of", lambda step, results, tiny: Fails())
    gpu.run_step("kernels", tmp_path, -1, True)
    results = gpu.Results(tmp_path).all
    assert all(row == {"left_out": "no time left"} for row in results["kernels"].values())
    source = {"machine": "none", "commit": None, "versions": {}, "time": "now"}
    assert "Left out for time: kernels: good" in gpu_report.summary({"provenance": source} | results)


@pytest.mark.parametrize(
    ("line", "kind", "test"),
    [
        ("tests/test_tile.py::test_a[64-x y] PASSED    [ 50%]", "PASSED", "tests/test_tile.py::test_a[64-x y]"),
        ("[gw0] [ 50%] FAILED tests/test_tile.py::test_a[64] ", "FAILED", "tests/test_tile.py::test_a[64]"),
        ("FAILED tests/kernels/test_tile.py::test_a - assert 1 == 2", None, None),
        ("[gw3] Python 3.12", None, None),
    ],
)  # fmt: skip
def test_outcomes_are_read_from_what_pytest_prints(line, kind, test):
    outcome = gpu._OUTCOME.search(line)
    found = (outcome[1] or outcome[4], outcome[2] or outcome[3]) if outcome else (None, None)
    assert found == (kind, test)
