"""How a ShadowKV segment's oldest tokens become chunks: values go to the host, keys into a space of few dimensions.

A fold takes the oldest chunks of what is not folded yet, in the tail or in the current forward, and lays out the
segment's buffer again (storage/low_rank.py).
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompress.policies.shadowkv import fit_basis, gram, landmarks_of, measure, project
from kvcompress.storage.room import grow_folded, lay_out
from kvcompress.storage.segment import EMPTY

if TYPE_CHECKING:
    from kvcompress.storage.low_rank import ShadowSegment

# how many tokens' keys are unrotated at a time: an eighth of those that are folded, so that the float32 intermediates
# stay small beside them, but enough to keep a GPU busy
_PIECE = 4096
_LEAST_PIECE = 256


class Newest:
    """The tokens of each sequence that are not folded, in order: those in its tail, and then those of a forward.

    key_parts, value_parts: the tail and a forward's tokens, [batch, kv_heads, any, head_dim] each. parts: both.
    """

    def __init__(
        self,
        segment: "ShadowSegment",
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
        self.parts = self.key_parts, self.value_parts
        self._tails = tails.to(key.device)
        self._order = None if visible is None else real_first(visible)
        # if all sequences are equally long, columns are positions
        self._even = visible is None and bool((tails == longest).all())

    def keys(self, first: int, last: int) -> Tensor:
        """The keys of these tokens, [batch, kv_heads, last - first, head_dim]; arbitrary past a sequence's end."""
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
        """`count` tokens of each sequence from `moved` [batch] on; arbitrary past a sequence's end."""
        if self._even and bool((moved == moved[0]).all()):
            return self._piece(parts, int(moved[0]), int(moved[0]) + count)
        index = moved.to(self._tails.device)[:, None, None] + torch.arange(count, device=self._tails.device)
        return self.pick(parts, index)

    def pick(self, parts: tuple[Tensor, Tensor], index: Tensor) -> Tensor:
        """Tokens by index, [batch, kv_heads or 1, any] int64; arbitrary past a sequence's end."""
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


