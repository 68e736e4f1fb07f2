"""What ShadowKV holds of a layer: on the device enough to choose chunks and to rebuild their keys, the values
elsewhere.

A sequence's tokens are counted without padding, and cut into chunks from its first. The oldest chunks are folded: for
them the device has low-rank coefficients of the keys and a landmark, and the host the values. Beside that lie exact
keys and values in one buffer that attention reads at once:

    [ chunks selected by the newest queries | outlier chunks | tail: what is not folded yet ]

Selected chunks lie in no order, and stay where they are for as long as they are selected; only what is new is rebuilt
and fetched.

A step of decoding asks the device nothing: what it needs to know of each sequence is counted there, in `marks`. The
host counts for itself what changes otherwise, and looks at the device's count when it next wants to know.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.runtime import runs_triton
from kvcompress.kernels.fill import FoldedChunks, Rotation, fill_buffer
from kvcompress.kernels.merge import merge_states
from kvcompress.kernels.selection import chunk_positions, select_chunks
from kvcompress.policies.shadowkv import ShadowKV
from kvcompress.storage.fold import Fold, Newest, real_first, row_length
from kvcompress.storage.offload import OffloadedPages
from kvcompress.storage.room import GROWTH, make_room, put_back, trim
from kvcompress.storage.rope import Rope
from kvcompress.storage.segment import EMPTY, NO_FACTS, Segment

# tokens whose keys are rebuilt at a time: keys and values are whole, and rebuilt in float32
_PIECE = 1024


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

    settings: ShadowKV
    rope: Rope | None
    host: OffloadedPages
    # (chunk, KV head) pairs whose values came from the host, and forwards that fetched, [2] int64 on the device
    fetched: Tensor
    # tokens held, those of them that are folded, and chunks selected at most, [batch, 3] int64 on the device
    marks: Tensor
    # places that the tail has at least, whoever lays the buffer out
    reserved = 0
    # places of the tail that are surely free
    free = 0
    _lengths: Tensor
    # whether the device has counted on
    _is_behind = False

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
        self.fetched = torch.zeros(2, dtype=torch.int64, device=self.keys.device)
        self.marks = torch.zeros(len(self.keys), 3, dtype=torch.int64, device=self.keys.device)
        self.mark()

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, [batch] int64 on the CPU; to ask may be to wait for the device."""
        if self._is_behind:
            self._lengths.copy_(self.marks[:, 0])
            self._is_behind = False
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: Tensor) -> None:
        self._lengths, self._is_behind = lengths, False

    def mark(self) -> None:
        """Tells the device what the host has counted, and the compiler that tensors stay where they are."""
        counts = torch.stack([self.lengths, self.folded * self.settings.chunk, self.limits], 1)
        if counts.shape == self.marks.shape:
            self.marks.copy_(counts)
        else:
            self.marks = counts.to(self.marks.device)
        self.free = 0
        self.pin()

    def pin(self) -> None:
        """Tells the compiler that the tensors of a step stay in place: else CUDA graphs refuse to write to them."""
        counted = (self.marks, self.fetched, self.host.addresses)
        for tensor in (*counted, *(each for each in self.tensors().values() if each.device == self.marks.device)):
            # unguarded: another cache of the same shapes records a graph, and compiles nothing
            torch._dynamo.mark_static_address(tensor, guard=False)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_tensors(change)
        self.mark()

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.tensors() | (self._saved_pages() if self.host.slabs else {}), {}

    @classmethod
    def load(cls, tensors: dict[str, Tensor], facts: Mapping[str, Any] = NO_FACTS, **built_with: Any) -> Self:
        """As Segment.load; built_with: settings, rope, and host, where values go now."""
        settings, rope, host = (built_with[name] for name in ("settings", "rope", "host"))
        segment = super().load(tensors)
        for name in ("limits", "folded", "lengths"):
            setattr(segment, name, tensors[name].cpu())
        length = row_length(segment.basis)
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
        is_used = self.is_chunk()
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
        batch: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        itemsize: int,
        settings: ShadowKV,
        selected: int,
        tokens: int,
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
        a_head = slots * ((head_dim + value_dim) * itemsize + 4) + 8 * selected + 12 * outliers
        # counted: what the basis missed, limits, chunks and tokens, here and there
        return batch * (low_rank + folded * a_chunk + kv_heads * a_head + 4 + 6 * 8)

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
            Fold(self, Newest(self, key, value, visible), folding).run(self.lengths + fresh)
            return
        tokens, tails = key.shape[2], self.tails()
        longest, first = int(tails.max()), self.tail_from
        make_room(self, longest + tokens)
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
                order = real_first(visible)
                places = places.masked_fill(~visible.gather(1, order), EMPTY)
            row = torch.arange(key.shape[0], device=key.device)[:, None]
            slot = first + tails.to(key.device)[:, None] + torch.arange(tokens, device=key.device)
            self.keys.transpose(1, 2)[row, slot] = key.transpose(1, 2)[row, order]
            self.values.transpose(1, 2)[row, slot] = value.transpose(1, 2)[row, order]
            self.positions.transpose(1, 2)[row, slot] = places.to(torch.int32)[..., None]
        self.lengths += fresh
        self.mark()

    def drop_last(self, counts: Tensor) -> None:
        """Lets the newest tokens of each sequence go, [batch] int64 on the CPU; all of them in the tail."""
        self.lengths -= counts
        slot = torch.arange(self.keys.shape[2] - self.tail_from)
        gone = (slot >= self.tails()[:, None]).to(self.positions.device)
        self.positions[:, :, self.tail_from :].masked_fill_(gone[:, None], EMPTY)
        self.mark()

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
            self.place()
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
        self.mark()

    # tokens are folded

    def fold(self, chunks: Tensor) -> None:
        """Folds the oldest chunks of each tail: as many as [batch] int64 on the CPU says.

        Raises:
            OSError: their values have no room; nothing has changed.
        """
        if bool(chunks.any()):
            before = self.tensors()
            Fold(self, Newest(self), chunks).run(self.lengths)
            if self.reserved:
                put_back(self, before)

    def trim(self) -> None:
        trim(self)

    def is_chunk(self) -> Tensor:
        """Which chunks of the tables are there, [batch, chunks] bool."""
        index = torch.arange(self.pages.shape[1], device=self.pages.device)
        return index < self.folded.to(index.device)[:, None]

    def place(self) -> None:
        """Writes the positions of selected chunks and outliers."""
        chunks = torch.cat([self.held, self.outliers], 2)
        self.positions[:, :, : self.tail_from] = chunk_positions(chunks, self.settings.chunk, self.hidden)

    # queries come

    def attend(
        self, query: Tensor, query_positions: Tensor, spec: LogitSpec, visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As Segment.attend: to the chunks selected for these queries together, the outliers and the tail; or, where
        there are many queries, to all chunks.

        Args:
            visible: [batch, queries] bool, False for queries that are padding and choose nothing.
        """
        assert spec.window is None
        reads_all = self.is_folded and query.shape[2] > self.settings.select_queries
        if self.is_folded and not reads_all:
            is_new = self._select(query, visible, spec)
            self._fill(self.keys, self.values, self.held, is_new)
        # at least one slot, though it be empty: padding may be all that was ever fed
        tail = max(1, int(self.tails().max()))
        buffer = slice(self.exact_from if reads_all else 0, self.tail_from + tail)
        state = slot_attention(query, *self._slots(buffer), query_positions, spec)
        if reads_all:
            self.fetched[1] += 1
            for keys, values, positions in self._everything():
                part = slot_attention(query, keys, values, positions, query_positions, spec)
                state = merge_states([state[0], part[0]], [state[1], part[1]])
        return state

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, spec: LogitSpec, visible: Tensor | None, again: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Adds one token to the tail, which has room for it, and attends to all that `attend` does and to the token.

        Args:
            query: [batch, heads, 1, head_dim]. key, value: [batch, kv_heads, 1, head_dim].
            visible: [batch, 1] bool, False where the token is padding. None: all are tokens.
            again: another query has added the token.
        """
        token = () if again else (key, value, visible)
        # a view of no slots, where nothing is folded
        is_new = self._select(query, visible, spec) if self.is_folded else self.is_open[..., :0]
        self._fill(self.keys, self.values, self.held, is_new, *token)
        self._is_behind = True
        if torch.compiler.is_compiling():
            # a graph knows no place from another
            self.free, slots = 0, slice(None)
        else:
            self.free -= not again
            # kernels would copy a part of the positions, and where steps are compiled all read the same
            is_whole = runs_triton(query) or self.reserved > 0
            slots = slice(None) if is_whole else slice(0, self.keys.shape[2] - self.free)
        # there is no window, and where the query stands is not looked at
        at = self.positions[:, 0, :1]
        return slot_attention(query, *self._slots(slots), at, spec)

    def _slots(self, places: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of a part of the buffer."""
        return self.keys[:, :, places], self.values[:, :, places], self.positions[:, :, places]

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield self._slots(slice(self.exact_from, None))
        yield from self._everything()

    @property
    def is_folded(self) -> bool:
        """Whether there are chunks to select."""
        return self.held.shape[2] > 0

    def _select(self, query: Tensor, visible: Tensor | None, spec: LogitSpec) -> Tensor:
        """Gives the chunks that these queries care for most their slots; which of those are new there."""
        return select_chunks(
            query, self.landmarks, self.is_open, self.held, self.positions, self.marks[:, 2], self.fetched,
            spec, self.settings.chunk, self.hidden, visible, self.settings.group,
        )  # fmt: skip

    def _fill(self, keys: Tensor, values: Tensor, held: Tensor, is_new: Tensor, *token: Tensor | None) -> None:
        """Rebuilds keys and fetches values of new chunks into [batch, kv_heads, at least slots * chunk, head_dim], and
        adds a token to the tail, if there is one."""
        rope = self.rope
        rotation = Rotation() if rope is None else Rotation(rope.inv_freq, rope.scaling, rope.interleaved)
        slabs = self.host.slabs_for(values)
        folded = FoldedChunks(self.coefficients, self.basis, self.pages, self.host.addresses, slabs)
        fill_buffer(
            keys, values, self.positions, self.marks, held, is_new, folded, rotation, self.settings.chunk,
            self.tail_from, *token,
        )  # fmt: skip

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
            self.fetched[0] += is_open.sum()
            self._fill(keys, values, held, is_open)
            yield keys, values, chunk_positions(held.masked_fill(~is_open, EMPTY), chunk, self.hidden)


def _of_host(number: int) -> str:
    """What a saved segment calls its slabs."""
    return f"host_values.{number}" if number else "host_values"
