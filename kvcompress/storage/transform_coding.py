"""Keys or values of one layer in few bits a number, for files: principal components, one step for all, entropy codes.

After KVTC (arXiv:2511.01815): what is decorrelated and quantised evenly is coded best, as components that hardly vary
become zeros that take next to no bits. Of a token's keys, without RoPE, or values x, all heads side by side:

    y = vectors^T (x - mean) / s        s: the token's size over that of all, a power of two to 1/8 of an octave
    c = sign(y) floor(|y| / step + 0.4)                  decoded as step * (c - 0.05 sign(c))

KVTC gives each component a number of bits. Here all have the same step, and entropy coding does the rest; the step is
the one for which the encoded bytes are as many as asked for. The codes of 16 components at a time lie component after
component, as many consecutive tokens in a byte as fit in 256 values, r^k <= 256, and are coded by how often each byte
comes. The first tokens of a sequence, whose keys are unlike all others, stay in 16 bits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress.storage.frames import compress, expand, pack, unpack
from kvcompress.storage.rope import Rope

# the first tokens of a sequence, in 16 bits
SINKS = 4
# what of a step below a half is rounded down more than up, and how far a code is decoded nearer to 0
_DEAD_ZONE = 0.1
_TOWARDS_ZERO = 0.05
# components whose codes are coded together, and tokens that are transformed together
_GROUP = 16
_TOKENS = 4096
# sizes of tokens: in eighths of an octave; the size of tokens that are not finite
_EIGHTHS = 8
_LARGEST = 120
_NOT_FINITE = -128
# bytes of a tensor's own in the header of a file
_IN_HEADER = 320
# the share of the bits that codes get at least, however much else a short text takes
_FOR_CODES = 0.75
# the search for a step
_ATTEMPTS = 12
_CLOSE = 0.995


class Coding(NamedTuple):
    """How a tensor was coded: coded again like this, it gives the same bytes, and loses nothing.

    basis: the digest of its basis. step: of its codes. sizes: [tokens] int8, of those that are coded.
    """

    basis: str
    step: float
    sizes: Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """Which tokens the columns of keys or values [batch, kv_heads, columns, head_dim] hold.

    side: keys, or values. length: columns that hold tokens; those after them are room for more.
    visible: [batch, length] bool, False for padding; None if nothing is padded.
    first: for each row, how many of its tokens came before those in the columns.
    shift: for each row, how far the model's positions are ahead of the count of its tokens.
    coding: how its numbers were coded before, if they were.
    """

    side: str
    length: int
    visible: Tensor | None
    first: list[int]
    shift: list[int]
    coding: Coding | None = None


class Transform(NamedTuple):
    """mean [width], vectors [width, width] float32, of one side of one layer; rope: of its keys, None for values."""

    mean: Tensor
    vectors: Tensor
    rope: Rope | None
    basis: str

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Components [width, tokens] of vectors [tokens, kv_heads, head_dim] at positions [tokens]; NaN where a token
        is not finite."""
        x = x.float()
        if self.rope is not None:
            x = self.rope.unrotate(x, positions[:, None])
        return self.vectors.mT @ (x.flatten(1) - self.mean).mT

    def backward(self, y: Tensor, positions: Tensor, kv_heads: int) -> Tensor:
        """Undoes `forward`."""
        x = (self.vectors @ y).mT + self.mean
        x = x.unflatten(1, (kv_heads, -1))
        return x if self.rope is None else self.rope.rotate(x, positions[:, None])


class _Tokens(NamedTuple):
    """Real tokens by row and column, and their positions, [tokens] each."""

    row: Tensor
    column: Tensor
    position: Tensor

    @classmethod
    def of(cls, visible: Tensor, first: list[int], shift: list[int]) -> tuple["_Tokens", "_Tokens"]:
        """The sinks, and the others; visible: [batch, columns] bool on the CPU."""
        begins = torch.tensor(first)[:, None]
        index = visible.cumsum(1) - 1 + begins
        position = index + torch.tensor(shift)[:, None]
        parts = []
        for chosen in (visible & (index < SINKS), visible & (index >= SINKS)):
            row, column = chosen.nonzero(as_tuple=True)
            parts.append(cls(row, column, position[chosen]))
        return parts[0], parts[1]

    def pieces(self) -> Iterator["_Tokens"]:
        for start in range(0, len(self.row), _TOKENS):
            yield _Tokens(*(each[start : start + _TOKENS] for each in self))

    def take(self, tensor: Tensor) -> Tensor:
        """[tokens, kv_heads, head_dim]."""
        return tensor[self.row.to(tensor.device), :, self.column.to(tensor.device)]

    def put(self, tensor: Tensor, x: Tensor) -> None:
        tensor[self.row.to(tensor.device), :, self.column.to(tensor.device)] = x.to(tensor.dtype)


