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
from kvcompress import Policy

@dataclass(frozen=True, kw_only=True)
class Newest(Policy):
    """The newest tokens, and nothing beside."""

    def score(self, candidates):
        return candidates.positions.float()
'''


@pytest.fixture
def command(tmp_path):
    """Runs a command where a package with a method is installed, as an installer leaves it: modules and metadata."""
    site = tmp_path / "site-packages"
    metadata = site / "their_methods-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "their_methods.py").write_text(NEWEST)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-methods\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[kvcompress.methods]\nnewest = their_methods:Newest\n")
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
    (listed,) = [line for line in done.stdout.splitlines() if "Known: none, random, h2o" in line]
    assert ", newest." in listed


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
