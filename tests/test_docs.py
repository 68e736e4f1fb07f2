"""Documents and site: what they name is there, what they show runs, and no page is missing."""

import ast
import copy
import importlib
import re
from pathlib import Path

import pytest
import typer
import yaml

import kvcompress
from kvcompress import cli
from kvcompress.cli.measurements import GROUPS
from kvcompress.policies.method import LISTED
from tests.contract.drive import generate
from tests.contract.models import prompt, tiny
from tests.evals.conftest import model, tokenizer  # noqa: F401
from tests.test_layout import LATE, LINKED, PACKAGES, sources
from tests.test_readme import GUIDES, ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# pages of the root, which the site shows
SHOWN = ["ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"]
FILES = [
    *(file for part in ("kvcompress", *LINKED) for file in sources(part)),
    *(file for file in (ROOT / "tests").rglob("*.py") if file != Path(__file__)),
    *(ROOT / name for name in ("Makefile", "pyproject.toml", ".pre-commit-config.yaml", "constraints.txt")),
]
WORDS = {word for file in FILES for word in re.findall(r"\w+", f"{file.stem} {file.read_text('utf-8')}")}


def read(name):
    return (ROOT / name).read_text("utf-8")


def rows(text, head):
    """The first cells of the table below this head."""
    lines = text[text.index(head) :].splitlines()[2:]
    return [line.split("|")[1].strip().strip("`") for line in lines[: lines.index("")]]


def test_the_map_of_packages_is_that_of_the_import_rule():
    assert set(rows(read("ARCHITECTURE.md"), "| package |")) == set(PACKAGES)


def test_packages_stand_below_those_they_import():
    listed = rows(read("ARCHITECTURE.md"), "| package |")
    for index, package in enumerate(listed):
        needed = PACKAGES[package] | (LATE["kvcompress"] if package == "kvcompress" else set())
        assert needed <= set(listed[:index]), package


def inline(text):
    """What a page has between backticks in its prose."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in GUIDES)])
def test_what_a_page_names_in_code_is_there(page):
    # of the examples
    own = {"NAME", "v2", "v0", "value_norm", "ValueNorm", "OUT", "name", "org"}
    for code in inline(read(page)):
        if code.startswith(("pipx ", "kvcompress sweep ", "accelerate ")):
            continue
        path = code.removesuffix("/")
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)+", path) and path.split("/")[0] in (
            *LINKED,
            "kvcompress",
            "tests",
            ".github",
        ):
            assert own & set(re.split(r"\W|test_", path)) or (ROOT / path).exists(), f"{page} names {path}"
            continue
        for word in re.findall(r"[A-Za-z_]\w+", code):
            assert word in WORDS | own or "NAME" in word, f"{page} names {word!r} in `{code}`"


@pytest.mark.parametrize("page", ["README.md", *SHOWN, *(str(p.relative_to(ROOT)) for p in PAGES)])
def test_what_a_page_links_to_is_there(page):
    for link in re.findall(r"\]\(([^)]+)\)", read(page)):
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target
        assert path.exists(), f"{page} links to {link}"
        if anchor:
            # a page of the root is named here, and lies there
            text = read(path.name) if path.name in SHOWN else path.read_text("utf-8")
            heads = [
                re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in re.findall(r"^#+ (.*)", text, re.M)
            ]
            assert anchor in heads, f"{page} links to {link}"


def commands(text):
    """The lines of a page that a user types: those that are indented, continued ones joined."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\\\n", " ")
    found = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [re.sub(r"^\.venv/bin/(python -m )?|  #.*", "", line) for line in found]


def settings():
    """The commands of kvcompress, and the flags of each."""
    return {name: {flag for part in command.params for flag in part.opts} for name, command in GROUP.commands.items()}


GROUP = typer.main.get_command(cli.app)
TYPED = [(page, line) for page in ["README.md", "CONTRIBUTING.md", *map(str, GUIDES)] for line in commands(read(page))]


@pytest.mark.parametrize(
    ("page", "line"),
    [(page, line) for page, line in TYPED if line.startswith("kvcompress ")],
    ids=lambda text: text[-60:],
)
def test_a_command_that_a_page_shows_has_the_flags_it_is_given(page, line):
    _, command, *rest = line.split()
    if command in GROUPS:
        assert rest[0] in GROUPS[command][1]
        return
    flags = {word for word in rest if word.startswith("--")}
    # eval hands on those of lm-eval
    known = settings()[command] | ({"--tasks", "--num_fewshot"} if command == "eval" else set())
    assert flags <= known, f"{page}: kvcompress {command} knows {sorted(known)}"


def test_a_target_that_a_page_names_is_in_the_makefile():
    shown = [code for page in ("README.md", "CONTRIBUTING.md") for code in [*inline(read(page)), *commands(read(page))]]
    named = {target for code in shown for target in re.findall(r"\bmake ([a-z][\w.-]*)", code)}
    there = set(re.findall(r"^([\w.-]+):", read("Makefile"), re.M))
    assert {"test", "lint", "docs", "demo"} <= named
    assert named <= there


@pytest.mark.parametrize("page", [DOCS / "index.md", *GUIDES], ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page, model, tokenizer, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
    assert blocks
    # as load_model gives it
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    monkeypatch.setattr(kvcompress, "load_model", lambda: (model, left))
    names = {"__name__": __name__}
    try:
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)
    finally:
        kvcompress.release(model)


