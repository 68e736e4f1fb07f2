"""A layer whose past is partly shared: nodes that many sequences pass through, and a suffix of each sequence's own."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcompress.dense import SLACK, DenseLayer, with_sinks
from kvcompress.kernels.merge import merge_states
from kvcompress.kernels.prefix import KeyBlocks, Sharing, merge_blocks, prefix_attention
from kvcompress.layer import Chunk, CompressedLayer
from kvcompress.padding import PaddingRecord
from kvcompress.rolled import RolledSlots
from kvcompress.segments import DenseSegment, Segment
from kvcompress.tree import ROOT, Tree, common_vectors, find_shared


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
    counts: for each row how many tokens it has in the suffix. leaves: for each row the node that it then goes on from.
    """

    nodes: list[tuple[int, int, int, int]]
    taken: list[int]
    counts: list[int]
    leaves: list[int]


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
        self.forget()

    def forget(self) -> None:
        """Lets go of what belongs to the forward at hand."""
        self.stored: Tensor | None = None
        self.thaws = False
        self.position_ids: Tensor | None = None
        self.before: Tensor | None = None
        # tokens of each row's past as the forward's mask shows them
        self._past: Tensor | None = None
        self._fresh: Tensor | None = None
        self._positions: Tensor | None = None
        self._queries = 0
        # what the first layer found to be shared, for the others to do as it does
        self.found: Move | None = None

    def settle(self, holds_suffix: bool) -> None:
        """After the last layer of a forward."""
        if self.found is not None:
            self.tree.set_leaves(self.found.leaves)
        # what was found in the rows stands where they were fed, even if it is all of them
        self.laid_out = holds_suffix or self.found is not None
        self.forget()

    def shown(self, rows: int, seen: int) -> Tensor:
        """Tokens of each row that are not padding, [rows]."""
        return torch.full((rows,), seen) if self.visible is None else self.visible.sum(-1)

    def read(self, mask: Tensor | None, batch: int, past: int, queries: int) -> None:
        if self.laid_out or not past:
            before = self.shown(batch, past)
            super().read(mask, batch, past, queries)
            self.before = before
            self._past = before if self.remap is None else (self.remap >= 0).sum(-1)
            self.thaws = bool(self.tree.nodes) and self.remap is not None and self._hides_shared(self.remap)
            if self.thaws:
                self.tree.ahead = None
        else:
            self._lay_out(mask, batch, past, queries)
            self.before = self._past = self.shown(batch, past)
            self._append(None if mask is None else mask[:, -queries:], batch, past, queries)
        self.laid_out = True
        self.stored = self._fresh = None if mask is None else mask[:, -queries:]
        self._queries = queries
        ahead = self.tree.ahead
        if ahead is not None:
            fresh = ahead.new_ones(batch, queries, dtype=torch.bool) if self._fresh is None else self._fresh
            place = fresh.cumsum(-1)
            ahead = ahead.to(place.device)
            self.stored = fresh & (place > ahead[:, None])
            ahead = (ahead - place[:, -1]).clamp(min=0)
            self.tree.ahead = ahead if bool(ahead.any()) else None
        if self.stored is not None and bool(self.stored.all()):
            self.stored = None

    def _hides_shared(self, remap: Tensor) -> bool:
        """True where a token is to be forgotten that lies in a node."""
        assert self.before is not None
        held = torch.tensor(self.tree.lengths(), device=remap.device)
        place = torch.arange(remap.shape[1], device=remap.device)
        in_nodes = place < torch.minimum(held, self.before.to(remap.device))[:, None]
        return bool((in_nodes & (remap < 0)).any())

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
                f"{int(held[row])}; pass whole prompts padded on the left, or suffixes with "
                "attention_mask=cache.cover(mask)"
            )
        ahead = held - shown
        self.tree.ahead = ahead if bool(ahead.any()) else None
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
                "the new tokens do not follow on the tokens that the cache holds: their position ids begin at "
                f"{given[:, 0].tolist()}, after {shown.tolist()} tokens; pass whole prompts, or suffixes with "
                "attention_mask=cache.cover(mask)"
            )

    def positions(self, device: torch.device) -> Tensor:
        """The positions of the queries at hand, padding not counted, [batch, queries] int32."""
        if self._positions is None:
            assert self._past is not None
            place = torch.arange(self._queries)[None] if self._fresh is None else self._fresh.cumsum(-1) - 1
            self._positions = (self._lay(self._past, device)[:, None] + self._lay(place, device)).clamp_(min=0)
        return self._positions.to(device)

    @staticmethod
    def _lay(tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.to(device, torch.int32)

    def repeat(self, repeats: int) -> None:
        """Each row several times."""
        self.visible = None if self.visible is None else self.visible.repeat_interleave(repeats, 0)


class SharedLayer(DenseLayer):
    """Keeps every token: those of nodes once, those of the suffixes for each row."""

    storage = SuffixSegment
    padding: SharedRecord

    def __init__(self, padding: SharedRecord, window: int | None, leads: bool, tree: Tree, min_tokens: int) -> None:
        """
        Args:
            leads: first layer of the cache.
            tree: of the whole cache.
            min_tokens: shared runs of fewer tokens stay in the suffixes.
        """
        super().__init__(padding, window, leads)
        self.tree = tree
        self.min_tokens = min_tokens
        self.held: dict[int, list[Segment]] = {}
        self._last: tuple[Sharing, KeyBlocks] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # addresses say nothing of a copy
        return self.__dict__ | {"_last": None}

    def segments(self) -> list[Segment]:
        own: list[Segment] = [] if self.dense is None else [self.dense]
        return own + [segment for node in self.held.values() for segment in node]

    def map_tensors(self, change: Any) -> None:
        self._last = None
        if self.dense is not None:
            self.dense.map_tensors(change)

    def attend(self, query: Tensor, visible: Tensor | None, **kwargs: Any) -> Tensor:
        if self.leads:
            self.padding.position_ids = kwargs["position_ids"]
        out = super().attend(query, visible, **kwargs)
        if self.ends:
            self.padding.settle(self.dense is not None)
        return out

    def _attend(self, chunk: Chunk) -> Tensor:
        stored = self.padding.stored
        own = replace(chunk, visible=None if stored is None else stored.to(chunk.key.device))
        out, lse = self._attend_dense(own)
        outs, lses = [out], [lse]
        if self.leads and self._seen == 0 and len(chunk.key) > 1:
            self.padding.found = self._find(own)
        if self.padding.found is not None:
            self.move(self.padding.found)
        elif self.held:
            out, lse = self._attend_nodes(chunk)
            outs, lses = [out, *outs], [lse, *lses]
        if chunk.sinks is not None:
            outs, lses = with_sinks(outs, lses, chunk.sinks)
        return merge_states(outs, lses)[0] if len(outs) > 1 else outs[0]

    def _find(self, chunk: Chunk) -> Move | None:
        """What rows turn out to have in common: in the first layer a key says which token stands where."""
        rows = [key.transpose(0, 1).flatten(1) for key in chunk.key]
        if chunk.visible is not None:
            rows = [row[shown] for row, shown in zip(rows, chunk.visible, strict=True)]
        counts = [len(row) for row in rows]
        found = find_shared(counts, common_vectors(rows), self.min_tokens)
        if not found:
            return None
        names: list[int] = []
        leaves, taken = list(self.tree.leaves), [0] * len(rows)
        for shared in found:
            names.append(self.tree.add(ROOT if shared.parent == ROOT else names[shared.parent], shared.tokens))
            for row in shared.rows:
                leaves[row], taken[row] = names[-1], shared.stop
        nodes = [(name, shared.rows[0], shared.start, shared.stop) for name, shared in zip(names, found, strict=True)]
        return Move(nodes, taken, counts, leaves)

    def _attend_nodes(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        sharing = self.tree.sharing()
        options: dict[str, Any] = {"scale": chunk.scale, "window": self.window, "softcap": chunk.softcap}
        positions = None if self.window is None else self.padding.positions(chunk.query.device)
        if all(isinstance(segment, NodeSegment) for node in self.held.values() for segment in node):
            return prefix_attention(
                chunk.query, self._node_blocks(sharing), sharing, query_positions=positions, **options
            )
        nodes_outs: dict[int, Tensor] = {}
        nodes_lses: dict[int, Tensor] = {}
        at = self.padding.positions(chunk.query.device)
        for block, (name, segments) in enumerate(self.held.items()):
            if not sharing.rows[block]:
                continue
            rows = sharing.pick(block, chunk.query.device)
            query = chunk.query[rows]
            # all queries of the node as one row's
            together = query.transpose(0, 1).flatten(1, 2)[None]
            relative = at[rows].reshape(1, -1) - self.tree.nodes[name].start
            answers = [segment.attend(together, relative, **options) for segment in segments]
            out, lse = answers[0] if len(answers) == 1 else merge_states(*map(list, zip(*answers, strict=True)))
            apart = (query.shape[0], query.shape[2])
            nodes_outs[block] = out[0].unflatten(1, apart).transpose(0, 1).contiguous()
            nodes_lses[block] = lse[0].unflatten(1, apart).transpose(0, 1).contiguous()
        return merge_blocks(nodes_outs, nodes_lses, sharing, chunk.query, chunk.value.shape[-1])

    def _node_blocks(self, sharing: Sharing) -> KeyBlocks:
        """The nodes as blocks of keys, in the tree's order."""
        if self._last is None or self._last[0] is not sharing:
            nodes: list[Any] = [node[0] for node in self.held.values()]
            starts = [self.tree.nodes[name].stop - node[0].tokens for name, node in self.held.items()]  # type: ignore[attr-defined]
            keys, values = [node.prefix_keys[0] for node in nodes], [node.prefix_values[0] for node in nodes]
            self._last = sharing, KeyBlocks(keys, values, starts)
        return self._last[1]

    def move(self, move: Move) -> None:
        """Turns the beginnings of suffixes into nodes."""
        assert self.dense is not None
        keys, values, visible = self.dense.held()
        for name, row, first, stop in move.nodes:
            columns = torch.arange(self.dense.length, device=keys.device)
            if visible is not None:
                columns = columns[visible[row]]
            # a sliding layer may have let the first tokens go, and needs little more than its window of a node
            missing = move.counts[row] - len(columns)
            least = 0 if self.window is None else stop - self.window - SLACK
            first = max(first, missing, least)
            columns = columns[first - missing : max(first, stop) - missing]
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
        self.dense.show(shown)
        self.dense.drop_first(int(kept[0]))
        if bool(shown[:, int(kept[0]) :].all()):
            self.dense.visible = None

    def cuts(self, name: int) -> bool:
        """True for a node of which the layer can give the first tokens alone: all are here, each for itself."""
        node: list[Any] = self.held[name]
        return isinstance(node[0], NodeSegment) and node[0].tokens == self.tree.nodes[name].tokens

    def cut(self, name: int, tokens: int) -> None:
        """Keeps the first tokens of a node, where they lie."""
        node: list[Any] = self.held[name]
        self.held[name] = [NodeSegment(*(getattr(node[0], part)[:, :, :tokens] for part in NodeSegment.state))]
        self._last = None

    def prune(self, names: list[int]) -> None:
        """Lets nodes go."""
        for name in names:
            self.held.pop(name, None)
            self._last = None

    def _remap(self, remap: Tensor) -> None:
        visible = self.padding.visible
        assert visible is not None
        if self.padding.thaws:
            assert self.padding.before is not None
            self.check_thaw()
            self.thaw(visible[:, : remap.shape[1]], self.padding.before, remap)
            if self.ends:
                self.tree.thaw()
        elif self.dense is not None:
            self._hide(remap, torch.tensor(self.tree.lengths(), device=remap.device))

    def check_thaw(self) -> None:
        """Raises ValueError where the nodes hold something else than keys and values of tokens."""
        for name, segments in self.held.items():
            for segment in segments:
                if not isinstance(segment, NodeSegment):
                    raise ValueError(
                        f"node {name} is a {type(segment).__name__}: shared tokens in this form can be neither cropped "
                        "nor forgotten by one sequence"
                    )

    def thaw(self, visible: Tensor | None, before: Tensor, remap: Tensor | None) -> None:
        """Gives each row its own copy of what it holds in nodes.

        Args:
            visible: where the tokens shall stand, [batch, columns] bool; None: every column is a token.
            before: tokens of each row until now, [batch].
            remap: [batch, tokens] int32, which of the visible columns each token goes to, EMPTY for those to drop;
                None: in order.
        """
        assert self.kv_shape is not None
        batch, kv_heads, _ = self.kv_shape
        columns = int(self.get_seq_length())
        nodes: dict[int, Any] = {name: segments[0] for name, segments in self.held.items()}
        like = [getattr(next(iter(nodes.values())), name) for name in NodeSegment.state]
        keys, values = (tensor.new_zeros(batch, kv_heads, columns, tensor.shape[-1]) for tensor in like)
        stored = torch.zeros(batch, columns, dtype=torch.bool, device=keys.device)
        for row, leaf in enumerate(self.tree.leaves):
            parts = [
                (self.tree.nodes[name].stop, nodes[name].prefix_keys[0], nodes[name].prefix_values[0])
                for name in self.tree.path(leaf)
            ]
            if self.dense is not None:
                own_keys, own_values, own_visible = self.dense.held()
                shown = slice(None) if own_visible is None else own_visible[row]
                parts.append((int(before[row]), own_keys[row, :, shown], own_values[row, :, shown]))
            for stop, key, value in parts:
                place = torch.arange(stop - key.shape[1], stop, device=keys.device)
                # what is ahead of its columns is fed again
                known = place < int(before[row])
                if remap is not None:
                    known &= remap[row, place.clamp(max=columns - 1)] >= 0
                place = place[known]
                to = place if remap is None else remap[row, place].long()
                to = to if visible is None else visible[row].to(keys.device).nonzero()[to, 0]
                keys[row, :, to], values[row, :, to] = key[:, known], value[:, known]
                stored[row, to] = True
        self.held, self._last = {}, None
        self.dense = self.storage(keys, values)
        self.dense.append(keys, values, None if bool(stored.all()) else stored)
        gone = int(stored.any(0).to(torch.uint8).argmax()) if self.window is not None else 0
        if gone:
            self.dense.drop_first(gone)
            self.dropped = gone

    def suffix_columns(self) -> int:
        """Columns of the suffixes."""
        return 0 if self.dense is None else self.dense.length

    def adopt(self, name: int, other: CompressedLayer) -> None:
        """Takes what another layer holds of one sequence as a node."""
        if not other.segments() or other.kv_shape is None:
            raise ValueError("from_cache takes a cache that has seen something")
        segments: list[Segment] = []
        for segment in other.segments():
            if isinstance(segment, DenseSegment):
                keys, values, _ = segment.held()
                segment = NodeSegment(keys.contiguous(), values.contiguous())
            if isinstance(segment, RolledSlots) or not hasattr(segment, "kept"):
                raise ValueError(f"{type(segment).__name__} cannot be a prefix that sequences share")
            segments.append(segment)
        self.held[name] = segments
        self.kv_shape, self.dtype, self.device = other.kv_shape, other.dtype, other.device
        self.is_initialized = True

    def tokens_kept(self) -> Tensor:
        assert self.kv_shape is not None
        batch, kv_heads, _ = self.kv_shape
        own = torch.zeros(batch, kv_heads, dtype=torch.int64) if self.dense is None else super().tokens_kept().clone()
        of_node = {
            name: torch.stack([segment.kept()[0] for segment in node]).sum(0)  # type: ignore[attr-defined]
            for name, node in self.held.items()
        }
        for row, leaf in enumerate(self.tree.leaves):
            for name in self.tree.path(leaf):
                own[row] += of_node[name].to(own.device)
        return own

    def counters(self) -> dict[str, Tensor]:
        tensors = [] if self._last is None else self._last[1].tensors()
        tensors += self.tree.tensors() if self.leads else []
        return {f"map {index}": tensor for index, tensor in enumerate(tensors)}

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().dump()
        kinds: dict[int, list[str]] = {}
        for name, segments in self.held.items():
            kinds[name] = [type(segment).__name__ for segment in segments]
            for index, segment in enumerate(segments):
                tensors |= {f"nodes.{name}.{index}.{part}": tensor for part, tensor in segment.tensors().items()}
        return tensors, facts | {"nodes": kinds, "kv_shape": self.kv_shape}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        super().restore({name: tensor for name, tensor in tensors.items() if not name.startswith("nodes.")}, facts)
        for name, kinds in facts["nodes"].items():
            self.held[int(name)] = []
            for index, kind in enumerate(kinds):
                prefix = f"nodes.{name}.{index}."
                parts = {part[len(prefix) :]: tensor for part, tensor in tensors.items() if part.startswith(prefix)}
                self.held[int(name)].append(_segment_kinds()[kind].from_tensors(parts))
                self.dtype, self.device = next(iter(parts.values())).dtype, next(iter(parts.values())).device
                self.is_initialized = True
        self.kv_shape = None if facts["kv_shape"] is None else tuple(facts["kv_shape"])

    def reset(self) -> None:
        super().reset()
        self.held = {}
        self._last = None


def _segment_kinds() -> dict[str, type[Segment]]:
    """Every kind of segment by its name."""
    kinds: dict[str, type[Segment]] = {}
    queue = [Segment]
    while queue:
        kind = queue.pop()
        kinds[kind.__name__] = kind
        queue += kind.__subclasses__()
    return kinds
