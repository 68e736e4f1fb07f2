import importlib
from dataclasses import replace

import pytest
import torch

from kvcompress.evals.bench import aot
from kvcompress.kernels.common.runtime import INTERPRETED, Launch

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


def every_case():
    return [case for cases in aot.all_cases().values() for case in cases]


def test_every_kernel_is_compiled_ahead_of_time():
    assert launched_kernels() == {case.kernel.__name__ for case in every_case()}


def test_a_kernel_lies_in_the_file_it_is_listed_under():
    for module, cases in aot.all_cases().items():
        assert {case.kernel.__module__ for case in cases} == {f"kvcompress.kernels.{module}"}


def test_every_label_tells_its_case_from_the_others():
    names = [(case.kernel.__name__, case.label) for case in every_case()]
    assert len(names) == len(set(names))


def test_a_case_has_the_types_and_the_alignment_of_its_launch():
    kernel = importlib.import_module("kvcompress.kernels.evict")._choose_victim_kernel
    scores, positions = torch.zeros(40), torch.zeros(40, dtype=torch.int32)
    launch = Launch(kernel, (scores[1:], positions, positions, positions, 5, 0), {"BLOCK_SLOTS": 64})
    (case,) = aot._configured(launch, False)
    options, types, constants, alignment = case.specialised(aot.TARGETS["sm_90"])
    assert types == {
        "scores_ptr": "*fp32", "positions_ptr": "*i32", "recent_from_ptr": "*i32", "victims_ptr": "*i32",
        "slots": "i32", "sinks": "i32", "BLOCK_SLOTS": "constexpr",
    }  # fmt: skip
    assert constants == {(6,): 64}
    assert alignment[(0,)] == []
    assert alignment[(1,)] == [["tt.divisibility", 16]]
    assert options.maxnreg == 255


def test_an_autotuned_launch_is_compiled_at_every_configuration_it_is_tried_at():
    causal = [case for case in aot.all_cases()["attention"] if case.constants["HEAD_DIM"] == 128]
    small, large = {(64, 32), (128, 32)}, {(64, 64), (128, 64)}
    for wgmma, expected in ((False, small), (True, small | large)):
        found = [case.constants for case in causal if (wgmma, True) in case.kinds and case.arguments[0].itemsize == 2]
        assert {(constants["BLOCK_QUERIES"], constants["BLOCK_TOKENS"]) for constants in found} == expected


# one target a kernel, the whole is `python -m kvcompress.evals.bench.aot`
@pytest.mark.parametrize(
    ("kernel", "target"),
    [
        pytest.param(name, list(aot.TARGETS)[number % len(aot.TARGETS)], id=name)
        for number, name in enumerate([] if INTERPRETED else sorted(launched_kernels()))
    ],
)
def test_a_first_case_of_each_kernel_compiles_without_spilling(kernel, target):
    module, index = next(
        (module, index)
        for module, cases in aot.all_cases().items()
        for index, case in enumerate(cases)
        if case.kernel.__name__ == kernel
    )
    report = aot.compile_case(module, index, target)
    assert not report.fault
    assert report.registers > 0
    assert 0 < report.occupancy <= 1


def test_what_spills_is_found(monkeypatch):
    # one warp cannot hold the accumulators of 64 queries of 128 dimensions
    case = next(case for case in aot.all_cases()["attention"] if case.label.startswith("bf16, head_dim 128, block_q"))
    slim = replace(case, constants=case.constants | {"num_warps": 1, "num_stages": 2})
    monkeypatch.setattr(aot, "all_cases", lambda: {"attention": [slim]})
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
    assert aot.occupancy(aot.TARGETS[target], registers, shared, warps) == expected


# README: GPU kernels are compiled ahead of time for sm_80, sm_90, sm_100 and gfx942
@pytest.mark.slow
def test_everything_compiles(capsys):
    assert aot.main([]) == 0
