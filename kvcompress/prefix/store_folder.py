"""A folder of saved prefixes: a file for each, named after what it holds, and an index file, written last."""

import dataclasses
import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from kvcompress import hf
from kvcompress.caches.transform_codec import Encoder
from kvcompress.prefix.cache import MIN_TOKENS, HydragenCache
from kvcompress.storage.durable import write_whole
from kvcompress.storage.tensor_file import TensorFile

INDEX = "prefixes.json"
_FORMAT = "kvcompress-prefixes-2"
LOCK = "prefixes.lock"
STEM = "prefix"
# file names: the digest of everything the prefix holds, with its tokens; and the names of the earlier format
FILE = re.compile(r"[0-9a-f]{64}\.safetensors")
FIRST_FILE = re.compile(r"prefix-[0-9]+\.safetensors")


@dataclass(frozen=True)
class FolderIndex:
    """The index of a folder: one small file, written last.

    files: the least recently used first. fingerprint: None if the folder has none. tokens: those of each file, if the
    index has them and not the files.
    """

    files: list[str]
    min_tokens: int
    fingerprint: hf.Fingerprint | None
    tokens: dict[str, list[int]] | None = None

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The index of a folder; None if there is none.

        Raises:
            ValueError: it names something other than prefixes in this folder.
        """
        try:
            text = (folder / INDEX).read_bytes()
        except FileNotFoundError:
            return None
        try:
            told: Any = json.loads(text)
            if isinstance(told, dict) and "format" not in told and "sum" not in told:
                index = cls(list(told), MIN_TOKENS, None, told)
            else:
                if told["format"] != _FORMAT or told["sum"] != _sum(told):
                    raise ValueError
                index = cls(told["files"], told["min_tokens"], hf.Fingerprint(**told["fingerprint"]))
        except (ValueError, KeyError, TypeError):
            # each file says by itself what it holds
            files = sorted(folder.glob("*.safetensors"), key=lambda path: (path.stat().st_mtime_ns, path.name))
            warnings.warn(f"{folder / INDEX} is damaged; prefixes are taken from the files next to it", stacklevel=3)
            return cls([path.name for path in files if FILE.fullmatch(path.name)], MIN_TOKENS, None)
        known = FILE if index.tokens is None else FIRST_FILE
        for name in index.files:
            if not known.fullmatch(name):
                raise ValueError(f"{folder / INDEX} names {name!r}, which no PrefixStore wrote; nothing is loaded")
        return index

    def write(self, folder: Path) -> None:
        assert self.fingerprint is not None
        told: dict[str, Any] = {
            "format": _FORMAT,
            "fingerprint": dataclasses.asdict(self.fingerprint),
            "min_tokens": self.min_tokens,
            "files": self.files,
        }

        def write(file: BinaryIO) -> str:
            file.write(json.dumps(told | {"sum": _sum(told)}, sort_keys=True).encode() + b"\n")
            return INDEX

        write_whole(folder, STEM, write)


def _sum(told: dict[str, Any]) -> str:
    facts = {name: value for name, value in told.items() if name != "sum"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_prefix(
    folder: Path, tokens: Tensor, cache: HydragenCache, fingerprint: hf.Fingerprint, encoder: Encoder | None
) -> str:
    """Writes a prefix to a folder, and returns the file's name."""

    def write(file: BinaryIO) -> str:
        return cache._to_file(file, fingerprint, {"tokens": tokens}, encoder) + ".safetensors"

    return write_whole(folder, STEM, write).name


def tokens_of(file: TensorFile, index: FolderIndex) -> Tensor:
    """The tokens [tokens] of a prefix's file."""
    if index.tokens is not None:
        return torch.tensor(index.tokens[file.path.name])
    if file.digest != file.path.stem:
        raise file.damaged("its name does not match its content")
    return file.tensor("tokens")
