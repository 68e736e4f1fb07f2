"""What a cache holds, in bytes of live storage."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one cache.

    by_component: bytes by what they hold (keys, values, scores, ...), whole storages, each counted once.
    by_device: bytes by device.
    full_bytes: what keys and values of every token seen would take (on sliding layers, of the window), pads included.
    full_elements: the numbers that those are.
    tokens_seen: tokens fed, pads included.
    tokens_kept: a tensor [batch, kv_heads] for each layer.
    """

    by_component: dict[str, int]
    by_device: dict[str, int]
    full_bytes: int
    full_elements: int
    tokens_seen: int
    tokens_kept: list[Tensor]

    @property
    def total_bytes(self) -> int:
        """All bytes, wherever they are."""
        return sum(self.by_component.values())

    @property
    def host_bytes(self) -> int:
        """Bytes in CPU memory."""
        return self.by_device.get("cpu", 0)

    @property
    def device_bytes(self) -> int:
        """Bytes on accelerators; on a machine that computes on its CPU, the bytes there."""
        accelerators = sum(size for device, size in self.by_device.items() if device != "cpu")
        return accelerators or self.host_bytes

    @property
    def ratio(self) -> float:
        """Bytes held over the bytes of the full cache; 0 for an empty cache."""
        return self.total_bytes / self.full_bytes if self.full_bytes else 0.0

    @property
    def bits_per_element(self) -> float:
        """All bits held for each number of a key or value that the full cache would hold; 0 for an empty cache."""
        return 8 * self.total_bytes / self.full_elements if self.full_elements else 0.0

    def __str__(self) -> str:
        kept = [layer.float().mean().item() for layer in self.tokens_kept]
        span = f"{min(kept):.0f} to {max(kept):.0f}" if kept else "0"
        share = (
            f"{self.ratio:.1%} of the full cache's {_size(self.full_bytes)}, {self.bits_per_element:.2f} bits a number"
        )
        rows = [
            f"tokens seen {self.tokens_seen}, kept per layer and head {span}",
            *(f"  {name:<12} {_size(size):>12}" for name, size in sorted(self.by_component.items())),
            f"  {'total':<12} {_size(self.total_bytes):>12}   {share}",
            *(f"  on {device:<9} {_size(size):>12}" for device, size in sorted(self.by_device.items())),
        ]
        return "\n".join(rows)


def storage_bytes(tensors: dict[str, list[Tensor]]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by component and by device of the storages under these tensors, each storage counted once."""
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


def full_cache_bytes(tokens: int, window: int | None, shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Keys and values of one layer's full cache; shape is (batch, kv_heads, head_dim)."""
    batch, kv_heads, head_dim = shape
    held = tokens if window is None else min(tokens, window)
    return 2 * batch * kv_heads * head_dim * held * dtype.itemsize


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError
