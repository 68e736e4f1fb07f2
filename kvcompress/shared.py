"""A layer whose past is partly shared: nodes that many sequences pass through, and a suffix of each sequence's own."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcompress.dense import DenseLayer, with_sinks
from kvcompress.kernels.merge import merge_states
from kvcompress.kernels.prefix import Sharing, merge_blocks, prefix_attention
from kvcompress.layer import Chunk
from kvcompress.padding import PaddingRecord
from kvcompress.segments import DenseSegment, Segment
from kvcompress.tree import ROOT, Tree


class SuffixSegment(DenseSegment):
    """The tokens of each sequence's own; many sequences have room to spare, so there is little of it."""

    growth: ClassVar[int] = 16


class NodeSegment(Segment):
    """Every token of a node, or on a sliding layer its last ones. Never written to again, so copies share it.

    prefix_keys, prefix_values: [1, kv_heads, tokens, head_dim].
    """

    state = ("prefix_keys", "prefix_values")

    prefix_keys: Tensor
    prefix_values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.prefix_keys, self.prefix_values = keys, values

    @property
    def tokens(self) -> int:
        return self.prefix_keys.shape[2]

    def kept(self) -> Tensor:
        """Tokens held, [1, kv_heads] int64."""
        return torch.full(self.prefix_keys.shape[:2], self.tokens, device=self.prefix_keys.device)


@dataclass(frozen=True)
class Move:
    """Tokens of the suffix that become nodes.

    nodes: for each new node its name, a row that holds its tokens, and which of the row's tokens in the suffix, padding
    not counted: first .. stop. taken: for each row how many of its first tokens in the suffix are in nodes now.
    counts: for each row how many tokens it has in the suffix.
    """

    nodes: list[tuple[int, int, int, int]]
    taken: list[int]
    counts: list[int]


class SharedRecord(PaddingRecord):
    """The padding record of a cache whose rows hold nodes.

    Until a row has a suffix, the columns of what it holds are the caller's to lay out: its padding may come before
    the prefix (whole prompts, padded on the left) or behind it (suffixes, padded on the left). Either way a row's past
    columns show as many tokens as it holds, or fewer; in that case the missing ones come once more and are dropped.

    stored: [batch, queries] bool, which tokens of the forward at hand go to the suffix; None: all.
    """

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        self.tree = tree
        self.laid_out = True
        self.stored: Tensor | None = None
        self.position_ids: Tensor | None = None
        self._before: Tensor | None = None
        self._fresh: Tensor | None = None
        self._shape = (0, 0, 0)
        self._positions: Tensor | None = None

    def read(self, mask: Tensor | None, batch: int, past: int, queries: int) -> None:
        if self.laid_out or not past:
            super().read(mask, batch, past, queries)
        else:
            self._lay_out(mask, batch, past, queries)
        self.laid_out = True
        self._before = None if self.visible is None else self.visible[:, :past]
        self._fresh = None if mask is None else mask[:, -queries:]
        self._shape = (batch, past, queries)
        self._positions = None
        self.stored = self._fresh
        ahead = self.tree.ahead
        if ahead is not None:
            fresh = ahead.new_ones(batch, queries, dtype=torch.bool) if self._fresh is None else self._fresh
            place = fresh.cumsum(-1)
            ahead = ahead.to(place.device)
            self.stored = fresh & (place > ahead[:, None])
            ahead = (ahead - place[:, -1]).clamp(min=0)
            self.tree.ahead = ahead if bool(ahead.any()) else None

    def _lay_out(self, mask: Tensor | None, batch: int, past: int, queries: int) -> None:
        """Takes the mask's word for where the tokens of the nodes stand."""
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
                f"attention_mask shows {int(shown[row])} tokens of row {row} before the new ones, and the cache holds "
                f"{int(held[row])}; pass whole prompts padded on the left, or suffixes with attention_mask=cache.cover(mask)"
            )
        ahead = held - shown
        self.tree.ahead = ahead if bool(ahead.any()) else None
        self.visible = None if told is None or bool(told.all()) else told.clone()
        fresh = None if mask is None else mask[:, -queries:]
        self._check_positions(shown, fresh, queries)
        self._append(fresh, batch, past, queries)

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
                "the new tokens do not follow on the tokens that the cache holds: their position ids begin at "
                f"{given[:, 0].tolist()}, after {shown.tolist()} tokens; pass whole prompts, or suffixes with "
                "attention_mask=cache.cover(mask)"
            )

    def positions(self, device: torch.device) -> Tensor:
        """The positions of the queries at hand, padding not counted, [batch, queries] int32."""
        if self._positions is None:
            batch, past, queries = self._shape
            before = torch.full((batch, 1), past) if self._before is None else self._before.sum(-1, keepdim=True)
            place = torch.arange(queries)[None] if self._fresh is None else self._fresh.cumsum(-1).sub_(1).clamp_(min=0)
            self._positions = (before.to(device) + place.to(device)).to(torch.int32)
        return self._positions.to(device)

    def repeat(self, repeats: int) -> None:
        """Each row several times."""
        self.visible = None if self.visible is None else self.visible.repeat_interleave(repeats, 0)


