"""Columns of tensors whose rows are sequences: adds columns, and chooses some row by row."""

import torch
from torch import Tensor


def grown(tensor: Tensor, dim: int, columns: int, fill: float = 0) -> Tensor:
    """The tensor with so many columns along a dimension: its own, then `fill`."""
    shape = list(tensor.shape)
    shape[dim] = columns
    wide = tensor.new_full(shape, fill)
    wide.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return wide


def marked_first(marks: Tensor) -> Tensor:
    """The order, [batch, columns] int64, that puts columns marked True before the others, stably."""
    return marks.to(torch.uint8).argsort(dim=-1, stable=True, descending=True)


def span_of_rows(first: list[int], counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns first .. first + count - 1 of each row, [batch, most] int64, and which of them exist."""
    number = torch.arange(max(counts, default=0), device=device)
    there = number < torch.tensor(counts, device=device)[:, None]
    at = torch.tensor(first, device=device)[:, None] + number
    return at.masked_fill(~there, 0), there


def taken(tensor: Tensor, at: Tensor, dim: int) -> Tensor:
    """Columns of a dimension, chosen row by row; at: [batch, columns]."""
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = at.shape
    target = list(tensor.shape)
    target[dim] = at.shape[1]
    return tensor.gather(dim, at.view(shape).expand(target))
