"""A static roofline of every kernel, from its machine code: kvcompress bench sass

    kvcompress bench sass                                        # bfloat16 and head_dim 128, for an H100
    kvcompress bench sass --arch sm_80,sm_100 --which first      # one launch a kernel, for an A100 and a B200
    kvcompress bench sass --kernel _split_kernel --which every   # every launch of one kernel
    kvcompress bench sass --measured kernels.json                # beside what `bench gpu` measured

Launches are compiled as `bench aot` does, and what the compiler made is taken apart; evals/bench/roofline.py says what
the clocks mean, and what they leave out. `of limit` is the larger of memory and tensor, of the clocks of an iteration:
where the three follow one another, to where they overlap. Triton's cache is used: a launch is compiled once, until its
kernel changes.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from kvcompress.evals.bench.machine_code import find_cuobjdump
from kvcompress.evals.bench.roofline import GPUS, REPRESENTATIVE, Iteration, Row, has_facts, launches, read_launches
from kvcompress.evals.provenance import provenance
from kvcompress.kernels.common.runtime import HAS_TRITON, INTERPRETED

# what `bench kernels` measures, and the launch whose main loop does most of it
MEASURED: dict[str, tuple[str, dict[str, Any]]] = {
    "causal_attention": ("_causal_kernel", {"block_queries": 128, "block_tokens": 64}),
    "maxima of a second reading": ("_column_sums_kernel", {"takes_max": True, "block_tokens": 128}),
    "slot_attention": ("_split_kernel", REPRESENTATIVE["_split_kernel"]),
    "decode_attention": ("_split_kernel", {"slotted": True, "block_rows": 16, "writes_logits": True, "group": 4}),
    "packed_attention, 4 bits": ("_packed_rows_kernel", {"key_bits": 4, "value_bits": 4, "key_group": 64}),
    "packed_attention, 4 and 3 bits": ("_packed_rows_kernel", {"key_bits": 4, "value_bits": 3, "key_group": 64}),
    "packed_attention, 2 bits": ("_packed_rows_kernel", {"key_bits": 2, "value_bits": 2, "key_group": 64}),
    "packed_attention, 2 bits, centred": ("_packed_rows_kernel", {"key_bits": 2, "key_centred": True}),
    "packed_attention, GEAR at 2 bits": ("_packed_kernel", {"key_bits": 2, "key_outliers": 2}),
    "prefix_attention": ("_prefix_kernel", {"block_rows": 128}),
    "chunk_scores": ("_landmark_lse_kernel", {}),
    "choose_victim": ("_choose_victim_kernel", {}),
    "merge_states": ("_merge_states_kernel", {}),
}

WHICH = {
    "first": lambda chosen: chosen.is_representative,
    "typical": lambda chosen: chosen.is_typical,
    "every": lambda chosen: True,
}


class Comparison(NamedTuple):
    """A shape that `bench gpu` measured beside what the model says of it; microseconds, the model's from and to."""

    measured: str
    shape: str
    kernel: str
    label: str
    binds: str
    microseconds: float
    predicted: tuple[float, float]

    @property
    def misses_by(self) -> float:
        """How many times as long as predicted it took, or the inverse; 1 within the bounds."""
        least, most = self.predicted
        return self.microseconds / most if self.microseconds > most else min(self.microseconds / least, 1.0)


def compare(rows: list[Row], measured: Mapping[str, Any]) -> list[Comparison]:
    """Of each kernel that was measured the shape that came nearest to the limit which the model knows."""
    found = [row for group in measured["kernels"].values() for row in group.get("rows", ())]
    by_launch = {(row.kernel, row.label): row for row in rows if row.arch == "sm_90" and not row.error}
    table = []
    for name, (kernel, told) in MEASURED.items():
        fitting = [each for each in launches("sm_90")[kernel] if each.is_typical and has_facts(each.case.facts(), told)]
        row = by_launch.get((kernel, fitting[0].case.label)) if fitting else None
        if row is None or row.main.of_limit is None:
            continue
        unit = "TFLOP/s" if row.main.clocks["tensor"] > row.main.clocks["memory"] else "GB/s"
        shares = [
            (each["achieved"]["ours"] / each["limit"], each)
            for each in found
            if (each["kernel"], each["unit"]) == (name, unit)
        ]
        if shares:
            share, best = max(shares, key=lambda pair: pair[0])
            took = best["seconds"]["ours"]["median"] * 1e6
            serial, overlapped = row.main.of_limit
            predicted = (round(took * share / overlapped, 1), round(took * share / serial, 1))
            shape = f"{best['shape']['batch']} x {best['shape']['tokens']}"
            table.append(Comparison(name, shape, kernel, row.label, row.main.binds, round(took, 1), predicted))
    return table


