"""Keys or values of one layer in few bits a number, for files: principal components, one step for all, entropy codes.

After KVTC (arXiv:2511.01815): what is decorrelated and quantised evenly is coded best, as components that hardly vary
become zeros that take next to no bits. Of a token's keys, without RoPE, or values x, all heads side by side:

    y = vectors^T (x - mean) / s        s: the token's size over that of all, a power of two to 1/8 of an octave
    c = sign(y) floor(|y| / step + 0.45)                decoded as step * sign(c) (|c| - d)

d is how much smaller, on average, the numbers are than their codes: one for |c| = 1, one for 2 and one for the others.
KVTC gives each component a number of bits. Here all have the same step, and entropy coding does the rest; the step is
the one for which the encoded bytes are as many as asked for. The codes of 16 components at a time, cut off to a few
values, lie component after component, as many consecutive tokens in a byte as fit in 256 values, r^k <= 256, and are
coded by how often each byte comes; so is what was cut off. The first tokens of a sequence, whose keys are unlike all
others, stay in 16 bits. Tokens beyond all sizes, few and far larger than the others, stay as they came.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress.storage.frames import compress, expand, pack, unpack
from kvcompress.storage.rope import Rope

# the first tokens of a sequence, in 16 bits
SINKS = 4
# a code is the next one towards 0 of a number plus this
_ROUNDS_UP = 0.45
# the least and the most that what a code stands for is nearer to 0, in steps: coded again, it is the same code
_SHIFTS = (-0.2, 0.3)
# the limit of a group's codes, by their mean size
_LIMITS = ((1, 0.35), (2, 0.85), (5, 3.0), (127, math.inf))
# components whose codes are coded together, and tokens that are transformed together
_GROUP = 16
_TOKENS = 4096
# sizes of tokens: in eighths of an octave; those of tokens that are not finite, and that stay as they came
_EIGHTHS = 8
_LARGEST = 120
_NOT_FINITE = -128
_AS_IT_CAME = 127
# how many tokens may be larger than all sizes, or which share, before others count as small beside them
_FEW, _SHARE = 8, 64
# components of more than this may overflow on the way back
_HUGE = 1e30
# bytes of a tensor's own in the header of a file
_IN_HEADER = 320
# bytes that the step and a group's facts take at most, nearly
_OF_STEP, _OF_GROUP = 40, 30
# bytes that a group may take on top of that in a short text: a frame without codes has some
_SPARED = 128
# the share of the bits that codes get at least, however much else a short text takes
_FOR_CODES = 0.75
# the search for a step
_ATTEMPTS = 12
_CLOSE = 0.995
# codes have no more bits than this, and a sign
_FINEST = 20


class Coding(NamedTuple):
    """How a tensor was coded: coded again like this, it loses next to nothing, up to about 6 bits a number.

    basis: the digest of its basis. step: of its codes. sizes: [tokens] int8, of those that are coded, or of more that
    come after them.
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
        """Components [width, tokens] of vectors [tokens, kv_heads, head_dim] at positions [tokens]; not finite where
        a token is not, or is too large."""
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

    def at(self, chosen: Tensor) -> "_Tokens":
        """Some of them; chosen: [tokens] bool."""
        return _Tokens(*(each[chosen] for each in self))

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
    around = [compress(_bytes_of(kept)), compress(_in_bits(mask))]
    width, count = kv_heads * head_dim, len(tokens.row)
    y = torch.empty(width, count, device=tensor.device)
    rms, is_finite = y.new_empty(count, dtype=torch.float64), y.new_empty(count, dtype=torch.bool)
    for start, piece in zip(range(0, count, _TOKENS), tokens.pieces(), strict=True):
        x, some = piece.take(tensor), slice(start, start + _TOKENS)
        y[:, some] = transform.forward(x, piece.position.to(x.device))
        rms[some] = torch.linalg.vector_norm(y[:, some], dim=0, dtype=torch.float64) / math.sqrt(width)
        is_finite[some] = x.flatten(1).isfinite().all(1)
    before = places.coding if places.coding is not None and places.coding.basis == transform.basis else None
    sizes = _sizes(rms, is_finite) if before is None else before.sizes[:count].to(y.device)
    apart = sizes == _AS_IT_CAME
    # what has no codes
    y[:, apart | (sizes == _NOT_FINITE)] = 0.0
    y /= _scale(sizes)
    around.append(compress(sizes.cpu().view(torch.uint8)))
    if bool(apart.any()):
        around.append(compress(_bytes_of(tokens.at(apart.cpu()).take(tensor))))
    facts = {"side": places.side, "first": places.first, "shift": places.shift, "sinks": kind}
    room = bits * width * (count + len(sinks.row)) / 8 - len(pack(facts, around)) - _IN_HEADER
    least = _FOR_CODES * bits * width * count / 8 + _SPARED * -(-width // _GROUP)
    step = _step(y, max(room, least)) if before is None else before.step
    groups, frames = _frames(y, step, shifted=True)
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
    apart = tokens.at(sizes == _AS_IT_CAME)
    stays = len(apart.row) > 0
    y = torch.empty(width, count)
    others = iter(frames[4 if stays else 3 :])
    for part, group in zip(y.split(_GROUP), facts["groups"], strict=True):
        _read_group(part, others, _Group(*group))
    scale = _scale(sizes) * facts["step"]
    scale[sizes == _NOT_FINITE] = torch.nan
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    for start, piece in zip(range(0, count, _TOKENS), tokens.pieces(), strict=True):
        part = (y[:, start : start + _TOKENS] * scale[start : start + _TOKENS]).to(device)
        # rounded, a number may be beyond the largest
        x = transform.backward(part, piece.position.to(device), kv_heads).clamp(-largest, largest)
        piece.put(tensor, x)
    if stays:
        held = expand(frames[3], width * dtype.itemsize * len(apart.row)).view(dtype)
        apart.put(tensor, held.view(-1, kv_heads, head_dim).to(device))
    return tensor, Coding(transform.basis, facts["step"], sizes)


def side_of(payload: memoryview) -> str:
    """Whether a payload holds keys or values; ValueError if it holds neither."""
    side: str = unpack(payload)[0]["side"]
    if side not in ("keys", "values"):
        raise ValueError(f"expected keys or values, got {side!r}")
    return side


# tokens


def _in_16_bits(x: Tensor) -> tuple[Tensor, str]:
    """Numbers in 16 bits on the CPU, and the name of their dtype; what is finite stays so."""
    x = x.detach().cpu()
    # what is too large or too small for float16 fits in bfloat16
    sizes, limits = x[x.isfinite() & (x != 0)].abs(), torch.finfo(torch.float16)
    fits = not len(sizes) or limits.tiny <= float(sizes.max()) <= limits.max
    kind = "F16" if fits and x.dtype != torch.bfloat16 else "BF16"
    largest = torch.finfo(_KINDS[kind]).max
    return torch.where(x.isfinite(), x.clamp(-largest, largest), x).to(_KINDS[kind]).contiguous(), kind


_KINDS = {"BF16": torch.bfloat16, "F16": torch.float16}


def _bytes_of(x: Tensor) -> Tensor:
    return x.detach().cpu().flatten().view(torch.uint8)


def _sizes(rms: Tensor, is_finite: Tensor) -> Tensor:
    """The size of each token, [tokens] int8, of the root mean squares of their components [tokens] float64."""
    fine = rms[is_finite & rms.isfinite()].sort().values
    if not len(fine):
        return torch.where(is_finite, _AS_IT_CAME, _NOT_FINITE).to(torch.int8)
    # a few that are large make no others small, as a mean would
    most = fine[max(0, len(fine) - 1 - max(_FEW, len(fine) // _SHARE))] / 2.0 ** (_LARGEST / _EIGHTHS)
    typical = torch.maximum(fine[len(fine) // 2], most).clamp(min=torch.finfo(torch.float32).tiny)
    eighths = _EIGHTHS * (rms / typical).log2()
    beyond = (eighths.round() > _LARGEST) | (rms > _HUGE) | ~rms.isfinite()
    sizes = eighths.round().clamp(-_LARGEST, _LARGEST).nan_to_num(0.0).to(torch.int8)
    return sizes.masked_fill(beyond, _AS_IT_CAME).masked_fill(~is_finite, _NOT_FINITE)


def _scale(sizes: Tensor) -> Tensor:
    return (sizes.float() / _EIGHTHS).exp2()


def _in_bits(mask: Tensor) -> Tensor:
    """[bits] bool as [bytes] uint8."""
    padded = torch.nn.functional.pad(mask, (0, -len(mask) % 8)).view(-1, 8)
    return (padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _from_bits(data: Tensor) -> Tensor:
    return (data[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()


# codes


class _Group(NamedTuple):
    """How the codes of a group of components lie in frames.

    limit: larger ones, either way, are cut off to it in the first frame. low, radix: the least there, and how many
    values there are. rest: how many values what was cut off has, 1 for none; of each code at the limit, in frames of
    their own. shifts: how much nearer to 0 than the code is what it stands for, in hundredths of the step, for codes
    of 1, of 2 and larger, either way.
    """

    limit: int
    low: int
    radix: int
    rest: int
    shifts: list[int]


def _codes(y: Tensor, step: float) -> Tensor:
    q = y / step
    return (q.abs() + _ROUNDS_UP).floor().copysign(q).to(torch.int32)


def _shifts(y: Tensor, step: float, codes: Tensor) -> list[int]:
    above = codes.abs() - (y / step).abs()
    sizes = codes.abs().clamp(max=3).flatten()
    sums = torch.bincount(sizes, above.flatten(), minlength=4)
    means = sums[1:] / torch.bincount(sizes, minlength=4)[1:].clamp(min=1)
    hundredths: list[int] = (100 * means.clamp(*_SHIFTS)).round().int().tolist()
    return hundredths


def _frames(y: Tensor, step: float, shifted: bool = False) -> tuple[list[_Group], list[bytes]]:
    """The groups of components y [width, tokens], without their shifts or with them, and their frames."""
    groups, frames = [], []
    for part in y.split(_GROUP):
        codes = _codes(part, step)
        low, high, typical = 0, 0, 0.0
        if codes.numel():
            low, high = (int(each) for each in codes.aminmax())
            typical = float(codes.abs().sum()) / codes.numel()
        # few values, so that many codes fit in a byte, and how often each byte comes says much
        limit = next(limit for limit, below in _LIMITS if typical < below)
        rest = max(high, -low) - limit + 1
        least, most = max(low, -limit), min(high, limit)
        groups.append(
            _Group(limit, least, most - least + 1, max(rest, 1), _shifts(part, step, codes) if shifted else [])
        )
        frames += _packed(codes.clamp(least, most), least, most - least + 1)
        if rest > 1:
            cut_off = codes.abs()[codes.abs() >= limit] - limit
            frames += _packed(cut_off[None], 0, rest)
    return groups, frames


def _read_group(y: Tensor, frames: Iterator[memoryview], group: _Group) -> None:
    """Puts what a group's codes stand for, but for step and scale, into y [components, tokens]."""
    shifts = torch.tensor([0, *group.shifts]) / 100

    def decoded(codes: Tensor) -> Tensor:
        return codes.sign() * (codes.abs() - shifts[codes.abs().clamp(max=3)])

    codes = _unpacked(frames, group.low, group.radix, tuple(y.shape), decoded if group.rest == 1 else None)
    if group.rest == 1:
        y.copy_(codes)
        return
    at_limit = codes.abs() == group.limit
    more = _unpacked(frames, 0, group.rest, (1, int(at_limit.sum())))
    codes[at_limit] += codes[at_limit].sign() * more[0]
    y.copy_(decoded(codes))


def _in_a_byte(radix: int) -> int:
    """How many codes of `radix` values fit in a byte."""
    fit = 1
    while radix ** (fit + 1) <= 256:
        fit += 1
    return fit


def _bytes_of_one(radix: int) -> int:
    """How many bytes, one after another, a code of more than 256 values takes."""
    return math.ceil(math.log2(radix) / 8)


def _packed(codes: Tensor, low: int, radix: int) -> list[bytes]:
    """The frames of codes [rows, tokens], from `low` on, of `radix` values."""
    if radix == 1:
        return []
    digits = codes - low
    if radix > 256:
        return [compress((digits >> 8 * at & 255).to(torch.uint8).cpu()) for at in range(_bytes_of_one(radix))]
    digits, fit = digits.to(torch.uint8), _in_a_byte(radix)
    digits = torch.nn.functional.pad(digits, (0, -digits.shape[1] % fit), value=min(-low, radix - 1))
    packed = digits[:, fit - 1 :: fit]
    for at in range(fit - 2, -1, -1):
        packed = packed * radix + digits[:, at::fit]
    return [compress(packed.cpu())]


def _unpacked(
    frames: Iterator[memoryview],
    low: int,
    radix: int,
    shape: tuple[int, ...],
    decoded: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The codes [rows, tokens], from the frames that come next; or what `decoded` makes of them."""
    rows, tokens = shape
    if radix <= 256:
        fit = 1 if radix == 1 else _in_a_byte(radix)
        # all codes of each byte
        table = torch.arange(256)[:, None] // radix ** torch.arange(fit) % radix + low
        table = table.int() if decoded is None else decoded(table)
        columns = -(-tokens // fit)
        data = torch.zeros(1, dtype=torch.int32).expand(rows * columns)
        data = data if radix == 1 else expand(next(frames), rows * columns).int()
        return table[data].view(rows, -1)[:, :tokens]
    codes = torch.full((rows * tokens,), low, dtype=torch.int32)
    for at in range(_bytes_of_one(radix)):
        codes += expand(next(frames), len(codes)).int() << 8 * at
    codes = codes.view(rows, tokens)
    return codes if decoded is None else decoded(codes)


def _step(y: Tensor, room: float) -> float:
    """Nearly the least step with which the frames of y [width, tokens] take no more than `room` bytes."""
    if not bool(y.any()):
        return 1.0
    # what may be said of it and of the groups
    room -= _OF_STEP + _OF_GROUP * -(-len(y) // _GROUP)
    step, count = _expected_step(y, 8 * room / y.numel()), y.shape[1]
    if count > 2 * _TOKENS:
        # most of the search looks at some tokens only
        some = y[:, :: -(-count // _TOKENS)].contiguous()
        if bool(some.any()):
            step = _search(some, room * some.shape[1] / count, step)
    return _search(y, room, step)


def _expected_step(y: Tensor, bits: float) -> float:
    """The step with which normally distributed components like these would take so many bits a number, nearly."""
    spreads = torch.linalg.vector_norm(y, dim=1, dtype=torch.float64) / math.sqrt(y.shape[1])
    low, high = (math.log2(float(spreads.max())) + away for away in (-40.0, 40.0))
    for _ in range(24):
        at = (low + high) / 2
        # codes of a spread of r steps have log2(4.13 r) bits where r is large, and next to none where it is small
        found = float((1 + (4.13 * spreads / 2**at) ** 3).log2().mean()) / 3
        low, high = (at, high) if found > bits else (low, at)
    return float(2**high)


def _search(y: Tensor, room: float, step: float) -> float:
    """False position in the step's logarithm, from this step on, with which sizes fall."""
    # half of what is allowed below the target
    target, per_octave = (1 + _CLOSE) / 2 * room, 0.8 * y.numel() / 8
    # the last step that was too small, and the last one that was not, with their sizes
    small: tuple[float, int] | None = None
    fits: tuple[float, int] | None = None
    finest = math.log2(float(y.abs().amax())) - _FINEST
    at = max(math.log2(step), finest)
    for attempt in range(_ATTEMPTS):
        size = sum(map(len, _frames(y, 2**at)[1]))
        if size <= room or not size:
            fits = at, size
            if size >= _CLOSE * room or at == finest:
                break
        else:
            small = at, size
        if small is not None and fits is not None:
            share = (small[1] - target) / (small[1] - fits[1])
            # the middle, now and then: a bracket always shrinks
            at = small[0] + (fits[0] - small[0]) * (0.5 if attempt % 4 == 3 else min(max(share, 0.05), 0.95))
        else:
            # those on one side of the target may be far from it
            at = max(at + (size - target) / per_octave * (1.0 + 0.5 * attempt), finest)
    while fits is None:
        at = max(at, small[0] if small is not None else at) + 1.0
        size = sum(map(len, _frames(y, 2**at)[1]))
        if size <= room or not size:
            fits = at, size
    return float(2 ** fits[0])
