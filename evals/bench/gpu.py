"""All that needs a GPU, in one call under ten minutes: kvcompress bench gpu --out DIR

    kernels    the rows of kvcompress bench kernels, beside what the device copies and multiplies
    tests      the kernels' tests, compiled by Triton in place of its interpreter, and a part of the contract
    endtoend   a model of Llama-3.1-8B's shape: DynamicCache beside the library's caches, eager and compiled
    report     plots, and a table in Markdown

Runs from a plain checkout, downloads nothing. Each step has a process and a share of the time of its own, and writes
every result to DIR/results.json as soon as it has it: one that fails, hangs or takes the device down with it loses
what it was at, is started again behind that, and the others go on. Exits with 1 where anything failed.
`--tiny` runs all of it on a CPU in a minute, to test this script; its numbers mean nothing.

A lent GPU often comes with torch and transformers alone. Therefore this file is also a program of its own, `python -m
kvcompress.evals.bench.gpu`, which imports nothing of the command line's packages, and starts each step that way.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Protocol
from xml.etree import ElementTree

import torch

from kvcompress.evals.bench import kernels as bench
from kvcompress.evals.provenance import provenance
from kvcompress.evals.timing import Clock, limits
from kvcompress.kernels.common.runtime import HAS_TRITON

# seconds each step may take; what a step leaves over is the next one's
STEPS = {"kernels": 130, "tests": 185, "endtoend": 230, "report": 20}
# to write results, and for a case that was begun shortly before the end
_RESERVE = 10
_RESTARTS = 3
# pytest's arguments, and seconds
_SUITES = {"kernels": (["tests/kernels"], 100), "contract": (["tests/contract", "-k", "llama"], 70)}
# seconds of these in which pytest, told to stop, ends its processes and writes what has run
_GRACE = 12
_DIED = {"error": "the process died here"}
_CUT = {"left_out": "cut off at the end of its time"}


class Cases(Protocol):
    """What a step measures: names, in order of importance, and how to measure one."""

    def names(self) -> Iterable[str]: ...

    def measure(self, name: str) -> dict[str, Any]: ...


class Results:
    """The results of all steps, in one file that is whole at any time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.json"
        self.all: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def record(self, step: str, name: str, row: dict[str, Any]) -> None:
        """Writes one result."""
        self.all.setdefault(step, {})[name] = row
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.all, indent=1) + "\n")
        partial.replace(self.path)

    def of(self, step: str) -> dict[str, dict[str, Any]]:
        return self.all.get(step, {})


class KernelCases:
    """The rows of kvcompress bench kernels."""

    def __init__(self, results: Results, tiny: bool) -> None:
        self.device = torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.tiny = tiny
        self.clock = Clock(self.device)
        self.limits = results.of("kernels").get("limits", {}).get("limits")
        self.shapes = {
            f"{group} {shape}": (build, shape)
            for group, (build, shapes) in bench.CASES.items()
            for shape in ([bench.Shape(2, 4, 2, 65, 16)] if tiny else shapes["cuda"])
        }

    def names(self) -> Iterable[str]:
        # the smallest of each group first, which shows whether its kernels work at all; then what says most
        order = sorted(self.shapes, key=lambda name: self.shapes[name][1].tokens * self.shapes[name][1].batch)
        smallest = list({self.shapes[name][0]: name for name in reversed(order)}.values())[::-1]
        return ["limits", *smallest, *(name for name in reversed(order) if name not in smallest)]

    def measure(self, name: str) -> dict[str, Any]:
        if name == "limits" or self.limits is None:
            self.limits = limits(self.clock, self.dtype)
        if name == "limits":
            print(", ".join(f"{value:.4g} {unit}" for unit, value in self.limits.items()))
            return {"limits": self.limits}
        build, shape = self.shapes[name]
        attempts = 2 if self.tiny else 7 if shape.tokens > 2**16 else 20
        rows, errors = [], {}
        with torch.inference_mode():
            cases = build(shape, self.dtype, self.device)
            while True:
                kernel = "between two kernels"
                try:
                    if (case := next(cases, None)) is None:
                        break
                    kernel = case.kernel
                    rows.append(bench.measure(case, self.clock, self.limits, attempts, self.dtype))
                    bench.print_row(rows[-1])
                except Exception as error:
                    traceback.print_exc()
                    errors[kernel] = one_line(error)
                    # a generator that has raised is at its end: what follows in this shape is lost
                    if broken():
                        break
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        disagree = [row.kernel for row in rows if row.agrees is False]
        if disagree:
            errors["results disagree"] = ", ".join(disagree)
        return {"rows": [asdict(row) for row in rows]} | ({"error": str(errors)} if errors else {})


