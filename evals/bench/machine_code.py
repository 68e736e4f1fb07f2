"""Machine code of a kernel for an NVIDIA GPU (SASS): its instructions and loops, and what they do.

Of loops that lie in one another the innermost counts; a kernel without loops is one loop that runs once.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from kvcompress.kernels.common.runtime import triton

# lanes of a warp
LANES = 32
# shorter ones wait for something or divide
_LEAST_LOOP = 12

# the first word of an instruction, by what it does: of several that fit the longest
_KINDS = {
    "tensor": "HMMA IMMA DMMA QMMA OMMA HGMMA IGMMA QGMMA BGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    "copy": "LDGSTS UTMALDG UBLKCP",
    "load": "LDG LD",
    "store": "STG ST UTMASTG",
    "shared load": "LDS LDSM",
    "shared store": "STS STSM",
    "tensor memory": "LDTM STTM UTCCP UTCSHIFT",
    "spill": "LDL STL",
    "constant": "LDC LDCU ULDC",
    "atomic": "ATOM ATOMG ATOMS RED REDG REDAS UTCATOMSWS UREDGR",
    "shuffle": "SHFL REDUX CREDUX VOTE VOTEU MATCH",
    "barrier": "BAR WARPSYNC WARPGROUP DEPBAR LDGDEPBAR SYNCS MEMBAR FENCE UTCBAR ERRBAR CCTL NANOSLEEP ARRIVES ELECT "
    "NOP UTMACMDFLUSH UTMACCTL UCGABAR ENDCOLLECTIVE",
    "branch": "BRA BRX BRXU JMP JMX CALL RET EXIT BSSY BSYNC BREAK BMOV BPT WARPSYNCALL YIELD KILL",
    "special": "MUFU",
    "conversion": "I2F I2FP F2F F2FP F2I F2IP I2I I2IP FRND",
    "permute": "PRMT",
    "half": "HADD2 HMUL2 HFMA2 HMNMX2 HSET2 HSETP2",
    "fp32": "FADD FADD2 FMUL FMUL2 FFMA FFMA2 FMNMX FMNMX3 FSEL FSET FSETP FCHK FSWZADD",
    "fp64": "DADD DMUL DFMA DSETP",
    "move": "MOV CS2R S2R S2UR R2UR P2R R2P SEL PLOP3 CSMTEST",
    "integer": "IADD IADD3 IMAD IMUL IABS IMNMX ISETP ISCADD LEA LOP3 SHF SHL SHR BREV BMSK FLO POPC SGXT VABSDIFF "
    "VIADD VIMNMX VIMNMX3 VIADDMNMX IDP VHMNMX",
}
KINDS = {word: kind for kind, words in _KINDS.items() for word in words.split()}
# what moves between a block and the memory of the GPU
_MOVES = ("copy", "load", "store")
_MOVING = (*_MOVES, "shared load", "shared store")
_TILE_COPIES = ("UTMA", "UBLKCP")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
# of matrices of 8 x 8 numbers that a lane has a pair of
_MATRICES = {"2": 8, "4": 16}


class Instruction(NamedTuple):
    """One line: where it stands, in bytes; the predicate it hangs on; its name with all its suffixes; its operands."""

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def kind(self) -> str:
        """What it does, in a word; "other" where the word is not known."""
        word = self.name.partition(".")[0]
        # what a warp computes once for all its lanes
        return KINDS.get(word) or ("uniform" if word.startswith("U") else "other")

    @property
    def width(self) -> int:
        """Bytes that a lane moves; 0 where it moves none, or the hardware copies a tile."""
        if self.kind not in _MOVING or self.name.startswith(_TILE_COPIES):
            return 0
        widths = _MATRICES if self.name.startswith(("LDSM", "STSM")) else _WIDTHS
        return next((widths[part] for part in self.name.split(".") if part in widths), 4)

    @property
    def flops(self) -> int | None:
        """Of a product of tiles, what falls to one warp; None where the name does not tell the tile's size."""
        if self.kind != "tensor":
            return 0
        if found := re.search(r"GMMA\.(\d+)x(\d+)x(\d+)", self.name):
            rows, columns, inner = map(int, found.groups())
            # four warps compute it together
            return 2 * rows * columns * inner // 4
        # 16816: 16 x 8 x 16
        found = re.search(r"MMA\.(?:SP\.)?(16)(8)(\d+)", self.name)
        return 2 * 16 * 8 * int(found[3]) if found else None

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.name.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def is_jump(self) -> bool:
        """A branch that is always taken."""
        return self.target is not None and not self.predicate and "," not in self.operands

    def reads(self, registers: range) -> bool:
        """Whether it reads any of these registers."""
        written, _, rest = self.operands.partition(",")
        # a store, and what writes a predicate, names no register that it writes
        named = rest if re.fullmatch(r"R\d+", written) else self.operands
        # a product of tiles names the first of up to four
        span = 4 if self.kind == "tensor" else 1
        read = {int(number) + more for number in re.findall(r"\bR(\d+)", named) for more in range(span)}
        return not read.isdisjoint(registers)


