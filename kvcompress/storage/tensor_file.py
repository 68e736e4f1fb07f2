"""Tensors and facts in one safetensors file: written one tensor at a time, and every byte of it checked when read.

The facts are JSON in the file's metadata, with the sha256 of each tensor; the file's `digest` is the sha256 of its
header, and so identifies the whole content. Any reader of safetensors can read the tensors; those that were encoded
(kvcompress/storage/frames.py) are bytes to it, and the metadata says what they stand for. Files without a digest, as
safetensors itself writes them, are read unchecked.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from kvcompress.storage import frames
from kvcompress.storage.frames import Encode

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLANK = "0" * 64
# tensors begin at multiples of this, so that other readers can map them into memory
_ALIGNMENT = 8

Parts = Callable[[], Iterator[tuple[dict[str, Tensor], dict[str, Any]]]]
# the tensor of a payload, its dtype and its shape; ValueError if it holds none
Decode = Callable[[memoryview, torch.dtype, list[int]], Tensor]


def told(facts: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Facts as a file holds them; ValueError if JSON cannot: `what` is what they tell, for the message."""
    try:
        held: dict[str, Any] = json.loads(json.dumps(dict(facts)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"a file cannot hold the facts of {what}: {error}") from error
    return held


class DamagedFileError(ValueError):
    """A file no longer holds what was written to it."""


def write_tensors(
    file: BinaryIO, format: str, facts: dict[str, Any], parts: Parts, encode: Encode | None = None
) -> str:
    """Writes a file, and returns its digest, 64 hexadecimal digits.

    Args:
        format: the name of the file's format.
        facts: facts that JSON can hold.
        parts: gives tensors by name, with their facts, part by part; one part is held at a time. It is called twice,
            and must give the same both times.
        encode: what to write of a tensor, asked once for each, with its name; None: all are written as they are.
    """
    header = _Header(format, facts, [])
    for tensors, own in parts():
        header.parts.append(own)
        for name, tensor in tensors.items():
            header.add(name, tensor, None)
            if encode is not None:
                # room for what may be said of it; its place takes no more, as the one digit that a number of bytes may
                # have more than a number of elements is saved by the dtype
                header.encoded[name] = _told(max(frames.CODECS, key=len), tensor)
    start = 8 + len(header.text(_BLANK))
    file.seek(start)
    written = header if encode is None else _Header(format, facts, header.parts)
    for tensors, _ in parts():
        for name, tensor in tensors.items():
            encoded = None if encode is None else encode(name, tensor)
            if encoded is not None and len(encoded.payload) >= tensor.nbytes:
                encoded = None
            if encode is not None:
                written.add(name, tensor, encoded)
            data = _bytes_of(tensor) if encoded is None else memoryview(encoded.payload)
            written.sums[name] = _write(file, data)
            stop = written.places[name]["data_offsets"][1]
            if f"gap.{stop}" in written.sums:
                written.sums[f"gap.{stop}"] = _write(file, memoryview(bytes(-stop % _ALIGNMENT)))
    if file.tell() != start + written.stop or len(written.text(_BLANK, start - 8)) != start - 8:
        raise RuntimeError(f"the tensors of a file took {file.tell() - start} bytes, but had announced {written.stop}")
    digest = hashlib.sha256(written.text(_BLANK, start - 8)).hexdigest()
    text = written.text(digest, start - 8)
    file.seek(0)
    file.write(len(text).to_bytes(8, "little") + text)
    return digest


class _Header:
    """What a file says of its tensors.

    places: for each tensor, as safetensors has it. sums: of their bytes. encoded: what those stand for that are
    encoded. stop: where the last one ends.
    """

    def __init__(self, format: str, facts: dict[str, Any], parts: list[dict[str, Any]]) -> None:
        self.format, self.facts, self.parts = format, facts, parts
        self.places: dict[str, Any] = {}
        self.sums: dict[str, str] = {}
        self.encoded: dict[str, Any] = {}
        self.stop = 0

    def add(self, name: str, tensor: Tensor, encoded: frames.EncodedTensor | None) -> None:
        if encoded is None:
            self._place(name, _NAMES[tensor.dtype], list(tensor.shape), tensor.numel() * tensor.element_size())
        else:
            self._place(name, "U8", [len(encoded.payload)], len(encoded.payload))
            self.encoded[name] = _told(encoded.codec, tensor)
        if self.stop % _ALIGNMENT:
            # the format allows no gaps
            self._place(f"gap.{self.stop}", "U8", [-self.stop % _ALIGNMENT], -self.stop % _ALIGNMENT)

    def _place(self, name: str, dtype: str, shape: list[int], size: int) -> None:
        start, self.stop = self.stop, self.stop + size
        self.places[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, self.stop]}
        self.sums[name] = _BLANK

    def text(self, digest: str, size: int = 0) -> bytes:
        """The header, with spaces behind it up to so many bytes."""
        told = {"facts": json.dumps(self.facts | {"parts": self.parts}), "sums": json.dumps(self.sums)}
        told |= {"encoded": json.dumps(self.encoded)} if self.encoded else {}
        metadata = {"format": self.format, "digest": digest, **told}
        text = json.dumps({"__metadata__": metadata, **self.places}).encode()
        return text.ljust(size) + b" " * (-max(size, len(text)) % _ALIGNMENT)


