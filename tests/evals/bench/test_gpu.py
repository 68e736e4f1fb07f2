import json
import subprocess
import sys

import pytest
import torch

from kvcompress.cli import main
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


class Rows(Fails):
    def names(self):
        return ["limits", "decode 1", "merge 1"]


def test_only_the_cases_asked_for_are_measured_and_the_limits_they_need(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "cases_of", lambda step, results, tiny: Rows())
    gpu.run_step("kernels", tmp_path, 100, True, "^dec")
    assert list(gpu.Results(tmp_path).of("kernels")) == ["limits", "decode 1"]


def test_what_there_is_no_time_for_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "cases_of", lambda step, results, tiny: Fails())
    gpu.run_step("kernels", tmp_path, -1, True)
    results = gpu.Results(tmp_path).all
    assert all(row == {"left_out": "no time left"} for row in results["kernels"].values())
    source = {"machine": "none", "commit": None, "versions": {}, "time": "now"}
    assert "Left out for time: kernels: good" in gpu_report.summary({"provenance": source} | results)


TESTS = """
import pytest

def test_right(): pass
@pytest.mark.parametrize("n", [1, 2])
def test_wrong(n): assert n == 3, "not <three>"
@pytest.mark.skip
def test_skipped(): pass
@pytest.fixture
def broken(): raise OSError("no disk")
def test_without_its_fixture(broken): pass
def test_slow():
    import time
    time.sleep(60)
"""


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    cases = gpu.SuiteCases(gpu.Results(tmp_path), True)

    def measure(limit, *arguments):
        cases.tests = {"some": ([str(tmp_path), "-c", "/dev/null", "--rootdir", str(tmp_path), *arguments], limit)}
        return cases.measure("some")

    return measure


def test_outcomes_are_those_of_the_report_that_pytest_writes(suite):
    row = suite(60, "-k", "not slow")
    assert row["counts"] == {"passed": 1, "failed": 2, "skipped": 1, "error": 1}
    assert list(row["failed"]) == [
        f"test_some::test_{name}" for name in ("wrong[1]", "wrong[2]", "without_its_fixture")
    ]
    assert row["failed"]["test_some::test_wrong[1]"].startswith("AssertionError: not <three>")
    assert row["error"] == "3 failed"


@pytest.mark.slow
def test_what_ran_before_the_end_of_the_time_is_told(suite, monkeypatch):
    monkeypatch.setattr(gpu, "_GRACE", 5)
    row = suite(25, "-k", "right or slow")
    assert row["left_out"] == "stopped after 20 s"
    assert row["counts"]["passed"] == 1
    assert "error" not in row


def test_the_program_needs_nothing_of_the_command_line(fresh):
    code = (
        "import sys\nfor name in ('typer', 'rich', 'datasets', 'lm_eval', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['gpu', '--help']\nimport kvcompress.evals.bench.endtoend\n"
        "from kvcompress.evals.bench import gpu\ngpu.main()"
    )
    ran = fresh(code)
    assert ran.returncode == 0, ran.stderr
    assert "--tiny" in ran.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line(capsys):
    assert main(["bench", "gpu"]) == 2
    assert "torch finds no GPU here; --tiny runs the script on a CPU" in capsys.readouterr().err