class Fold:
    """One fold of a segment.

    chunks: how many of each sequence, [batch] int64 on the CPU. is_new: [batch, most] bool, the first `chunks` of each
    sequence; at: [batch, most] int64, which chunks they become. pieces: the parts of `most` computed at a time.
    """

    def __init__(self, segment: "ShadowSegment", newest: Newest, chunks: Tensor) -> None:
        self.segment, self.newest, self.chunks = segment, newest, chunks
        self.chunk, most = segment.settings.chunk, int(chunks.max())
        step = max(1, max(_LEAST_PIECE, min(_PIECE, most * self.chunk // 8)) // self.chunk)
        self.pieces = [slice(start, min(start + step, most)) for start in range(0, most, step)]
        index = torch.arange(most, device=segment.keys.device)
        self.is_new = index < chunks.to(index.device)[:, None]
        self.at = segment.folded.to(index.device)[:, None] + index

    def run(self, lengths: Tensor) -> None:
        """Folds the chunks, and makes the rest the tail.

        Args:
            lengths: tokens of each sequence, `newest` included, [batch] int64 on the CPU.

        Raises:
            OSError: there is no room for the values; nothing has changed.
        """
        segment, chunk, device = self.segment, self.chunk, self.at.device
        # first, as a disk may be full
        pages = self._offload()
        grow_folded(segment, int(segment.folded.max()) + self.at.shape[1])
        row = torch.arange(len(self.at), device=device)[:, None]
        segment.pages[row, self.at] = pages
        cosines = []
        for piece in self.pieces:
            keys = self.newest.keys(piece.start * chunk, piece.stop * chunk)
            means, alike = landmarks_of(keys.unflatten(2, (-1, chunk)))
            segment.landmarks.transpose(1, 2)[row, self.at[:, piece]] = means.transpose(1, 2)
            cosines.append(alike.masked_fill(~self.is_new[:, None, piece], torch.inf))
        self._fold_keys()

        exact = self._choose_outliers(torch.cat(cosines, 2))
        segment.folded, segment.lengths = segment.folded + self.chunks, lengths.clone()
        room = segment.is_open.shape[2]
        index = torch.arange(room + 1, device=device)
        is_open = (index < segment.folded.to(device)[:, None])[:, None].repeat(1, segment.keys.shape[1], 1)
        is_open.scatter_(2, segment.outliers.masked_fill(segment.outliers < 0, room), False)
        # a copy: one row of one head is contiguous, and as a view would keep the column for no chunk alive
        segment.is_open = is_open[..., :-1].clone(memory_format=torch.contiguous_format)
        selected = max(segment.held.shape[2], min(int(segment.limits.max()), int(segment.folded.max())))
        tail = [self.newest.rest(part, self.chunks * chunk, int(segment.tails().max())) for part in self.newest.parts]
        lay_out(segment, selected, exact, tail)

    def _offload(self) -> Tensor:
        """Copies the values of new chunks to the host; returns their pages, [batch, most] int64, 0 for no chunk."""
        chunk, chunks, is_new = self.chunk, self.chunks, self.is_new
        whole = bool((chunks == is_new.shape[1]).all())

        def parts() -> Iterator[Tensor]:
            for piece in self.pieces:
                values = self.newest.values(piece.start * chunk, piece.stop * chunk).unflatten(2, (-1, chunk))
                values = values.transpose(1, 2)  # [batch, chunks, kv_heads, chunk, head_dim]
                yield values.flatten(0, 1) if whole else values[is_new[:, piece]]

        numbers = self.segment.host.append(int(chunks.sum()), parts())
        pages = torch.zeros(is_new.shape, dtype=torch.int64, device=is_new.device)
        counts = [int((chunks - piece.start).clamp(0, piece.stop - piece.start).sum()) for piece in self.pieces]
        for piece, some in zip(self.pieces, numbers.split(counts), strict=True):
            if whole:
                pages[:, piece] = some.view(len(chunks), -1)
            else:
                pages[:, piece][is_new[:, piece]] = some
        return pages

    def _fold_keys(self) -> None:
        """Stores the keys of new chunks in the space of the old ones, or in a better one."""
        segment = self.segment
        length = row_length(segment.basis)
        basis = segment.basis.float() / length
        norm, missed = torch.zeros_like(segment.missed), torch.zeros_like(segment.missed)
        folds = self.is_new.any(1)
        # rows without a space yet need one; there is nothing to measure
        worse = folds & (segment.folded == 0).to(folds.device)
        if bool((worse != folds).any()):
            for keys, at in self._unrotated():
                self._store(project(keys, basis, length), at)
                norm, missed = (total + part for total, part in zip((norm, missed), measure(keys, basis), strict=True))
            # written so that keys with NaN count as worse
            worse |= ~(missed <= norm * (segment.settings.drift**2 * segment.missed + 1e-6))
        if not bool(worse.any()):
            return
        old = basis[worse]
        inner = self._inner(worse) * length**2
        inner = old.mT @ inner @ old
        for keys, _ in self._unrotated():
            inner += gram(keys[worse])
        fitted, share = fit_basis(inner, old.shape[1])
        # rounded as it will be stored, so that the coefficients fit the stored basis
        segment.basis[worse] = (fitted * length).to(segment.basis.dtype)
        fitted = segment.basis[worse].float() / length
        turned = old @ fitted.mT
        for piece in range(0, segment.coefficients.shape[1], _PIECE):
            some = segment.coefficients[:, piece : piece + _PIECE]
            some[worse] = (some[worse].float() @ turned).to(some.dtype)
        segment.missed[worse] = torch.maximum(segment.missed[worse], share)
        # rebuilt from the old space
        segment.held[worse] = EMPTY
        for keys, at in self._unrotated():
            self._store(project(keys[worse], fitted, length), at[worse], worse)

    def _inner(self, rows: Tensor) -> Tensor:
        """The Gram matrices of the folded coefficients, in some rows, [batch] bool."""
        coefficients = self.segment.coefficients
        index = torch.arange(coefficients.shape[1])
        known = (index < (self.segment.folded * self.chunk)[:, None]).to(rows.device)[rows]
        return gram(coefficients[rows].masked_fill_(~known[..., None], 0.0))

    def _store(self, coefficients: Tensor, at: Tensor, rows: Tensor | None = None) -> None:
        """Writes coefficients [rows, tokens, rank] to places [rows, tokens], of all rows or of some, [batch] bool."""
        row = torch.arange(len(self.chunks), device=at.device)
        row = row if rows is None else row[rows]
        self.segment.coefficients[row[:, None], at] = coefficients

    def _unrotated(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The new keys without rotation, 0 for no key, and their places: [batch, tokens, width] and [batch, tokens]."""
        chunk, device, rope = self.chunk, self.at.device, self.segment.rope
        starts = (self.segment.folded * chunk).to(device)[:, None]
        for piece in self.pieces:
            first, last = piece.start * chunk, piece.stop * chunk
            keys, places = self.newest.keys(first, last), starts + torch.arange(first, last, device=device)
            if rope is not None:
                keys = rope.unrotate(keys, places[:, None])
            absent = ~self.is_new[:, piece].repeat_interleave(chunk, 1)
            yield keys.transpose(1, 2).flatten(2).masked_fill(absent[..., None], 0.0), places

    def _choose_outliers(self, cosines: Tensor) -> list[Tensor]:
        """Chooses the outliers, the least alike of the old ones and the new chunks; returns their keys and values."""
        segment, newest, chunk = self.segment, self.newest, self.chunk
        had = segment.outliers.shape[2]
        candidates = torch.cat([segment.outliers, self.at[:, None].expand(-1, segment.keys.shape[1], -1)], 2)
        cosines = torch.cat([segment.cosines, cosines], 2)
        count = min(segment.settings.outlier_chunks, candidates.shape[2])
        # stable: of equal ones the older chunk, independent of padding
        order = cosines.argsort(dim=-1, stable=True)[..., :count]
        segment.cosines = cosines.gather(2, order)
        segment.outliers = candidates.gather(2, order).masked_fill(segment.cosines == torch.inf, EMPTY)
        within = torch.arange(chunk, device=order.device)
        stays = (order < had).repeat_interleave(chunk, 2)[..., None]
        old = (segment.exact_from + order.clamp(max=max(0, had - 1))[..., None] * chunk + within).flatten(2)
        fresh = ((order - had).clamp(min=0)[..., None] * chunk + within).flatten(2)
        exact = []
        for mine, theirs in (
            (segment.keys, newest.pick(newest.key_parts, fresh)),
            (segment.values, newest.pick(newest.value_parts, fresh)),
        ):
            exact.append(torch.where(stays, _columns(mine, old), theirs) if had else theirs)
        return exact


def _columns(tensor: Tensor, index: Tensor) -> Tensor:
    """Tokens of [batch, kv_heads, tokens, head_dim] by column, [batch, kv_heads or 1, any] int64."""
    return tensor.gather(2, index[..., None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def real_first(visible: Tensor) -> Tensor:
    """The order that puts padding after all tokens, [batch, tokens] int64."""
    return (~visible).to(torch.uint8).argsort(dim=-1, stable=True)


def row_length(basis: Tensor) -> float:
    """The length of the rows of a stored basis [batch, rank, width]: 1, or for float16 a power of two such that no key
    in float16 has coefficients that overflow."""
    return 2.0 ** math.ceil(math.log2(basis.shape[2]) / 2) if basis.dtype == torch.float16 else 1.0