class SharedLayer(DenseLayer):
    """Keeps every token: those of nodes once, those of the suffixes for each row."""

    storage = SuffixSegment
    padding: SharedRecord

    def __init__(self, padding: SharedRecord, window: int | None, leads: bool, tree: Tree) -> None:
        super().__init__(padding, window, leads)
        self.tree = tree
        self.held: dict[int, list[Segment]] = {}
        self._last: tuple[Sharing, list[Tensor], list[Tensor], list[int]] | None = None

    def segments(self) -> list[Segment]:
        own: list[Segment] = [] if self.dense is None else [self.dense]
        return own + [segment for node in self.held.values() for segment in node]

    def map_tensors(self, change: Any) -> None:
        if self.dense is not None:
            self.dense.map_tensors(change)

    def attend(self, query: Tensor, visible: Tensor | None, **kwargs: Any) -> Tensor:
        if self.leads:
            self.padding.position_ids = kwargs["position_ids"]
        return super().attend(query, visible, **kwargs)

    def _attend(self, chunk: Chunk) -> Tensor:
        stored = self.padding.stored
        own = chunk if stored is None else replace(chunk, visible=stored.to(chunk.key.device))
        out, lse = self._attend_dense(own)
        outs, lses = [out], [lse]
        if self.held:
            out, lse = self._attend_nodes(chunk)
            outs, lses = [out, *outs], [lse, *lses]
        if chunk.sinks is not None:
            outs, lses = with_sinks(outs, lses, chunk.sinks)
        return merge_states(outs, lses)[0] if len(outs) > 1 else outs[0]

    def _attend_nodes(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        sharing = self.tree.sharing()
        options: dict[str, Any] = {"scale": chunk.scale, "window": self.window, "softcap": chunk.softcap}
        positions = None if self.window is None else self.padding.positions(chunk.query.device)
        if all(isinstance(segment, NodeSegment) for node in self.held.values() for segment in node):
            keys, values, starts = self._blocks(sharing)
            return prefix_attention(
                chunk.query, keys, values, sharing, starts=starts, query_positions=positions, **options
            )
        outs, lses = [], []
        at = self.padding.positions(chunk.query.device)
        for block, (name, segments) in enumerate(self.held.items()):
            rows = sharing.pick(block, chunk.query.device)
            query = chunk.query[rows]
            # all queries of the node as one row's
            together = query.transpose(0, 1).flatten(1, 2)[None]
            relative = at[rows].reshape(1, -1) - self.tree.nodes[name].start
            answers = [segment.attend(together, relative, **options) for segment in segments]
            out, lse = answers[0] if len(answers) == 1 else merge_states(*map(list, zip(*answers, strict=True)))
            outs.append(out[0].unflatten(1, query.shape[::2][:2]).transpose(0, 1).contiguous())
            lses.append(lse[0].unflatten(1, query.shape[::2][:2]).transpose(0, 1).contiguous())
        return merge_blocks(outs, lses, sharing, chunk.query, chunk.value.shape[-1])

    def _blocks(self, sharing: Sharing) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Keys and values of the nodes, [kv_heads, tokens, head_dim] each, and the position of each one's first token."""
        if self._last is None or self._last[0] is not sharing:
            nodes: list[Any] = [node[0] for node in self.held.values()]
            starts = [self.tree.nodes[name].stop - node[0].tokens for name, node in self.held.items()]  # type: ignore[attr-defined]
            self._last = (
                sharing,
                [node.prefix_keys[0] for node in nodes],
                [node.prefix_values[0] for node in nodes],
                starts,
            )
        return self._last[1:]

    def move(self, move: Move) -> None:
        """Turns the beginnings of suffixes into nodes."""
        assert self.dense is not None
        keys, values, visible = self.dense.held()
        for name, row, first, stop in move.nodes:
            columns = torch.arange(self.dense.length, device=keys.device)
            if visible is not None:
                columns = columns[visible[row]]
            # a sliding layer may have let the first tokens go, and needs no more than its window of any node
            gone = move.counts[row] - len(columns)
            first = max(first, gone) if self.window is None else max(first, gone, stop - self.window)
            columns = columns[first - gone : stop - gone]
            self.held[name] = [NodeSegment(keys[row : row + 1, :, columns], values[row : row + 1, :, columns])]
        held = self.dense.length
        shown = torch.ones(len(keys), held, dtype=torch.bool, device=keys.device) if visible is None else visible
        gone = torch.tensor(move.counts, device=keys.device) - shown.sum(-1)
        left = torch.tensor(move.taken, device=keys.device) - gone
        shown = shown & (shown.cumsum(-1) > left[:, None])
        kept = shown.any(0).nonzero()
        if len(kept) == 0:
            self.dense = None
            return
        if move.taken and any(move.taken):
            self.dense.show(shown)
            self.dense.drop_first(int(kept[0]))

    def prune(self, names: list[int]) -> None:
        """Lets nodes go."""
        for name in names:
            self.held.pop(name, None)

    def _remap(self, remap: Tensor) -> None:
        visible = self.padding.visible
        assert visible is not None
        past = remap.shape[1]
        suffix = 0 if self.dense is None else self.dense.length
        held = torch.tensor([self.tree.length(leaf) for leaf in self.tree.leaves], device=remap.device)
        in_nodes = torch.arange(past, device=remap.device) < held[:, None]
        if bool((in_nodes & (remap < 0) & (torch.arange(past, device=remap.device) < (remap >= 0).sum(-1, keepdim=True))).any()):
            raise ValueError("attention_mask hides tokens that other sequences share; build the cache anew without them")
        if self.dense is not None:
            shown = visible[:, past - suffix : past].to(remap.device)
            if self.dense.visible is not None:
                shown = shown & self.dense.visible[:, :suffix]
            self.dense.show(shown)

    def tokens_kept(self) -> Tensor:
        assert self.kv_shape is not None
        batch, kv_heads, _ = self.kv_shape
        own = torch.zeros(batch, kv_heads, dtype=torch.int64) if self.dense is None else super().tokens_kept().clone()
        of_node = {name: sum(segment.kept() for segment in node) for name, node in self.held.items()}  # type: ignore[attr-defined]
        for row, leaf in enumerate(self.tree.leaves):
            for name in self.tree.path(leaf):
                own[row] += of_node[name][0].to(own.device)
        return own

    def reset(self) -> None:
        super().reset()
        self.held = {}
        self._last = None