def encode(tensor: Tensor, places: Places, transform: Transform, bits: float) -> bytes:
    """The payload of keys or values [batch, kv_heads, columns, head_dim], of `bits` for each number of a token.

    Padding and room come back as zeros. Everything counts: what a short text cannot spare comes on top.
    """
    batch, kv_heads, columns, head_dim = tensor.shape
    visible = torch.zeros(batch, columns, dtype=torch.bool)
    visible[:, : places.length] = True if places.visible is None else places.visible.cpu()
    sinks, tokens = _Tokens.of(visible, places.first, places.shift)
    kept, kind = _in_16_bits(sinks.take(tensor))
    mask = visible.flatten()
    around = [compress(kept.flatten().view(torch.uint8)), compress(_in_bits(mask))]
    width, count = kv_heads * head_dim, len(tokens.row)
    y = torch.empty(width, count, device=tensor.device)
    for start, piece in zip(range(0, count, _TOKENS), tokens.pieces(), strict=True):
        x = piece.take(tensor)
        y[:, start : start + _TOKENS] = transform.forward(x, piece.position.to(x.device))
    before = places.coding if places.coding is not None and places.coding.basis == transform.basis else None
    sizes = _sizes(y) if before is None else before.sizes.to(y.device)
    # codes of what is not finite are not read
    y[:, sizes == _NOT_FINITE] = 0.0
    y /= _scale(sizes)
    around.append(compress(sizes.cpu().view(torch.uint8)))
    facts = {"side": places.side, "first": places.first, "shift": places.shift, "sinks": kind}
    room = bits * width * (count + len(sinks.row)) / 8 - len(pack(facts, around)) - _IN_HEADER
    least = _FOR_CODES * bits * width * count / 8
    if before is None:
        step, groups, frames = _coded(y, max(room, least), bits)
    else:
        step, (groups, frames) = before.step, _frames(y, before.step)
    return pack(facts | {"step": step, "groups": groups}, [*around, *frames])


