"""A method of a package that is installed beside kvcompress: in the list, and in a sweep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_cli import SMALL, folder  # noqa: F401

ROOT = Path(__file__).parents[2]
NEWEST = '''
from dataclasses import dataclass
from kvcompress import DenseCache, Policy

@dataclass(frozen=True, kw_only=True)
class Newest(Policy):
    """The newest tokens, and nothing beside."""

    def score(self, candidates):
        return candidates.positions.float()

class Everything(DenseCache):
    """All of them."""
'''


@pytest.fixture
def command(tmp_path):
    """Runs a command where a package with a method is installed, as an installer leaves it: modules and metadata."""
    site = tmp_path / "site-packages"
    metadata = site / "their_methods-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "their_methods.py").write_text(NEWEST)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-methods\nVersion: 1.0\n")
    points = "newest = their_methods:Newest\nall = their_methods:Everything"
    (metadata / "entry_points.txt").write_text(f"[kvcompress.methods]\n{points}\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]),
        "COLUMNS": "1000",
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "kvcompress", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


# docs: Packages name theirs in the entry point group `kvcompress.methods`
def test_an_installed_method_is_in_the_commands_list(command):
    done = command("generate", "--help")
    assert done.returncode == 0, done.stderr
    (listed,) = [line for line in done.stdout.splitlines() if "Known: none, " in line]
    assert ", newest, all, " in listed


def test_an_installed_method_is_swept_by_its_name_and_by_where_its_class_is(command, folder, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    methods = "newest:recent=8,their_methods:Newest:recent=8"
    done = command("sweep", "--model", folder, "--device", "cpu", "--out", str(out), *SMALL, "--methods", methods)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["status"] for row in rows} == {"ok"}
    kept = {row["method"]: row["tokens_kept"] for row in rows}
    assert set(kept) == {"none", "streaming", "newest:recent=8", "their_methods:Newest:recent=8"}
    assert kept["newest:recent=8"] == kept["their_methods:Newest:recent=8"] < kept["none"]


def test_a_plan_leaves_out_an_installed_cache_whose_size_is_not_known(command, folder):  # noqa: F811
    done = command("plan", "--model", folder, "--context", "1000")
    assert done.returncode == 0, done.stderr
    assert "newest" in done.stdout
    assert "Left out, because their sizes are not known: all." in done.stdout
    assert command("plan", "--model", folder, "--context", "1000", "--methods", "all").returncode == 2


def test_a_class_that_has_changed_is_measured_again(command, folder, tmp_path):  # noqa: F811
    module, out = tmp_path / "site-packages" / "their_methods.py", tmp_path / "out"
    call = ("sweep", "--model", folder, "--device", "cpu", "--out", str(out), *SMALL, "--methods", "newest")
    assert command(*call).returncode == 0
    assert "6 of them are already in" in command(*call).stdout
    module.write_text(NEWEST.replace("candidates.positions.float()", "-candidates.positions.float()"))
    done = command(*call)
    assert "4 of them are already in" in done.stdout, done.stderr
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert len({row["source"] for row in rows if row["method"] == "newest"}) == 2
    assert not any("source" in row for row in rows if row["method"] != "newest")
    # of the two, a report shows the newer
    told = command("report", str(out), "--out", str(tmp_path / "report"))
    assert told.returncode == 0, told.stderr
    assert (tmp_path / "report" / "results.csv").read_text().count(",newest,") == 2
