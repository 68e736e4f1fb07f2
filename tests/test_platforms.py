"""Where Triton is not installed (macOS, Windows, builds of torch without it) everything runs in PyTorch.

Hidden it is in processes of their own, which find every module but Triton's.
"""

import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_map_only

from kvcompress import cli
from kvcompress.evals.bench import gpu
from kvcompress.evals.bench import kernels as bench
from kvcompress.kernels.common import runtime
from kvcompress.kernels.missing_triton import MissingTriton
from kvcompress.storage.offload import OffloadedPages
from tests.kernels.test_runtime import CALLS, fresh, public, tensors
from tests.test_layout import MAY_IMPORT, ROOT, imports, sources

# also a plugin of pytest, that sees to it that Triton stayed hidden
HIDING = """
import sys


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)


assert "triton" not in sys.modules
sys.meta_path[:] = map(Hiding, sys.meta_path)


def pytest_sessionfinish():
    assert "triton" not in sys.modules
    assert not sys.modules["kvcompress.kernels.common.runtime"].HAS_TRITON
"""
MODULES = sorted(
    ".".join(("kvcompress", *file.relative_to(ROOT).with_suffix("").parts[folder == "kvcompress" :]))
    for folder in ("kvcompress", "kernels", "policies", "evals")
    for file in sources(folder)
    # what lighteval loads needs lighteval, which is in no extra
    if not file.name.startswith("__") and file.stem != "lighteval_model"
)
KERNELS = [name for name in MODULES if name.startswith("kvcompress.kernels.")]


@pytest.fixture
def run(tmp_path):
    """Runs Python where Triton is not found: its arguments, and variables of the environment."""
    (tmp_path / "hiding.py").write_text(HIDING)
    paths = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))

    def run(*arguments, **variables):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | variables
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

    return run


def passes(done):
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.fixture
def no_triton(monkeypatch):
    """This process, as if Triton had not been found when the package was imported."""
    monkeypatch.setattr(runtime, "_missing", MissingTriton(ModuleNotFoundError("No module named 'triton'")))
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    runtime._warn_of_speed.cache_clear()
    yield
    runtime._warn_of_speed.cache_clear()


def test_triton_is_imported_in_one_file():
    files = [file for folder in MAY_IMPORT for file in sources(folder)]
    takers = [file for file in files if any(re.match(r"triton\b", name) for name in imports(file.read_text()))]
    assert takers == [ROOT / "kernels" / "common" / "runtime.py"]


def test_every_module_can_be_imported_without_triton(run):
    code = f"import hiding, importlib; [importlib.import_module(n) for n in {MODULES}]; hiding.pytest_sessionfinish()"
    assert len(MODULES) > 80
    passes(run("-c", code))


# README: | `triton` | compiling the kernels with a CPU build of torch; GPU builds bring their own Triton |
def test_every_kernel_launched_without_triton_says_what_to_install(run):
    code = f"""
import hiding, importlib
from kvcompress.kernels.missing_triton import Kernel

for module in {KERNELS}:
    for name, kernel in vars(importlib.import_module(module)).items():
        if isinstance(kernel, Kernel) and name.endswith("_kernel"):
            try:
                kernel[(1,)](None, BLOCK=1)
            except ImportError as error:
                print(error)
"""
    said = passes(run("-c", code)).splitlines()
    kernels = {re.match(r"the kernel (\w+) needs Triton", line)[1] for line in said}
    texts = "".join(file.read_text() for file in sources("kernels"))
    assert kernels == set(re.findall(r"^def (\w+_kernel)\b", texts, re.MULTILINE))
    assert all("No module named 'triton'" in line and "pip install 'triton>=3.5'" in line for line in said)


