import ast
import importlib
from pathlib import Path

import pytest

from kvcompress.evals.bench import aot
from kvcompress.kernels.common.runtime import INTERPRETED

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(INTERPRETED, reason="under the interpreter there is nothing to compile")


def launched_kernels():
    """Every Triton kernel of kernels/: by the house's rule a launched one, and no device function, ends in _kernel."""
    found = set()
    for path in importlib.import_module("kvcompress.kernels").__path__:
        for file in sorted(aot.Path(path).rglob("*.py")):
            parts = file.relative_to(path).with_suffix("").parts
            module = importlib.import_module(".".join(("kvcompress.kernels", *parts)))
            for name, member in vars(module).items():
                while member is not None and not isinstance(member, triton.JITFunction):
                    member = getattr(member, "fn", None)
                if member is not None and name.endswith("_kernel"):
                    found.add(member.__name__)
    return found


def test_every_kernel_is_compiled_ahead_of_time():
    assert launched_kernels() == {case.kernel.__name__ for module in aot.modules() for case in aot.cases(module)}


def test_every_case_names_what_a_launch_names():
    for module in aot.modules():
        for case in aot.cases(module):
            constants = {parameter.name for parameter in case.kernel.params if parameter.is_constexpr}
            pointers = {name for name in case.kernel.arg_names if name.endswith(("_ptr", "_ptrs"))}
            assert constants <= set(case.constants)
            assert {name for name in case.constants if name not in constants} <= pointers
            assert all(case.signature[name] != "i32" for name in pointers), case.label


def launches_without_the_ceiling(source):
    """Lines that launch a kernel without the ceiling of registers with which it was compiled ahead of time."""
    for node in ast.walk(ast.parse(source)):
        launched = getattr(getattr(getattr(node, "func", None), "value", None), "id", "")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and launched.endswith("_kernel"):
            spread = {getattr(keyword.value, "id", None) for keyword in node.keywords if keyword.arg is None}
            if "ALL_REGISTERS" not in spread:
                yield node.lineno


def test_every_launch_has_the_ceiling_of_registers_it_was_compiled_with():
    autotuned = {"_causal_kernel", "_column_sums_kernel"}
    for folder in importlib.import_module("kvcompress.kernels").__path__:
        for file in sorted(Path(folder).rglob("*.py")):
            lines = file.read_text().splitlines()
            bare = [lines[number - 1].strip() for number in launches_without_the_ceiling(file.read_text())]
            assert {line.partition("[")[0] for line in bare} <= autotuned, file.name


def first_cases():
    seen = set()
    for module in aot.modules():
        for index, case in enumerate(aot.cases(module)):
            if case.kernel.__name__ not in seen:
                seen.add(case.kernel.__name__)
                yield module, index, case.kernel.__name__


# one target a kernel, the whole is `python -m kvcompress.evals.bench.aot`
@pytest.mark.parametrize(
    ("module", "index", "target"),
    [
        pytest.param(module, index, list(aot.TARGETS)[number % len(aot.TARGETS)], id=name)
        for number, (module, index, name) in enumerate([] if INTERPRETED else first_cases())
    ],
)
def test_a_first_case_of_each_kernel_compiles_without_spilling(module, index, target):
    report = aot.compile_case(module, index, target)
    assert not report.fault
    assert report.registers > 0
    assert 0 < report.occupancy <= 1


def test_what_spills_is_found(monkeypatch):
    # one warp cannot hold the accumulators of 64 queries of 128 dimensions
    plain = next(case for case in aot.cases("attention") if "head_dim 128, bf16, plain" in case.label)
    monkeypatch.setattr(aot, "cases", lambda module: [plain._replace(options={"num_warps": 1, "num_stages": 2})])
    report = aot.compile_case("attention", 0, "sm_80")
    assert report.spilled > 0
    assert report.fault == f"spills {report.spilled} bytes a thread"


def test_too_much_shared_memory_and_a_failure_to_compile_are_faults():
    report = aot.Report("kernel", "launch", "sm_80", registers=100, shared=(163 << 10) + 1)
    assert report.fault == f"needs {report.shared} bytes of shared memory, {163 << 10} are there"
    assert not aot.Report("kernel", "launch", "sm_90", registers=100, shared=(163 << 10) + 1).fault
    assert aot.Report("kernel", "launch", "sm_80", error="does not compile: x").fault == "does not compile: x"


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 32, 0, 4, 1.0),
        # 65536 registers hold two blocks of 128 threads with 255 each
        ("sm_80", 255, 0, 4, 0.125),
        ("sm_90", 32, 100 << 10, 4, 0.125),
        ("gfx942", 64, 0, 4, 1.0),
        ("gfx942", 128, 0, 4, 0.5),
        ("gfx942", 32, 40 << 10, 4, 0.125),
    ],
)
def test_occupancy_is_what_registers_and_shared_memory_leave(target, registers, shared, warps, expected):
    assert aot._occupancy(aot.TARGETS[target], registers, shared, warps) == expected


# README: GPU kernels are compiled ahead of time for sm_80, sm_90, sm_100 and gfx942
@pytest.mark.slow
def test_everything_compiles(capsys):
    assert aot.main([]) == 0
