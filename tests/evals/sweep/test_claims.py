"""A sweep shared among processes: every point is measured once, by someone, whoever dies on the way."""

import collections
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvcompress import cli, registry
from kvcompress.evals.sweep.claims import Claims
from kvcompress.evals.sweep.points import Settings
from kvcompress.evals.sweep.rows import Parts, read_rows
from kvcompress.evals.sweep.sweep import Sweep
from kvcompress.evals.tasks import make_tasks

ROOT = Path(__file__).parents[3]
SETTINGS = Settings(("h2o", "knorm"), (0.1, 0.5), ("passkey",), (600,), 1, protocols=("question-agnostic",))


def written(folder):
    """How often each key stands in the files of the processes, but for a line that was torn off."""
    keys = collections.Counter()
    for path in folder.glob("results*.jsonl"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                keys[json.loads(line)["key"]] += 1
    return keys


def test_a_claim_keeps_others_away_until_it_is_let_go(tmp_path):
    one, other = Claims(tmp_path), Claims(tmp_path)
    with one.claim("a") as ours:
        assert ours
        with other.claim("a") as theirs, other.claim("b") as free:
            assert (theirs, free) == (False, True)
    with other.claim("a") as free:
        assert free


def test_a_claim_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, time, pathlib\nfrom kvcompress.evals.sweep.claims import Claims\n"
        "with Claims(pathlib.Path(sys.argv[1])).claim('a') as ours:\n    print(ours, flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline().strip() == "True"
    with Claims(tmp_path).claim("a") as ours:
        assert not ours
    process.kill()
    process.wait()
    with Claims(tmp_path).claim("a") as ours:
        assert ours


@pytest.fixture
def together(model, tokenizer, tmp_path, monkeypatch):
    """Runs the sweep as so many processes, each a thread; the rows that each returned."""
    monkeypatch.setattr("kvcompress.evals.sweep.sweep._PAUSE", 0.01)

    def run(processes, build=registry.build):
        returned = {}

        def work(rank):
            tasks = make_tasks(SETTINGS)
            sweep = Sweep(SETTINGS, tasks, model, tokenizer, tmp_path, build=build, rank=rank, processes=processes)
            returned[rank] = sweep.run()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return returned

    return run


def test_every_point_is_measured_once_and_all_know_all(together, tmp_path):
    returned = together(2)
    files = {path.name: path.read_text().count("\n") for path in tmp_path.glob("results*.jsonl")}
    assert set(files) == {"results.0.jsonl", "results.1.jsonl"}
    assert list(written(tmp_path).values()) == [1] * 7
    assert [row["status"] for row in returned[0]] == ["ok"] * 7
    assert returned[0] == returned[1]
    # as a single process has them, which finds nothing to do
    assert together(1)[0] == returned[0]
    assert not (tmp_path / "results.jsonl").exists()


def test_files_that_another_process_deletes_meanwhile_are_no_fault(tmp_path):
    (tmp_path / "parts.0.jsonl").symlink_to(tmp_path / "deleted")
    (tmp_path / "results.0.jsonl").symlink_to(tmp_path / "deleted")
    parts = Parts(tmp_path, name="parts.1.jsonl")
    parts.append("a", 1, 0, {}, 0.0)
    parts.reload()
    assert len(parts.of("a", 1)) == 1
    assert read_rows(tmp_path) == {}


def test_a_failing_point_is_tried_by_one_process_and_again_in_the_next_run(together, tmp_path):
    built = collections.Counter()

    def broken(method, model, budget):
        built[method, budget] += 1
        if method == "h2o":
            raise RuntimeError("no luck")
        return registry.build(method, model, budget)

    for run in (1, 2):
        rows = together(2, broken)
        assert [row["status"] for row in rows[0]] == ["ok", "failed", "failed", "ok", "ok", "ok", "ok"]
        # processes that begin together may both find the failure of the last run, and only that, worth a try
        assert run <= built["h2o", 60] <= 2 * run
        assert built["none", None] == 1


def test_several_processes_do_not_forget_one_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["sweep", "--methods", "h2o", "--fresh", "--out", str(tmp_path), "--model", "/nowhere"]) == 2
    assert "--fresh is for a single process" in capsys.readouterr().err


def launched(folder, out):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--num_cpu_threads_per_process", "1", "-m", "kvcompress", "sweep", "--model", str(folder), "--device", "cpu",
        "--out", str(out), "--tasks", "passkey", "--lengths", "900", "--samples", "6", "--methods", "h2o,knorm,tova",
        "--budgets", "0.1,0.2,0.3,0.5", "--batch", "1",
    ]  # fmt: skip
    # the launcher of several processes on one machine, each on the CPU
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


# docs: `accelerate launch -m kvcompress sweep ...` shares the points of one folder among processes
@pytest.mark.slow
def test_under_accelerate_launch_a_killed_run_goes_on_with_what_is_missing(folder, tmp_path):
    pytest.importorskip("accelerate")
    psutil = pytest.importorskip("psutil")
    out = tmp_path / "out"
    first = launched(folder, out)
    until = time.monotonic() + 300
    while len(written(out)) < 4:
        assert first.poll() is None, first.stdout.read()[-3000:]
        assert time.monotonic() < until
        time.sleep(0.05)
    # the launcher and both workers, in the midst of a point
    family = psutil.Process(first.pid)
    family = [family, *family.children(recursive=True)]
    assert len(family) >= 3
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    before = {path: path.read_bytes() for path in out.glob("results*.jsonl")}
    done = set(read_rows(out))
    assert 4 <= len(done) < 34
    assert not (out / "report.html").exists()

    second = launched(folder, out)
    said = second.communicate(timeout=600)[0]
    assert second.returncode == 0, said[-3000:]
    rows = read_rows(out)
    assert len(rows) == 34
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert set(written(out).values()) == {1}
    assert all(path.read_bytes().startswith(had) for path, had in before.items())
    assert {"results.csv", "accuracy.png", "report.html"} <= {path.name for path in out.iterdir()}
    # one process reports for both
    assert said.count("report.html") == 1
