"""Compiles every kernel at every configuration it can be launched with, for GPUs that are not there.

    python -m kvcompress.evals.bench.aot                              # everything, all cores
    python -m kvcompress.evals.bench.aot --only decode --target sm_90

Each file in kernels/ calls its ops as models do in `aot_calls()`; what they launch is what is compiled, with the types
and the alignment of the launch. For each target the table gives the registers of a thread, the shared memory of a
block, what spills, and an estimate of occupancy: the share of a multiprocessor's threads that can be resident at once,
by registers, shared memory and block slots. Exits with 1 where a kernel spills registers to memory, needs more shared
memory than the target gives one block, or does not compile.
"""

import argparse
import functools
import importlib
import math
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import kvcompress.kernels
from kvcompress.evals.bench.machine_code import dump, usage
from kvcompress.kernels.common.runtime import HAS_TRITON, INTERPRETED, Launch, recording, triton


@dataclass(frozen=True)
class Target:
    """A GPU, and what one of its multiprocessors has; memory in bytes, of 32-bit registers per multiprocessor."""

    backend: str
    architecture: int | str
    warp_size: int
    shared_per_block: int
    shared: int
    registers: int
    threads: int
    blocks: int
    has_wgmma: bool

    @property
    def kind(self) -> tuple[bool, bool]:
        """Whether it has wgmma, and runs PTX: what launches depend on."""
        return self.has_wgmma, self.backend == "cuda"

    def of_triton(self) -> Any:
        return triton.backends.compiler.GPUTarget(self.backend, self.architecture, self.warp_size)


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10, 164 << 10, 65536, 2048, 32, False),
    "sm_90": Target("cuda", 90, 32, 227 << 10, 228 << 10, 65536, 2048, 32, True),
    "sm_100": Target("cuda", 100, 32, 227 << 10, 228 << 10, 65536, 2048, 32, True),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, 64 << 10, 131072, 2048, 32, False),
}


@dataclass(frozen=True)
class Report:
    """What one case compiled to."""

    kernel: str
    label: str
    target: str
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    occupancy: float = 0.0
    error: str = ""

    @property
    def fault(self) -> str:
        """Why the case fails the check, or nothing."""
        limit = TARGETS[self.target].shared_per_block
        if self.error:
            return self.error
        if self.spilled:
            return f"spills {self.spilled} bytes a thread"
        return f"needs {self.shared} bytes of shared memory, {limit} are there" if self.shared > limit else ""


@dataclass(frozen=True)
class Case:
    """One way a kernel can be launched.

    constants: the compile-time arguments and the launch options.
    kinds: of the GPUs that launch it so (`Target.kind`).
    """

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    kinds: frozenset[tuple[bool, bool]]
    label: str = ""

    def compiled(self, target: Target) -> Any:
        """What Triton makes of it for the target."""
        options, signature, constants, alignment = self.specialised(target)
        source = triton.compiler.ASTSource(self.kernel, signature, constants, alignment)
        return triton.compile(source, target=target.of_triton(), options=options.__dict__)

    def specialised(self, target: Target) -> tuple[Any, dict[str, Any], dict, dict]:
        """What a launch on the target finds out by looking: options, types, constants and alignment, for Triton.

        `triton.JITFunction.run` does the same.
        """
        backend, bind = _binder(self.kernel, target)
        # on CUDA every launch has this ceiling (kernels/common/runtime.py)
        constants = self.constants | ({"maxnreg": 255} if target.backend == "cuda" else {})
        return self.kernel._pack_args(backend, constants, *bind(*self.arguments, **constants))

    def facts(self) -> dict[str, Any]:
        """What tells the case from others of its kernel: types, constants, options, what is absent, and alignment."""
        _, signature, constants, alignment = self.specialised(TARGETS["sm_80"])
        names = self.kernel.arg_names
        fixed = {names[path[0]]: value for path, value in constants.items()}
        types = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        aligned = {(names[path[0]], *path[1:]): str(is_so) for path, is_so in alignment.items()}
        return (
            {f"type of {name}": kind for name, kind in types.items()}
            | {name.lower(): value for name, value in fixed.items() if value is not None}
            | {name: value for name, value in self.constants.items() if name not in signature}
            | {f"no {name.removesuffix('_ptr')}": True for name, value in fixed.items() if value is None}
            | {f"alignment of {path}": is_so for path, is_so in aligned.items() if path[0] in types}
        )


@functools.cache
def _binder(kernel: Any, target: Target) -> tuple[Any, Any]:
    """Triton's backend for a target, and what looks at the arguments of a launch for it."""
    backend = triton.compiler.make_backend(target.of_triton())
    return backend, triton.runtime.jit.create_function_from_signature(kernel.signature, kernel.params, backend)


@functools.cache
def all_cases() -> dict[str, list[Case]]:
    """All launches, by the file in kernels/ that has the kernel, as a dotted name."""
    files = {
        ".".join((kvcompress.kernels.__name__, *file.relative_to(folder).with_suffix("").parts))
        for folder in kvcompress.kernels.__path__
        for file in Path(folder).rglob("*.py")
    }
    cases: dict[Any, dict[str, tuple[Case, dict[str, Any]]]] = {}
    # those that run PTX first
    for kind in sorted({target.kind for target in TARGETS.values()}, key=lambda kind: (not kind[1], kind[0])):
        with recording(*kind) as launches:
            for module in map(importlib.import_module, sorted(files)):
                if hasattr(module, "aot_calls"):
                    module.aot_calls()
            for case in [case for launch in launches for case in _configured(launch, kind)]:
                facts = case.facts()
                of_kernel = cases.setdefault(case.kernel, {})
                first, _ = of_kernel.get(str(facts), (case, facts))
                of_kernel[str(facts)] = replace(first, kinds=first.kinds | case.kinds), facts
    by_file: dict[str, list[Case]] = {}
    for kernel, of_kernel in cases.items():
        labels = _labels([facts for _, facts in of_kernel.values()])
        by_file.setdefault(kernel.__module__.removeprefix(f"{kvcompress.kernels.__name__}."), []).extend(
            replace(case, label=label) for (case, _), label in zip(of_kernel.values(), labels, strict=True)
        )
    return dict(sorted(by_file.items()))


