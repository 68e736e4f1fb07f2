"""Values that live off the device: pages in pinned memory, or in a memory-mapped file.

A page holds the values of one chunk in all KV heads, [kv_heads, chunk, head_dim]. It is written once and never changes,
so that beams, repeated rows and clones share pages: each has only its own table of page numbers. Pages are in slabs; a
page number is `slab * 2**32 + index within the slab` (kernels/pages.py). The pages of a slab that are not written yet
belong to one owner: a clone takes them over if the original is gone; a forked process never does, as it shares the
file with its parent.
"""

import os
import tempfile
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from kvcompress.kernels.common.runtime import runs_triton
from kvcompress.kernels.pages import SLAB, collect_pages

# room in a table of addresses, and how much is added when it runs out
ADDRESSES = 64
# slabs grow by this share of what is written: few slabs, little room to spare
_SPARE = 8
# how many bytes of pages are moved at a time, and of zeros written to reserve a file if the system cannot reserve it
_PIECE = 2**24


class OffloadedPages:
    """Pages of values off the device.

    slabs: each [pages, kv_heads, chunk, head_dim]. addresses: of the slabs' memory, int64 on the device.
    """

    def __init__(self, host: str, page: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            host: "pinned" or "mmap:/a/folder".
            page: kv_heads, chunk, head_dim.
            device: where the values come from and go to.
        """
        self.host = host
        self.page = page
        self.dtype = dtype
        self.device = device
        self.slabs: list[Tensor] = []
        self.addresses = torch.zeros(ADDRESSES, dtype=torch.int64, device=device)
        self._room: _Room | None = None

    @property
    def tier(self) -> str:
        """Where the pages are: "host" or "disk"."""
        return "disk" if self.host.startswith("mmap:") else "host"

    def append(self, count: int, parts: Iterable[Tensor]) -> Tensor:
        """Copies values off the device, in parts [pages, kv_heads, chunk, head_dim]; returns page numbers, [count].

        Args:
            count: how many pages all parts have together.

        Raises:
            OSError: there is no room on the disk; nothing has changed.
        """
        room = self._own_room()
        left = 0 if room is None else len(self.slabs[-1]) - room.filled
        more = None
        if count > left:
            written = 0 if room is None else room.written
            more = self._slab(max(count - left, (written + count) // _SPARE))
        numbers = []
        for part in parts:
            while len(part):
                if room is None or room.filled == len(self.slabs[-1]):
                    assert more is not None
                    room = self._add(more, 0 if room is None else room.written)
                numbers.append(self._write(room, part))
                part = part[len(numbers[-1]) :]
        return torch.cat(numbers) if numbers else torch.empty(0, dtype=torch.int64, device=self.device)

    def slabs_for(self, values: Tensor) -> list[Tensor]:
        """The slabs for a kernel that fetches values; none where it finds them by their addresses alone."""
        return [] if values.is_cuda and self.tier == "host" and runs_triton(values) else self.slabs

    def keep(self, pages: Tensor, exactly: bool = False) -> Tensor:
        """Drops all pages but these, [any] int64; returns their new numbers.

        A page that several tables name is kept once. Slabs are shared with clones, which keep theirs.

        Args:
            exactly: close every gap between these, and leave what comes after the last one; if False, move pages only
                to free more than the usual spare room of slabs.

        Raises:
            OSError: there is no room on the disk to move them; nothing has changed.
        """
        used: Tensor
        places: Tensor
        used, places = pages.cpu().unique(return_inverse=True)
        spare = 0 if exactly else len(used) // _SPARE
        there = int(self._ends(used).sum()) if exactly else sum(map(len, self.slabs))
        if there <= len(used) + spare:
            return pages
        if not len(used):
            self.slabs, self._room = [], None
            return pages
        slab = self._slab(len(used))
        heads = torch.arange(self.page[0])
        step = max(1, _PIECE // max(1, self._page_bytes()))
        for start in range(0, len(used), step):
            piece = used[start : start + step, None].expand(-1, len(heads))
            slab[start : start + step] = collect_pages(piece, heads.expand_as(piece), self.slabs)
        self.slabs = []
        self._add(slab, len(used)).filled = len(used)
        return places.to(pages.device)

    def written(self, pages: Tensor) -> tuple[list[Tensor], Tensor]:
        """Views of the slabs up to the last of these pages, [any] int64, and the pages' indexes in all of them."""
        slab, index = pages.cpu() // SLAB, pages.cpu() % SLAB
        ends = self._ends(pages.cpu())
        starts = ends.cumsum(0) - ends
        parts = [part[:end] for part, end in zip(self.slabs, ends.tolist(), strict=True) if end]
        return parts, (starts[slab] + index).to(pages.device)

    def _ends(self, pages: Tensor) -> Tensor:
        """Where the last of these pages ends in each slab, [slabs] int64."""
        ends = torch.zeros(len(self.slabs), dtype=torch.int64)
        return ends.scatter_reduce(0, pages // SLAB, pages % SLAB + 1, "amax")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # pages never change, so copies share them
        copy = type(self)(self.host, self.page, self.dtype, self.device)
        copy.slabs = list(self.slabs)
        copy.addresses = self.addresses.clone()
        copy._room = self._room
        return copy

    def _own_room(self) -> "_Room | None":
        """The room in the last slab, if it belongs to these pages."""
        return self._room if self._room is not None and self._room.belongs_to(self) else None

    def _add(self, slab: Tensor, written: int) -> "_Room":
        self.slabs.append(slab)
        number = len(self.slabs) - 1
        if number == len(self.addresses):
            self.addresses = torch.cat([self.addresses, torch.zeros_like(self.addresses[:ADDRESSES])])
        self.addresses[number] = slab.data_ptr()
        self._room = _Room(self, written)
        return self._room

    def _write(self, room: "_Room", values: Tensor) -> Tensor:
        """Copies as many pages as the last slab has room for; returns their numbers."""
        slab, start = self.slabs[-1], room.filled
        count = min(len(slab) - start, len(values))
        slab[start : start + count].copy_(values[:count], non_blocking=True)
        room.filled += count
        room.written += count
        first = (len(self.slabs) - 1) * SLAB + start
        return torch.arange(first, first + count, device=self.device)

    def _page_bytes(self) -> int:
        return self.page[0] * self.page[1] * self.page[2] * self.dtype.itemsize

    def _slab(self, pages: int) -> Tensor:
        shape = (pages, *self.page)
        if self.tier == "host":
            return torch.empty(shape, dtype=self.dtype, pin_memory=self.device.type == "cuda")
        size = pages * self._page_bytes()
        folder = self.host.removeprefix("mmap:")
        handle, name = tempfile.mkstemp(dir=folder, prefix="kvcompress-", suffix=".values")
        try:
            _reserve(handle, size)
            elements = size // self.dtype.itemsize
            return torch.from_file(name, shared=True, size=elements, dtype=self.dtype).view(shape)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.host} has no room for {size} more bytes of values ({error.strerror}): make room there, or "
                "build the cache with another folder or host='pinned'",
                folder,
            ) from error
        finally:
            os.close(handle)
            # the mapping keeps the file's bytes until it is released, and no file is left behind
            Path(name).unlink()


