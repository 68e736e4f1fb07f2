"""Tensors and facts in one safetensors file: written one tensor at a time, and every byte of it checked when read.

The facts are JSON in the file's metadata, with the sha256 of each tensor; the file's `digest` is the sha256 of its
header, and so identifies the whole content. Any reader of safetensors can read the tensors. Files without a digest, as
safetensors itself writes them, are read unchecked.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

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


class DamagedFileError(ValueError):
    """A file no longer holds what was written to it."""


def write_tensors(file: BinaryIO, format: str, facts: dict[str, Any], parts: Parts) -> str:
    """Writes a file, and returns its digest, 64 hexadecimal digits.

    Args:
        format: the name of the file's format.
        facts: facts that JSON can hold.
        parts: gives tensors by name, with their facts, part by part; one part is held at a time. It is called twice,
            and must give the same both times.
    """
    header: dict[str, Any] = {}
    sums: dict[str, str] = {}
    of_parts: list[dict[str, Any]] = []
    at = 0
    for tensors, own in parts():
        of_parts.append(own)
        for name, tensor in tensors.items():
            stop = at + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, stop]}
            sums[name], at = _BLANK, stop
            if at % _ALIGNMENT:
                # the format allows no gaps
                stop = at + -at % _ALIGNMENT
                header[f"gap.{at}"] = {"dtype": "U8", "shape": [stop - at], "data_offsets": [at, stop]}
                sums[f"gap.{at}"], at = _BLANK, stop

    def head(digest: str) -> bytes:
        told = {"facts": json.dumps(facts | {"parts": of_parts}), "sums": json.dumps(sums)}
        text = json.dumps({"__metadata__": {"format": format, "digest": digest, **told}, **header}).encode()
        return text + b" " * (-len(text) % _ALIGNMENT)

    start = 8 + len(head(_BLANK))
    file.seek(start)
    for tensors, _ in parts():
        for name, tensor in tensors.items():
            stop = header[name]["data_offsets"][1]
            sums[name] = _write(file, _bytes_of(tensor))
            if f"gap.{stop}" in sums:
                sums[f"gap.{stop}"] = _write(file, memoryview(bytes(-stop % _ALIGNMENT)))
    if file.tell() != start + at:
        raise RuntimeError(f"the tensors of a file took {file.tell() - start} bytes, but had announced {at}")
    digest = hashlib.sha256(head(_BLANK)).hexdigest()
    text = head(digest)
    file.seek(0)
    file.write(len(text).to_bytes(8, "little") + text)
    return digest


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
        """
        self.path = Path(path)
        self._file = self.path.open("rb")
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

    @property
    def names(self) -> list[str]:
        return list(self._places)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return max((place["data_offsets"][1] for place in self._places.values()), default=0)

    def tensor(self, name: str) -> Tensor:
        """A tensor, in its own memory on the CPU.

        Raises:
            DamagedFileError: it is not as it was written.
        """
        place = self._places[name]
        start, stop = place["data_offsets"]
        held = torch.empty(stop - start, dtype=torch.uint8)
        data = held.numpy().data
        self._file.seek(self._start + start)
        if self._file.readinto(data) != stop - start:
            raise self.damaged(f"it ends within {name}")
        if self.digest is not None and hashlib.sha256(data).hexdigest() != self._sums[name]:
            raise self.damaged(f"{name} does not match its checksum")
        return held.view(_DTYPES[place["dtype"]]).reshape(place["shape"])

    def damaged(self, how: str) -> DamagedFileError:
        return DamagedFileError(f"{self.path} is not a safetensors file or is damaged ({how}); write it again")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
