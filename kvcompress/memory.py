"""What a cache holds, in bytes of live storage."""

import html
import operator
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor


# it has tensors, which do not compare to one truth
@dataclass(frozen=True, repr=False, eq=False)
class MemoryReport:
    """Bytes of one cache.

    by_component: bytes by what they hold (keys, values, scores, ...), whole storages, each counted once.
    by_device: bytes by device, as PyTorch names it; memory-mapped files are on "cpu".
    full_bytes: what keys and values of every token seen would take (on sliding layers, of the window), pads included.
    full_elements: how many numbers those are.
    tokens_seen: tokens fed, pads included.
    tokens_kept: a tensor [batch, kv_heads] for each layer.
    offloaded: bytes that the cache keeps off the model's device on purpose, by tier, "host" or "disk".
    fetching_forwards, fetched_bytes: forwards that read offloaded bytes, and how many bytes they moved to the device.
    """

    by_component: dict[str, int]
    by_device: dict[str, int]
    full_bytes: int
    full_elements: int
    tokens_seen: int
    tokens_kept: list[Tensor]
    offloaded: dict[str, int] = field(default_factory=dict)
    fetching_forwards: int = 0
    fetched_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All bytes, wherever they are."""
        return sum(self.by_component.values())

    @property
    def device_bytes(self) -> int:
        """Bytes where the model computes. On a CPU, all bytes that no segment reports as offloaded."""
        return self.total_bytes - self.host_bytes - self.disk_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes kept in CPU memory rather than on an accelerator; on a CPU, those that would be."""
        on_cpu = self.by_device.get("cpu", 0)
        return on_cpu - self.disk_bytes if len(self.by_device) > 1 else self.offloaded.get("host", 0)

    @property
    def disk_bytes(self) -> int:
        """Bytes in memory-mapped files."""
        return self.offloaded.get("disk", 0)

    @property
    def fetched_per_forward(self) -> float:
        """Average bytes moved to the device per forward that reads offloaded bytes; 0 if none did."""
        return self.fetched_bytes / self.fetching_forwards if self.fetching_forwards else 0.0

    @property
    def ratio(self) -> float:
        """Bytes held over the bytes of the full cache; 0 for an empty cache."""
        return self.total_bytes / self.full_bytes if self.full_bytes else 0.0

    @property
    def bits_per_element(self) -> float:
        """Bits held per number that the full cache would hold; 0 for an empty cache."""
        return 8 * self.total_bytes / self.full_elements if self.full_elements else 0.0

    @property
    def device_ratio(self) -> float:
        """Bytes on the device over the bytes of the full cache; 0 for an empty cache."""
        return self.device_bytes / self.full_bytes if self.full_bytes else 0.0

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def __repr__(self) -> str:
        kept = [layer.float().mean().item() for layer in self.tokens_kept]
        span = f"{min(kept):.0f} to {max(kept):.0f}" if kept else "0"
        share = (
            f"{self.ratio:.1%} of the full cache's {_size(self.full_bytes)}, "
            f"{self.bits_per_element:.2f} bits per number"
        )
        rows = [
            f"tokens seen {self.tokens_seen}, kept per layer and head {span}",
            *(f"  {name:<12} {_size(size):>12}" for name, size in sorted(self.by_component.items())),
            f"  {'total':<12} {_size(self.total_bytes):>12}   {share}",
            *(f"  on {device:<9} {_size(size):>12}" for device, size in sorted(self.by_device.items())),
        ]
        if self.offloaded:
            rows += [
                f"  {'device tier':<12} {_size(self.device_bytes):>12}   {self.device_ratio:.1%} of the full cache",
                f"  {'host tier':<12} {_size(self.host_bytes):>12}",
                f"  {'disk tier':<12} {_size(self.disk_bytes):>12}",
                f"  {'fetched':<12} {_size(round(self.fetched_per_forward)):>12}   per forward, averaged over "
                f"{self.fetching_forwards}",
            ]
        return "\n".join(rows)


def storage_bytes(tensors: dict[str, list[Tensor]]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the storages behind these tensors, by component and by device, each storage counted once."""
    counted: set[tuple[str, int]] = set()
    by_component: dict[str, int] = {}
    by_device: dict[str, int] = {}
    for component, members in tensors.items():
        for tensor in members:
            storage = tensor.untyped_storage()
            place = (str(tensor.device), storage.data_ptr())
            if place in counted or storage.nbytes() == 0:
                continue
            counted.add(place)
            by_component[component] = by_component.get(component, 0) + storage.nbytes()
            by_device[place[0]] = by_device.get(place[0], 0) + storage.nbytes()
    return by_component, by_device


def full_cache_bytes(
    tokens: int, window: int | None, shape: tuple[int, int, int], value_width: int, dtype: torch.dtype
) -> int:
    """Bytes of keys and values of one layer's full cache; shape is that of keys, (batch, kv_heads, head_dim)."""
    batch, kv_heads, head_dim = shape
    held = tokens if window is None else min(tokens, window)
    return batch * kv_heads * (head_dim + value_width) * held * dtype.itemsize


def read_bytes(name: str, size: int | str) -> int:
    """A number of bytes as people write it: 8589934592, "8GiB" or "8.6 GB".

    Args:
        name: of the setting, for the messages.

    Raises:
        ValueError: a str that is no number with a unit from B to TiB, or less than 1 byte.
        TypeError: neither an int nor a str.
    """
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|[KMGT]i?B)\s*", size, re.IGNORECASE)
        if found is None:
            raise ValueError(
                f"{name} must be a number of bytes (int), or a size with its unit such as '8GiB', got {size!r}"
            )
        base, exponent = (1024 if "i" in found[2].lower() else 1000), "BKMGT".index(found[2][0].upper())
        size = int(float(found[1]) * base**exponent)
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"{name} must be a number of bytes (int), or a size such as '8GiB', got {size!r}")
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return operator.index(size)


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError
