"""A method of a package that is installed beside kvcompress: in the list, and in a sweep."""

import json
from dataclasses import dataclass
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


# each command takes as long as its imports, so all that may share a process do
CALLS = """
import contextlib, io, json, os, sys
os.environ["COLUMNS"] = "1000"
from kvcompress.cli import main

for arguments in json.loads(sys.argv[1]):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main(arguments)
    print(json.dumps([status, out.getvalue(), error.getvalue()]))
"""
METHODS = "newest:recent=8,their_methods:Newest:recent=8"


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    error: str


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where a package with a method is installed, as an installer leaves it: modules and metadata."""
    place = tmp_path_factory.mktemp("place")
    site = place / "site-packages"
    metadata = site / "their_methods-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "their_methods.py").write_text(NEWEST)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-methods\nVersion: 1.0\n")
    points = "newest = their_methods:Newest\nall = their_methods:Everything"
    (metadata / "entry_points.txt").write_text(f"[kvcompress.methods]\n{points}\n")
    return place


@pytest.fixture(scope="module")
def run(place, fresh):
    """Runs commands where the package is, in a process of their own."""

    def run(*commands):
        ran = fresh(CALLS, json.dumps(commands), path=(place / "site-packages", ROOT), folder=place)
        assert ran.returncode == 0, ran.stderr
        return [Done(*json.loads(line)) for line in ran.stdout.splitlines()]

    return run


@pytest.fixture(scope="module")
def sweep(place, folder):  # noqa: F811
    out = str(place / "out")
    return ["sweep", "--model", folder, "--device", "cpu", "--out", out, *SMALL, "--methods", METHODS]


@pytest.fixture(scope="module")
def first(run, sweep, folder):  # noqa: F811
    """What the commands that change nothing did, one after another, by name."""
    plan = ["plan", "--model", folder, "--context", "1000"]
    commands = {
        "help": ["generate", "--help"],
        "plan": plan,
        "plan of all": [*plan, "--methods", "all"],
        "sweep": sweep,
        "sweep again": sweep,
    }
    return dict(zip(commands, run(*commands.values()), strict=True))


def rows(place):
    return [json.loads(line) for line in (place / "out" / "results.jsonl").read_text().splitlines()]


# docs: Packages name theirs in the entry point group `kvcompress.methods`
def test_an_installed_method_is_in_the_commands_list(first):
    assert first["help"].status == 0, first["help"].error
    (listed,) = [line for line in first["help"].out.splitlines() if "Known: none, " in line]
    assert ", newest, all, " in listed


def test_an_installed_method_is_swept_by_its_name_and_by_where_its_class_is(first, place):
    assert first["sweep"].status == 0, first["sweep"].error
    swept = rows(place)[:8]
    assert {row["status"] for row in swept} == {"ok"}
    kept = {row["method"]: row["tokens_kept"] for row in swept}
    assert set(kept) == {"none", "streaming", *METHODS.split(",")}
    assert kept["newest:recent=8"] == kept["their_methods:Newest:recent=8"] < kept["none"]


def test_a_plan_leaves_out_an_installed_cache_whose_size_is_not_known(first):
    assert first["plan"].status == 0, first["plan"].error
    assert "newest" in first["plan"].out
    assert "Left out, because their sizes are not known: all." in first["plan"].out
    assert first["plan of all"].status == 2


def test_a_class_that_has_changed_is_measured_again(first, place, run, sweep):
    assert first["sweep"].status == 0, first["sweep"].error
    assert "8 of them are already in" in first["sweep again"].out, first["sweep again"].error
    module = place / "site-packages" / "their_methods.py"
    module.write_text(NEWEST.replace("candidates.positions.float()", "-candidates.positions.float()"))
    done, told = run(sweep, ["report", str(place / "out"), "--out", str(place / "report")])
    assert "4 of them are already in" in done.out, done.error
    swept = rows(place)
    assert len(swept) == 12
    for method in METHODS.split(","):
        assert len({row["source"] for row in swept if row["method"] == method}) == 2
    assert not any("source" in row for row in swept if row["method"] not in METHODS.split(","))
    # of the two, a report shows the newer
    assert told.status == 0, told.error
    assert (place / "report" / "results.csv").read_text().count(",newest:recent=8,") == 2
