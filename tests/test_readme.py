"""Every sentence of README.md that claims something is named by the test that proves it.

A comment above a test, `# README: ` and words that stand so in one sentence (or table row) of README, says which one it
proves. A sentence is proved if such a comment quotes it, or stands in `UNPROVED` with the reason.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest

from kvcompress import EvictingCache
from kvcompress.policies.h2o import H2O
from tests.contract.models import tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
MARK = "# README: "
# how sentences begin that no test can prove, and why
UNPROVED = {
    "[CHANGELOG.md](CHANGELOG.md) says": "another page",
}


def sentences(text):
    """The sentences and table rows of a page, outside of code, with single spaces."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.split("\n")
        if lines[0].startswith("|"):
            # behind the head and the line below it
            found += lines[2:]
        elif not lines[0].startswith(("#", "    ")):
            for item in re.split(r"^\* ", block, flags=re.MULTILINE):
                found += re.split(r"(?<=[.?!])\s+(?=[A-Z`\[])", item)
    return [" ".join(one.split()) for one in found if one.strip()]


def quotes(path):
    """What the comments of a test file quote: pairs of a line number and words."""
    lines = path.read_text("utf-8").splitlines()
    return [
        (number, " ".join(line.strip().removeprefix(MARK).split()))
        for number, line in enumerate(lines, 1)
        if line.strip().startswith(MARK)
    ]


SENTENCES = sentences(README)
FILES = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text("utf-8")]


def names(path):
    return str(path.relative_to(ROOT / "tests"))


@pytest.mark.parametrize("path", FILES, ids=names)
def test_a_comment_quotes_one_sentence_and_stands_above_a_test(path):
    lines = path.read_text("utf-8").splitlines()
    tests = {
        min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        for node in ast.walk(ast.parse("\n".join(lines)))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    for number, words in quotes(path):
        said_by = [sentence for sentence in SENTENCES if words in sentence]
        assert len(said_by) == 1, f"{path.name}:{number}: {words!r} stands in {len(said_by)} sentences of README"
        after = number + 1
        while lines[after - 1].strip().startswith("#"):
            after += 1
        assert after in tests, f"{path.name}:{number}: no test begins in line {after}"


def test_every_sentence_is_quoted_by_a_test():
    quoted = [words for path in FILES for _, words in quotes(path)]
    silent = [one for one in SENTENCES if not any(words in one for words in quoted)]
    excused = [one for one in silent if any(one.startswith(words) for words in UNPROVED)]
    missing = [one for one in silent if one not in excused]
    assert not missing, f"{len(missing)} sentences are proved by no test:\n" + "\n".join(missing)
    assert len(excused) == len(UNPROVED), "sentences of UNPROVED are quoted, or not there"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# Head\n\nOne thing,\nand so on. Another: `x`.\n", ["One thing, and so on.", "Another: `x`."]),
        ("| a | b |\n|---|---|\n| 1 | 2 |\n", ["| 1 | 2 |"]),
        ("* one. Two.\n* three,\n  four\n", ["one.", "Two.", "three, four"]),
        ("```\ncode. Code.\n```\n\n    a command\n", []),
        ("Weighs 1.5 GB, e.g. so. `f` runs.\n", ["Weighs 1.5 GB, e.g. so.", "`f` runs."]),
    ],
)
def test_sentences_are_told_apart(text, expected):
    assert sentences(text) == expected


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "evals/results/README.md"])
def test_what_a_page_links_to_is_there(page):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


# README: Every policy has a module of its own
# README: What the short names do not take, `EvictingCache(model, policy=H2O(), budget=512)` does
def test_the_policies_that_it_names_are_found_where_it_says():
    named = {*re.findall(r"policy=(\w+)\(", README), *re.findall(r"packed=(\w+)\(", README)}
    assert {"H2O", "TOVA", "GEAR"} <= named
    for name in named - {"ValueNorm"}:
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        (module,) = {words, words.replace("_", "")} & {file.stem for file in (ROOT / "policies").glob("*.py")}
        assert hasattr(importlib.import_module(f"kvcompress.policies.{module}"), name)
    cache = EvictingCache(tiny(), policy=H2O(), budget=512, allocation="pyramid", rerotated=True)
    assert cache.allocation == "pyramid"
