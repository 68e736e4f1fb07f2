"""Values that live off the device: pages in pinned memory, or in a memory-mapped file.

A page holds the values of one chunk in all KV heads, [kv_heads, chunk, head_dim]. It is written once and never changes,
so that beams, repeated rows and clones share pages: what they have of their own is a table of page numbers. Pages lie
in slabs; a page number is `slab * 2**32 + index within the slab` (kernels/pages.py).
"""

import os
import tempfile
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from kvcompress.kernels.pages import SLAB, collect_pages, fetch_pages

# 32 of them hold 43 times what the first held, and each of the others doubles that
MOST_SLABS = 64


class HostPages:
    """Pages of values off the device, that only ever become more.

    slabs: each [pages, kv_heads, chunk, head_dim]. filled: pages written to the last one. addresses: of the slabs'
    memory, int64 on the device.
    """

    def __init__(self, host: str, page: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            host: "pinned" or "mmap:/a/folder".
            page: kv_heads, chunk, head_dim.
            device: where the values come from, and go to.
        """
        self.host = host
        self.page = page
        self.dtype = dtype
        self.device = device
        self.slabs: list[Tensor] = []
        self.filled = 0
        self.addresses = torch.zeros(MOST_SLABS, dtype=torch.int64, device=device)

    @property
    def tier(self) -> str:
        """Where the pages lie: "host" or "disk"."""
        return "disk" if self.host.startswith("mmap:") else "host"

    def append(self, values: Tensor) -> Tensor:
        """Copies values [pages, kv_heads, chunk, head_dim] off the device; their page numbers, [pages] int64 there."""
        numbers = []
        while len(values):
            room = len(self.slabs[-1]) - self.filled if self.slabs else 0
            if room == 0:
                # an eighth more each time: few slabs, little room to spare; later, as much again
                held = sum(len(slab) for slab in self.slabs)
                spare = held // 8 if len(self.slabs) < MOST_SLABS // 2 else held
                self.slabs.append(self._slab(max(len(values), spare)))
                self.filled, room = 0, len(self.slabs[-1])
                self.addresses[len(self.slabs) - 1] = self.slabs[-1].data_ptr()
            count = min(room, len(values))
            self.slabs[-1][self.filled : self.filled + count].copy_(values[:count], non_blocking=True)
            first = (len(self.slabs) - 1) * SLAB + self.filled
            numbers.append(torch.arange(first, first + count, device=self.device))
            self.filled += count
            values = values[count:]
        return torch.cat(numbers) if numbers else torch.empty(0, dtype=torch.int64, device=self.device)

    def fetch(self, values: Tensor, pages: Tensor, held: Tensor, is_new: Tensor) -> None:
        """`kernels.pages.fetch_pages` from these pages."""
        fetch_pages(values, pages, held, is_new, self.slabs, self.addresses)

    def compacted(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """The pages that a table refers to, each once, [used, *page], and the table of their places among them."""
        used, places = pages.cpu().unique(return_inverse=True)
        heads = torch.arange(self.page[0]).expand(len(used), -1)
        return collect_pages(used[:, None].expand_as(heads), heads, self.slabs), places

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # pages never change, so copies share them; the room that is left belongs to the original
        copy = type(self)(self.host, self.page, self.dtype, self.device)
        copy.slabs = list(self.slabs)
        copy.filled = len(self.slabs[-1]) if self.slabs else 0
        copy.addresses = self.addresses.clone()
        return copy

    def _slab(self, pages: int) -> Tensor:
        shape = (pages, *self.page)
        if self.tier == "host":
            return torch.empty(shape, dtype=self.dtype, pin_memory=self.device.type == "cuda")
        elements = pages * self.page[0] * self.page[1] * self.page[2]
        handle, name = tempfile.mkstemp(dir=self.host.removeprefix("mmap:"), prefix="kvcompress-", suffix=".values")
        try:
            os.ftruncate(handle, elements * self.dtype.itemsize)
            return torch.from_file(name, shared=True, size=elements, dtype=self.dtype).view(shape)
        finally:
            os.close(handle)
            # the mapping keeps the file's room until it is let go, and nothing is left behind
            Path(name).unlink()


def check_host(host: str) -> str:
    """
    Raises:
        ValueError: not a place that pages can live.
    """
    kind, _, folder = host.partition(":")
    if host != "pinned" and not (kind == "mmap" and Path(folder).is_dir()):
        raise ValueError(f"host must be 'pinned', or 'mmap:' and an existing folder such as 'mmap:/tmp', got {host!r}")
    return host