class _Room:
    """The owner of those pages of a slab that are not written yet.

    filled: how many pages of the slab are written. written: how many pages the owner has written in all, with those of
    earlier owners whose room it took over.
    """

    def __init__(self, owner: OffloadedPages, written: int) -> None:
        self.filled, self.written = 0, written
        self._owner = weakref.ref(owner)
        self._process = os.getpid()
        self._lock = threading.Lock()

    def belongs_to(self, pages: OffloadedPages) -> bool:
        """Whether these pages may write here; if the owner is gone, the first to ask becomes the next."""
        if self._process != os.getpid():
            return False
        with self._lock:
            if self._owner() is None:
                self._owner = weakref.ref(pages)
            return self._owner() is pages


def check_host(host: str) -> str:
    """
    Raises:
        ValueError: pages cannot be kept there.
    """
    kind, _, folder = host.partition(":")
    if host != "pinned" and not (kind == "mmap" and Path(folder).is_dir()):
        raise ValueError(
            f"host must be 'pinned', or 'mmap:' and an existing folder such as 'mmap:/tmp', got {host!r}; for a saved "
            "cache whose folder is gone, pass host to load"
        )
    return host


def _reserve(handle: int, size: int) -> None:
    """Allocates an empty file's bytes on the disk: writing to mapped bytes that do not exist would kill the process.

    Raises:
        OSError: the disk has no room for them.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    zeros = bytes(min(size, _PIECE))
    while size:
        size -= os.write(handle, zeros[:size])