def print_row(row: Row) -> None:
    """A line with what a launch takes and what binds it, and one with its instructions."""
    print(f"\n{row.arch} {row.kernel}  {row.label}")
    if row.error:
        print(f"  {row.error}")
        return
    loop = row.main
    named = "an iteration" if loop.repeats else "no loop: once"
    print(
        f"  {row.registers} registers, {row.spilled} spilled, {row.shared} shared, {row.warps} warps, "
        f"stages {row.stages}, occupancy {row.occupancy:.0%}, prefetch {loop.prefetch or 'none'}\n"
        f"  {named}: {loop.instructions} instructions, {loop.bytes} bytes, {_number(loop.flops)} flops; clocks "
        + ", ".join(f"{name} {clocks:g}" for name, clocks in loop.clocks.items() if clocks)
        + f"; {loop.binds} binds, {_share(loop.of_limit)} of limit"
    )
    print("  " + ", ".join(f"{name} {count}" for name, count in sorted(loop.mix.items(), key=lambda each: -each[1])))
    for name, count in loop.narrow.items():
        print(f"  narrow: {count} {name}")


def _number(value: int | None) -> str:
    return "?" if value is None else str(value)


def _share(of_limit: Sequence[float] | None) -> str:
    return "-" if of_limit is None else f"{of_limit[0]:.0%} to {of_limit[1]:.0%}"


# columns of the page, and the kinds of instructions that each counts
_COLUMNS = {
    "tensor": ("tensor",),
    "fp32": ("fp32", "half", "special", "fp64"),
    "integer": ("integer", "move", "uniform", "constant"),
    "conversion": ("conversion", "permute"),
    "memory": ("load", "store", "copy", "atomic"),
    "shared": ("shared load", "shared store", "shuffle", "tensor memory"),
    "barrier, branch": ("barrier", "branch"),
}


def _cells(row: Row) -> dict[str, Any]:
    """A row of the page by its columns."""
    cells = {"": f"{row.arch} `{row.kernel}`", "launch": row.label or "the only one"}
    if row.error:
        return cells | {"registers": row.error}
    loop = row.main
    mix = {
        column: sum(count for name, count in loop.mix.items() if re.sub(r" \d+$", "", name) in kinds)
        for column, kinds in _COLUMNS.items()
    }
    return cells | {
        "registers": f"{row.registers}{f' + {row.spilled} bytes spilled' if row.spilled else ''}",
        "shared KB": f"{row.shared / 1024:.0f}",
        "warps": row.warps,
        "occupancy": f"{row.occupancy:.0%}",
        "stages": row.stages,
        "prefetch": loop.prefetch or "none",
        "instructions": f"{loop.instructions}{'' if loop.repeats else ', no loop'}",
        **mix,
        "bytes": loop.bytes,
        "flops": _number(loop.flops),
        **{f"{name} clocks": f"{clocks:.0f}" for name, clocks in loop.clocks.items()},
        "binds": loop.binds,
        "of limit": _share(loop.of_limit),
    }


