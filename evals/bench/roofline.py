"""What a kernel's machine code says of its speed: a static roofline of its main loop.

An iteration takes a block, of the clocks of its multiprocessor,

    issue  = instructions of a warp * warps / 4        (a multiprocessor has four schedulers; fewer warps use fewer)
    memory = bytes / the multiprocessor's share of the bandwidth
    tensor = flops of products of tiles / the multiprocessor's rate in 16 bits

and not less than the largest of the three, which binds; where none overlaps with another, their sum. The main loop is
the one with most arithmetic and bytes; where loops have as many the shortest, as others run for the tiles at an edge.

What this leaves out: latency, so that it is a bound, and no forecast of a kernel with few blocks or no prefetch; what
masks skip; that lanes of a loop that does not wait for all warps may ask for the same bytes; the L2 cache, so that a
kernel whose blocks read the same operands is given no memory limit; a bus. TF32 counts as 16 bits, and `mma` of Ampere
as fast as Hopper's own.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, NamedTuple

from kvcompress.evals.bench.aot import TARGETS, Case, all_cases, occupancy
from kvcompress.evals.bench.machine_code import LANES, Loop, read_machine_code
from kvcompress.evals.bench.tile_code import TileLoop, read_tile_loops

# warp-instructions that a multiprocessor issues in a clock
SCHEDULERS = 4


class GPU(NamedTuple):
    """What one multiprocessor gets of memory, in bytes a clock, and computes in 16 bits, in flops a clock.

    Of the bandwidth nine tenths, which a copy reaches.
    """

    name: str
    bytes: float
    flops: int


GPUS = {
    # 108 multiprocessors at 1.41 GHz, 2.04 TB/s
    "sm_80": GPU("A100", 12.0, 2048),
    # 132 at 1.7 GHz, 3.35 TB/s
    "sm_90": GPU("H100", 13.5, 4096),
    # 148 at 1.85 GHz, 8 TB/s
    "sm_100": GPU("B200", 26.0, 8192),
}

# kernels whose blocks read the same operands, from the L2 cache then; of _prefix_kernel those with many rows
_SHARES_OPERANDS = {"_causal_kernel", "_column_sums_kernel", "_bulk_kv_kernel", "_rebuild_keys_kernel"}

# the launch that stands for a kernel, by what is told of it; else its first in bfloat16 with head_dim 128
REPRESENTATIVE: dict[str, dict[str, Any]] = {
    "_causal_kernel": {"block_queries": 128, "block_tokens": 64},
    "_column_sums_kernel": {"block_tokens": 64},
    "_split_kernel": {"slotted": True, "block_rows": 16, "writes_logits": False, "biased": False, "ragged": False},
    "_packed_kernel": {"key_bits": 4, "key_outliers": 1},
    "_packed_rows_kernel": {"key_bits": 2, "key_centred": True},
    "_prefix_kernel": {"block_rows": 128},
    "_bulk_kv_kernel": {"block_rows": 128},
    "_evict_kernel": {"group": 4},
}


@dataclass(frozen=True)
class Iteration:
    """An iteration of a loop: instructions of a warp, and bytes and flops of a block.

    flops: None where the machine code does not tell them.
    mix: instructions by kind, and by bytes a lane where they move any.
    clocks: of the block's multiprocessor, by what takes them.
    """

    instructions: int
    repeats: bool
    bytes: int
    flops: int | None
    prefetch: str
    narrow: dict[str, int]
    mix: dict[str, int]
    clocks: dict[str, float]

    @property
    def binds(self) -> str:
        return max(self.clocks, key=lambda name: self.clocks[name])

    @property
    def work(self) -> tuple[float, float]:
        """Flops, and bytes; of a loop without flops what takes most clocks."""
        return self.flops or 0, self.bytes if self.flops else self.clocks[self.binds]

    @property
    def of_limit(self) -> tuple[float, float] | None:
        """The larger of the clocks for memory and for products, of those of the iteration: where issue, memory and
        products follow one another, and where they overlap; None where there is neither memory nor product."""
        limit = max(clocks for name, clocks in self.clocks.items() if name != "issue")
        return (limit / sum(self.clocks.values()), limit / self.clocks[self.binds]) if limit else None


@dataclass(frozen=True)
class Row:
    """A launch as it was compiled: registers and spilled bytes of a thread, bytes of shared memory of a block."""

    kernel: str
    label: str
    arch: str
    is_representative: bool
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    warps: int = 0
    stages: int = 0
    occupancy: float = 0.0
    loops: list[Iteration] = field(default_factory=list)
    error: str = ""

    @property
    def main(self) -> Iteration:
        """The loop in which the kernel spends its time."""
        return max(self.loops, key=lambda loop: (*loop.work, -loop.instructions))


class Chosen(NamedTuple):
    """A launch, and its place among those of its kernel on a GPU."""

    case: Case
    place: int
    is_typical: bool
    is_representative: bool


@functools.cache
def launches(arch: str) -> dict[str, list[Chosen]]:
    """Of each kernel its launches on a GPU.

    Typical ones are in bfloat16 and with head_dim 128, as far as any of the kernel are; one of them stands for it.
    """
    by_kernel: dict[str, list[Case]] = {}
    for cases in all_cases().values():
        for case in cases:
            if TARGETS[arch].kind in case.kinds:
                by_kernel.setdefault(case.kernel.__name__, []).append(case)
    found = {}
    for kernel, of_kernel in by_kernel.items():
        facts = [case.facts() for case in of_kernel]
        in_bf16, in_dim = ["bf16" in str(each) for each in facts], [_head_dim(each) == 128 for each in facts]
        typical = [
            (is_bf16 or not any(in_bf16)) and (has_dim or not any(in_dim))
            for is_bf16, has_dim in zip(in_bf16, in_dim, strict=True)
        ]
        told = REPRESENTATIVE.get(kernel, {})
        fitting = [is_so and has_facts(each, told) for is_so, each in zip(typical, facts, strict=True)]
        # GPUs without wgmma may have no tile so large
        first = (fitting if any(fitting) else typical).index(True)
        found[kernel] = [Chosen(case, at, typical[at], at == first) for at, case in enumerate(of_kernel)]
    return found


def _head_dim(facts: Mapping[str, Any]) -> int | None:
    return facts.get("head_dim", facts.get("value_dim"))


def has_facts(facts: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    """Whether a launch is as told; what is not told of it is False."""
    return all(facts.get(name, False) == value for name, value in told.items())


def read_launch(kernel: str, place: int, arch: str) -> Row:
    """Compiles a launch, and reads its code."""
    case, _, _, is_representative = launches(arch)[kernel][place]
    try:
        compiled = case.compiled(TARGETS[arch])
        program = read_machine_code(compiled.asm["cubin"])
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Row(kernel, case.label, arch, is_representative, error=lines[-1])
    made = compiled.metadata
    resident = occupancy(TARGETS[arch], program.registers, made.shared, made.num_warps)
    schedulers = min(SCHEDULERS, resident * TARGETS[arch].threads / LANES)
    shares = kernel in _SHARES_OPERANDS or (kernel == "_prefix_kernel" and case.constants["BLOCK_ROWS"] >= 64)
    gpu = GPUS[arch]._replace(bytes=math.inf) if shares else GPUS[arch]
    tiles = [read_tile_loops(compiled.asm["ttgir"], unrolled) for unrolled in (False, True)]
    loops = [
        iteration(loop, [tile for tile in same if tile], made.num_warps, schedulers, gpu)
        for loop, *same in zip(program.loops, *(_beside(program.loops, each) for each in tiles), strict=True)
    ]
    return Row(
        kernel, case.label, arch, is_representative, program.registers, program.spilled, made.shared, made.num_warps,
        made.num_stages, resident, loops,
    )  # fmt: skip


def _beside(loops: list[Loop], tiles: list[TileLoop]) -> list[TileLoop | None]:
    """What each loop does in Triton's code: known where there are as many loops, and this one waits for all warps.

    One that does not may have been unrolled.
    """
    waits = [any(each.name.startswith("BAR") for each in loop.instructions) for loop in loops]
    known = len(tiles) == len(loops)
    return [tiles[at] if known and loop_waits else None for at, loop_waits in enumerate(waits)]


def iteration(loop: Loop, tiles: list[TileLoop], warps: int, schedulers: float, gpu: GPU) -> Iteration:
    """What an iteration takes a block of so many warps.

    Args:
        tiles: what it may be in Triton's code, of which lanes ask for at least the bytes.
        schedulers: those that have warps.
    """
    asked = loop.bytes * warps
    tile = max((tile for tile in tiles if tile.bytes <= asked), default=None)
    moved = tile.bytes if tile else asked
    flops = loop.flops * warps if loop.flops is not None else tile.flops if tile else None
    clocks = {
        "issue": len(loop.instructions) * warps / schedulers,
        "memory": moved / gpu.bytes,
        "tensor": (flops or 0) / gpu.flops,
    }
    narrow = {name: loop.narrow.count(name) for name in sorted(set(loop.narrow))}
    rounded = {name: round(value, 1) for name, value in clocks.items()}
    return Iteration(len(loop.instructions), loop.repeats, moved, flops, loop.prefetch, narrow, loop.mix, rounded)


def read_launches(jobs: list[tuple[str, int, str]], workers: int) -> Iterator[Row]:
    """Reads (kernel, place of the launch, GPU) in parallel, in order."""
    if workers == 1:
        yield from (read_launch(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(read_launch, *zip(*jobs, strict=True))
