"""Prefixes kept from call to call, found by their tokens: a service runs each document through the model once."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.hydragen import MIN_TOKENS, HydragenCache
from kvcompress.memory import storage_bytes
from kvcompress.tree import leading

_INDEX = "prefixes.json"


@dataclass(eq=False)
class _Entry:
    ids: Tensor
    cache: HydragenCache


class PrefixStore:
    """Prefixes of one model by their tokens, the most recently used last.

        store = PrefixStore(model, max_bytes=8 << 30)
        cache = store.prefix(document_ids)                      # runs only what no stored prefix begins with
        model.generate(prompts, cache=cache)                    # prompts that begin with the document

    A stored prefix serves every shorter one, as keys and values depend on nothing that follows; caches given out share
    its tensors, so what is stored twice or in use costs nothing more. Sizes are of live storages.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: int | None = None, *, min_tokens: int = MIN_TOKENS) -> None:
        """
        Args:
            max_bytes: what all prefixes may take together; the least recently used ones go first. None: no limit.
            min_tokens: shorter matches count as none.
        """
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, or None for no limit, got {max_bytes}")
        self.model = model
        self.max_bytes = max_bytes
        self.min_tokens = min_tokens
        self._entries: list[_Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def nbytes(self) -> int:
        """Bytes of all prefixes, each storage once."""
        return _bytes([entry.cache for entry in self._entries])

    def prefix(self, input_ids: Tensor | Sequence[int]) -> HydragenCache:
        """A cache that holds these tokens: as many as possible from the store, the others run now and stored.

        Args:
            input_ids: [tokens] or [1, tokens].
        """
        ids = self._ids(input_ids)
        cache = self.get(ids)
        if cache is None:
            cache = HydragenCache.from_prefix(self.model, ids)
        elif cache.get_seq_length() < len(ids):
            cache.push(ids[None, cache.get_seq_length() :])
        else:
            return cache
        if self.max_bytes is None or _bytes([cache]) <= self.max_bytes:
            self.put(ids, cache)
        return cache

    def put(self, input_ids: Tensor | Sequence[int], cache: HydragenCache) -> None:
        """Stores what a cache holds of these tokens; the cache may be used on.

        Args:
            input_ids: [tokens] or [1, tokens], the tokens that the cache's one sequence passes through.

        Raises:
            ValueError: the cache holds several paths or another number of tokens, or is larger than the store.
        """
        ids = self._ids(input_ids)
        kept = cache.fork() if any(cache.own_lengths()) else cache.clone()
        if len(set(kept.tree.leaves)) != 1 or kept.tree.lengths()[0] != len(ids):
            raise ValueError(
                f"put takes a cache of one path of {len(ids)} tokens, got paths of {sorted(set(kept.tree.lengths()))}"
            )
        kept.gather_rows()
        size = _bytes([kept])
        if self.max_bytes is not None and size > self.max_bytes:
            raise ValueError(f"the prefix takes {size} bytes, more than the store's max_bytes = {self.max_bytes}")
        # what is a beginning of the new one is served by it
        self._entries = [entry for entry in self._entries if not self._covers(ids, kept, entry.ids)]
        self._entries.append(_Entry(ids, kept))
        while self.max_bytes is not None and self.nbytes() > self.max_bytes:
            del self._entries[0]

    def get(self, input_ids: Tensor | Sequence[int]) -> HydragenCache | None:
        """A cache of the longest beginning of these tokens that is stored, None where there is none.

        Args:
            input_ids: [tokens] or [1, tokens].
        """
        ids = self._ids(input_ids)
        best, longest = None, 0
        for entry in self._entries:
            usable = entry.cache.cut_length(leading(entry.ids, ids, torch.eq))
            if usable > longest:
                best, longest = entry, usable
        if best is None or longest < min(self.min_tokens, len(ids)):
            return None
        self._entries.remove(best)
        self._entries.append(best)
        cache = best.cache.clone()
        cache.cut(longest)
        return cache

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes every prefix to a safetensors file in a folder, which is made where it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"prefix-{index}.safetensors" for index in range(len(self._entries))]
        for name, entry in zip(names, self._entries, strict=True):
            entry.cache.save(folder / name)
        index = {name: entry.ids.tolist() for name, entry in zip(names, self._entries, strict=True)}
        partial = folder / f"{_INDEX}.partial"
        partial.write_text(json.dumps(index) + "\n")
        partial.replace(folder / _INDEX)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: PreTrainedModel, max_bytes: int | None = None) -> Self:
        """The prefixes that `save` wrote, for the model they were made with, on its device.

        Raises:
            ValueError: the folder holds none, or they are of another model.
        """
        index = Path(folder) / _INDEX
        if not index.exists():
            raise ValueError(f"{folder} is no saved PrefixStore: it has no {_INDEX}")
        store = cls(model, max_bytes)
        for name, ids in json.loads(index.read_text()).items():
            store.put(ids, HydragenCache.load(Path(folder) / name, model))
        return store

    def _ids(self, input_ids: Tensor | Sequence[int]) -> Tensor:
        ids = torch.as_tensor(input_ids).reshape(-1)
        if len(ids) == 0:
            raise ValueError("a prefix needs a token")
        return ids.to(hf.input_device(self.model))

    @staticmethod
    def _covers(ids: Tensor, cache: HydragenCache, other: Tensor) -> bool:
        return leading(ids, other, torch.eq) == len(other) == cache.cut_length(len(other))


def _bytes(caches: list[HydragenCache]) -> int:
    tensors = [
        tensor
        for cache in caches
        for layer in cache.layers
        for segment in layer.segments()
        for tensor in segment.tensors().values()
    ]
    return sum(storage_bytes({"prefixes": tensors})[0].values())