def _markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of rows by columns; the first that has all of them names them."""
    names = max((list(row) for row in rows), key=len, default=[])
    lines = [" | ".join(str(row.get(name, "")) for name in names) for row in rows]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|", *(f"| {line} |" for line in lines)]


def page(rows: list[Row], compared: list[Comparison], source: Mapping[str, Any]) -> str:
    """The rows as Markdown: one a launch, of its main loop; and what was measured."""
    head = f"Triton {source['versions']['triton']}, commit {source['commit']}: `{source['command']}`"
    lines = [head, "", *_markdown([_cells(row) for row in rows])]
    if compared:
        beside = [
            {
                "measured": each.measured,
                "batch x tokens": each.shape,
                "launch": f"`{each.kernel}` {each.label}",
                "binds": each.binds,
                "predicted us": f"{each.predicted[0]:g} to {each.predicted[1]:g}",
                "took us": f"{each.microseconds:g}",
                "off by": f"{each.misses_by:.2f}",
            }
            for each in compared
        ]
        lines += ["", *_markdown(beside)]
    return "\n".join(lines) + "\n"


def main(
    kernel: Annotated[str | None, "one kernel"] = None,
    arch: Annotated[str, f"the GPUs, by commas: {', '.join(GPUS)}"] = "sm_90",
    which: Annotated[str, "first: one a kernel; typical: in bfloat16, with head_dim 128; every"] = "typical",
    measured: Annotated[Path | None, "kernels.json of `bench gpu`, to set the model beside"] = None,
    workers: Annotated[int | None, "processes; default: a core each"] = None,
    out: Annotated[
        Path | None, "rows as FILE.json, the page as FILE.md; rows there of what is not asked for stay"
    ] = None,
) -> int:
    """A static roofline of every kernel, from its machine code; status 1 where one does not compile."""
    if not HAS_TRITON:
        raise ValueError("Triton cannot be imported here: there is nothing to compile with")
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set: there is nothing to compile")
    archs = arch.split(",")
    for name, values, known in (("arch", archs, GPUS), ("which", [which], WHICH)):
        for value in values:
            if value not in known:
                raise ValueError(f"--{name} must be one of {', '.join(known)}, got {value!r}")
    kernels = list(launches(archs[0]))
    if kernel is not None and kernel not in kernels:
        raise ValueError(f"--kernel must be one of {', '.join(kernels)}, got {kernel!r}")
    find_cuobjdump()
    jobs = [
        (name, chosen.place, gpu)
        for gpu in archs
        for name in ([kernel] if kernel else kernels)
        for chosen in launches(gpu)[name]
        if WHICH[which](chosen)
    ]
    rows = []
    for row in read_launches(jobs, workers or os.cpu_count() or 1):
        print_row(row)
        rows.append(row)
    compared = compare(rows, json.loads(measured.read_text("utf-8"))) if measured else []
    for each in compared:
        least, most = each.predicted
        print(f"{each.measured} at {each.shape} took {each.microseconds:g} us, {least:g} to {most:g} by the model")
    if out:
        write(out, rows, compared)
    failed = [row for row in rows if row.error]
    print(f"\n{len(rows)} compiled, {len(failed)} failed")
    return 1 if failed else 0


def read_rows(file: Path) -> list[Row]:
    """The rows of a file that `write` has written."""
    rows = json.loads(file.read_text("utf-8"))["rows"]
    return [Row(**row | {"loops": [Iteration(**loop) for loop in row["loops"]]}) for row in rows]


def write(out: Path, rows: Iterable[Row], compared: list[Comparison]) -> None:
    """Writes rows as FILE.json, a line each, and the page as FILE.md.

    Raises:
        ValueError: the file is of another Triton.
    """
    source, file = provenance("cpu"), out.with_name(f"{out.name}.json")
    asked = {(row.kernel, row.arch) for row in rows}
    kept = []
    if file.exists():
        before = json.loads(file.read_text("utf-8"))
        was, now = (each["versions"]["triton"] for each in (before["provenance"], source))
        if was != now:
            raise ValueError(f"{file} has rows of Triton {was}, this is Triton {now}: name another file")
        compared = compared or [Comparison(**each) for each in before["compared"]]
        kept = [row for row in read_rows(file) if (row.kernel, row.arch) not in asked]
    together = sorted([*kept, *rows], key=lambda row: (row.arch != "sm_90", row.arch, row.kernel))
    lines = ",\n".join(json.dumps(asdict(row)) for row in together)
    head = json.dumps({"provenance": source, "compared": [each._asdict() for each in compared]})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n', "utf-8")
    out.with_name(f"{out.name}.md").write_text(page(together, compared, source), "utf-8")
