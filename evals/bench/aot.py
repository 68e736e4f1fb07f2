"""Compiles every kernel at every configuration it can be launched with, for GPUs that are not there.

    python -m kvcompress.evals.bench.aot                              # everything, all cores
    python -m kvcompress.evals.bench.aot --only decode --target sm_90

Each file in kernels/ lists its launches in `aot_cases()`. For each target the table gives the registers of a thread,
the shared memory of a block, what spills, and an estimate of occupancy: the share of a multiprocessor's threads that
can be resident at once, by registers, shared memory and block slots. Exits with 1 where a kernel spills registers to
memory, needs more shared memory than the target gives one block, or does not compile.
"""

import argparse
import importlib
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import kvcompress.kernels
from kvcompress.kernels.common.runtime import HAS_TRITON, INTERPRETED, AotCase, triton


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


def modules() -> list[str]:
    """The files of kernels/ that launch a kernel, as dotted names below it."""
    files = {
        ".".join(file.relative_to(folder).with_suffix("").parts)
        for folder in kvcompress.kernels.__path__
        for file in Path(folder).rglob("*.py")
    }
    return sorted(name for name in files if hasattr(importlib.import_module(f"kvcompress.kernels.{name}"), "aot_cases"))


def cases(module: str) -> list[AotCase]:
    """All launches of one file's kernels."""
    return list(importlib.import_module(f"kvcompress.kernels.{module}").aot_cases())


def compile_case(module: str, index: int, target: str) -> Report:
    """Compiles one case for one target."""
    case = cases(module)[index]
    name = case.kernel.__name__
    gpu = TARGETS[target]
    try:
        source = triton.compiler.ASTSource(case.kernel, case.signature, _constants(case), _alignment(case))
        aim = triton.backends.compiler.GPUTarget(gpu.backend, gpu.architecture, gpu.warp_size)
        # on CUDA every launch has this ceiling (kernels/common/runtime.py)
        ceiling = {"maxnreg": 255} if gpu.backend == "cuda" else {}
        compiled = triton.compile(source, target=aim, options=case.options | ceiling)
        registers, spilled = _usage(compiled)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Report(name, case.label, target, error=f"does not compile: {lines[-1]}")
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    occupancy = _occupancy(gpu, registers, shared, warps)
    return Report(name, case.label, target, registers, shared, spilled, occupancy)


def compile_all(jobs: list[tuple[str, int, str]], workers: int) -> Iterator[Report]:
    """Compiles (module, index of the case, target) in parallel, in order."""
    if workers == 1:
        yield from (compile_case(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(compile_case, *zip(*jobs, strict=True))


def print_table(reports: Iterator[Report]) -> list[Report]:
    """Prints a row a report as they come, and returns those that fail."""
    print(f"{'target':7} {'kernel':26} {'launch':62} {'regs':>5} {'shared':>7} {'spill':>6} {'occup.':>6}")
    failed = []
    for report in reports:
        print(
            f"{report.target:7} {report.kernel:26} {report.label:62} {report.registers:5} {report.shared:7} "
            f"{report.spilled:6} {report.occupancy:6.0%}  {report.fault}",
            flush=True,
        )
        if report.fault:
            failed.append(report)
    return failed


def _constants(case: AotCase) -> dict[tuple[int, ...], object]:
    return {(case.kernel.arg_names.index(name),): value for name, value in case.constants.items()}


def _alignment(case: AotCase) -> dict[tuple[int, ...], list]:
    # what a launch finds out by looking: pointers and strides are multiples of 16, `rows_aligned` sees to it
    attributes: dict[tuple[int, ...], list] = {}
    for index, name in enumerate(case.kernel.arg_names):
        kind = case.signature[name]
        if isinstance(kind, tuple):
            attributes.update({(index, part): [["tt.divisibility", 16]] for part in range(len(kind))})
        elif kind.startswith("*") or name.endswith("_stride"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return attributes


def _usage(compiled) -> tuple[int, int]:
    """Registers of a thread, and the bytes it spills."""
    if "amdgcn" in compiled.asm:
        counts = dict(re.findall(r"\.(\w+):\s+(\d+)\s*$", compiled.asm["amdgcn"], re.MULTILINE))
        spilled = 4 * int(counts["vgpr_spill_count"]) or int(counts["private_segment_fixed_size"])
        # vgpr_count covers the accumulation registers too: the file is one
        return int(counts["vgpr_count"]), spilled
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        listing = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", listing))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def _occupancy(target: Target, registers: int, shared: int, warps: int) -> float:
    threads = warps * target.warp_size
    # registers come by the 8 a thread; a block's shared memory by the 128 bytes and, on CUDA, 1 KB more
    of_registers = target.registers // (threads * math.ceil(max(registers, 1) / 8) * 8)
    reserved = 1024 if target.backend == "cuda" else 0
    of_shared = target.shared // max(math.ceil(shared / 128) * 128 + reserved, 1)
    blocks = min(target.blocks, target.threads // threads, of_registers, of_shared)
    return blocks * threads / target.threads


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=modules(), help="one file of kernels/")
    parser.add_argument("--label", default="", help="only launches with this in their name")
    parser.add_argument("--target", choices=TARGETS, help="one target")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if not HAS_TRITON:
        parser.error("Triton cannot be imported here: there is nothing to compile with")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    jobs = [
        (module, index, target)
        for module in ([options.only] if options.only else modules())
        for index, case in enumerate(cases(module))
        if options.label in f"{case.kernel.__name__} {case.label}"
        for target in ([options.target] if options.target else TARGETS)
        if TARGETS[target].has_wgmma or not case.needs_wgmma
    ]
    failed = print_table(compile_all(jobs, options.workers))
    print(f"\n{len(jobs)} compiled, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
