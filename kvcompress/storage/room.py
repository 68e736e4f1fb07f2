"""How much room a ShadowKV segment has, and how its buffer is laid out in it (storage/low_rank.py)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompress.storage.segment import EMPTY

if TYPE_CHECKING:
    from kvcompress.storage.low_rank import ShadowSegment

# places that a full tail gets more, at a new copy of the buffer
GROWTH = 64


def lay_out(segment: "ShadowSegment", selected: int, exact: list[Tensor], tail: list[Tensor]) -> None:
    """Lays a segment's buffer out anew.

    Args:
        selected: places of chunks; at least as many as now, or nothing is held.
        exact: keys and values of the outliers, tail: those of the tail, [batch, kv_heads, any, head_dim] each; past a
            sequence's end anything.
    """
    chunk, had, tails = segment.settings.chunk, min(selected, segment.held.shape[2]), segment.tails()
    longest, first = tail[0].shape[2], selected * chunk + exact[0].shape[2]
    room = first + max(longest + GROWTH, segment.reserved)
    held = segment.held.new_full((*segment.held.shape[:2], selected), EMPTY)
    held[..., :had] = segment.held[..., :had]
    buffers = []
    for old, middle, end in zip((segment.keys, segment.values), exact, tail, strict=True):
        buffer = old.new_zeros(*old.shape[:2], room, old.shape[3])
        buffer[:, :, : had * chunk] = old[:, :, : had * chunk]
        buffer[:, :, selected * chunk : first] = middle
        buffer[:, :, first : first + longest] = end
        buffers.append(buffer)
    segment.held, (segment.keys, segment.values) = held, buffers
    segment.positions = segment.positions.new_full((*held.shape[:2], room), EMPTY)
    index = torch.arange(longest)
    places = ((segment.folded * chunk)[:, None] + index).masked_fill(index >= tails[:, None], EMPTY)
    segment.positions[:, :, first : first + longest] = places.to(segment.positions.device, torch.int32)[:, None]
    segment.place()
    segment.mark()


def reserve_tail(segment: "ShadowSegment", tail: int) -> None:
    """Takes room for a tail of so many tokens, now and whenever the buffer is laid out anew."""
    segment.reserved = tail
    if segment.tail_from + tail > segment.keys.shape[2]:
        _reallocate(segment, segment.tail_from + tail)


def make_room(segment: "ShadowSegment", tail: int) -> None:
    """Lets the buffer grow to what a tail of so many tokens needs."""
    if segment.tail_from + tail > segment.keys.shape[2]:
        room = tail if segment.keys.shape[2] == 0 else tail + max(GROWTH, tail // 8)
        _reallocate(segment, segment.tail_from + max(room, segment.reserved))


def make_room_for_one(segment: "ShadowSegment") -> None:
    """Takes room for one token more; looks at how long the tails are only where there may be none."""
    if not segment.free:
        longest = int(segment.tails().max())
        make_room(segment, longest + 1)
        segment.free = segment.keys.shape[2] - segment.tail_from - longest


def _reallocate(segment: "ShadowSegment", slots: int) -> None:
    held = segment.keys.shape[2]
    for name, empty in (("keys", 0), ("values", 0), ("positions", EMPTY)):
        tensor = getattr(segment, name)
        grown = tensor.new_full((*tensor.shape[:2], slots, *tensor.shape[3:]), empty)
        grown[:, :, :held] = tensor
        setattr(segment, name, grown)
    segment.free = 0
    segment.pin()


def grow_folded(segment: "ShadowSegment", chunks: int) -> None:
    """Takes room for so many folded chunks a sequence."""
    room = segment.is_open.shape[2]
    if chunks > room:
        room = chunks if room == 0 else chunks + room // 8
        for name, dim, size in _folded_sizes(segment, room):
            tensor = getattr(segment, name)
            if tensor is not None:
                shape = list(tensor.shape)
                shape[dim] = size
                grown = tensor.new_zeros(shape)
                grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
                setattr(segment, name, grown)


def _folded_sizes(segment: "ShadowSegment", chunks: int) -> list[tuple[str, int, int]]:
    """Of the tensors that grow with what is folded the name, the dimension, and its size for so many chunks."""
    tokens = chunks * segment.settings.chunk
    return [("coefficients", 1, tokens), ("hidden", 1, tokens), ("landmarks", 2, chunks), ("is_open", 2, chunks),
            ("pages", 1, chunks)]  # fmt: skip


def trim(segment: "ShadowSegment") -> None:
    """Gives back the room that no sequence needs any more, as others have left."""
    chunk, first, last = segment.settings.chunk, segment.exact_from, segment.tail_from
    held = min(segment.held.shape[2], int(torch.minimum(segment.limits, segment.folded).max()))
    outliers = int((segment.outliers != EMPTY).sum(-1).amax()) if segment.outliers.numel() else 0
    longest = int(segment.tails().max())
    if (held + outliers) * chunk + max(longest + GROWTH, segment.reserved) < segment.keys.shape[2]:
        buffers = segment.keys, segment.values
        exact = [buffer[:, :, first : first + outliers * chunk] for buffer in buffers]
        tail = [buffer[:, :, last : last + longest] for buffer in buffers]
        if held < segment.held.shape[2]:
            # they lie anywhere in their places, and are soon fetched again
            segment.held = torch.full_like(segment.held[..., :held], EMPTY)
        segment.outliers = segment.outliers[..., :outliers].clone()
        segment.cosines = segment.cosines[..., :outliers].clone()
        lay_out(segment, held, exact, tail)
    # chunks to choose from for every place that stays
    for name, dim, size in _folded_sizes(segment, max(int(segment.folded.max()), segment.held.shape[2])):
        tensor = getattr(segment, name)
        if tensor is not None and tensor.shape[dim] > size:
            setattr(segment, name, tensor.narrow(dim, 0, size).clone(memory_format=torch.contiguous_format))
    is_used = segment.is_chunk()
    segment.pages[is_used] = segment.host.keep(segment.pages[is_used])
    segment.pin()


def put_back(segment: "ShadowSegment", before: dict[str, Tensor]) -> None:
    """Puts tensors that have kept their shape where they were: graphs that were recorded know them by their places."""
    for name, now in segment.tensors().items():
        was = before.get(name)
        if was is not None and was is not now and was.shape == now.shape:
            setattr(segment, name, was.copy_(now))