class SuiteCases:
    """Parts of the test suite, by pytest."""

    def __init__(self, results: Results, tiny: bool) -> None:
        self.tests = {"kernels": (["tests/kernels/test_tile.py"], 60)} if tiny else _SUITES

    def names(self) -> Iterable[str]:
        return self.tests

    def measure(self, name: str) -> dict[str, Any]:
        for package in ("pytest", "numpy"):
            if importlib.util.find_spec(package) is None:
                return {"error": f"{package} is not installed"}
        arguments, limit = self.tests[name]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow"]
        if len(self.tests) > 1 and importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(max(1, min(14, (os.cpu_count() or 1) - 2))), "--dist", "worksteal"]
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            row: dict[str, Any] = {}
            command += [f"--junitxml={report}", *arguments]
            with subprocess.Popen(command, env=environment, start_new_session=True) as tests:
                try:
                    tests.wait(limit - _GRACE)
                except subprocess.TimeoutExpired:
                    row["left_out"] = f"stopped after {limit - _GRACE} s"
                    _stop(tests)
            if not report.exists():
                return row | {"error": f"pytest ended with {tests.returncode} and without a report"}
            row |= read_outcomes(report)
        if tests.returncode > 1 and not row.get("left_out"):
            row["error"] = f"pytest ended with {tests.returncode}"
        return row | ({"error": f"{len(row['failed'])} failed"} if row["failed"] else {})


