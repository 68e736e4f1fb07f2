"""Which of the tokens a cache has seen are padding.

Caches place tokens by their position in their own sequence, pads not counted, so that a row of a padded batch is
treated as if it were alone. The record is kept once a cache, and read by its first layer in each forward.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from kvcompress.storage.segment import EMPTY

# no position is so far off
_UNKNOWN = 2**62


class PaddingRecord:
    """The padding mask of all tokens seen, [batch, tokens seen] bool; None while nothing is padded."""

    # of what is saved, in the order of `tensors`
    names = ("padding", "filler", "last_position", "shift", "last_fed")
    # the method at hand undoes rotations, so that a sequence's positions must go up by one a token
    needs_even_positions = False

    def __init__(self) -> None:
        self.visible: Tensor | None = None
        # columns that `generate` fed to rows that had ended, [batch, tokens seen] bool; None where there are none
        self.filler: Tensor | None = None
        # the position that the model gave to each sequence's last token; None where it is not known
        self.last_position: list[int] | None = None
        # how far the model's positions are ahead of a count of real tokens, by row; None before the first forward
        self.shift: list[int] | None = None
        # the last token fed to each row, an end where it is filler; and the rows whose token in the forward at hand is
        # filler, [batch] bool
        self.last_fed: list[int] | None = None
        self.ended: Tensor | None = None
        self.remap: Tensor | None = None
        # tokens of each sequence until now, [batch], before `remap` moves them
        self.before: Tensor | None = None
        self._counts: list[int] | None = None
        self._counted = False

    def tensors(self) -> dict[str, Tensor]:
        """What is to be saved, by name."""
        numbers = (self.last_position, self.shift, self.last_fed)
        saved = [self.visible, self.filler, *(None if each is None else torch.tensor(each) for each in numbers)]
        return {name: tensor for name, tensor in zip(self.names, saved, strict=True) if tensor is not None}

    def held(self) -> list[Tensor]:
        """The masks that live as long as the tokens."""
        return [mask for mask in (self.visible, self.filler) if mask is not None]

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes on what `tensors` gave."""
        self.visible, self.filler = tensors.get("padding"), tensors.get("filler")
        self.last_position, self.shift, self.last_fed = (
            tensors[name].tolist() if name in tensors else None for name in self.names[2:]
        )
        self.ended = None

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces each tensor, whose first dimension is the batch, by `change(tensor)`."""
        self.restore({name: change(tensor) for name, tensor in self.tensors().items()})

    def note_fed(self, ids: Tensor | None, pad: int | None, ends: list[int]) -> None:
        """Finds the rows that have ended, by what `generate` feeds them while others go on: behind an end only `pad`.

        Args:
            ids: [batch, tokens] that the next forward is fed, None where they are not known.
            pad: the token fed to rows that have ended, None where it is not known.
            ends: tokens that end a sequence. The first of them is the row's own.
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

    def fresh_of(self, mask: Tensor | None, queries: int) -> Tensor | None:
        """Which of the tokens of the forward at hand are real, [batch, queries] bool; None for all.

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
        """Takes in the mask of a forward, once, before its first layer stores anything.

        Leaves in `remap` how positions change, [batch, past tokens] int32 (EMPTY for a token that goes), where the
        mask hides tokens that were visible; else None.

        Args:
            mask: [batch, past + queries] or [batch, queries] bool, or None.
            position_ids: the model's own positions of the tokens, [batch or 1, queries], None where it has none.

        Raises:
            ValueError: the mask's size is wrong, it shows a token that was cached as padding, or the positions do not
                follow on those before. Nothing has changed then.
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
            ValueError: they go back, or leave a gap that the method at hand cannot serve.
        """
        batch, queries = position_ids.shape
        if queries == 1 and position_ids.is_cuda:
            # a decode step must not wait for the GPU, and what generate feeds follows on
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
                f"position ids must follow on what the cache has seen: row {row} had a token at position "
                f"{int(before[row, column])}, and its next one is at {int(position_ids[row, column])}; feed only what "
                "is new, with the positions that come after; pad prompts on the left; or begin anew (cache.reset())"
            )
        self.last_position = reached[:, -1].maximum(last).tolist()
        if self.needs_even_positions:
            self._check_even(position_ids, fresh, past)

    def _last_positions(self, batch: int, past: int) -> Tensor:
        """Positions that no token may come at or before, [batch]."""
        return torch.tensor([-1] * batch if self.last_position is None else self.last_position)

    def _check_even(self, position_ids: Tensor, fresh: Tensor, past: int) -> None:
        shown = fresh.new_full((len(fresh),), past, dtype=torch.int64)
        if self.visible is not None:
            # steps that were compiled left no record; what they fed is visible
            held = self.visible.to(fresh.device)
            shown = held.sum(-1) + past - held.shape[1]
        shifts = position_ids - (shown[:, None] + fresh.cumsum(-1) - 1)
        known = shown.new_tensor([_UNKNOWN] * len(shown) if self.shift is None else self.shift)
        first = shifts.gather(1, fresh.to(torch.uint8).argmax(1, keepdim=True))[:, 0]
        known = torch.where((known == _UNKNOWN) & fresh.any(1), first, known)
        uneven = fresh & (shifts != known[:, None])
        if bool(uneven.any()):
            row, column = uneven.nonzero()[0].tolist()
            raise ValueError(
                "this cache takes rotations back, so a row's position ids must go up by one a token, padding not "
                f"counted; row {row} has {int(position_ids[row, column])} where "
                f"{int(position_ids[row, column] - shifts[row, column] + known[row])} comes next; pass position_ids "
                "that count the row's real tokens, or use a cache that keeps keys as they come"
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
            # who feeds filler shows it too, as generate does
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
        # the token at place p of its sequence goes to place remap[p]
        place = (before.cumsum(-1) - 1).masked_fill(~before, now.shape[1])
        to = (now.cumsum(-1) - 1).masked_fill(~now, EMPTY).to(torch.int32)
        remap = torch.full((now.shape[0], now.shape[1] + 1), EMPTY, dtype=torch.int32, device=now.device)
        self.remap = remap.scatter_(1, place, to)[:, :-1]
        # what is hidden may have been the last
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
        # steps that were compiled left no record; what they fed is visible
        self.visible = torch.cat([self.visible, self.visible.new_ones(batch, missing), tail], 1)

    def counts(self, fresh: Tensor | None) -> list[int] | None:
        """Real tokens of each sequence in the forward at hand, whose mask is [batch, queries]; None where all are real.

        Read from the device once a forward, whichever layers ask.
        """
        if not self._counted:
            self._counts = None if fresh is None or bool(fresh.all()) else fresh.sum(-1).tolist()
            self._counted = True
        return self._counts

    def crop(self, tokens: int) -> None:
        """Forgets the last tokens."""
        if not tokens:
            # which rows have ended, and where they stand, is known still
            return
        for name in ("visible", "filler"):
            columns = getattr(self, name)
            if columns is not None:
                setattr(self, name, columns[:, : columns.shape[1] - tokens].clone())
        self.last_position = self.last_fed = None


def pads_first(visible: Tensor) -> Tensor | None:
    """The order that puts padding before all tokens, [batch, tokens] int64, or None where it stands there already.

    A window counts tokens and no padding. In this order it may count columns.
    """
    if bool((visible[:, 1:] >= visible[:, :-1]).all()):
        return None
    return visible.to(torch.uint8).argsort(dim=-1, stable=True)


def warn_of_short_windows(window: int, tokens: Tensor, held: Tensor) -> None:
    """Tells of sequences that cannot be given their whole window any more, because recent tokens are hidden too late.

    Args:
        tokens: of each sequence that are not padding, [batch].
        held: how many of them, the last ones, the layer holds, [batch].
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
