"""What the loops of a kernel move and multiply, from Triton's code of tiles (TTGIR).

Machine code tells what each lane asks for. Where there are more lanes than a tile has parts several ask for the same
bytes, and only the tile's shape says how many there are.
"""

import math
import re
from typing import NamedTuple

_BITS = re.compile(r"(?:bf|f|i|ui)(\d+)")
# !tt.ptr<bf16>, or tensor<64x128x!tt.ptr<bf16>, of what is loaded, copied or stored
_MOVED = re.compile(r"(?:tt\.load|tt\.store|ttg\.async_copy_global_to_local) .*?: (?:tensor<([\dx]*)x)?!tt\.ptr<(\w+)>")
_SHAPES = re.compile(r"(?:tensor|memdesc)<(\d+)x(\d+)x")
_PRODUCTS = ("tt.dot ", "ttng.warp_group_dot ", "ttng.tc_gen5_mma ")


class TileLoop(NamedTuple):
    """Bytes that a block moves to and from the GPU's memory in an iteration, and flops of its products of tiles."""

    bytes: int
    flops: int


class _Open(NamedTuple):
    """A loop being read: the depth it began at, its iterations where that is a constant, and bytes and flops so far."""

    depth: int
    iterations: int
    does: list[int]
    inner: list[TileLoop]


def read_tile_loops(code: str, unrolled: bool) -> list[TileLoop]:
    """The innermost loops, in their order.

    Args:
        unrolled: count loops in others whose iterations are a constant as part of those, as a compiler that unrolls
            them leaves it.
    """
    found: list[TileLoop] = []
    stack: list[_Open] = []
    depth = 0
    for line in code.splitlines():
        if re.search(r"\bscf\.(for|while)\b", line):
            stack.append(_Open(depth, _iterations(line) if unrolled and stack else 0, [0, 0], []))
        elif stack:
            stack[-1].does[0] += _bytes(line)
            stack[-1].does[1] += _flops(line)
        depth += line.count("{") - line.count("}")
        while stack and depth <= stack[-1].depth:
            loop = stack.pop()
            if loop.iterations and not loop.inner:
                for at, value in enumerate(loop.does):
                    stack[-1].does[at] += value * loop.iterations
                continue
            innermost = loop.inner or [TileLoop(*loop.does)]
            (stack[-1].inner if stack else found).extend(innermost)
    return found


def _iterations(line: str) -> int:
    """How often a loop runs, where its bounds are constants; else 0."""
    bounds = re.search(r"= %c(\d+)_i32 to %c(\d+)_i32 step %c(\d+)_i32", line)
    if not bounds:
        return 0
    first, last, step = map(int, bounds.groups())
    return math.ceil((last - first) / step)


def _bytes(line: str) -> int:
    moved = _MOVED.search(line)
    if not moved:
        return 0
    shape, kind = moved.groups()
    bits = _BITS.fullmatch(kind)
    # a pointer has 64 bits, and a number of eight is of a type with a longer name
    each = int(bits[1]) // 8 if bits else 8 if kind.startswith("ptr") else 1
    return math.prod(map(int, shape.split("x"))) * each if shape else each


def _flops(line: str) -> int:
    if not any(product in line for product in _PRODUCTS):
        return 0
    (rows, inner), (_, columns) = ((int(first), int(second)) for first, second in _SHAPES.findall(line)[:2])
    return 2 * rows * inner * columns