def _stop(tests: subprocess.Popen[bytes]) -> None:
    """Interrupts pytest, which then reports what has run, and ends it with its workers, which would hold the GPU."""
    tests.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        tests.wait(_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(tests.pid, signal.SIGKILL)


def read_outcomes(report: Path) -> dict[str, Any]:
    """How many tests of a report in JUnit's XML passed, failed, were skipped or met an error, and what failed why."""
    counts: dict[str, int] = {}
    failed: dict[str, str] = {}
    # a test that was interrupted has no name
    for case in ElementTree.parse(report).iterfind(".//testcase[@name]"):
        outcomes = [part for part in case if part.tag in ("failure", "error", "skipped")]
        kind = {"failure": "failed"}.get(outcomes[0].tag, outcomes[0].tag) if outcomes else "passed"
        counts[kind] = counts.get(kind, 0) + 1
        if kind in ("failed", "error"):
            failed[f"{case.get('classname')}::{case.get('name')}"] = (outcomes[0].get("message") or "").split("\n")[0]
    return {"counts": counts, "failed": failed}


def cases_of(step: str, results: Results, tiny: bool) -> Cases:
    if step == "endtoend":
        from kvcompress.evals.bench.endtoend import EndToEndCases

        return EndToEndCases(results.of("kernels").get("limits", {}).get("limits"), tiny)
    return SuiteCases(results, tiny) if step == "tests" else KernelCases(results, tiny)


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def broken() -> bool:
    """True where a kernel has left the device unusable for this process."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run_step(step: str, folder: Path, seconds: float, tiny: bool, wanted: str = "") -> int:
    """Measures the cases that are not done yet, in this process; 3 where it must be started again.

    Args:
        wanted: a regular expression that their names match.
    """
    deadline = time.monotonic() + seconds
    results = Results(folder)
    cases = cases_of(step, results, tiny)
    for name in cases.names():
        # what the limits are is needed for every row
        if name in results.of(step) or (name != "limits" and not re.search(wanted, name)):
            continue
        if time.monotonic() > deadline:
            results.record(step, name, {"left_out": "no time left"})
            continue
        print(f"\n--- {step}: {name}", flush=True)
        results.record(step, name, _DIED)
        began = time.monotonic()
        try:
            row = cases.measure(name)
        except Exception as error:
            traceback.print_exc()
            row = {"error": one_line(error)}
        row["took_seconds"] = round(time.monotonic() - began, 2)
        results.record(step, name, row)
        if broken():
            return 3
    return 0


def drive(steps: list[str], folder: Path, seconds: float, tiny: bool, wanted: str = "") -> None:
    """Runs the steps, each in processes of its own."""
    end = time.monotonic() + seconds
    for index, step in enumerate(steps):
        later = sum(STEPS[name] for name in steps[index + 1 :])
        share = max(STEPS[step], end - time.monotonic() - later)
        step_end = min(end, time.monotonic() + share) - _RESERVE
        for _ in range(_RESTARTS):
            left = step_end - time.monotonic()
            if left < 1:
                break
            command = [sys.executable, "-m", "kvcompress.evals.bench.gpu", "--step", step, "--out", str(folder)]
            command += ["--seconds", str(left), "--cases", wanted, *(["--tiny"] if tiny else [])]
            print(f"{step}: at most {left:.0f} s", flush=True)
            with (folder / "log.txt").open("a") as log:
                try:
                    status = subprocess.run(command, stdout=log, stderr=log, timeout=left + _RESERVE / 2).returncode
                except subprocess.TimeoutExpired:
                    status = 124
                    results = Results(folder)
                    for name in [name for name, row in results.of(step).items() if row == _DIED]:
                        results.record(step, name, _CUT)
            if status == 0:
                break
            print(f"{step}: ended with {status}", flush=True)
            if not Results(folder).of(step):
                Results(folder).record(step, "start", {"error": f"ended with {status} before its first case"})


def run(
    out: Annotated[Path | None, "folder; default: $OUT, or results/gpu"] = None,
    only: Annotated[list[str] | None, f"run this step of {', '.join(STEPS)}; may be given again"] = None,
    cases: Annotated[str, "only cases whose names this regular expression finds"] = "",
    seconds: Annotated[float, "time for everything"] = 565,
    tiny: Annotated[bool, "a tiny model on the CPU, to test this script"] = False,
) -> int:
    """All that needs a GPU: tests, kernels, a model end to end, and a report. The status is 1 where anything failed."""
    if unknown := set(only or ()) - set(STEPS):
        raise ValueError(f"a step must be one of {', '.join(STEPS)}, got {', '.join(unknown)}")
    if not tiny and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here; --tiny runs the script on a CPU")
    if not tiny and not HAS_TRITON:
        raise ValueError("Triton cannot be imported here, and this is about its kernels")
    out = out or Path(os.environ.get("OUT", "results/gpu"))
    settings = {"out": str(out), "only": str(only), "cases": cases, "seconds": str(seconds), "tiny": str(tiny)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)
    (out / "log.txt").unlink(missing_ok=True)
    results = Results(out)
    results.all["provenance"] = provenance("cpu" if tiny else "cuda")
    results.record("settings", "arguments", settings)
    drive([step for step in only or STEPS if step != "report"], out, seconds - STEPS["report"], tiny, cases)

    results = Results(out)
    from kvcompress.evals.bench import gpu_report

    try:
        gpu_report.plot(results.all, out)
    except Exception as error:
        results.record("report", "plots", {"error": one_line(error)})
    errors = gpu_report.errors(results.all)
    text = gpu_report.summary(results.all)
    (out / "summary.md").write_text(text)
    print(text)
    return 1 if errors else 0


def main() -> int:
    """The program of its own, and that of each step."""
    parser = argparse.ArgumentParser(description=run.__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=STEPS, action="append")
    parser.add_argument("--cases")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--step", choices=STEPS, help="in this process, as a part of such a run")
    options = vars(parser.parse_args())
    if step := options.pop("step", None):
        return run_step(step, options["out"], options["seconds"], options.get("tiny", False), options.get("cases", ""))
    try:
        return run(**options)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
