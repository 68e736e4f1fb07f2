"""What a file holds of a tensor that was encoded: zstd frames behind a line of facts, decoded piece by piece.

    payload = bytes of the facts (8) | facts, JSON, with the size of each frame | frames | zeros up to a multiple of 8

Without loss, the first bytes of all numbers come first, then the second ones, and so on: of floats the bytes of sign
and exponent repeat, and those of the mantissa do not. Frames are coded at level 1, which codes single bytes by how
often they come; higher levels look for repeated runs, which numbers do not have, and make files larger.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# bytes whose number a file must keep down to are encoded at a time
_PIECE = 1 << 22
_ALIGNMENT = 8
# bytes that the header of a file says of a tensor that was encoded
_IN_HEADER = 64
LOSSLESS = "zstd"
# of keys and values through a basis: kvcompress/storage/transform_coding.py
TRANSFORM = "transform"
CODECS = (LOSSLESS, TRANSFORM)


@dataclass(frozen=True)
class EncodedTensor:
    """The bytes that stand for a tensor in a file, and by which codec they are read."""

    codec: str
    payload: bytes


# of a tensor with this name; None: it is written as it is
Encode = Callable[[str, Tensor], EncodedTensor | None]


def zstandard() -> ModuleType:
    """The library; ImportError, which says what to install, if it is not there."""
    try:
        import zstandard as library
    except ImportError as error:
        raise ImportError("files with a codec need zstandard: pip install 'kvcompress[codec]'") from error
    return library


def pack(facts: dict[str, Any], frames: list[bytes]) -> bytes:
    """A payload of facts that JSON can hold and of frames, which `compress` made."""
    text = json.dumps(facts | {"sizes": [len(frame) for frame in frames]}, separators=(",", ":")).encode()
    size = 8 + len(text) + sum(map(len, frames))
    return b"".join([len(text).to_bytes(8, "little"), text, *frames, bytes(-size % _ALIGNMENT)])


def unpack(payload: memoryview) -> tuple[dict[str, Any], list[memoryview]]:
    """The facts and the frames of a payload; ValueError if it is none."""
    start = 8 + int.from_bytes(payload[:8], "little")
    facts: dict[str, Any] = json.loads(bytes(payload[8:start]))
    frames = []
    for size in facts.pop("sizes"):
        frames.append(payload[start : start + size])
        start += size
    if start + -start % _ALIGNMENT != len(payload):
        raise ValueError(f"a payload of {start} bytes has {len(payload)}")
    return facts, frames


def compress(tensor: Tensor) -> bytes:
    """The bytes of a tensor of uint8 on the CPU as one frame."""
    frame: bytes = zstandard().ZstdCompressor(level=1).compress(tensor.contiguous().numpy().data)
    return frame


def expand(frame: memoryview, size: int) -> Tensor:
    """The bytes [size] uint8 of a frame; ValueError if it holds another number."""
    library = zstandard()
    try:
        # a frame says how many bytes it holds, and no more are made
        held = library.frame_content_size(frame)
        if held != size:
            raise ValueError(f"a frame of {size} bytes says that it holds {held}")
        data = library.ZstdDecompressor().decompress(frame)
    except library.ZstdError as error:
        raise ValueError(f"a frame cannot be read: {error}") from error
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def encode(name: str, tensor: Tensor) -> EncodedTensor | None:
    """A tensor without loss; None where that hardly takes fewer bytes."""
    flat, width = tensor.detach().contiguous().reshape(-1), tensor.element_size()
    frames = []
    for piece in flat.split(_PIECE // width):
        columns = piece.cpu().view(torch.uint8).view(-1, width)
        frames += [compress(columns[:, at]) for at in range(width)]
    payload = pack({}, frames)
    return EncodedTensor(LOSSLESS, payload) if len(payload) + _IN_HEADER < tensor.nbytes else None


def decode(payload: memoryview, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """The tensor that `encode` was given; ValueError if the payload does not hold one."""
    tensor = torch.empty(shape, dtype=dtype)
    width = tensor.element_size()
    pieces = tensor.view(-1).split(_PIECE // width)
    _, frames = unpack(payload)
    if len(frames) != len(pieces) * width:
        raise ValueError(f"expected {len(pieces) * width} frames, got {len(frames)}")
    for index, piece in enumerate(pieces):
        columns = piece.view(torch.uint8).view(-1, width)
        for at in range(width):
            columns[:, at] = expand(frames[index * width + at], len(columns))
    return tensor