def test_a_triton_that_fails_to_load_is_as_good_as_none_and_the_error_says_why(run, tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('libtriton.so: version GLIBC_2.99 not found')")
    code = "from kvcompress.kernels.merge import _merge_states_kernel as kernel; kernel[(1,)]()"
    done = run("-c", code)
    assert re.search(r"ImportError: .* needs Triton, .*\(libtriton.so: version GLIBC_2.99 not found\)", done.stderr)


def test_another_package_of_that_name_is_not_triton(run, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    passes(run("-c", "from kvcompress.kernels.common import runtime; assert not runtime.HAS_TRITON"))


def test_the_interpreter_that_is_asked_for_and_not_there_is_an_error(run):
    code = """
import hiding, os, torch

for value in ("1", "true", "ON", "0"):
    os.environ["TRITON_INTERPRET"] = value
    try:
        import kvcompress.kernels.common.runtime
        print("none")
    except ImportError as error:
        print(error)
"""
    *asked, not_asked = passes(run("-c", code)).splitlines()
    assert len(asked) == 3
    assert all(line.startswith("TRITON_INTERPRET=1 needs Triton, which cannot be imported here") for line in asked)
    assert not_asked == "none"


def test_the_check_ahead_of_time_refuses_without_triton(run):
    code = """
import hiding
from kvcompress.evals.bench import aot

try:
    aot.compile_case("merge", 0, "sm_90")
except ImportError as error:
    print(error)
aot.main([])
"""
    done = run("-c", code)
    assert "needs Triton, which cannot be imported here" in done.stdout
    assert done.returncode == 2
    assert "Triton cannot be imported here: there is nothing to compile with" in done.stderr


@pytest.mark.parametrize(
    ("module", "command"), [(bench, ["kernels", "--device", "cuda"]), (gpu, ["gpu"])], ids=["kernels", "gpu"]
)
def test_what_measures_kernels_on_a_gpu_refuses_without_triton(module, command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(module, "HAS_TRITON", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert cli.main(["bench", *command]) == 2
    assert "Triton cannot be imported here" in capsys.readouterr().err


def test_the_gpu_script_of_its_own_refuses_without_triton(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "HAS_TRITON", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "Triton cannot be imported here" in capsys.readouterr().err


def test_a_gpu_without_triton_takes_the_pytorch_path_and_warns_once(no_triton):
    tensor = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    with pytest.warns(UserWarning, match="computes in PyTorch, which is right and slower: .* needs Triton") as warned:
        found = [runtime.runs_triton(tensor) for _ in range(3)]
    assert not any(found)
    assert len(warned) == 1


@pytest.mark.parametrize("is_cuda", [False, True])
def test_no_warning_is_given_on_a_cpu_or_in_a_graph(no_triton, monkeypatch, is_cuda):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_cuda)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not runtime.runs_triton(SimpleNamespace(is_cuda=is_cuda, dtype=torch.float32))


class OnGPU(torch.Tensor):
    """Says that it is on a GPU, and computes where it is."""

    is_cuda = True


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:kvcompress computes in PyTorch")
def test_the_ops_give_on_a_gpu_without_triton_what_they_give_on_a_cpu(no_triton, name):
    on_cpu, options = fresh(name)
    on_gpu = tree_map_only(torch.Tensor, lambda tensor: tensor.clone().as_subclass(OnGPU), fresh(name))
    expected, found = public(name)(*on_cpu, **options), public(name)(*on_gpu[0], **on_gpu[1])
    torch.testing.assert_close(_plain(found), _plain(expected))
    torch.testing.assert_close(_plain(on_gpu[0]), _plain(on_cpu))


@pytest.mark.filterwarnings("ignore:kvcompress computes in PyTorch")
def test_a_gpu_without_triton_collects_pages_on_the_host(no_triton):
    values = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    pages = OffloadedPages("pinned", (1, 1, 1), torch.float32, torch.device("cpu"))
    pages.append(1, [torch.zeros(1, 1, 1, 1)])
    assert pages.slabs_for(values) is pages.slabs


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(("host", "by_address"), [("pinned", True), ("mmap:", False)])
def test_a_gpu_with_triton_finds_what_is_pinned_by_its_address(host, by_address, tmp_path):
    values = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    host = f"{host}{tmp_path}" if host.endswith(":") else host
    pages = OffloadedPages(host, (1, 1, 1), torch.float32, torch.device("cpu"))
    pages.append(1, [torch.zeros(1, 1, 1, 1)])
    assert bool(pages.slabs_for(values)) is not by_address


def _plain(result):
    return [tensor.as_subclass(torch.Tensor) for tensor in tensors(result)]


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton to compare with")
def test_the_stand_in_counts_as_triton_does():
    missing = MissingTriton(ImportError())
    for n in range(-3, 130):
        assert missing.next_power_of_2(n) == runtime.triton.next_power_of_2(n)
        assert missing.cdiv(n, 16) == runtime.triton.cdiv(n, 16)


def pytest_without_triton(run, *arguments):
    command = ["-m", "pytest", "-q", "-x", "-p", "hiding", "-p", "no:cacheprovider", "-W", "ignore", *arguments]
    said = passes(run(*command))
    assert re.search(r"^\d+ passed", said, re.M), said[-1000:]


def test_every_cache_keeps_its_contract_without_triton(run):
    # and rows move in a cache of each kind of storage
    rows = "beam_search_equals and (dense or hydragen or gear or shadowkv or packed or heads)"
    named = f"shorter_than or ({rows})"
    pytest_without_triton(run, "-m", "not slow and not variant", "-k", named, "tests/contract/test_generation.py")


@pytest.mark.slow
@pytest.mark.parametrize("tests", ["tests/contract", "tests/kernels", "tests/policies"])
def test_what_needs_no_triton_passes_without_it(run, tests):
    pytest_without_triton(run, "-m", "not slow", tests)
