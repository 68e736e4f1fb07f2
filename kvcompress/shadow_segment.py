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
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor

from kvcompress.hosted import HostPages
from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.chunk_scores import chunk_scores
from kvcompress.kernels.merge import merge_states
from kvcompress.kernels.rebuild import rebuild_keys
from kvcompress.kernels.selection import reuse_slots
from kvcompress.policies.shadowkv import ShadowKV, fit_basis, gram, landmarks_of, project
from kvcompress.rope import Rope
from kvcompress.segments import EMPTY, Segment

# tokens whose keys are rebuilt, or freed of their rotation, at a time
_PIECE = 4096
# places that a full tail gets more, at a new copy of the buffer
GROWTH = 64


class ShadowSegment(Segment):
    """Tokens of which the oldest are folded.

    keys, values: [batch, kv_heads, slots, head_dim], exact or rebuilt; positions: [batch, kv_heads, slots] int32, the
    place of a slot's token in its sequence, or EMPTY. held: [batch, kv_heads, selected] int64, chunk in each selected
    place, or EMPTY; outliers: [batch, kv_heads, outlier_chunks] int64 likewise; cosines: the same shape, float32, how
    alike its keys are. coefficients: [batch, room, rank] and basis: [batch, rank, kv_heads * head_dim]: keys without
    rotation. missed: [batch] float32, share of the squared norm that the basis missed when it was made. landmarks:
    [batch, kv_heads, chunks, head_dim]. is_open: [batch, kv_heads, chunks] bool, folded and no outlier. pages: [batch,
    chunks] int64, where the values are. hidden: [batch, room] bool, folded tokens that became padding later; None
    while there are none. limits, folded, lengths: [batch] int64 on the CPU, chunks a sequence selects, chunks folded
    and tokens held.
    """

    state = (
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
    host: HostPages
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
        self.equip(
            settings, rope, HostPages(host, (kv_heads, settings.chunk, value.shape[-1]), value.dtype, key.device)
        )

    def equip(self, settings: ShadowKV, rope: Rope | None, host: HostPages) -> None:
        """Gives the segment what is no tensor of its own."""
        self.settings, self.rope, self.host = settings, rope, host
        # (chunk, KV head) pairs whose values came from the host; a tensor, as to read one is to wait for the GPU
        self.fetched = torch.zeros((), dtype=torch.int64, device=self.keys.device)

    @classmethod
    def from_saved(cls, tensors: dict[str, Tensor], settings: ShadowKV, rope: Rope | None, host: str) -> Self:
        """A segment of what `tensors` and `saved_pages` gave."""
        segment = cls.from_tensors(tensors)
        segment.limits, segment.folded, segment.lengths = (
            x.cpu() for x in (segment.limits, segment.folded, segment.lengths)
        )
        page = (segment.keys.shape[1], settings.chunk, segment.values.shape[3])
        pages = HostPages(host, page, segment.values.dtype, segment.keys.device)
        if "host_values" in tensors:
            segment.pages = pages.append(tensors["host_values"])[segment.pages]
        segment.equip(settings, rope, pages)
        return segment

    def saved_pages(self) -> tuple[Tensor, Tensor]:
        """The host's values that are in use, [pages, kv_heads, chunk, head_dim], and the table `pages` for them."""
        return self.host.compacted(self.pages)

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
        """Tokens held, [batch] int64 on the CPU."""
        return self.lengths if self.hidden is None else self.lengths - self.hidden.sum(-1).cpu()

    # tokens come

    def append(self, key: Tensor, value: Tensor, visible: Tensor | None, counts: Tensor | None) -> None:
        """Adds tokens [batch, kv_heads, tokens, head_dim] to the tail.

        Args:
            visible: [batch, tokens] bool marks padding by False. counts: its sum, [batch] on the CPU. Or both None.
        """
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
            if visible is not None and counts is not None:
                # padding goes to the end, where the next tokens overwrite it
                order = (~visible).to(torch.uint8).argsort(dim=-1, stable=True)
                places = places.masked_fill(~visible.gather(1, order), EMPTY)
            row = torch.arange(key.shape[0], device=key.device)[:, None]
            slot = first + tails.to(key.device)[:, None] + torch.arange(tokens, device=key.device)
            self.keys.transpose(1, 2)[row, slot] = key.transpose(1, 2)[row, order]
            self.values.transpose(1, 2)[row, slot] = value.transpose(1, 2)[row, order]
            self.positions.transpose(1, 2)[row, slot] = places.to(torch.int32)[..., None]
        self.lengths += tokens if counts is None else counts

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
        """Folds the oldest chunks of each tail: as many as [batch] int64 on the CPU says."""
        settings, device = self.settings, self.keys.device
        most = int(chunks.max())
        if most == 0:
            return
        chunk, first = settings.chunk, self.tail_from
        tokens = most * chunk
        keys, values = self.keys[:, :, first : first + tokens], self.values[:, :, first : first + tokens]
        batch, kv_heads = keys.shape[:2]
        on_device = chunks.to(device)
        starts = self.folded.to(device)
        new = torch.arange(most, device=device)
        is_new = new < on_device[:, None]  # [batch, most]
        at = starts[:, None] + new
        self._grow_folded(int((self.folded + most).max()))

        row = torch.arange(batch, device=device)[:, None]
        means, cosines = landmarks_of(keys.unflatten(2, (most, chunk)))
        self.landmarks.transpose(1, 2)[row, at] = means.transpose(1, 2)
        self._fold_keys(keys, (starts * chunk)[:, None] + torch.arange(tokens, device=device), is_new)

        pages = values.unflatten(2, (most, chunk)).transpose(1, 2)  # [batch, most, kv_heads, chunk, head_dim]
        numbers = torch.zeros(batch, most, dtype=torch.int64, device=device)
        if bool((chunks == most).all()):
            numbers = self.host.append(pages.flatten(0, 1)).view(batch, most)
        else:
            numbers[is_new] = self.host.append(pages[is_new])
        self.pages[row, at] = numbers

        exact = self._choose_outliers(keys, values, at, cosines.masked_fill(~is_new[:, None], torch.inf))
        self.folded = self.folded + chunks
        index = torch.arange(self.is_open.shape[2] + 1, device=device)
        is_open = (index < self.folded.to(device)[:, None])[:, None].repeat(1, kv_heads, 1)
        is_open.scatter_(2, self.outliers.masked_fill(self.outliers < 0, self.is_open.shape[2]), False)
        # a copy: one row of one head is contiguous, and would hold on to the place that stands for no chunk
        self.is_open = is_open[..., :-1].clone(memory_format=torch.contiguous_format)
        self._rebuild_buffer(first, on_device * chunk, exact)

    def _fold_keys(self, keys: Tensor, places: Tensor, is_new: Tensor) -> None:
        """Stores keys [batch, kv_heads, tokens, head_dim] in the space of the old ones, or in a better one."""
        batch = keys.shape[0]
        flat = torch.empty_like(keys.transpose(1, 2), memory_format=torch.contiguous_format)
        # a piece at a time: rotations are computed in float32
        for start in range(0, keys.shape[2], _PIECE):
            piece = slice(start, start + _PIECE)
            some = keys[:, :, piece]
            if self.rope is not None:
                some = self.rope.unrotate(some, places[:, None, piece])
            flat[:, piece] = some.transpose(1, 2)
        flat = flat.flatten(2)  # [batch, tokens, width]
        flat = flat.masked_fill(~is_new.repeat_interleave(self.settings.chunk, 1)[..., None], 0.0)
        basis = self.basis.float()
        coefficients, norm, missed = project(flat, basis)
        worse = missed > norm * (self.settings.drift**2 * self.missed + 1e-6)
        if bool(worse.any()):
            stored = self.coefficients[worse]
            inner = gram(stored)
            old = basis[worse]
            fitted, share = fit_basis(old.mT @ inner @ old + gram(flat[worse]), old.shape[1])
            # rounded as it is stored, so that the coefficients belong to what is stored
            fitted = fitted.to(self.basis.dtype).float()
            self.coefficients[worse] = (stored.float() @ (old @ fitted.mT)).to(stored.dtype)
            self.basis[worse] = fitted.to(self.basis.dtype)
            self.missed[worse] = torch.maximum(self.missed[worse], share)
            coefficients[worse] = project(flat[worse], fitted)[0]
            # rebuilt from the old space
            self.held[worse] = EMPTY
        row = torch.arange(batch, device=keys.device)[:, None]
        self.coefficients[row, places] = coefficients

    def _choose_outliers(self, keys: Tensor, values: Tensor, at: Tensor, cosines: Tensor) -> list[Tensor]:
        """Takes the least alike of the outliers so far and the new chunks; their keys and values."""
        kv_heads, chunk = keys.shape[1], self.settings.chunk
        old = slice(self.exact_from, self.tail_from)
        candidates = torch.cat([self.outliers, at[:, None].expand(-1, kv_heads, -1)], 2)
        cosines = torch.cat([self.cosines, cosines], 2)
        count = min(self.settings.outlier_chunks, candidates.shape[2])
        # stable: of equal ones the older chunk, whatever padding stands beside it
        order = cosines.argsort(dim=-1, stable=True)[..., :count]
        self.cosines = cosines.gather(2, order)
        self.outliers = candidates.gather(2, order).masked_fill(self.cosines == torch.inf, EMPTY)
        exact = []
        for tensor, fresh in ((self.keys, keys), (self.values, values)):
            both = torch.cat([tensor[:, :, old], fresh], 2).unflatten(2, (-1, chunk))
            row, head, _ = _grid(order)
            exact.append(both[row, head, order].flatten(2, 3))
        return exact

    def _rebuild_buffer(self, tail_from: int, moved: Tensor, exact: list[Tensor]) -> None:
        """Lays the buffer out anew, after `moved` tokens [batch] of each tail were folded."""
        device = self.keys.device
        had = self.held.shape[2]
        selected = max(had, min(int(self.limits.max()), int(self.folded.max())))
        tails, chunk = self.tails(), self.settings.chunk
        longest = int(tails.max())
        slots = (selected + self.outliers.shape[2]) * chunk + longest + GROWTH
        old_slots = tail_from + moved[:, None] + torch.arange(longest, device=device)
        old_slots = old_slots.clamp(max=self.keys.shape[2] - 1)
        row = torch.arange(len(moved), device=device)[:, None]
        grown = self.held.new_full((*self.held.shape[:2], selected), EMPTY)
        grown[..., :had] = self.held
        self.held = grown
        for name, middle in zip(("keys", "values"), exact, strict=True):
            old = getattr(self, name)
            buffer = old.new_zeros(*old.shape[:2], slots, old.shape[3])
            buffer[:, :, : had * chunk] = old[:, :, : had * chunk]
            buffer[:, :, selected * chunk : selected * chunk + middle.shape[2]] = middle
            first = selected * chunk + middle.shape[2]
            buffer[:, :, first : first + longest] = old.transpose(1, 2)[row, old_slots].transpose(1, 2)
            setattr(self, name, buffer)
        self.positions = self.positions.new_full((*self.held.shape[:2], slots), EMPTY)
        index = torch.arange(longest)
        places = ((self.folded * chunk)[:, None] + index).masked_fill(index >= tails[:, None], EMPTY)
        first = self.tail_from
        self.positions[:, :, first : first + longest] = places.to(device, torch.int32)[:, None]
        self._place()

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
            tokens = room * self.settings.chunk
            for name, dim, size in (
                ("coefficients", 1, tokens), ("hidden", 1, tokens), ("landmarks", 2, room), ("is_open", 2, room),
                ("pages", 1, room),
            ):  # fmt: skip
                tensor = getattr(self, name)
                if tensor is not None:
                    shape = list(tensor.shape)
                    shape[dim] = size
                    grown = tensor.new_zeros(shape)
                    grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
                    setattr(self, name, grown)

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
        here, bus = torch.cuda.current_stream(keys.device), _bus(keys.device)
        bus.wait_stream(here)
        with torch.cuda.stream(bus):
            self.host.fetch(values, self.pages, held, is_new)
        rebuild_keys(keys, self.coefficients, self.basis, held, is_new, *rope)
        here.wait_stream(bus)

    def _everything(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Keys, values and positions of all folded chunks that are no outliers, a piece at a time."""
        chunk, most = self.settings.chunk, int(self.folded.max())
        batch, kv_heads = self.held.shape[:2]
        piece = max(1, _PIECE // chunk)
        for start in range(0, most, piece):
            held = torch.arange(start, min(start + piece, most), device=self.keys.device)
            is_open = self.is_open[:, :, start : start + len(held)]
            held = held.expand(batch, kv_heads, -1)
            shape = (batch, kv_heads, held.shape[2] * chunk)
            keys, values = (x.new_zeros(*shape, x.shape[3]) for x in (self.keys, self.values))
            self._fill(keys, values, held, is_open)
            yield keys, values, self._places_of(held.masked_fill(~is_open, EMPTY))


@functools.lru_cache
def _bus(device: torch.device) -> torch.cuda.Stream:
    """The stream that values cross over to a device on."""
    return torch.cuda.Stream(device)


def _grid(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the three dimensions of a tensor, to index another by."""
    batch, heads, count = index.shape
    device = index.device
    row = torch.arange(batch, device=device)[:, None, None]
    head = torch.arange(heads, device=device)[None, :, None]
    return row, head, torch.arange(count, device=device)[None, None]
