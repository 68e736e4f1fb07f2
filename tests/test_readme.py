"""Every sentence of README.md is named by a test that proves it, and many sentences of the guides are.

A comment above a test, `# README: ` and words that stand so in one sentence (or table row) of README, says which one it
proves; `# docs: ` is the same for a sentence of docs/guides.
"""

import ast
import re
from pathlib import Path

import pytest

import kvcompress
from kvcompress import GEAR, KVzipCache, SnapKVCache, StreamingLLMCache, registry
from tests.contract.models import tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


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


def quotes(path, mark):
    """What the comments of a test file that begin so quote: pairs of a line number and words."""
    lines = path.read_text("utf-8").splitlines()
    return [
        (number, " ".join(line.strip().removeprefix(mark).split()))
        for number, line in enumerate(lines, 1)
        if line.strip().startswith(mark)
    ]


SENTENCES = sentences(README)
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
MARKS = {"# README: ": SENTENCES, "# docs: ": [one for page in GUIDES for one in sentences(page.read_text("utf-8"))]}
FILES = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if any(quotes(path, mark) for mark in MARKS)]


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
    for mark, (number, words) in [(each, quote) for each in MARKS for quote in quotes(path, each)]:
        said_by = [sentence for sentence in MARKS[mark] if words in sentence]
        assert len(said_by) == 1, f"{path.name}:{number}: {mark}{words!r} stands in {len(said_by)} sentences"
        after = number + 1
        while lines[after - 1].strip().startswith("#"):
            after += 1
        assert after in tests, f"{path.name}:{number}: no test begins in line {after}"


def test_every_sentence_is_quoted_by_a_test():
    quoted = [words for path in FILES for _, words in quotes(path, "# README: ")]
    missing = [one for one in SENTENCES if not any(words in one for words in quoted)]
    assert not missing, f"{len(missing)} sentences are proved by no test:\n" + "\n".join(missing)


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


def test_readme_is_shorter_than_150_lines():
    assert len(README.splitlines()) < 150


# README: Guides: [choose a method]
# README: To change the code
@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "evals/results/README.md"])
def test_what_a_page_links_to_is_there(page):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def table(page):
    """The page's table of methods as it should be, and as it is; rows of what is no method of its own stay."""
    is_now = page[page.index("| name | class |") :].partition("\n\n")[0].split("\n")
    rows = [
        f"| `{each.name}` | `{each.label}` | {each.about} | {each.costs} | {each.paper} |".replace("|  |", "| |")
        for each in registry.METHODS.values()
        if each.kind.__module__.startswith("kvcompress.")
    ]
    others = [line for line in is_now[2:] if line.split("`")[1] not in registry.METHODS]
    return [*is_now[:2], *rows, *others], is_now


def test_its_table_of_methods_is_what_they_say_of_themselves():
    expected, found = table(README)
    assert found == expected, "`make readme` writes it"


# README: Caches and policies are imported from `kvcompress`
def test_what_it_names_is_imported_from_kvcompress():
    classes = re.findall(r"`(?:\w+ = )?(\w+(?:Cache|Store))\b", README)
    named = {*re.findall(r"(?:policy|packed)=(\w+)\(", README), *classes} - {
        "ValueNorm",
        "DynamicCache",
        "QuantizedCache",
    }
    assert {"TOVA", "Random", "GEAR", "H2OCache", "PrefixStore"} <= named
    assert all(hasattr(kvcompress, name) for name in named)
    assert named <= set(dir(kvcompress))


# README: Settings of most: `allocation="pyramid"` gives early layers more of the budget
# README: `packed=GEAR(bits=4)` stores them as 4-bit codes
@pytest.mark.parametrize("kind", [SnapKVCache, StreamingLLMCache])
def test_short_names_take_what_evicting_cache_takes(kind):
    cache = kind(tiny(), budget=512, allocation="pyramid", packed=GEAR(bits=4))
    assert (cache.allocation, cache.packed) == ("pyramid", GEAR(bits=4))
    assert kind(tiny(), budget=512, rerotated=True).rerotated
    assert KVzipCache(tiny(), budget=512, allocation="pyramid").allocation == "pyramid"


if __name__ == "__main__":
    expected, found = table(README)
    (ROOT / "README.md").write_text(README.replace("\n".join(found), "\n".join(expected)), "utf-8")