def _configured(launch: Launch, kind: tuple[bool, bool]) -> Iterator[Case]:
    """The launch at each configuration that the autotuner would try."""
    kinds = frozenset((kind,))
    if not isinstance(launch.kernel, triton.runtime.Autotuner):
        yield Case(*launch, kinds)
        return
    tuner = launch.kernel
    tuner.nargs = dict(zip(tuner.arg_names, launch.arguments, strict=False))
    for config in tuner.prune_configs(launch.constants):
        yield Case(tuner.fn, launch.arguments, launch.constants | config.all_kwargs(), kinds)


def _labels(cases: list[dict[str, Any]]) -> list[str]:
    """In few words what tells each case of a kernel from the others: no fact that follows from those before it."""
    names = list(dict.fromkeys(name for facts in cases for name in facts))
    kept: list[str] = []
    apart = 1
    # what all cases have says most; then what one lacks
    in_all = {name for name in names if all(name in facts for facts in cases)}
    for name in sorted(names, key=lambda name: (name not in in_all, not name.startswith("no "))):
        told = len({tuple(str(facts.get(each)) for each in (*kept, name)) for facts in cases})
        if told > apart:
            kept.append(name)
            apart = told
    return [", ".join(filter(None, (_fact(name, facts.get(name)) for name in kept))) for facts in cases]


def _fact(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else ""
    if name.startswith("type of "):
        return f"{len(value)} {value[0][1:]}" if isinstance(value, tuple) else str(value).removeprefix("*")
    return "" if value is None else f"{name} {value}"


def compile_case(module: str, index: int, target: str) -> Report:
    """Compiles one case of a file's kernels for one target."""
    case = all_cases()[module][index]
    name = case.kernel.__name__
    gpu = TARGETS[target]
    try:
        compiled = case.compiled(gpu)
        registers, spilled = _usage(compiled)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Report(name, case.label, target, error=f"does not compile: {lines[-1]}")
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    resident = occupancy(gpu, registers, shared, warps)
    return Report(name, case.label, target, registers, shared, spilled, resident)


def compile_all(jobs: list[tuple[str, int, str]], workers: int) -> Iterator[Report]:
    """Compiles (module, index of the case, target) in parallel, in order."""
    if workers == 1:
        yield from (compile_case(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(compile_case, *zip(*jobs, strict=True))


def print_table(reports: Iterator[Report]) -> list[Report]:
    """Prints a row a report as they come, and returns those that fail."""
    print(f"{'target':7} {'kernel':26} {'regs':>5} {'shared':>7} {'spill':>6} {'occup.':>6}  launch")
    failed = []
    for report in reports:
        print(
            f"{report.target:7} {report.kernel:26} {report.registers:5} {report.shared:7} {report.spilled:6} "
            f"{report.occupancy:6.0%}  {report.label}  {report.fault}",
            flush=True,
        )
        if report.fault:
            failed.append(report)
    return failed


def _usage(compiled) -> tuple[int, int]:
    """Registers of a thread, and the bytes it spills."""
    if "amdgcn" in compiled.asm:
        counts = dict(re.findall(r"\.(\w+):\s+(\d+)\s*$", compiled.asm["amdgcn"], re.MULTILINE))
        spilled = 4 * int(counts["vgpr_spill_count"]) or int(counts["private_segment_fixed_size"])
        # vgpr_count covers the accumulation registers too: the file is one
        return int(counts["vgpr_count"]), spilled
    return usage(dump(compiled.asm["cubin"], "-res-usage"))


def occupancy(target: Target, registers: int, shared: int, warps: int) -> float:
    """The share of a multiprocessor's threads that can be resident at once; shared in bytes."""
    threads = warps * target.warp_size
    # registers come by the 8 a thread; a block's shared memory by the 128 bytes and, on CUDA, 1 KB more
    of_registers = target.registers // (threads * math.ceil(max(registers, 1) / 8) * 8)
    reserved = 1024 if target.backend == "cuda" else 0
    of_shared = target.shared // max(math.ceil(shared / 128) * 128 + reserved, 1)
    blocks = min(target.blocks, target.threads // threads, of_registers, of_shared)
    return blocks * threads / target.threads


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if not HAS_TRITON:
        parser.error("Triton cannot be imported here: there is nothing to compile with")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    cases = all_cases()
    parser.add_argument("--only", choices=cases, help="one file of kernels/")
    parser.add_argument("--label", default="", help="only launches with this in their name")
    parser.add_argument("--target", choices=TARGETS, help="one target")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    jobs = [
        (module, index, target)
        for module in ([options.only] if options.only else cases)
        for index, case in enumerate(cases[module])
        if options.label in f"{case.kernel.__name__} {case.label}"
        for target in ([options.target] if options.target else TARGETS)
        if TARGETS[target].kind in case.kinds
    ]
    failed = print_table(compile_all(jobs, options.workers))
    print(f"\n{len(jobs)} compiled, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