@dataclass(frozen=True)
class Loop:
    """The instructions of an innermost loop, as one warp runs them in an iteration."""

    instructions: Sequence[Instruction]
    repeats: bool = True

    @cached_property
    def mix(self) -> dict[str, int]:
        """How many of each kind, and of what moves by its bytes a lane: "load 16"."""
        named = Counter(f"{each.kind} {each.width}" if each.width else each.kind for each in self.instructions)
        return dict(sorted(named.items()))

    @cached_property
    def bytes(self) -> int:
        """What a warp's lanes ask of the GPU's memory, and write to it; lanes that are masked count."""
        return LANES * sum(each.width for each in self.instructions if each.kind in _MOVES)

    @cached_property
    def flops(self) -> int | None:
        """Multiplications and additions of a warp's products of tiles; None where one does not tell its size."""
        found = [each.flops for each in self.instructions]
        return None if None in found else sum(flops for flops in found if flops is not None)

    @cached_property
    def narrow(self) -> list[str]:
        """What moves one or two bytes a lane, or stages less than 16."""
        return [each.name for each in self.instructions if 0 < each.width < (16 if each.kind == "copy" else 4)]

    @cached_property
    def prefetch(self) -> str:
        """How what an iteration reads is asked for before the iteration: "" where it is not.

        "tma": the hardware's copies of tiles. "cp.async 1.5": copies to shared memory; the wait leaves those of so many
        iterations under way. "cp.async": the wait is for all of them, and products follow the copies before it.
        "registers": loads that no later instruction of the iteration reads.
        """
        kinds = [each.kind for each in self.instructions]
        if not self.repeats:
            return ""
        if any(each.kind == "copy" and not each.width for each in self.instructions):
            return "tma"
        if "copy" in kinds:
            waits = [each.operands for each in self.instructions if each.name == "DEPBAR.LE" and "SB0" in each.operands]
            left = max((int(wait.rpartition("0x")[2], 16) for wait in waits), default=0)
            groups = sum(each.name == "LDGDEPBAR" for each in self.instructions)
            if left:
                return f"cp.async {left / max(groups, 1):g}"
            last = len(kinds) - kinds[::-1].index("copy")
            return "cp.async" if "tensor" in kinds[last:] else ""
        loads = [place for place, kind in enumerate(kinds) if kind == "load"]
        ahead = sum(not self._is_read_after(place) for place in loads)
        return "registers" if loads and 2 * ahead >= len(loads) else ""

    def _is_read_after(self, place: int) -> bool:
        """Whether what is loaded at a place is read before the iteration ends."""
        load = self.instructions[place]
        found = re.match(r"R(\d+)", load.operands)
        first = int(found[1]) if found else 0
        loaded = range(first, first + max(load.width // 4, 1))
        return any(later.reads(loaded) for later in self.instructions[place + 1 :])


@dataclass(frozen=True)
class Program:
    """A compiled kernel: 32-bit registers of a thread, the bytes it spills, and its instructions."""

    registers: int
    spilled: int
    instructions: Sequence[Instruction]

    @cached_property
    def loops(self) -> list[Loop]:
        """Its innermost loops, in their order; the whole where there is none."""
        bodies = [body for body in _loops(self.instructions) if len(body) >= _LEAST_LOOP]
        inner = [body for body in bodies if not any(other < body for other in bodies)]
        if not inner:
            return [Loop(self.instructions, repeats=False)]
        return [Loop([self.instructions[place] for place in sorted(body)]) for body in inner]


def _loops(instructions: Sequence[Instruction]) -> list[set[int]]:
    """What lies on a way from a loop's first instruction back to it, for each loop, by place."""
    places = {each.address: place for place, each in enumerate(instructions)}
    after: list[list[int]] = []
    before: dict[int, list[int]] = {}
    for place, each in enumerate(instructions):
        to = places.get(each.target) if each.target is not None else None
        ends = each.name.partition(".")[0] in ("EXIT", "RET") and not each.predicate
        next_too = not ends and not each.is_jump and place + 1 < len(instructions)
        after.append([*([place + 1] if next_too else []), *([] if to is None else [to])])
        for later in after[-1]:
            before.setdefault(later, []).append(place)
    bodies: dict[int, set[int]] = {}
    for place, each in enumerate(instructions):
        head = places.get(each.target) if each.target is not None else None
        # code that lies behind the end, and returns, makes no loop: it is also reached without what it returns to
        if head is not None and head <= place and place not in _reached(0, after, head):
            found = _reached(place, [before.get(other, []) for other in range(len(after))], head)
            bodies.setdefault(head, {head}).update(found)
    return [bodies[head] for head in sorted(bodies)]


def _reached(start: int, ways: Sequence[Sequence[int]], without: int) -> set[int]:
    """Places that are reached from a start, itself one of them, by ways that do not pass another."""
    found: set[int] = set()
    left = [start]
    while left:
        place = left.pop()
        if place != without and place not in found:
            found.add(place)
            left.extend(ways[place])
    return found


def read_machine_code(cubin: bytes) -> Program:
    """The program of a compiled kernel.

    Raises:
        FileNotFoundError: there is no cuobjdump.
        ValueError: cuobjdump does not read the code.
    """
    listing = dump(cubin, "-sass", "-res-usage")
    return Program(*usage(listing), parse(listing))


def usage(listing: str) -> tuple[int, int]:
    """Registers of a thread, and the bytes it spills, of what cuobjdump -res-usage says."""
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", listing))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def parse(listing: str) -> list[Instruction]:
    """The instructions that cuobjdump -sass lists."""
    line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][A-Z0-9_.a-z]*)\s*(.*?)\s*;", re.MULTILINE)
    return [Instruction(int(address, 16), *words) for address, *words in line.findall(listing)]


def dump(cubin: bytes, *options: str) -> str:
    """What cuobjdump says of a compiled kernel.

    Raises:
        FileNotFoundError: there is no cuobjdump.
        ValueError: cuobjdump does not read the code.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        ran = subprocess.run([find_cuobjdump(), *options, file], capture_output=True, text=True)
    if ran.returncode:
        raise ValueError(f"cuobjdump does not read this machine code: {ran.stderr.strip()}")
    return ran.stdout


def find_cuobjdump() -> str:
    """The disassembler that Triton brings, or the one that it finds.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        return triton.knobs.nvidia.cuobjdump.path
    except (AttributeError, RuntimeError) as error:
        raise FileNotFoundError(
            f"reading machine code takes cuobjdump, which Triton {triton.__version__} does not bring here: install "
            "Triton's wheel for Linux, or CUDA's toolkit and name its program in TRITON_CUOBJDUMP_PATH"
        ) from error