def _told(codec: str, tensor: Tensor) -> list[Any]:
    return [codec, _NAMES[tensor.dtype], list(tensor.shape)]


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write(file: BinaryIO, data: memoryview) -> str:
    file.write(data)
    return hashlib.sha256(data).hexdigest()


class TensorFile:
    """A file open for reading. `metadata`: texts by name. `names`: of the tensors. `digest`: None if it has none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Raises:
            DamagedFileError: the file is not a safetensors file, or not as it was written.
            FileNotFoundError: there is none.
        """
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
        except FileNotFoundError as error:
            where = "" if self.path.is_absolute() else f" below {Path.cwd()}"
            raise FileNotFoundError(
                error.errno, f"No such file{where}, where one that save() wrote should be", str(path)
            ) from None
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        text = self._file.read(length) if length <= size - 8 else b""
        try:
            header = json.loads(text)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._places: dict[str, Any] = header
            stop = max((place["data_offsets"][1] for place in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.damaged("its header cannot be read") from error
        self._start = 8 + length
        if self._start + stop != size:
            raise self.damaged(f"it should have {self._start + stop} bytes, but has {size}")
        self.digest = self.metadata.get("digest")
        self._sums: dict[str, str] = {}
        if self.digest is not None:
            blank = text.replace(self.digest.encode(), _BLANK.encode(), 1)
            if hashlib.sha256(blank).hexdigest() != self.digest:
                raise self.damaged("its header does not match its digest")
            self._sums = json.loads(self.metadata["sums"])
        self._encoded: dict[str, Any] = json.loads(self.metadata.get("encoded", "{}"))

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def nbytes(self, prefix: str = "") -> int:
        """Bytes of all tensors whose names begin so, decoded."""
        total = 0
        for name, place in self._places.items():
            if name.startswith(prefix):
                _, dtype, shape = self._encoded.get(name, [None, place["dtype"], place["shape"]])
                total += math.prod(shape) * _DTYPES[dtype].itemsize
        return total

    def codec(self, name: str) -> str | None:
        """How a tensor was encoded; None if it was not."""
        return self._encoded[name][0] if name in self._encoded else None

    def tensor(self, name: str, decode: Decode | None = None) -> Tensor:
        """A tensor, in its own memory on the CPU; where `decode` puts it, if it was encoded otherwise than without
        loss.

        Args:
            decode: decodes what takes more than the file to decode.

        Raises:
            DamagedFileError: it is not as it was written.
            ImportError: it was encoded, and zstandard is not installed.
        """
        held = self._bytes(name)
        if name not in self._encoded:
            place = self._places[name]
            return held.view(_DTYPES[place["dtype"]]).reshape(place["shape"])
        codec, dtype, shape = self._encoded[name]
        chosen = frames.decode if codec == frames.LOSSLESS else decode
        if chosen is None:
            raise ValueError(f"{self.path} holds {name} encoded by {codec!r}, which this release cannot decode alone")
        try:
            return chosen(held.numpy().data, _DTYPES[dtype], shape)
        except (ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
            raise self.damaged(f"{name} cannot be decoded: {error}") from error

    def _bytes(self, name: str) -> Tensor:
        """What the file holds of a tensor, [bytes] uint8, checked."""
        place = self._places[name]
        start, stop = place["data_offsets"]
        held = torch.empty(stop - start, dtype=torch.uint8)
        data = held.numpy().data
        self._file.seek(self._start + start)
        if self._file.readinto(data) != stop - start:
            raise self.damaged(f"it ends within {name}")
        if self.digest is not None and hashlib.sha256(data).hexdigest() != self._sums[name]:
            raise self.damaged(f"{name} does not match its checksum")
        return held

    def check_format(self, format: str, what: str, maker: str) -> None:
        """Raises ValueError unless it is a whole file of this format: `what`, as "a basis", which `maker` makes."""
        given = self.metadata.get("format")
        if given != format:
            raise ValueError(f"{self.path} is not {what} (format {format!r}), got format {given!r}; {maker} makes one")
        if self.digest is None:
            raise self.damaged("it has no digest")

    def damaged(self, how: str) -> DamagedFileError:
        return DamagedFileError(f"{self.path} is not a safetensors file or is damaged ({how}); write it again")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
