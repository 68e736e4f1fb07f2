"""The padding record of a cache whose sequences share tokens: which columns are whose, and what was fed in them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompress.prefix.promotion import Promotion
from kvcompress.prefix.tree import UNKNOWN, Tree
from kvcompress.storage.padding import PaddingRecord

if TYPE_CHECKING:
    from kvcompress.prefix.layer import SharedLayer

# stands for a token's id in a column that has no own token of its row
PADDING = -2


class PrefixPadding(PaddingRecord):
    """The padding record of a cache whose rows hold nodes.

    Until a row has a suffix, the caller decides the columns of what it holds: padding may come before the prefix (whole
    prompts, padded on the left) or after it (suffixes, padded on the left). Either way a row's past columns show as
    many tokens as it holds, or fewer; then the missing ones are fed again and dropped.

    stored: [batch, queries] bool, which tokens of the current forward go to the suffix; None: all.
    fed: [batch, columns] int32, the tokens of the columns fed since the rows were laid out: an id, UNKNOWN, or PADDING
    for a column that has no own token of the row.
    """

    def __init__(self, tree: Tree) -> None:
        self.layers: list[SharedLayer] = []
        self._visible: Tensor | None = None
        super().__init__()
        self.tree = tree
        self.columns_fixed = True
        self.fed: Tensor | None = None
        self.fed_from = 0
        self.forget()

    @property
    def visible(self) -> Tensor | None:
        missing = 0
        if self._visible is not None and self.layers and not torch.compiler.is_compiling():
            missing = self.layers[0].clock.seen - self._visible.shape[1]
        if missing > 0:
            assert self._visible is not None
            # steps that were compiled left no record; all tokens that they fed are real
            self._visible = torch.nn.functional.pad(self._visible, (0, missing), value=True)
        return self._visible

    @visible.setter
    def visible(self, visible: Tensor | None) -> None:
        self._visible = visible

    def forget(self) -> None:
        """Forgets what belongs to the current forward."""
        self.stored: Tensor | None = None
        # tokens of nodes are fed again
        self.again = False
        # [batch, queries], what the decoder is fed; None if unknown
        self.ids: Tensor | None = None
        # undoes what was done to the rows, if the forward is refused
        self.undo: Callable[[], None] | None = None
        self.needs_suffix = False
        self.position_ids: Tensor | None = None
        self.before: Tensor | None = None
        # how many tokens of each row's past the forward's mask shows
        self._past: Tensor | None = None
        self._fresh: Tensor | None = None
        self._positions: Tensor | None = None
        self._queries = 0
        # what the first layer found to be shared, for the other layers
        self.found: Promotion | None = None

    def settle(self, holds_suffix: bool) -> None:
        """After the last layer of a forward."""
        if self.found is not None:
            self.tree.set_leaves(self.found.leaves)
            self._take(self.found.taken)
        # what was found in the rows keeps its columns, even if it is all of them
        self.columns_fixed = holds_suffix or self.found is not None
        self.forget()

    def see(self, tokens: int) -> None:
        """Reports so many columns as seen."""
        for layer in self.layers:
            layer.clock.begin_at(tokens)

    def note_steps(self) -> None:
        """Begins to record what is fed, before the first step that is compiled and leaves no record."""
        if self.fed is None:
            self.fed_from = self.layers[0].clock.seen
            self.fed = torch.empty(len(self.tree.leaves), 0, dtype=torch.int32)

    def shown(self, rows: int, seen: int) -> Tensor:
        """Tokens of each row that are not padding, [rows]."""
        return torch.full((rows,), seen) if self.visible is None else self.visible.sum(-1)

    def own_lengths(self, seen: int) -> list[int]:
        """For each row, after so many columns seen, how many of its tokens are its own, in no node."""
        rows, ahead = len(self.tree.leaves), self.tree.overlap
        if not self.columns_fixed or not rows:
            return [0] * rows
        own = self.shown(rows, seen).cpu() - torch.tensor(self.tree.lengths())
        return (own if ahead is None else own + ahead.cpu()).tolist()

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_rows(change)
        if self.fed is not None:
            self.fed = change(self.fed)

    def begins_again(self, mask: Tensor | None, queries: int, past: int) -> bool:
        """True if the rows are fed from their first token on, although the nodes hold some."""
        given = self.position_ids
        if self.columns_fixed or not past or not self.tree.nodes or given is None or given.dim() != 2:
            return False
        if given.shape[1] != queries or (mask is not None and mask.shape[1] != queries):
            return False
        first = given[:, 0] if mask is None else given.expand(len(mask), -1)[mask & (mask.cumsum(-1) == 1)]
        return len(first) > 0 and bool((first == 0).all())

    def read(
        self, mask: Tensor | None, batch: int, past: int, queries: int, position_ids: Tensor | None = None
    ) -> None:
        # a row may be fed again what it holds, at the positions it had
        if self.columns_fixed or not self.tree.nodes:
            before = self.shown(batch, past)
            super().read(mask, batch, past, queries, None if self.tree.overlap is not None else position_ids)
            self.last_position = None
            self.before = before
            self._past = before if self.remap is None else (self.remap >= 0).sum(-1)
            self.needs_suffix = bool(self.tree.nodes) and self.remap is not None and self._hides_shared(self.remap)
            if self.remap is not None:
                self._hide(self.remap, past)
            if self.needs_suffix:
                for layer in self.layers:
                    layer.check_thaw()
                self.tree.overlap = None
        else:
            self.fed = None
            self._lay_out(mask, batch, past, queries)
            self.before = self._past = self.shown(batch, past)
            self._append(None if mask is None else mask[:, -queries:], batch, past, queries)
        self.columns_fixed = True
        self.stored = self._fresh = None if mask is None else mask[:, -queries:]
        self._queries = queries
        ahead = self.tree.overlap
        if ahead is not None:
            fresh = ahead.new_ones(batch, queries, dtype=torch.bool) if self._fresh is None else self._fresh
            place = fresh.cumsum(-1)
            ahead = ahead.to(place.device)
            self.stored = fresh & (place > ahead[:, None])
            self._check_fed_again(fresh & ~self.stored)
            self.again = True
            ahead = (ahead - place[:, -1]).clamp(min=0)
            self.tree.overlap = ahead if bool(ahead.any()) else None
        if self.stored is not None and bool(self.stored.all()):
            self.stored = None
        self._note(batch, past, queries)

    def _last_positions(self, batch: int, past: int) -> Tensor:
        # rows share tokens and then differ: the columns that each one shows say how far it has come
        return self.shown(batch, past) - 1

    def _check_fed_again(self, again: Tensor) -> None:
        """Raises ValueError if the tokens fed again, [batch, queries] bool, are not those that the nodes hold."""
        at = self.positions(again.device)
        known = None if self.ids is None or self.ids.shape != again.shape else self.ids.to(again.device)
        for row, leaf in enumerate(self.tree.leaves):
            places = at[row, again[row]]
            if not len(places):
                continue
            first = int(places.min())
            for layer in self.layers:
                layer.check_reach(leaf, first)
            if known is not None:
                same_tokens(row, known[row, again[row]].cpu(), self.tree.ids(leaf)[places.cpu().long()], places.cpu())

    def _note(self, batch: int, past: int, queries: int) -> None:
        """Records what the columns of the current forward are."""
        ids = self.ids
        if ids is None or ids.shape != (batch, queries):
            ids = torch.full((batch, queries), UNKNOWN)
        ids = ids.to(torch.int32)
        if self.stored is not None:
            ids = ids.masked_fill(~self.stored.to(ids.device), PADDING)
        if self.fed is None:
            self.fed, self.fed_from = ids, past
            return
        # steps that were compiled left no record
        missing = past - self.fed_from - self.fed.shape[1]
        self.fed = torch.cat([self.fed, self.fed.new_full((batch, missing), UNKNOWN), ids.to(self.fed.device)], 1)

    def own_ids(self, row: int) -> Tensor:
        """A row's own tokens, [tokens] int32 on the CPU."""
        own = torch.empty(0, dtype=torch.int32) if self.fed is None else self.fed[row].cpu()
        return own[own != PADDING]

    def row_ids(self, row: int, tokens: int) -> Tensor:
        """The first tokens of a row, in its nodes and its own, [tokens] int32 on the CPU."""
        ids = torch.cat([self.tree.ids(self.tree.leaves[row]), self.own_ids(row)])
        # steps that were compiled left no record
        return torch.cat([ids, ids.new_full((tokens,), UNKNOWN)])[:tokens]

    def _hide(self, remap: Tensor, past: int) -> None:
        assert self.visible is not None
        assert self.before is not None
        if self.needs_suffix:
            stays = [remap[row, : int(tokens)].cpu() >= 0 for row, tokens in enumerate(self.before)]
            rows = [self.row_ids(row, len(kept))[kept] for row, kept in enumerate(stays)]
            self.lay_ids(rows, self.visible[:, :past])
        elif self.fed is not None:
            width = self.fed.shape[1]
            now = self.visible[:, self.fed_from : self.fed_from + width]
            self.fed = self.fed.masked_fill(~now.to(self.fed.device), PADDING)

    def lay_ids(self, rows: list[Tensor], visible: Tensor) -> None:
        """Sets the rows' own tokens: for each row [tokens], in its visible columns, [batch, columns] bool."""
        fed = torch.full(visible.shape, PADDING, dtype=torch.int32)
        for row, ids in enumerate(rows):
            fed[row, visible[row].cpu().nonzero()[: len(ids), 0]] = ids.to(torch.int32)
        self.fed, self.fed_from = fed.to(visible.device), 0

    def _take(self, taken: list[int]) -> None:
        """Records that the first own tokens of each row are now in nodes."""
        if self.fed is not None:
            own = self.fed != PADDING
            gone = own & (own.cumsum(-1) <= torch.tensor(taken, device=own.device)[:, None])
            self.fed = self.fed.masked_fill(gone, PADDING)

    def crop(self, tokens: int, seen: int) -> None:
        super().crop(tokens, seen)
        if self.fed is not None:
            # steps that were compiled left no record, so that it may end before the tokens taken back
            self.fed = self.fed[:, : max(0, seen - self.fed_from)].clone()

    def _hides_shared(self, remap: Tensor) -> bool:
        """True if a token that is in a node is to be dropped."""
        assert self.before is not None
        held = torch.tensor(self.tree.lengths(), device=remap.device)
        place = torch.arange(remap.shape[1], device=remap.device)
        in_nodes = place < torch.minimum(held, self.before.to(remap.device))[:, None]
        return bool((in_nodes & (remap < 0)).any())

    def _lay_out(self, mask: Tensor | None, batch: int, past: int, queries: int) -> None:
        """Lets the mask decide which columns the tokens of the nodes are in."""
        self.remap = None
        told = self.visible
        if mask is not None and mask.shape == (batch, past + queries):
            told = mask[:, :past]
        elif mask is not None and mask.shape != (batch, queries):
            raise ValueError(
                f"attention_mask must be [batch={batch}, tokens seen={past + queries}], got {list(mask.shape)}"
            )
        held = torch.tensor(self.tree.lengths(), device=None if told is None else told.device)
        shown = torch.full_like(held, past) if told is None else told.sum(-1)
        if bool((shown > held).any()):
            row = int((shown - held).argmax())
            raise ValueError(
                f"attention_mask shows {int(shown[row])} tokens of row {row} before the new ones, but the cache holds "
                f"{int(held[row])}; pass whole prompts padded on the left, or suffixes with "
                "attention_mask=cache.cover(mask)"
            )
        ahead = held.to(shown.device) - shown
        self.tree.overlap = ahead if bool(ahead.any()) else None
        self.visible = None if told is None or bool(told.all()) else told.clone()
        self._check_positions(shown, None if mask is None else mask[:, -queries:], queries)

    def _check_positions(self, shown: Tensor, fresh: Tensor | None, queries: int) -> None:
        given = self.position_ids
        if given is None or given.dim() != 2 or given.shape[1] != queries:
            return
        given = given.to(shown.device)
        place = torch.arange(queries, device=shown.device) if fresh is None else fresh.cumsum(-1) - 1
        wrong = given != shown[:, None] + place
        if fresh is not None:
            wrong = wrong & fresh
        if bool(wrong.any()):
            raise ValueError(
                "the new tokens do not follow those that the cache holds: their position ids begin at "
                f"{given[:, 0].tolist()}, after {shown.tolist()} tokens; pass whole prompts, or suffixes with "
                "attention_mask=cache.cover(mask)"
            )

    def positions(self, device: torch.device) -> Tensor:
        """The positions of the current queries, padding not counted, [batch, queries] int32."""
        if self._positions is None:
            assert self._past is not None
            place = torch.arange(self._queries)[None] if self._fresh is None else self._fresh.cumsum(-1) - 1
            self._positions = (self._lay(self._past, device)[:, None] + self._lay(place, device)).clamp_(min=0)
        return self._positions.to(device)

    @staticmethod
    def _lay(tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.to(device, torch.int32)

    def repeat(self, repeats: int) -> None:
        """Repeats each row several times."""
        self.visible = None if self.visible is None else self.visible.repeat_interleave(repeats, 0)


def same_tokens(row: int, given: Tensor, held: Tensor, places: Tensor) -> None:
    """
    Raises:
        ValueError: a row's tokens [tokens] are not those that the cache holds at these positions, except for UNKNOWN.
    """
    wrong = ((given != held) & (held != UNKNOWN)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"row {row} does not match the tokens that the cache holds: its token {int(places[first])} is "
            f"{int(given[first])}, but the cache was fed {int(held[first])}. Prompts must begin with the cache's "
            "tokens, in the order of its rows and padded as in its attention_mask; suffixes alone need "
            "attention_mask=cache.cover(mask). One cache is for one conversation: clone() it before each call, or "
            "build another"
        )
