"""Which of the tokens that a cache has seen are padding.

Caches place tokens by their position in their own sequence, pads not counted, so that a row of a padded batch is
treated as if it were alone. There is one record per cache; in each forward, the first layer reads the mask into it.
"""

import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from kvcompress.storage.segment import EMPTY

# no position is ever this far off
_UNKNOWN = 2**62


class PaddingRecord:
    """The padding mask of all tokens seen, [batch, tokens seen] bool; None while nothing is padded."""

    # names of what is saved, in the order of `tensors`
    names = ("padding", "filler", "last_position", "shift", "last_fed", "axes")
    # the cache's method undoes rotations, so a sequence's positions must increase by one per token
    needs_even_positions = False
    # how far positions are ahead of a count of tokens is noted, and may change
    notes_shift = False

    def __init__(self) -> None:
        self.visible: Tensor | None = None
        # columns that `generate` fed to rows that had ended, [batch, tokens seen] bool; None if there are none
        self.filler: Tensor | None = None
        # the position that the model gave to each sequence's last token; None if unknown
        self.last_position: list[int] | None = None
        # positions that the forward to come was given, for a model that does not pass them on to its attention
        self.told_positions: weakref.ref[Tensor] | None = None
        # how far the model's positions are ahead of a count of real tokens, by row; None before the first forward
        self.shift: list[int] | None = None
        # the last token fed to each row, an end token if it was filler; then the rows whose token in the current
        # forward is filler, [batch] bool
        self.last_fed: list[int] | None = None
        self.ended: Tensor | None = None
        # positions of all columns, where the model's indexers rotate keys by them, [batch, tokens seen, axes] int32
        self.axes: Tensor | None = None
        self.remap: Tensor | None = None
        # tokens of each sequence until now, [batch], before `remap` moves them
        self.before: Tensor | None = None
        self._counts: list[int] | None = None
        self._counted = False

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save, by name."""
        lists = (self.last_position, self.shift, self.last_fed)
        numbers = (None if each is None else torch.tensor(each) for each in lists)
        saved = [self.visible, self.filler, *numbers, self.axes]
        return {name: tensor for name, tensor in zip(self.names, saved, strict=True) if tensor is not None}

    def held(self) -> list[Tensor]:
        """What lives as long as the tokens."""
        return [held for held in (self.visible, self.filler, self.axes) if held is not None]

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `tensors` returned."""
        self.visible, self.filler = tensors.get("padding"), tensors.get("filler")
        self.last_position, self.shift, self.last_fed = (
            tensors[name].tolist() if name in tensors else None for name in self.names[2:5]
        )
        self.axes = tensors.get("axes")
        self.ended = self.told_positions = None

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces each tensor, whose first dimension is the batch, by `change(tensor)`."""
        self.restore({name: change(tensor) for name, tensor in self.tensors().items()})

    def note_fed(self, ids: Tensor | None, pad: int | None, ends: list[int]) -> None:
        """Finds the rows that have ended, by what `generate` feeds them while others go on: after an end only `pad`.

        Args:
            ids: [batch, tokens] that the next forward is fed, None if they are not known.
            pad: the token fed to ended rows, None if it is not known.
            ends: tokens that end a sequence. The first one fed still counts as the row's own.
        """
        self.ended, before, self.last_fed = None, self.last_fed, None
        if ids is None or pad is None or not ends or ids.shape[0] == 1:
            return
        fed = ids[:, -1].tolist()
        if ids.shape[1] == 1 and before is not None and len(before) == len(fed):
            ended = [token == pad and last in ends for token, last in zip(fed, before, strict=True)]
            if any(ended):
                self.ended = torch.tensor(ended, device=ids.device)
                fed = [ends[0] if over else token for over, token in zip(ended, fed, strict=True)]
        self.last_fed = fed

    def take_told(self, tokens: int) -> Tensor | None:
        """The positions that the forward in progress was given, once; None if that is not known."""
        told = None if self.told_positions is None else self.told_positions()
        self.told_positions = None
        return told if told is not None and told.shape[-1] == tokens else None

    def fresh_of(self, mask: Tensor | None, queries: int) -> Tensor | None:
        """Which tokens of the current forward are real, [batch, queries] bool; None for all.

        Args:
            mask: as in `read`.
        """
        fresh = None if mask is None else mask[:, -queries:]
        if self.ended is None:
            return fresh
        going = ~self.ended[:, None].to(self.ended.device if fresh is None else fresh.device)
        return going if fresh is None else fresh & going

    def read(
        self, mask: Tensor | None, batch: int, past: int, queries: int, position_ids: Tensor | None = None
    ) -> None:
        """Reads a forward's mask, once, before the first layer stores anything.

        If the mask hides tokens that were visible, sets `remap` to how positions change, [batch, past tokens] int32
        (EMPTY for a dropped token); else to None.

        Args:
            mask: [batch, past + queries] or [batch, queries] bool, or None.
            position_ids: the model's own positions of the tokens, [batch or 1, queries], None if it has none.

        Raises:
            ValueError: the mask's size is wrong, it shows a token that was cached as padding, or the positions do not
                follow those before. Nothing has changed then.
        """
        before = self.visible, self.last_position, self.shift
        self.remap = None
        self._counted = False
        try:
            if mask is not None:
                if mask.shape[0] != batch or mask.shape[1] not in (queries, past + queries):
                    raise ValueError(
                        f"attention_mask must be [batch={batch}, tokens seen={past + queries}], got {list(mask.shape)}"
                    )
                if past and mask.shape[1] == past + queries:
                    self._compare(mask[:, :past])
            fresh = self.fresh_of(mask, queries)
            if position_ids is not None and position_ids.dim() == 2:
                self._follow(position_ids.expand(batch, -1), fresh, past)
        except ValueError:
            self.visible, self.last_position, self.shift = before
            self.remap = self.before = None
            raise
        self._append(fresh, batch, past, queries)
        self._note_filler(batch, past, queries)

    def _follow(self, position_ids: Tensor, fresh: Tensor | None, past: int) -> None:
        """Compares the model's positions of a forward, [batch, queries], with those that came before.

        Raises:
            ValueError: they go backwards, or leave a gap that the method does not support.
        """
        batch, queries = position_ids.shape
        if queries == 1 and position_ids.is_cuda:
            # a decode step must not wait for the GPU, and generate's positions are in order
            return
        if fresh is None:
            fresh = torch.ones_like(position_ids, dtype=torch.bool)
        fresh = fresh.to(position_ids.device)
        last = self._last_positions(batch, past).to(position_ids)
        reached = position_ids.masked_fill(~fresh, -1).cummax(1).values
        before = torch.cat([last[:, None], reached[:, :-1].maximum(last[:, None])], 1)
        back = fresh & (position_ids <= before)
        if bool(back.any()):
            row, column = back.nonzero()[0].tolist()
            raise ValueError(
                f"position ids must continue from what the cache has seen: row {row} had a token at position "
                f"{int(before[row, column])}, but its next one is at {int(position_ids[row, column])}; feed only what "
                "is new, with the positions that come after; pad prompts on the left; or start over (cache.reset())"
            )
        self.last_position = reached[:, -1].maximum(last).tolist()
        if self.needs_even_positions:
            self._check_even(position_ids, fresh, past)
        elif self.notes_shift:
            shifts, known = self._shifts(position_ids, fresh, past)
            newest = queries - 1 - fresh.flip(-1).to(torch.uint8).argmax(1, keepdim=True)
            self.shift = torch.where(fresh.any(1), shifts.gather(1, newest)[:, 0], known).tolist()

    def shifts(self, batch: int) -> list[int]:
        """How far the model's positions are ahead of a count of real tokens, by row; 0 where that is not known."""
        return [0 if shift == _UNKNOWN else shift for shift in self.shift or [0] * batch]

    def _last_positions(self, batch: int, past: int) -> Tensor:
        """The positions that the next tokens must come after, [batch]."""
        return torch.tensor([-1] * batch if self.last_position is None else self.last_position)

    def _shifts(self, position_ids: Tensor, fresh: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Of each token of a forward how far its position is ahead, [batch, queries], and of each row until now."""
        shown = fresh.new_full((len(fresh),), past, dtype=torch.int64)
        if self.visible is not None:
            # compiled steps leave no record; all tokens that they fed are real
            held = self.visible.to(fresh.device)
            shown = held.sum(-1) + past - held.shape[1]
        shifts = position_ids - (shown[:, None] + fresh.cumsum(-1) - 1)
        return shifts, shown.new_tensor([_UNKNOWN] * len(shown) if self.shift is None else self.shift)

    def _check_even(self, position_ids: Tensor, fresh: Tensor, past: int) -> None:
        shifts, known = self._shifts(position_ids, fresh, past)
        first = shifts.gather(1, fresh.to(torch.uint8).argmax(1, keepdim=True))[:, 0]
        known = torch.where((known == _UNKNOWN) & fresh.any(1), first, known)
        uneven = fresh & (shifts != known[:, None])
        if bool(uneven.any()):
            row, column = uneven.nonzero()[0].tolist()
            raise ValueError(
                "this cache undoes rotations, so a row's position ids must increase by one per token, padding not "
                f"counted; row {row} has {int(position_ids[row, column])} where "
                f"{int(position_ids[row, column] - shifts[row, column] + known[row])} comes next; pass position_ids "
                "that count the row's real tokens, or use a cache that keeps keys rotated"
            )
        self.shift = known.tolist()

    def _note_filler(self, batch: int, past: int, queries: int) -> None:
        if self.ended is None and self.filler is None:
            return
        known = self.ended if self.filler is None else self.filler
        assert known is not None
        columns = known.new_zeros(batch, past + queries)
        if self.filler is not None:
            columns[:, : self.filler.shape[1]] = self.filler
        if self.ended is not None:
            columns[:, past:] = self.ended[:, None].to(columns.device)
        self.filler = columns

    def _compare(self, now: Tensor) -> None:
        if self.filler is not None:
            # generate shows filler in the mask, so this is not an error for it
            filler = self.filler.to(now.device)
            now = torch.cat([now[:, : filler.shape[1]] & ~filler, now[:, filler.shape[1] :]], 1)
        if self.visible is None and bool(now.all()):
            return
        before = torch.ones_like(now)
        if self.visible is not None:
            before[:, : self.visible.shape[1]] = self.visible
        if torch.equal(before, now):
            return
        if bool((now & ~before).any()):
            raise ValueError(
                "attention_mask shows tokens that were padding when they were cached; their keys and values are gone"
            )
        # the token at position p of its sequence goes to position remap[p]
        place = (before.cumsum(-1) - 1).masked_fill(~before, now.shape[1])
        to = (now.cumsum(-1) - 1).masked_fill(~now, EMPTY).to(torch.int32)
        remap = torch.full((now.shape[0], now.shape[1] + 1), EMPTY, dtype=torch.int32, device=now.device)
        self.remap = remap.scatter_(1, place, to)[:, :-1]
        # the last token may be among those hidden
        self.last_position = None
        self.before = before.sum(-1)
        self.visible = now.clone()

    def _append(self, fresh: Tensor | None, batch: int, past: int, queries: int) -> None:
        if self.visible is None:
            if fresh is None or bool(fresh.all()):
                return
            self.visible = torch.ones(batch, past, dtype=torch.bool, device=fresh.device)
        missing = past - self.visible.shape[1]
        tail = fresh if fresh is not None else self.visible.new_ones(batch, queries)
        # compiled steps leave no record; all tokens that they fed are real
        self.visible = torch.cat([self.visible, self.visible.new_ones(batch, missing), tail], 1)

    def counts(self, fresh: Tensor | None) -> list[int] | None:
        """Real tokens of each sequence in the current forward, whose mask is [batch, queries]; None if all are real.

        Read from the device once per forward, however many layers ask.
        """
        if not self._counted:
            # where no token was ever padding, the record knows without a look at the device
            fresh = None if self.visible is None else fresh
            self._counts = None if fresh is None or bool(fresh.all()) else fresh.sum(-1).tolist()
            self._counted = True
        return self._counts

    def columns(self, positions: Tensor) -> Tensor:
        """The columns in which tokens were fed, by their positions [batch or 1, any, ...], as far as differences go:
        where padding only precedes a row, its positions. EMPTY stays."""
        if self.visible is None or pads_first(self.visible) is None:
            return positions
        return self.columns_fed(positions)

    def columns_fed(self, positions: Tensor) -> Tensor:
        """The columns in which tokens were fed, by their positions [batch or 1, any, ...]; EMPTY stays."""
        visible = self.visible
        if visible is None:
            return positions
        # the columns of real tokens, in order, before those of padding
        order = visible.to(torch.uint8).argsort(dim=-1, stable=True, descending=True).to(positions.device)
        positions = positions.expand(len(order), *positions.shape[1:])
        columns = order.gather(1, positions.clamp(min=0).flatten(1).long()).view_as(positions).to(positions.dtype)
        return torch.where(positions == EMPTY, EMPTY, columns)

    def real_of_last(self, tokens: int, seen: int) -> list[int] | None:
        """How many of the last columns seen are real tokens, for each sequence; None if all are.

        Columns that compiled steps fed are not in the record, and real.
        """
        if self.visible is None:
            return None
        recorded = self.visible[:, max(0, seen - tokens) : seen]
        return (recorded.sum(-1) + min(tokens, seen) - recorded.shape[1]).tolist()

    def crop(self, tokens: int, seen: int) -> None:
        """Forgets the last tokens, after which `seen` are left."""
        if not tokens:
            # which rows have ended, and their positions, are still known
            return
        for name in ("visible", "filler"):
            columns = getattr(self, name)
            if columns is not None:
                setattr(self, name, columns[:, :seen].clone())
        if self.axes is not None:
            self.axes = self.axes[:, :seen].clone()
        self.last_position = self.last_fed = None

    def told_of(self, seen: int) -> Tensor | None:
        """Positions of the columns seen, [batch, columns, axes] int32; None before the first. Those that a refused
        forward told are not among them."""
        return self.axes[:, :seen] if self.axes is not None and seen else None


def pads_first(visible: Tensor) -> Tensor | None:
    """The order that puts padding before all tokens, [batch, tokens] int64, or None if it is already there.

    A window counts tokens without padding. In this order it can count columns.
    """
    if bool((visible[:, 1:] >= visible[:, :-1]).all()):
        return None
    return visible.to(torch.uint8).argsort(dim=-1, stable=True)


def warn_of_short_windows(window: int, tokens: Tensor, held: Tensor) -> None:
    """Warns of sequences that no longer have their whole window, because recent tokens were hidden too late.

    Args:
        tokens: of each sequence that are not padding, [batch].
        held: how many of the last of them the layer holds, [batch].
    """
    short = tokens.clamp(max=window - 1) - held
    if bool((short > 0).any()):
        warnings.warn(
            f"attention_mask hides so many tokens it showed that up to {int(short.max())} older ones of a sliding "
            f"window of {window}, gone since, are missing in {int((short > 0).sum())} of {len(short)} sequences",
            stacklevel=2,
        )


def reordered(tensor: Tensor, order: Tensor | None) -> Tensor:
    """The tokens of [batch, heads, tokens, head_dim] in another order, [batch, tokens] int64."""
    if order is None:
        return tensor
    return tensor.gather(2, order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))