def targets(page):
    return re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.M)


@pytest.mark.parametrize(
    "page", [page for page in sorted(DOCS.glob("reference/*.md")) if page.stem != "types"], ids=lambda page: page.stem
)
def test_what_the_reference_shows_is_there(page):
    assert targets(page)
    for name in targets(page):
        assert found(name)


def found(name):
    """A module, or what one has under this name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        owner, _, last = name.rpartition(".")
        return getattr(found(owner), last)


@pytest.mark.parametrize("page", sorted(DOCS.glob("reference/*.md")), ids=lambda page: page.stem)
def test_what_the_reference_shows_is_defined_where_it_says(page):
    text = page.read_text("utf-8")
    for name in targets(page):
        # the package itself names what lies elsewhere
        if name.count(".") > 1 and isinstance(thing := found(name), type):
            assert thing.__module__ == name.rpartition(".")[0], name
    for name, members in re.findall(r"^::: ([\w.]+)\n    options:\n      members: \[(.*)\]$", text, re.M):
        owner = found(name)
        home = owner.__module__ if isinstance(owner, type) else name
        for member in members.split(", "):
            assert member in vars(owner), f"{name} has no {member} of its own"
            assert getattr(vars(owner)[member], "__module__", home) == home, f"{member} is not of {name}"


def test_the_reference_shows_every_public_name():
    shown = {name for page in DOCS.glob("reference/*.md") for name in targets(page)}
    assert {f"kvcompress.{name}" for name in kvcompress.__all__} <= shown | {
        f"kvcompress.{name}" for name in kvcompress.__all__ if getattr(kvcompress, name).__module__ in policies()
    }
    assert {"kvcompress.policies", "kvcompress.kernels"} <= shown


def policies():
    """Modules that the reference shows whole."""
    return {f"kvcompress.policies.{file.stem}" for file in (ROOT / "policies").glob("*.py")}


def test_the_site_has_every_page():
    def files(nav):
        for item in nav:
            yield from files(*item.values()) if isinstance(item, dict) else [item]

    site = yaml.safe_load(read("mkdocs.yml"))
    assert sorted(files(site["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)
    for page, shown in [*((name, name) for name in SHOWN), ("results.md", "evals/results/README.md")]:
        # the second line is for those who read it in the project's folder, where nothing is inserted
        assert (DOCS / page).read_text() == f'--8<-- "{shown}"\n\n*This page is {shown} of the project.*\n'


def test_the_changelog_tells_where_modules_lie_now():
    text = read("CHANGELOG.md")
    table = text[text.index("**Modules have moved.**") : text.index("Where `import kvcompress.swiftkv`")]
    lines = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    assert len(lines) > 20
    for before, now in lines:
        was, now = re.findall("`(.*?)`", before), re.findall("`(.*?)`", now)
        assert len(was) == len(now)
        for name in now:
            assert found(f"kvcompress.{name}"), name


def test_the_changelog_tells_where_classes_lie_now():
    text = read("CHANGELOG.md")
    start, end = text.index("Classes and functions of those modules"), text.index("**Names of the public interface.**")
    # the right-hand column
    cells = [line.split("|")[2] for line in text[start:end].splitlines() if line.startswith("| `")]
    names = re.findall(r"`([a-z][\w.]+\.[A-Z]\w+)`", "".join(cells))
    assert len(names) > 5
    for name in names:
        assert isinstance(found(f"kvcompress.{name}"), type), name


def test_the_hooks_are_the_checks_of_make_lint():
    hooks = [hook for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", read("Makefile"), re.M)[1]
    checked = {" ".join(line.split()[2:4]) for line in lint.strip().splitlines()}
    assert {" ".join(hook["entry"].split()[2:4]).removesuffix(" kvcompress") for hook in hooks} == {
        "ruff format", "ruff check", "mypy",
    }  # fmt: skip
    assert len(checked) == len(hooks) == 3
    assert all(hook["entry"].split()[:2] == [".venv/bin/python", "-m"] for hook in hooks)


def test_a_release_is_published_by_a_tag_after_all_checks_and_without_a_secret():
    text = read(".github/workflows/release.yml")
    workflow = yaml.safe_load(text)
    # YAML 1.1 reads `on` as true
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    assert workflow["permissions"] == {"contents": "read"}
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert "permissions" not in build
    assert "secrets." not in text
    ran = [step["run"] for step in build["steps"] if "run" in step]
    assert any(line == ".ci/run" for line in ran)
    assert "build --no-isolation" in ran[-1]
    assert (ROOT / ".ci/run").exists()


def test_contributings_policy_is_one_file():
    (block,) = re.findall(r"```python\n(.*?)```", read("CONTRIBUTING.md"), flags=re.DOTALL)
    lines = [line.removeprefix("    ") for line in block.splitlines()]
    names = {"__name__": "value_norm"}
    exec(compile(ast.parse("\n".join(lines)), "value_norm.py", "exec"), names)
    assert LISTED.pop("valuenorm").kind is names["ValueNorm"]
    cache = kvcompress.EvictingCache(tiny(), policy=names["ValueNorm"](), budget=8)
    generate(tiny(), cache, prompt(20))
    assert all((kept <= 8).all() for kept in cache.memory().tokens_kept)
