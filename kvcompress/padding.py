"""Which of the tokens a cache has seen are padding.

Caches place tokens by their position in their own sequence, pads not counted, so that a row of a padded batch is
treated as if it were alone. The record is kept once a cache, and read by its first layer in each forward.
"""

import warnings

import torch
from torch import Tensor

from kvcompress.segments import EMPTY


class PaddingRecord:
    """The padding mask of all tokens seen, [batch, tokens seen] bool; None while nothing is padded."""

    def __init__(self) -> None:
        self.visible: Tensor | None = None
        # real tokens that each sequence was fed by the forward at hand; None where nothing is padded
        self.fresh: list[int] | None = None
        self.remap: Tensor | None = None
        # tokens of each sequence until now, [batch], before `remap` moves them
        self.before: Tensor | None = None
        self._counts: list[int] | None = None
        self._counted = False

    def read(self, mask: Tensor | None, batch: int, past: int, queries: int) -> None:
        """Takes in the mask of a forward, once, before its first layer stores anything.

        Leaves in `remap` how positions change, [batch, past tokens] int32 (EMPTY for a token that goes), where the
        mask hides tokens that were visible; else None.

        Args:
            mask: [batch, past + queries] or [batch, queries] bool, or None.

        Raises:
            ValueError: the mask's size is wrong, or it shows a token that was cached as padding.
        """
        self.remap = None
        self._counted = False
        if mask is None:
            fresh = None
        else:
            if mask.shape[0] != batch or mask.shape[1] not in (queries, past + queries):
                raise ValueError(
                    f"attention_mask must be [batch={batch}, tokens seen={past + queries}], got {list(mask.shape)}"
                )
            fresh = mask[:, -queries:]
            if past and mask.shape[1] == past + queries:
                self._compare(mask[:, :past])
        self._append(fresh, batch, past, queries)
        self.fresh = None if self.visible is None else self.visible[:, -queries:].sum(-1).tolist()

    def _compare(self, now: Tensor) -> None:
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
        if self.visible is not None:
            self.visible = self.visible[:, : self.visible.shape[1] - tokens].clone()


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