def decode(
    payload: memoryview, dtype: torch.dtype, shape: list[int], transform: Transform, device: torch.device
) -> tuple[Tensor, Coding]:
    """The tensor that `encode` was given, nearly; ValueError if the payload does not hold one."""
    batch, kv_heads, columns, head_dim = shape
    facts, frames = unpack(payload)
    tensor = torch.zeros(shape, dtype=dtype, device=device)
    bits = expand(frames[1], -(-batch * columns // 8))
    visible = _from_bits(bits)[: batch * columns].view(batch, columns)
    sinks, tokens = _Tokens.of(visible, facts["first"], facts["shift"])
    width, count = kv_heads * head_dim, len(tokens.row)
    kept = expand(frames[0], 2 * width * len(sinks.row)).view(_KINDS[facts["sinks"]])
    sinks.put(tensor, kept.view(-1, kv_heads, head_dim).to(device))
    sizes = expand(frames[2], count).view(torch.int8)
    y = torch.empty(width, count)
    at = 3
    for index, (low, radix) in enumerate(facts["groups"]):
        part = y[index * _GROUP : (index + 1) * _GROUP]
        planes = _planes(radix)
        _read_codes(part, frames[at : at + planes], low, radix)
        at += planes
    if at != len(frames) or len(facts["groups"]) != -(-width // _GROUP):
        raise ValueError(f"expected frames of {width} components, got {len(frames)}")
    scale = _scale(sizes) * facts["step"]
    scale[sizes == _NOT_FINITE] = torch.nan
    for start, piece in zip(range(0, count, _TOKENS), tokens.pieces(), strict=True):
        part = (y[:, start : start + _TOKENS] * scale[start : start + _TOKENS]).to(device)
        piece.put(tensor, transform.backward(part, piece.position.to(device), kv_heads))
    return tensor, Coding(transform.basis, facts["step"], sizes)


def side_of(payload: memoryview) -> str:
    """Whether a payload holds keys or values; ValueError if it holds neither."""
    side: str = unpack(payload)[0]["side"]
    if side not in ("keys", "values"):
        raise ValueError(f"expected keys or values, got {side!r}")
    return side


# tokens


def _in_16_bits(x: Tensor) -> tuple[Tensor, str]:
    """Numbers in 16 bits on the CPU, and the name of their dtype."""
    x = x.detach().cpu()
    # what is too large for float16 fits in bfloat16
    wide = bool((x.abs() > torch.finfo(torch.float16).max).any()) or x.dtype == torch.bfloat16
    kind = "BF16" if wide else "F16"
    return x.to(_KINDS[kind]).contiguous(), kind


_KINDS = {"BF16": torch.bfloat16, "F16": torch.float16}


def _sizes(y: Tensor) -> Tensor:
    """The size of each token, [tokens] int8, of components [width, tokens]."""
    rms = y.square().mean(0).sqrt()
    fine = rms.isfinite()
    typical = rms[fine].mean() if bool(fine.any()) else rms.new_ones(())
    octaves = (rms / typical.clamp(min=torch.finfo(torch.float32).tiny)).log2().nan_to_num(0.0)
    sizes = (octaves * _EIGHTHS).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return sizes.masked_fill(~fine, _NOT_FINITE)


def _scale(sizes: Tensor) -> Tensor:
    return (sizes.float() / _EIGHTHS).exp2()


def _in_bits(mask: Tensor) -> Tensor:
    """[bits] bool as [bytes] uint8."""
    padded = torch.nn.functional.pad(mask, (0, -len(mask) % 8)).view(-1, 8)
    return (padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _from_bits(data: Tensor) -> Tensor:
    return (data[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()


# codes


def _codes(y: Tensor, step: float) -> Tensor:
    q = y / step
    return (q.abs() + (0.5 - _DEAD_ZONE)).floor().copysign(q).to(torch.int32)


def _planes(radix: int) -> int:
    """How many bytes a code takes, one after another, that has `radix` values."""
    return 0 if radix == 1 else math.ceil(math.log2(radix) / 8)


def _in_a_byte(radix: int) -> int:
    """How many codes of `radix` values fit in a byte."""
    fit = 1
    while radix ** (fit + 1) <= 256:
        fit += 1
    return fit


def _frames(y: Tensor, step: float) -> tuple[list[tuple[int, int]], list[bytes]]:
    """The least code and the number of codes of each group of components, and their frames."""
    groups, frames = [], []
    for part in y.split(_GROUP):
        codes = _codes(part, step)
        low, high = (int(each) for each in codes.aminmax()) if codes.numel() else (0, 0)
        radix = high - low + 1
        groups.append((low, radix))
        codes -= low
        if radix == 1:
            continue
        if radix > 256:
            for plane in range(_planes(radix)):
                frames.append(compress((codes >> 8 * plane & 255).to(torch.uint8).cpu()))
            continue
        digits, fit = codes.to(torch.uint8), _in_a_byte(radix)
        if digits.shape[1] % fit:
            digits = torch.nn.functional.pad(digits, (0, -digits.shape[1] % fit), value=min(max(-low, 0), radix - 1))
        packed = digits[:, fit - 1 :: fit]
        for at in range(fit - 2, -1, -1):
            packed = packed * radix + digits[:, at::fit]
        frames.append(compress(packed.cpu()))
    return groups, frames


def _read_codes(y: Tensor, frames: list[memoryview], low: int, radix: int) -> None:
    """Puts the codes of a group, as they are decoded but for step and scale, into y [components, tokens]."""
    components, tokens = y.shape

    def decoded(codes: Tensor) -> Tensor:
        return codes - _TOWARDS_ZERO * codes.sign()

    if radix == 1:
        y.fill_(float(decoded(torch.tensor(float(low)))))
    elif radix > 256:
        codes = torch.full((components * tokens,), low, dtype=torch.int32)
        for plane, frame in enumerate(frames):
            codes += expand(frame, len(codes)).int() << 8 * plane
        y.copy_(decoded(codes.float()).view(components, tokens))
    else:
        fit = _in_a_byte(radix)
        # all codes of each byte
        table = torch.arange(256)[:, None] // radix ** torch.arange(fit) % radix + low
        table = decoded(table.float())
        size = components * -(-tokens // fit)
        codes = table[expand(frames[0], size).int()].view(components, -1)
        y.copy_(codes[:, :tokens])


def _coded(y: Tensor, room: float, bits: float) -> tuple[float, list[tuple[int, int]], list[bytes]]:
    """Nearly the least step with which the frames of y [width, tokens] take no more than `room` bytes, and its
    frames."""
    spread = float(y.square().mean().sqrt()) if y.numel() else 0.0
    if spread == 0.0:
        return 1.0, *_frames(y, 1.0)
    step, count = spread * 2 ** (1.0 - bits), y.shape[1]
    if count > 2 * _TOKENS:
        # most of the search looks at some tokens only
        some = y[:, :: -(-count // _TOKENS)].contiguous()
        step, *_ = _search(some, room * some.shape[1] / count, step)
    return _search(y, room, step)


def _search(y: Tensor, room: float, step: float) -> tuple[float, list[tuple[int, int]], list[bytes]]:
    """False position in the step's logarithm, from this step on, with which sizes fall."""
    # half of what is allowed below the target
    target, per_octave = (1 + _CLOSE) / 2 * room, 0.8 * y.numel() / 8
    # the last step that was too small, and the best one so far, with their sizes
    small: tuple[float, int] | None = None
    fits: tuple[float, int] | None = None
    found = None
    at = math.log2(step)
    for attempt in range(_ATTEMPTS):
        groups, frames = _frames(y, 2**at)
        size = sum(map(len, frames))
        if size <= room:
            fits, found = (at, size), (2**at, groups, frames)
            if size >= _CLOSE * room or not frames:
                break
        else:
            small = at, size
        if small is not None and fits is not None:
            share = (small[1] - target) / (small[1] - fits[1])
            # the middle, now and then: a bracket always shrinks
            at = small[0] + (fits[0] - small[0]) * (0.5 if attempt % 4 == 3 else min(max(share, 0.05), 0.95))
        else:
            # the first two on one side of the target may be far from it
            at += (size - target) / per_octave * (1.0 + 0.5 * attempt)
    while found is None:
        at = max(at, small[0] if small is not None else at) + 1.0
        groups, frames = _frames(y, 2**at)
        if sum(map(len, frames)) <= room or all(group == (0, 1) for group in groups):
            found = 2**at, groups, frames
    return found

