"""Prefixes kept from call to call, found by their tokens: a service runs each document through the model once."""

import operator
import os
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self, SupportsIndex

import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.cache import warn_of_unchecked
from kvcompress.caches.basis import Basis
from kvcompress.caches.transform_codec import Codec, encoder_of
from kvcompress.memory import read_bytes
from kvcompress.policies.settings import names_settings
from kvcompress.prefix.cache import MIN_TOKENS, HydragenCache
from kvcompress.prefix.store_folder import FILE, FIRST_FILE, INDEX, LOCK, STEM, FolderIndex, tokens_of, write_prefix
from kvcompress.prefix.tree import UNKNOWN, leading
from kvcompress.storage.durable import PARTIAL
from kvcompress.storage.tensor_file import DamagedFileError, TensorFile

# how often a folder is read again because another process changed it meanwhile
_READINGS = 20


@dataclass(eq=False)
class _Entry:
    """tokens: [tokens] int64 on the CPU. key: their bytes. storages: bytes by storage. file: its latest name."""

    tokens: Tensor
    key: bytes
    cache: HydragenCache
    storages: dict[tuple[str, int], int]
    file: str | None = None


class PrefixStore:
    """Prefixes of one model by their tokens, the most recently used last. Threads may share one.

        store = PrefixStore(model, max_bytes=8 << 30)
        cache = store.prefix(document_ids)                      # [tokens]: runs only what no stored prefix begins with
        model.generate(prompts, cache=cache)                    # prompts that begin with the document

        cache = store.prefix(prompts, attention_mask)           # [batch, tokens]: what these prompts begin with
        model.generate(prompts, attention_mask=attention_mask, cache=cache)

    A stored prefix can be used for every shorter one, as keys and values do not depend on later tokens. Caches that the
    store returns share its tensors, so what is stored twice or in use costs nothing more. Sizes are of live storages.

    For a document [tokens], the returned cache holds all of it, for prompts that are longer, or continue by `push` or
    `cover`. Prompts [batch, tokens] are those that `generate` will be called with: at least one token of each row is
    left to run, even if the whole prompt is stored.
    """

    @names_settings
    def __init__(
        self, model: PreTrainedModel, max_bytes: int | str | None = None, *, min_tokens: int = MIN_TOKENS
    ) -> None:
        """
        Args:
            max_bytes: how many bytes all prefixes may take, as a number or as "8GiB"; the least recently used are
                dropped first. None: no limit.
            min_tokens: shorter matches do not count.

        Raises:
            TypeError: the model is none that was loaded, a setting that there is not, or max_bytes is no size.
            ValueError: max_bytes or min_tokens is less than 1, or a size is not written as "8GiB".
        """
        config = hf.text_config(model)
        if hf.latent_rank(config) is not None:
            raise ValueError(
                f"{type(model).__name__} has multi-head latent attention, whose latents a PrefixStore does not share; "
                "DenseCache.save and DenseCache.load keep a document's"
            )
        if hf.is_multimodal(model):
            raise ValueError(
                f"{type(model).__name__} is multimodal: a PrefixStore finds documents by their tokens, among which "
                "images are not; give it the language model"
            )
        max_bytes = None if max_bytes is None else read_bytes("max_bytes", max_bytes)
        if min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1, got {min_tokens}")
        self.model = model
        self._model = weakref.ref(model)
        self.max_bytes = max_bytes
        self.min_tokens = operator.index(min_tokens)
        self._entries: dict[bytes, _Entry] = {}
        # entries by storage, and the bytes of all storages
        self._holders: dict[tuple[str, int], int] = {}
        self._nbytes = 0
        # by folder, the files that this store has written to it or loaded from it
        self._files: dict[Path, set[str]] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a PrefixStore cannot be pickled: call store.save(folder), and PrefixStore.load(folder, model)")

    def nbytes(self) -> int:
        """Bytes of all prefixes, each storage once."""
        return self._nbytes

    def prefix(self, input_ids: Tensor | Sequence[int], attention_mask: Tensor | None = None) -> HydragenCache:
        """A cache of these tokens: as many as possible come from the store, the others are run now and stored.

        Args:
            input_ids: a document [tokens], all of which the cache then holds; or prompts [batch, tokens], padded on the
                left, whose common beginning it holds. If that is shorter than `min_tokens`, the store is not changed,
                and the cache is HydragenCache(model, prompts), which shares what some of them have in common.
            attention_mask: of prompts, [batch, tokens], 0 for padding; None: no padding.

        Raises:
            ValueError: there are no tokens, or padding is not on the left.
        """
        ids, prompts = self._read(input_ids, attention_mask)
        if prompts is not None and len(prompts) > 1 and len(ids) < self.min_tokens:
            return HydragenCache(self.model, prompts, attention_mask, min_tokens=self.min_tokens)
        cache = self._longest(ids)
        held = 0 if cache is None else int(cache.get_seq_length())
        on_device = ids.to(hf.input_device(self.model))
        if cache is None:
            cache = HydragenCache.from_prefix(self.model, on_device)
        elif held < len(ids):
            cache.push(on_device[None, held:])
        if held < len(ids) and (self.max_bytes is None or _bytes(cache) <= self.max_bytes):
            self.put(ids, cache)
        return _leave_a_token(cache, prompts)

    def get(self, input_ids: Tensor | Sequence[int], attention_mask: Tensor | None = None) -> HydragenCache | None:
        """A cache of the longest stored beginning of these tokens, None if there is none.

        Args:
            input_ids: a document [tokens], or prompts [batch, tokens] padded on the left, which begin with one.
            attention_mask: of prompts, [batch, tokens], 0 for padding; None: no padding.

        Raises:
            ValueError: there are no tokens, or padding is not on the left.
        """
        ids, prompts = self._read(input_ids, attention_mask)
        cache = self._longest(ids)
        return None if cache is None else _leave_a_token(cache, prompts)

    def put(self, input_ids: Tensor | Sequence[int], cache: HydragenCache) -> None:
        """Stores what a cache holds of these tokens; the cache can still be used.

        Args:
            input_ids: [tokens] or [1, tokens], the tokens on the cache's single path.

        Raises:
            ValueError: the cache is for another model, holds several paths, other tokens or another number of them, or
                is larger than `max_bytes`.
        """
        self._put(self._document(input_ids), cache)

    def _put(self, ids: Tensor, cache: HydragenCache, file: str | None = None) -> None:
        model = cache._model()
        if model is not self.model:
            if model is None:
                raise ValueError("the cache's model has been deleted, so it is unknown whether it was the store's")
            hf.Fingerprint.of(self.model).check(hf.Fingerprint.of(model), "the prefix store")
        kept = cache.fork() if any(cache.own_lengths()) else cache.clone()
        if len(set(kept.tree.leaves)) != 1 or kept.tree.lengths()[0] != len(ids):
            raise ValueError(
                f"put takes a cache with one path of {len(ids)} tokens, got paths of {sorted(set(kept.tree.lengths()))}"
            )
        known = kept.known_ids()
        wrong = ((known != UNKNOWN) & (known != ids)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"the cache was not filled with these tokens: at {at} it saw {int(known[at])}, and input_ids say "
                f"{int(ids[at])}"
            )
        kept.gather_rows()
        kept.tell_ids(ids)
        kept._model = self._model
        size = _bytes(kept)
        if self.max_bytes is not None and size > self.max_bytes:
            raise ValueError(f"the prefix takes {size} bytes, more than the store's max_bytes = {self.max_bytes}")
        key = ids.numpy().tobytes()
        with self._lock:
            # prefixes that are a beginning of the new one are dropped, if it can be cut there
            for entry in [entry for entry in self._entries.values() if key.startswith(entry.key)]:
                if kept.cut_length(len(entry.tokens)) == len(entry.tokens):
                    self._let_go(entry)
            self._take_in(_Entry(ids, key, kept, _storages(kept), file))
            while self.max_bytes is not None and self._nbytes > self.max_bytes:
                self._let_go(next(iter(self._entries.values())))

    def _take_in(self, entry: _Entry) -> None:
        self._entries[entry.key] = entry
        for storage, size in entry.storages.items():
            holders = self._holders.get(storage, 0)
            self._holders[storage] = holders + 1
            self._nbytes += 0 if holders else size

    def _let_go(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        for storage, size in entry.storages.items():
            self._holders[storage] -= 1
            if not self._holders[storage]:
                del self._holders[storage]
                self._nbytes -= size

    def _longest(self, ids: Tensor) -> HydragenCache | None:
        """A cache of the longest stored beginning of a sequence [tokens]; None if there is none long enough."""
        with self._lock:
            matches = [(_common(entry.tokens, ids), entry) for entry in self._entries.values()]
            best, longest = None, 0
            for matched, entry in sorted(matches, key=lambda match: match[0], reverse=True):
                if matched <= longest:
                    break
                usable = entry.cache.cut_length(matched)
                if usable > longest:
                    best, longest = entry, usable
            if best is None or longest < min(self.min_tokens, len(ids)):
                return None
            self._entries[best.key] = self._entries.pop(best.key)
            cache = best.cache.clone()
        cache.cut(longest)
        return cache

    # files

    def save(self, folder: str | os.PathLike[str], *, codec: Codec | None = None) -> None:
        """Updates a folder to what the store holds; creates it if it is missing.

        Prefixes that this store once saved there, or loaded from there, and no longer holds are deleted; what others
        have saved there stays. A prefix that is already there is not written again. A reader, also after a crash, finds
        the folder either as it was before or as it is afterwards.

        Args:
            codec: of the prefixes that are written now, as `cache.save` takes it; a folder may hold those of several.
                What was loaded from a lossy file loses next to nothing more.

        Raises:
            ValueError: the folder holds prefixes of another model, or some of an earlier kvcompress that this store
                has not loaded; or the codec is not for this model.
            OSError: the folder cannot be written; what was saved there is still there.
            ImportError: the codec needs zstandard.
        """
        # what is no codec, or not for this model, is refused before the folder is touched
        if codec is not None:
            encoder_of(HydragenCache(self.model), self.model, codec)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        fingerprint = hf.Fingerprint.of(self.model)
        with self._lock:
            entries = list(self._entries.values())
            known = self._files.setdefault(folder.resolve(), set())
        # no other process writes here until this is released, by the end of the process at the latest
        with FileLock(folder / LOCK):
            index = FolderIndex.read(folder)
            if index is not None and index.fingerprint is not None:
                index.fingerprint.check(fingerprint, f"the prefix store in {folder}")
            others = [] if index is None else [name for name in index.files if name not in known]
            if any(FIRST_FILE.fullmatch(name) for name in others):
                raise ValueError(
                    f"{folder} holds prefixes saved by an earlier kvcompress, which this store has not loaded: save to "
                    "another folder, or start from PrefixStore.load(folder, model)"
                )
            for left in folder.glob(f"{STEM}-*{PARTIAL}"):
                left.unlink(missing_ok=True)
            mine = []
            for entry in entries:
                if entry.file is None or not FILE.fullmatch(entry.file) or not (folder / entry.file).exists():
                    entry.file = write_prefix(
                        folder, entry.tokens, entry.cache, fingerprint, encoder_of(entry.cache, self.model, codec)
                    )
                mine.append(entry.file)
            files = [name for name in others if name not in mine] + mine
            FolderIndex(files, self.min_tokens, fingerprint).write(folder)
            for path in folder.glob("*.safetensors"):
                if path.name not in files and (FILE.fullmatch(path.name) or FIRST_FILE.fullmatch(path.name)):
                    path.unlink(missing_ok=True)
        with self._lock:
            self._files[folder.resolve()] = set(mine)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        model: PreTrainedModel,
        max_bytes: int | None = None,
        *,
        basis: Basis | str | os.PathLike[str] | None = None,
    ) -> Self:
        """Loads the prefixes that `save` wrote, for the model that they were made with, on its device.

        If they exceed `max_bytes`, the most recently used ones are loaded. Damaged ones are skipped. A warning tells of
        either; the files stay in the folder.

        Args:
            max_bytes: as in `PrefixStore`; what counts is what prefixes take in memory.
            basis: in which prefixes were coded, or the path of its file. None: one that the model was given before.

        Raises:
            ValueError: the folder holds no store, one for another model, or its index names a file that is no prefix;
                or a prefix needs another basis.
            ImportError: a prefix was saved with a codec, and zstandard is not installed.
        """
        folder = Path(folder)
        if basis is not None:
            # what files name
            Basis.given(basis, model)
        fingerprint = hf.Fingerprint.of(model)
        # what was read, None for a damaged file
        read: dict[str, tuple[Tensor, HydragenCache] | None] = {}
        before: list[str] | None = None
        for _ in range(_READINGS):
            index = FolderIndex.read(folder)
            if index is None:
                raise ValueError(f"{folder} is not a saved PrefixStore: it has no {INDEX}")
            if index.fingerprint is not None:
                index.fingerprint.check(fingerprint, f"the prefix store in {folder}")
            store = cls(model, max_bytes, min_tokens=index.min_tokens)
            fits, gone = store._fill(folder, index, fingerprint, read)
            if not gone or index.files == before:
                break
            before = index.files
        assert index is not None
        if gone:
            warnings.warn(
                f"{len(gone)} of {len(index.files)} prefixes in {folder} are missing, such as {gone[0]}; they are left "
                "out",
                stacklevel=2,
            )
        if index.tokens is not None:
            warn_of_unchecked(folder)
        if not fits:
            warnings.warn(
                f"{len(store)} of {len(index.files)} prefixes in {folder} are loaded: more do not fit in max_bytes = "
                f"{max_bytes}",
                stacklevel=2,
            )
        return store

    def _fill(
        self,
        folder: Path,
        index: "FolderIndex",
        fingerprint: hf.Fingerprint,
        read: dict[str, tuple[Tensor, HydragenCache] | None],
    ) -> tuple[bool, list[str]]:
        """Loads what a folder holds, newest first, until the store is full; returns whether all fit, and missing files.

        Args:
            read: what was read of the folder so far, which this extends.
        """
        room = self.max_bytes
        taken: list[str] = []
        fits, gone = True, []
        for name in reversed(index.files):
            try:
                if name not in read:
                    with TensorFile(folder / name) as file:
                        if room is not None and file.nbytes("layers.") > room:
                            fits = False
                            continue
                        cache = HydragenCache._from_file(file, self.model, fingerprint)
                        read[name] = tokens_of(file, index), cache
            except FileNotFoundError:
                gone.append(name)
            except DamagedFileError as error:
                read[name] = None
                warnings.warn(f"a prefix is skipped: {error}", stacklevel=4)
            found = read.get(name)
            if found is None:
                continue
            size = _bytes(found[1])
            if room is not None and size > room:
                fits = False
                continue
            room = None if room is None else room - size
            taken.append(name)
        for name in reversed(taken):
            found = read[name]
            assert found is not None
            self._put(*found, name)
        self._files[folder.resolve()] = set(taken)
        return fits, gone

    # what is asked for

    def _read(self, input_ids: Tensor | Sequence[int], attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tokens to hold, [tokens] int64 on the CPU, and the prompts [batch, tokens] they are for, None if none."""
        ids = _as_ids(input_ids)
        if ids.dim() < 2 and attention_mask is None:
            return self._document(ids), None
        mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask)
        if ids.dim() != 2 or mask.shape != ids.shape:
            raise ValueError(
                "expected a document [tokens], or prompts and their attention_mask of one shape [batch, tokens]; got "
                f"{list(ids.shape)} and {list(mask.shape)}"
            )
        shown = mask.bool().cpu()
        if bool((shown[:, 1:] < shown[:, :-1]).any()):
            raise ValueError("expected prompts padded on the left; a row has padding after a token")
        rows = [row[visible] for row, visible in zip(ids.detach().cpu().long(), shown, strict=True)]
        if not rows or min(map(len, rows)) == 0:
            raise ValueError("a prefix needs at least one token, and so does each prompt")
        shared = rows[0]
        for row in rows[1:]:
            shared = shared[: leading(shared, row, torch.eq)]
        return shared.clone(), ids

    @staticmethod
    def _document(input_ids: Tensor | Sequence[int]) -> Tensor:
        """A document as [tokens] int64 on the CPU."""
        ids = _as_ids(input_ids)
        if ids.dim() > 1 and ids.numel() != ids.shape[-1]:
            raise ValueError(f"expected one document, [tokens] or [1, tokens], got {list(ids.shape)}")
        if ids.numel() == 0:
            raise ValueError("a prefix needs at least one token")
        if bool((ids < 0).any()):
            raise ValueError(f"expected token ids, which are integers of at least 0, got {int(ids.min())}")
        return ids.detach().reshape(-1).cpu().long().clone()


def _as_ids(input_ids: Tensor | Sequence[int]) -> Tensor:
    ids = torch.as_tensor(input_ids)
    # torch makes floats of an empty list
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise ValueError(f"expected token ids, which are integers of at least 0, got {ids.dtype}")
    return ids


def _leave_a_token(cache: HydragenCache, prompts: Tensor | None) -> HydragenCache:
    """A cache that reports fewer tokens as seen than prompts [batch, tokens] have columns, whatever it holds."""
    cache.for_prompts = prompts is not None
    if prompts is not None and cache.get_seq_length() >= prompts.shape[1]:
        # tokens that it holds but does not report are fed again, and dropped
        cache.padding.see(prompts.shape[1] - 1)
    return cache


def _common(ours: Tensor, theirs: Tensor) -> int:
    """`leading` for tokens on the CPU, fast enough to look through hundreds of documents."""
    size = min(len(ours), len(theirs))
    differs = ours.numpy()[:size] != theirs.numpy()[:size]
    first = int(differs.argmax())
    return first if differs[first] else size


def _storages(cache: HydragenCache) -> dict[tuple[str, int], int]:
    """The bytes of each storage behind a cache's segments, and behind what these are decoded with."""
    tensors = [
        tensor for layer in cache.layers for segment in layer.segments() for tensor in segment.tensors().values()
    ]
    tensors += [tensor for layer in cache.layers for shared in layer.constants().values() for tensor in shared]
    storages = [(tensor.device, tensor.untyped_storage()) for tensor in tensors]
    return {(str(device), storage.data_ptr()): storage.nbytes() for device, storage in storages if storage.nbytes()}


def _bytes(cache: HydragenCache) -> int:
    return sum(_storages(cache).values())
