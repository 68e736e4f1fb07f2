"""What ShadowKV holds of a layer: on the device enough to choose chunks and to rebuild their keys, the values
elsewhere.

A sequence's tokens are counted without padding, and cut into chunks from its first. The oldest chunks are folded: for
them the device has low-rank coefficients of the keys and a landmark, and the host the values. Beside that lie exact
keys and values in one buffer that attention reads at once:

    [ chunks selected by the newest queries | outlier chunks | tail: what is not folded yet ]

Selected chunks lie in no order, and stay where they are for as long as they are selected; only what is new is rebuilt
and fetched.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.chunk_scores import chunk_scores
from kvcompress.kernels.merge import merge_states
from kvcompress.kernels.rebuild import rebuild_keys
from kvcompress.kernels.selection import reuse_slots
from kvcompress.policies.shadowkv import ShadowKV, fit_basis, gram, landmarks_of, measure, project
from kvcompress.storage.offload import OffloadedPages
from kvcompress.storage.rope import Rope
from kvcompress.storage.segment import EMPTY, NO_FACTS, Segment

# tokens whose keys are rebuilt, or freed of their rotation, at a time; of those that are folded an eighth, so that
# what is computed in float32 stays little beside them, but enough to keep a GPU at work
_PIECE = 4096
_LEAST_PIECE = 256
# places that a full tail gets more, at a new copy of the buffer
GROWTH = 64


class ShadowSegment(Segment):
    """Tokens of which the oldest are folded.

    keys, values: [batch, kv_heads, slots, head_dim], exact or rebuilt; positions: [batch, kv_heads, slots] int32, the
    place of a slot's token in its sequence, or EMPTY. held: [batch, kv_heads, selected] int64, chunk in each selected
    place, or EMPTY; outliers: [batch, kv_heads, outlier_chunks] int64 likewise; cosines: the same shape, float32, how
    alike its keys are. coefficients: [batch, room, rank] and basis: [batch, rank, kv_heads * head_dim]: keys without
    rotation; float16 coefficients are small by a power of two, and the basis large, as a token's keys together may be
    longer than float16 goes. missed: [batch] float32, share of the squared norm that the basis missed when it was
    made. landmarks: [batch, kv_heads, chunks, head_dim]. is_open: [batch, kv_heads, chunks] bool, folded and no
    outlier. pages: [batch, chunks] int64, where the values are. hidden: [batch, room] bool, folded tokens that became
    padding later; None while there are none. limits, folded, lengths: [batch] int64 on the CPU, chunks a sequence
    selects, chunks folded and tokens held.
    """

    tensor_names = (
        "keys", "values", "positions", "held", "outliers", "cosines", "coefficients", "basis", "missed", "landmarks",
        "is_open", "pages", "hidden", "limits", "folded", "lengths",
    )  # fmt: skip

    keys: Tensor
    values: Tensor
    positions: Tensor
    held: Tensor
    outliers: Tensor
    cosines: Tensor
    coefficients: Tensor
    basis: Tensor
    missed: Tensor
    landmarks: Tensor
    is_open: Tensor
    pages: Tensor
    hidden: Tensor | None
    limits: Tensor
    folded: Tensor
    lengths: Tensor

    settings: ShadowKV
    rope: Rope | None
    host: OffloadedPages
    fetched: Tensor

    def __init__(
        self, settings: ShadowKV, rope: Rope | None, host: str, key: Tensor, value: Tensor, limits: Tensor
    ) -> None:
        """An empty segment for tokens like these, [batch, kv_heads, any, head_dim]."""
        batch, kv_heads, _, head_dim = key.shape
        width = kv_heads * head_dim
        self.keys, self.values = key[:, :, :0].clone(), value[:, :, :0].clone()
        self.positions = torch.empty(batch, kv_heads, 0, dtype=torch.int32, device=key.device)
        self.held = torch.empty(batch, kv_heads, 0, dtype=torch.int64, device=key.device)
        self.outliers, self.cosines = self.held.clone(), self.held.float()
        self.coefficients = key.new_empty(batch, 0, settings.rank_of(width))
        self.basis = key.new_zeros(batch, settings.rank_of(width), width)
        self.missed = torch.zeros(batch, device=key.device)
        self.landmarks = key.new_empty(batch, kv_heads, 0, head_dim)
        self.is_open = torch.empty(batch, kv_heads, 0, dtype=torch.bool, device=key.device)
        self.pages = torch.empty(batch, 0, dtype=torch.int64, device=key.device)
        self.hidden = None
        self.limits = limits
        self.folded = torch.zeros(batch, dtype=torch.int64)
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self.attach(
            settings, rope, OffloadedPages(host, (kv_heads, settings.chunk, value.shape[-1]), value.dtype, key.device)
        )

    def attach(self, settings: ShadowKV, rope: Rope | None, host: OffloadedPages) -> None:
        """Gives the segment what is no tensor of its own."""
        self.settings, self.rope, self.host = settings, rope, host
        # (chunk, KV head) pairs whose values came from the host; a tensor, as to read one is to wait for the GPU
        self.fetched = torch.zeros((), dtype=torch.int64, device=self.keys.device)

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.tensors() | (self._saved_pages() if self.host.slabs else {}), {}

    @classmethod
    def load(cls, tensors: dict[str, Tensor], facts: Mapping[str, Any] = NO_FACTS, **built_with: Any) -> Self:
        """As Segment.load; built_with: settings, rope, and host, where values go now."""
        settings, rope, host = (built_with[name] for name in ("settings", "rope", "host"))
        segment = super().load(tensors)
        segment.limits, segment.folded, segment.lengths = (
            x.cpu() for x in (segment.limits, segment.folded, segment.lengths)
        )
        length = _length(segment.basis)
        if length > 1 and float(segment.basis.float().norm(dim=-1).max()) < 1.5:
            # as files had it whose float16 coefficients were those of rows of length 1
            segment.basis, segment.coefficients = segment.basis * length, segment.coefficients / length
        page = (segment.keys.shape[1], settings.chunk, segment.values.shape[3])
        pages = OffloadedPages(host, page, segment.values.dtype, segment.keys.device)
        segment.attach(settings, rope, pages)
        parts: list[Tensor] = []
        while (name := _of_host(len(parts))) in tensors:
            parts.append(tensors[name])
        segment.pages = pages.append(sum(map(len, parts)), parts)[segment.pages] if parts else segment.pages
        return segment

    def _saved_pages(self) -> dict[str, Tensor]:
        """The host's values that are in use, [pages, kv_heads, chunk, head_dim] by name, and the table `pages` for
        them."""
        places = torch.zeros_like(self.pages)
        is_used = self._is_folded()
        self.pages[is_used] = self.host.keep(self.pages[is_used], exactly=True)
        parts, places[is_used] = self.host.written(self.pages[is_used])
        return {"pages": places} | {_of_host(number): part for number, part in enumerate(parts)}

    def offloaded(self) -> dict[str, tuple[str, list[Tensor]]]:
        return {"host values": (self.host.tier, self.host.slabs)}

    @property
    def exact_from(self) -> int:
        """The first slot of the outliers."""
        return self.held.shape[2] * self.settings.chunk

    @property
    def tail_from(self) -> int:
        """The first slot of the tail."""
        return self.exact_from + self.outliers.shape[2] * self.settings.chunk

    def tails(self) -> Tensor:
        """Tokens of each sequence that are not folded, [batch] int64 on the CPU."""
        return self.lengths - self.folded * self.settings.chunk

    def kept(self) -> Tensor:
        kept = self.lengths if self.hidden is None else self.lengths - self.hidden.sum(-1).cpu()
        return kept.to(self.keys.device)[:, None].expand(-1, self.keys.shape[1])

    @staticmethod
    def nbytes_for(
        batch: int, kv_heads: int, head_dim: int, itemsize: int, settings: ShadowKV, selected: int, tokens: int
    ) -> int:
        """Bytes on the device after a prefill of so many tokens, of which so many chunks are selected in each step."""
        width, chunk = kv_heads * head_dim, settings.chunk
        rank, folded, room = settings.rank_of(width), 0, 0
        if tokens > int(settings.dense_tokens(torch.tensor([selected]))):
            folded, room = max(0, tokens // chunk - settings.local_chunks), GROWTH
        selected, outliers = min(selected, folded), min(settings.outlier_chunks, folded)
        slots = (selected + outliers - folded) * chunk + tokens + (room if folded else 0)
        low_rank = itemsize * rank * (folded * chunk + width)
        a_chunk = kv_heads * (head_dim * itemsize + 1) + 8
        a_head = slots * (2 * head_dim * itemsize + 4) + 8 * selected + 12 * outliers
        # counted: what the basis missed, limits, chunks and tokens
        return batch * (low_rank + folded * a_chunk + kv_heads * a_head + 4 + 3 * 8)

    # tokens come

    def append(
        self,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None,
        counts: Tensor | None,
        folding: Tensor | None = None,
    ) -> None:
        """Adds tokens [batch, kv_heads, tokens, head_dim] to the tail.

        Args:
            visible: [batch, tokens] bool marks padding by False. counts: its sum, [batch] on the CPU. Or both None.
            folding: the chunks of each sequence to fold at once, of the tail's tokens and then of these, [batch] int64
                on the CPU; they are in the tail at no time.

        Raises:
            OSError: the values of what is folded have no room; nothing has changed.
        """
        fresh = torch.full_like(self.lengths, key.shape[2]) if counts is None else counts
        if folding is not None and bool(folding.any()):
            self._fold(_Newest(self, key, value, visible), folding, self.lengths + fresh)
            return
        tokens, tails = key.shape[2], self.tails()
        longest, first = int(tails.max()), self.tail_from
        self._make_room(longest + tokens)
        if counts is None and bool((tails == longest).all()):
            slots = slice(first + longest, first + longest + tokens)
            self.keys[:, :, slots], self.values[:, :, slots] = key, value
            places = self.lengths[:, None] + torch.arange(tokens)
            self.positions[:, :, slots] = places.to(key.device, torch.int32)[:, None]
        else:
            order = torch.arange(tokens, device=key.device).expand(key.shape[0], -1)
            places = self.lengths.to(key.device)[:, None] + order
            if visible is not None:
                # padding goes to the end, where the next tokens overwrite it
                order = _real_first(visible)
                places = places.masked_fill(~visible.gather(1, order), EMPTY)
            row = torch.arange(key.shape[0], device=key.device)[:, None]
            slot = first + tails.to(key.device)[:, None] + torch.arange(tokens, device=key.device)
            self.keys.transpose(1, 2)[row, slot] = key.transpose(1, 2)[row, order]
            self.values.transpose(1, 2)[row, slot] = value.transpose(1, 2)[row, order]
            self.positions.transpose(1, 2)[row, slot] = places.to(torch.int32)[..., None]
        self.lengths += fresh

    def drop_last(self, counts: Tensor) -> None:
        """Lets the newest tokens of each sequence go, [batch] int64 on the CPU; all of them in the tail."""
        self.lengths -= counts
        slot = torch.arange(self.keys.shape[2] - self.tail_from)
        gone = (slot >= self.tails()[:, None]).to(self.positions.device)
        self.positions[:, :, self.tail_from :].masked_fill_(gone[:, None], EMPTY)

    def hide(self, remap: Tensor) -> None:
        """Forgets tokens that became padding.

        Args:
            remap: [batch, places] int32, EMPTY where the token at this place of its sequence goes.
        """
        device, width = remap.device, int(self.lengths.max())
        lengths, starts = self.lengths.to(device), (self.folded * self.settings.chunk).to(device)
        index = torch.arange(width, device=device)
        hidden = torch.zeros(len(remap), width, dtype=torch.bool, device=device)
        if self.hidden is not None:
            known = min(width, self.hidden.shape[1])
            hidden[:, :known] = self.hidden[:, :known]
        place = ((~hidden).cumsum(-1) - 1).clamp(min=0, max=remap.shape[1] - 1)
        gone = (remap.gather(1, place) == EMPTY) & (index < lengths[:, None])
        folded = index < starts[:, None]
        if bool((gone & folded).any()):
            if self.hidden is None:
                self.hidden = torch.zeros(len(remap), self.coefficients.shape[1], dtype=torch.bool, device=device)
            self.hidden |= torch.nn.functional.pad(gone & folded, (0, self.hidden.shape[1]))[:, : self.hidden.shape[1]]
            self._place()
        # the tail closes up
        first, room = self.tail_from, self.keys.shape[2] - self.tail_from
        slot = torch.arange(room, device=device)
        at = (starts[:, None] + slot).clamp(max=width - 1)
        tails = (lengths - starts)[:, None]
        goes = torch.where(slot < tails, gone.gather(1, at), True)
        order = goes.to(torch.uint8).argsort(dim=-1, stable=True)
        for tensor in (self.keys, self.values):
            tail = tensor[:, :, first:]
            tail.copy_(tail.gather(2, order[:, None, :, None].expand_as(tail)))
        stays = (~goes).sum(-1)
        places = (starts[:, None] + slot).masked_fill(slot >= stays[:, None], EMPTY)
        self.positions[:, :, first:] = places.to(torch.int32)[:, None]
        self.lengths = (starts + stays).cpu()

    def _make_room(self, tail: int) -> None:
        needed = self.tail_from + tail
        if needed > self.keys.shape[2]:
            room = tail if self.keys.shape[2] == 0 else tail + max(GROWTH, tail // 8)
            self._reallocate(self.tail_from + room)

    def _reallocate(self, slots: int) -> None:
        held = self.keys.shape[2]
        for name, empty in (("keys", 0), ("values", 0), ("positions", EMPTY)):
            tensor = getattr(self, name)
            grown = tensor.new_full((*tensor.shape[:2], slots, *tensor.shape[3:]), empty)
            grown[:, :, :held] = tensor
            setattr(self, name, grown)

    # tokens are folded

    def fold(self, chunks: Tensor) -> None:
        """Folds the oldest chunks of each tail: as many as [batch] int64 on the CPU says.

        Raises:
            OSError: their values have no room; nothing has changed.
        """
        if bool(chunks.any()):
            self._fold(_Newest(self), chunks, self.lengths)

    def _fold(self, newest: "_Newest", chunks: Tensor, lengths: Tensor) -> None:
        """Folds the oldest chunks of what is not folded yet, and makes the rest the tail.

        Args:
            chunks: how many of each sequence, [batch] int64 on the CPU.
            lengths: tokens of each sequence, `newest` included, [batch] int64 on the CPU.
        """
        device, chunk, most = self.keys.device, self.settings.chunk, int(chunks.max())
        step = max(_LEAST_PIECE, min(_PIECE, most * chunk // 8)) // chunk
        pieces = [slice(start, min(start + max(1, step), most)) for start in range(0, most, max(1, step))]
        is_new = torch.arange(most, device=device) < chunks.to(device)[:, None]  # [batch, most]
        at = self.folded.to(device)[:, None] + torch.arange(most, device=device)
        # first of all, as a disk may be full
        pages = self._offload(newest, pieces, chunks, is_new)
        self._grow_folded(int((self.folded + most).max()))
        row = torch.arange(len(chunks), device=device)[:, None]
        self.pages[row, at] = pages
        cosines = []
        for piece in pieces:
            keys = newest.keys(piece.start * chunk, piece.stop * chunk)
            means, alike = landmarks_of(keys.unflatten(2, (-1, chunk)))
            self.landmarks.transpose(1, 2)[row, at[:, piece]] = means.transpose(1, 2)
            cosines.append(alike.masked_fill(~is_new[:, None, piece], torch.inf))
        self._fold_keys(newest, pieces, is_new)

        exact = self._choose_outliers(newest, at, torch.cat(cosines, 2))
        moved, self.folded, self.lengths = chunks * chunk, self.folded + chunks, lengths.clone()
        index = torch.arange(self.is_open.shape[2] + 1, device=device)
        is_open = (index < self.folded.to(device)[:, None])[:, None].repeat(1, self.keys.shape[1], 1)
        is_open.scatter_(2, self.outliers.masked_fill(self.outliers < 0, self.is_open.shape[2]), False)
        # a copy: one row of one head is contiguous, and would hold on to the place that stands for no chunk
        self.is_open = is_open[..., :-1].clone(memory_format=torch.contiguous_format)
        selected = max(self.held.shape[2], min(int(self.limits.max()), int(self.folded.max())))
        self._lay_out(selected, exact, newest, moved)

    def _offload(self, newest: "_Newest", pieces: list[slice], chunks: Tensor, is_new: Tensor) -> Tensor:
        """Copies the values of new chunks to the host; the page of each chunk, [batch, chunks] int64, 0 for no chunk.

        Args:
            is_new: [batch, chunks] bool, the first `chunks`, [batch] int64 on the CPU, of each sequence.
        """
        chunk, whole = self.settings.chunk, bool((chunks == is_new.shape[1]).all())

        def parts() -> Iterator[Tensor]:
            for piece in pieces:
                values = newest.values(piece.start * chunk, piece.stop * chunk).unflatten(2, (-1, chunk))
                values = values.transpose(1, 2)  # [batch, chunks, kv_heads, chunk, head_dim]
                yield values.flatten(0, 1) if whole else values[is_new[:, piece]]

        numbers = self.host.append(int(chunks.sum()), parts())
        pages = torch.zeros(is_new.shape, dtype=torch.int64, device=is_new.device)
        counts = [int((chunks - piece.start).clamp(0, piece.stop - piece.start).sum()) for piece in pieces]
        for piece, some in zip(pieces, numbers.split(counts), strict=True):
            if whole:
                pages[:, piece] = some.view(len(chunks), -1)
            else:
                pages[:, piece][is_new[:, piece]] = some
        return pages

    def _fold_keys(self, newest: "_Newest", pieces: list[slice], is_new: Tensor) -> None:
        """Stores the keys of new chunks in the space of the old ones, or in a better one."""
        length = _length(self.basis)
        basis = self.basis.float() / length
        norm, missed = torch.zeros_like(self.missed), torch.zeros_like(self.missed)
        folds = is_new.any(1)
        # what has no space yet needs no measuring
        worse = folds & (self.folded == 0).to(folds.device)
        if bool((worse != folds).any()):
            for keys, at in self._unrotated(newest, pieces, is_new):
                self._store(project(keys, basis, length), at)
                norm, missed = (total + part for total, part in zip((norm, missed), measure(keys, basis), strict=True))
            # not `>`: keys with NaN are worse
            worse |= ~(missed <= norm * (self.settings.drift**2 * self.missed + 1e-6))
        if not bool(worse.any()):
            return
        old = basis[worse]
        inner = self._inner(worse) * length**2
        inner = old.mT @ inner @ old
        for keys, _ in self._unrotated(newest, pieces, is_new):
            inner += gram(keys[worse])
        fitted, share = fit_basis(inner, old.shape[1])
        # rounded as it is stored, so that the coefficients belong to what is stored
        self.basis[worse] = (fitted * length).to(self.basis.dtype)
        fitted = self.basis[worse].float() / length
        turned = old @ fitted.mT
        for piece in range(0, self.coefficients.shape[1], _PIECE):
            some = self.coefficients[:, piece : piece + _PIECE]
            some[worse] = (some[worse].float() @ turned).to(some.dtype)
        self.missed[worse] = torch.maximum(self.missed[worse], share)
        # rebuilt from the old space
        self.held[worse] = EMPTY
        for keys, at in self._unrotated(newest, pieces, is_new):
            self._store(project(keys[worse], fitted, length), at[worse], worse)

    def _inner(self, rows: Tensor) -> Tensor:
        """The gram matrices of the coefficients of what is folded, in some rows, [batch] bool."""
        index = torch.arange(self.coefficients.shape[1])
        known = (index < (self.folded * self.settings.chunk)[:, None]).to(rows.device)[rows]
        return gram(self.coefficients[rows].masked_fill_(~known[..., None], 0.0))

    def _store(self, coefficients: Tensor, at: Tensor, rows: Tensor | None = None) -> None:
        """Writes coefficients [rows, tokens, rank] to places [rows, tokens], of all rows or of some, [batch] bool."""
        row = torch.arange(len(self.lengths), device=at.device)
        row = row if rows is None else row[rows]
        self.coefficients[row[:, None], at] = coefficients

    def _unrotated(self, newest: "_Newest", pieces: list[slice], is_new: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The new keys without rotation, 0 for no key, and their places, [batch, tokens, width] and [batch, tokens]."""
        chunk, device = self.settings.chunk, self.keys.device
        starts = (self.folded * chunk).to(device)[:, None]
        for piece in pieces:
            first, last = piece.start * chunk, piece.stop * chunk
            keys, places = newest.keys(first, last), starts + torch.arange(first, last, device=device)
            if self.rope is not None:
                keys = self.rope.unrotate(keys, places[:, None])
            absent = ~is_new[:, piece].repeat_interleave(chunk, 1)
            yield keys.transpose(1, 2).flatten(2).masked_fill(absent[..., None], 0.0), places

    def _choose_outliers(self, newest: "_Newest", at: Tensor, cosines: Tensor) -> list[Tensor]:
        """Takes the least alike of the outliers so far and the new chunks; their keys and values."""
        kv_heads, chunk = self.keys.shape[1], self.settings.chunk
        had = self.outliers.shape[2]
        candidates = torch.cat([self.outliers, at[:, None].expand(-1, kv_heads, -1)], 2)
        cosines = torch.cat([self.cosines, cosines], 2)
        count = min(self.settings.outlier_chunks, candidates.shape[2])
        # stable: of equal ones the older chunk, whatever padding stands beside it
        order = cosines.argsort(dim=-1, stable=True)[..., :count]
        self.cosines = cosines.gather(2, order)
        self.outliers = candidates.gather(2, order).masked_fill(self.cosines == torch.inf, EMPTY)
        within = torch.arange(chunk, device=order.device)
        stays = (order < had).repeat_interleave(chunk, 2)[..., None]
        old = (self.exact_from + order.clamp(max=max(0, had - 1))[..., None] * chunk + within).flatten(2)
        fresh = ((order - had).clamp(min=0)[..., None] * chunk + within).flatten(2)
        exact = []
        for mine, theirs in (
            (self.keys, newest.pick(newest.key_parts, fresh)),
            (self.values, newest.pick(newest.value_parts, fresh)),
        ):
            exact.append(torch.where(stays, _columns(mine, old), theirs) if had else theirs)
        return exact

    def _lay_out(self, selected: int, exact: list[Tensor], newest: "_Newest", moved: Tensor) -> None:
        """Lays the buffer out anew.

        Args:
            selected: places of chunks; at least as many as now, or nothing is held.
            exact: keys and values of the outliers.
            moved: tokens [batch] at the beginning of `newest` that are in the tail no more; the others are.
        """
        chunk, had = self.settings.chunk, min(selected, self.held.shape[2])
        tails = self.tails()
        longest, first = int(tails.max()), selected * chunk + exact[0].shape[2]
        grown = self.held.new_full((*self.held.shape[:2], selected), EMPTY)
        grown[..., :had] = self.held[..., :had]
        buffers = []
        for old, middle, tail in zip(
            (self.keys, self.values),
            exact,
            (newest.rest(part, moved, longest) for part in (newest.key_parts, newest.value_parts)),
            strict=True,
        ):
            buffer = old.new_zeros(*old.shape[:2], first + longest + GROWTH, old.shape[3])
            buffer[:, :, : had * chunk] = old[:, :, : had * chunk]
            buffer[:, :, selected * chunk : first] = middle
            buffer[:, :, first : first + longest] = tail
            buffers.append(buffer)
        self.held, (self.keys, self.values) = grown, buffers
        self.positions = self.positions.new_full((*self.held.shape[:2], self.keys.shape[2]), EMPTY)
        index = torch.arange(longest)
        places = ((self.folded * chunk)[:, None] + index).masked_fill(index >= tails[:, None], EMPTY)
        self.positions[:, :, first : first + longest] = places.to(self.positions.device, torch.int32)[:, None]
        self._place()

    def trim(self) -> None:
        chunk, first = self.settings.chunk, self.exact_from
        held = min(self.held.shape[2], int(torch.minimum(self.limits, self.folded).max()))
        outliers = int((self.outliers != EMPTY).sum(-1).amax()) if self.outliers.numel() else 0
        if (held + outliers) * chunk + int(self.tails().max()) + GROWTH < self.keys.shape[2]:
            newest = _Newest(self)
            exact = [x[:, :, first : first + outliers * chunk] for x in (self.keys, self.values)]
            if held < self.held.shape[2]:
                # they lie anywhere in their places, and are soon fetched again
                self.held = torch.full_like(self.held[..., :held], EMPTY)
            self.outliers, self.cosines = self.outliers[..., :outliers].clone(), self.cosines[..., :outliers].clone()
            self._lay_out(held, exact, newest, torch.zeros_like(self.lengths))
        # chunks to choose from for every place that stays
        for name, dim, size in self._folded_sizes(max(int(self.folded.max()), self.held.shape[2])):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape[dim] > size:
                setattr(self, name, tensor.narrow(dim, 0, size).clone(memory_format=torch.contiguous_format))
        is_used = self._is_folded()
        self.pages[is_used] = self.host.keep(self.pages[is_used])

    def _is_folded(self) -> Tensor:
        """Which chunks of the tables are there, [batch, chunks] bool."""
        index = torch.arange(self.pages.shape[1], device=self.pages.device)
        return index < self.folded.to(index.device)[:, None]

    def _place(self) -> None:
        """Writes the positions of selected chunks and outliers."""
        self.positions[:, :, : self.tail_from] = self._places_of(torch.cat([self.held, self.outliers], 2))

    def _places_of(self, chunks: Tensor) -> Tensor:
        """Positions of the tokens of chunks [batch, kv_heads, any], EMPTY for none, [batch, kv_heads, any * chunk]."""
        chunk = self.settings.chunk
        within = torch.arange(chunk, dtype=torch.int32, device=chunks.device)
        places = chunks.to(torch.int32)[..., None] * chunk + within
        places = places.masked_fill((chunks == EMPTY)[..., None], EMPTY).flatten(2)
        if self.hidden is not None:
            rows = self.hidden[:, None].expand(-1, places.shape[1], -1)
            places = places.masked_fill(rows.gather(2, places.clamp(min=0).long()), EMPTY)
        return places

    def _grow_folded(self, chunks: int) -> None:
        """Room for so many folded chunks a sequence."""
        room = self.is_open.shape[2]
        if chunks > room:
            room = chunks if room == 0 else chunks + room // 8
            for name, dim, size in self._folded_sizes(room):
                tensor = getattr(self, name)
                if tensor is not None:
                    shape = list(tensor.shape)
                    shape[dim] = size
                    grown = tensor.new_zeros(shape)
                    grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
                    setattr(self, name, grown)

    def _folded_sizes(self, chunks: int) -> list[tuple[str, int, int]]:
        """Of the tensors that grow with what is folded the name, the dimension, and its size for so many chunks."""
        tokens = chunks * self.settings.chunk
        return [("coefficients", 1, tokens), ("hidden", 1, tokens), ("landmarks", 2, chunks), ("is_open", 2, chunks),
                ("pages", 1, chunks)]  # fmt: skip

    # queries come

    def attend(
        self,
        query: Tensor,
        query_positions: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        visible: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As Segment.attend: to the chunks selected for these queries together, the outliers and the tail; or, where
        there are many queries, to all chunks.

        Args:
            visible: [batch, queries] bool, False for queries that are padding and choose nothing.
        """
        assert window is None
        how: dict[str, Any] = {"scale": scale, "softcap": softcap}
        is_folded = bool((self.folded > 0).any())
        reads_all = is_folded and query.shape[2] > self.settings.select_queries
        if is_folded and not reads_all:
            self.select(query, visible, **how)
        # at least one slot, though it be empty: padding may be all that was ever fed
        tail = max(1, int(self.tails().max()))
        buffer = slice(self.exact_from if reads_all else 0, self.tail_from + tail)
        state = self._attend_slots(query, self.keys, self.values, self.positions, buffer, query_positions, how)
        if reads_all:
            for keys, values, positions in self._everything():
                part = self._attend_slots(query, keys, values, positions, slice(None), query_positions, how)
                state = merge_states([state[0], part[0]], [state[1], part[1]])
        return state

    @staticmethod
    def _attend_slots(
        query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, slots: slice, at: Tensor, how: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        return slot_attention(query, keys[:, :, slots], values[:, :, slots], positions[:, :, slots], at, **how)

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        exact = slice(self.exact_from, None)
        yield self.keys[:, :, exact], self.values[:, :, exact], self.positions[:, :, exact]
        yield from self._everything()

    def select(self, query: Tensor, visible: Tensor | None, *, scale: float, softcap: float | None) -> None:
        """Puts the chunks that these queries care for most into the buffer."""
        selected = self.held.shape[2]
        scores = chunk_scores(
            query, self.landmarks, self.is_open, visible, scale=scale, softcap=softcap, group=self.settings.group
        )
        found, wanted = scores.topk(selected, -1)
        wanted = wanted.masked_fill(found == -torch.inf, EMPTY)
        if bool((self.limits < selected).any()):
            rank = torch.arange(selected)
            over = rank >= self.limits[:, None]
            wanted = wanted.masked_fill(over.to(query.device)[:, None], EMPTY)
        self.held, is_new = reuse_slots(self.held, wanted, self.is_open.shape[2])
        places = slice(None, self.exact_from)
        self._fill(self.keys[:, :, places], self.values[:, :, places], self.held, is_new)
        self._place()

    def _fill(self, keys: Tensor, values: Tensor, held: Tensor, is_new: Tensor) -> None:
        """Rebuilds keys and fetches values of new chunks into [batch, kv_heads, slots * chunk, head_dim]."""
        self.fetched += is_new.sum()
        rope = () if self.rope is None else (self.rope.inv_freq, self.rope.scaling, self.rope.interleaved)
        if not keys.is_cuda:
            rebuild_keys(keys, self.coefficients, self.basis, held, is_new, *rope)
            self.host.fetch(values, self.pages, held, is_new)
            return
        # the bus is slow: keys are rebuilt meanwhile
        here, bus = torch.cuda.current_stream(keys.device), _copy_stream(keys.device)
        bus.wait_stream(here)
        with torch.cuda.stream(bus):
            self.host.fetch(values, self.pages, held, is_new)
        rebuild_keys(keys, self.coefficients, self.basis, held, is_new, *rope)
        here.wait_stream(bus)

    def _everything(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Keys, values and positions of all folded chunks that are no outliers, a piece at a time."""
        chunk, most = self.settings.chunk, int(self.folded.max())
        batch, kv_heads = self.held.shape[:2]
        # a quarter: keys and values are whole, and rebuilt in float32
        piece = max(1, _PIECE // 4 // chunk)
        for start in range(0, most, piece):
            held = torch.arange(start, min(start + piece, most), device=self.keys.device)
            is_open = self.is_open[:, :, start : start + len(held)]
            held = held.expand(batch, kv_heads, -1)
            shape = (batch, kv_heads, held.shape[2] * chunk)
            keys, values = (x.new_zeros(*shape, x.shape[3]) for x in (self.keys, self.values))
            self._fill(keys, values, held, is_open)
            yield keys, values, self._places_of(held.masked_fill(~is_open, EMPTY))


@functools.lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that values cross over to a device on."""
    return torch.cuda.Stream(device)


class _Newest:
    """The tokens of each sequence that are not folded, in order: those in its tail, and then those of a forward.

    key_parts, value_parts: the tail and what a forward brings, [batch, kv_heads, any, head_dim] each.
    """

    def __init__(
        self,
        segment: ShadowSegment,
        key: Tensor | None = None,
        value: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> None:
        tails, first = segment.tails(), segment.tail_from
        longest = int(tails.max())
        tail = slice(first, first + longest)
        key = segment.keys[:, :, :0] if key is None else key
        value = segment.values[:, :, :0] if value is None else value
        self.key_parts = segment.keys[:, :, tail], key
        self.value_parts = segment.values[:, :, tail], value
        self._tails = tails.to(key.device)
        self._order = None if visible is None else _real_first(visible)
        # columns are places where no sequence is shorter than another
        self._even = visible is None and bool((tails == longest).all())

    def keys(self, first: int, last: int) -> Tensor:
        """The keys of so many tokens, [batch, kv_heads, last - first, head_dim]; past a sequence's end anything."""
        return self._piece(self.key_parts, first, last)

    def values(self, first: int, last: int) -> Tensor:
        """As `keys`."""
        return self._piece(self.value_parts, first, last)

    def _piece(self, parts: tuple[Tensor, Tensor], first: int, last: int) -> Tensor:
        if not self._even:
            index = torch.arange(first, last, device=self._tails.device)
            return self.pick(parts, index.expand(len(self._tails), 1, -1))
        tail, key = parts
        ahead = tail.shape[2]
        mine, theirs = tail[:, :, first:last], key[:, :, max(0, first - ahead) : max(0, last - ahead)]
        return torch.cat([mine, theirs], 2) if mine.shape[2] and theirs.shape[2] else mine if mine.shape[2] else theirs

    def rest(self, parts: tuple[Tensor, Tensor], moved: Tensor, count: int) -> Tensor:
        """So many tokens of each sequence from `moved` [batch] on; past a sequence's end anything."""
        if self._even and bool((moved == moved[0]).all()):
            return self._piece(parts, int(moved[0]), int(moved[0]) + count)
        index = moved.to(self._tails.device)[:, None, None] + torch.arange(count, device=self._tails.device)
        return self.pick(parts, index)

    def pick(self, parts: tuple[Tensor, Tensor], index: Tensor) -> Tensor:
        """Tokens by their places, [batch, kv_heads or 1, any] int64; past a sequence's end anything."""
        tail, key = parts
        past = index - self._tails[:, None, None]
        if not key.shape[2]:
            return _columns(tail, index.clamp(max=max(0, tail.shape[2] - 1)))
        column = past.clamp(0, key.shape[2] - 1)
        if self._order is not None:
            column = self._order[:, None].expand(-1, column.shape[1], -1).gather(2, column)
        found = _columns(key, column)
        if not tail.shape[2]:
            return found
        return torch.where((past < 0)[..., None], _columns(tail, index.clamp(max=tail.shape[2] - 1)), found)


def _columns(tensor: Tensor, index: Tensor) -> Tensor:
    """Tokens of [batch, kv_heads, tokens, head_dim] by their columns, [batch, kv_heads or 1, any] int64."""
    return tensor.gather(2, index[..., None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def _real_first(visible: Tensor) -> Tensor:
    """The order that puts padding behind all tokens, [batch, tokens] int64."""
    return (~visible).to(torch.uint8).argsort(dim=-1, stable=True)


def _length(basis: Tensor) -> float:
    """Of the rows of a basis as it is stored, [batch, rank, width]: 1, or for float16 a power of two that no key of
    numbers in float16 has coefficients beyond."""
    return 2.0 ** math.ceil(math.log2(basis.shape[2]) / 2) if basis.dtype == torch.float16 else 1.0


def _of_host(number: int) -> str:
    """What a saved segment calls its slabs."""
    return f"host_values.{number}" if number else "host_values"
