"""A layer whose past is partly shared: nodes that many sequences pass through, and each sequence's own suffix."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcompress.caches.dense import SLACK, DenseLayer
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.shared_blocks import KeyBlocks, Sharing
from kvcompress.kernels.merge import merge_states, with_sinks
from kvcompress.kernels.prefix import bounded_attention, merge_blocks, prefix_attention
from kvcompress.layer import AttentionInput, CompressedLayer
from kvcompress.prefix.padding import PrefixPadding, Promotion
from kvcompress.prefix.segments import NodeSegment, SuffixSegment
from kvcompress.prefix.tree import ROOT, Tree, common_vectors, find_shared
from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.padding import warn_of_short_windows
from kvcompress.storage.segment import Segment
from kvcompress.storage.tail import TailSegment


class SharedLayer(DenseLayer):
    """Keeps every token: those of nodes once, those of the suffixes for each row.

    held: the segments of each node, in the tree's order. coded: for a node made from another cache, that cache's layer;
    its segments never change either.
    """

    storage = SuffixSegment
    padding: PrefixPadding

    def __init__(self, padding: PrefixPadding, window: int | None, is_first: bool, tree: Tree, min_tokens: int) -> None:
        """
        Args:
            is_first: whether it is the first layer of the cache.
            tree: the cache's.
            min_tokens: shared runs of fewer tokens stay in the suffixes.
        """
        super().__init__(padding, window, is_first)
        self.tree = tree
        self.min_tokens = min_tokens
        self.held: dict[int, list[Segment]] = {}
        self.coded: dict[int, CompressedLayer] = {}
        # nodes that another layer also holds
        self.borrowed: set[int] = set()
        self._last: tuple[Sharing, KeyBlocks, Sharing] | None = None
        padding.layers.append(self)

    def __getstate__(self) -> dict[str, Any]:
        # addresses are of no use in a copy
        return self.__dict__ | {"_last": None}

    def segments(self) -> list[Segment]:
        own: list[Segment] = [] if self.dense is None else [self.dense]
        return own + [segment for node in self.held.values() for segment in node]

    def map_tensors(self, change: Any) -> None:
        self._last = None
        if self.dense is not None:
            self.dense.map_tensors(change)

    def attend(self, query: Tensor, visible: Tensor | None, spec: LogitSpec, **kwargs: Any) -> Tensor:
        if not self.is_first:
            out = super().attend(query, visible, spec, **kwargs)
        else:
            self.padding.position_ids = kwargs["position_ids"]
            held = dict(vars(self.padding)), self.tree.overlap
            seen = self.clock.seen
            try:
                assert self.pending_kv is not None
                if self.padding.begins_again(visible, self.pending_kv[0].shape[2], seen):
                    self.padding.see(0)
                    self.padding.visible = None
                out = super().attend(query, visible, spec, **kwargs)
            except ValueError:
                # refused before anything was stored: nothing has changed
                if self.forwards_begun == self.forwards_ended:
                    vars(self.padding).update(held[0])
                    self.tree.overlap = held[1]
                    self.padding.see(seen)
                    if self.padding.undo is not None:
                        self.padding.undo()
                    self.padding.forget()
                    self.pending_kv = None
                raise
        if self.is_last:
            self.padding.settle(self.dense is not None)
        return out

    def _attend(self, chunk: AttentionInput) -> Tensor:
        stored = self.padding.stored
        own = replace(chunk, visible=None if stored is None else stored.to(chunk.key.device))
        out, lse = self._attend_dense(own)
        outs, lses = [out], [lse]
        if self.is_first and self.clock.seen == 0 and not self.held and len(chunk.key) > 1:
            self.padding.found = self._find(own)
        if self.padding.found is not None:
            self.move(self.padding.found)
        elif self.held:
            out, lse = self._attend_nodes(chunk)
            outs, lses = [out, *outs], [lse, *lses]
        if chunk.sinks is not None:
            outs, lses = with_sinks(outs, lses, chunk.sinks)
        return merge_states(outs, lses)[0] if len(outs) > 1 else outs[0]

    def _find(self, chunk: AttentionInput) -> Promotion | None:
        """What rows turn out to have in common: in the first layer, equal keys mean equal tokens at equal positions."""
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
            ids = self.padding.own_ids(shared.rows[0])[shared.start : shared.stop]
            names.append(self.tree.add(ROOT if shared.parent == ROOT else names[shared.parent], shared.tokens, ids))
            for row in shared.rows:
                leaves[row], taken[row] = names[-1], shared.stop
        # on a sliding layer, the shortest row still holds most of a node's tokens, and all that any row will look at
        nodes = [
            (name, min(shared.rows, key=counts.__getitem__), shared.start, shared.stop)
            for name, shared in zip(names, found, strict=True)
        ]
        return Promotion(nodes, taken, counts, leaves)

    def _attend_nodes(self, chunk: AttentionInput) -> tuple[Tensor, Tensor]:
        sharing = self.tree.sharing()
        again, device = self.padding.again, chunk.query.device
        positions = self.padding.positions(device) if again or self.coded or self.window is not None else None
        outs, lses = [], []
        if len(self.coded) < len(self.held):
            blocks, plain = self._node_blocks(sharing)
            out, lse = prefix_attention(chunk.query, blocks, plain, chunk.spec, positions, causal=again)
            outs, lses = [out], [lse]
        if self.coded:
            nodes_outs: dict[int, Tensor] = {}
            nodes_lses: dict[int, Tensor] = {}
            assert positions is not None
            for block, name in enumerate(self.held):
                if name in self.coded and sharing.rows[block]:
                    rows = sharing.pick(block, device)
                    at = positions[rows] - self.tree.nodes[name].start
                    nodes_outs[block], nodes_lses[block] = self._attend_coded(name, chunk.query[rows], at, chunk.spec)
            out, lse = merge_blocks(nodes_outs, nodes_lses, sharing, chunk.query, chunk.value.shape[-1])
            outs, lses = [*outs, out], [*lses, lse]
        return merge_states(outs, lses) if len(outs) > 1 else (outs[0], lses[0])

    def _attend_coded(self, name: int, query: Tensor, at: Tensor, spec: LogitSpec) -> tuple[Tensor, Tensor]:
        """Attention of queries [rows, heads, queries, head_dim], at positions [rows, queries], to a coded node."""
        segments = self.held[name]
        self.fetching_forwards += any(tensors for one in segments for _, tensors in one.offloaded().values())
        # all queries of the node as those of one row
        together = query.transpose(0, 1).flatten(1, 2)[None].contiguous()
        out, lse = _merged([segment.attend(together, at.reshape(1, -1), spec) for segment in segments])
        apart = (query.shape[0], query.shape[2])
        out, lse = (part[0].unflatten(1, apart).transpose(0, 1).contiguous() for part in (out, lse))
        if self.padding.again:
            within = (at < self.tree.nodes[name].tokens - 1).any(-1)
            if bool(within.any()):
                answers = []
                for segment in segments:
                    for keys, values, places in segment.pieces():
                        places = places[0].expand(keys.shape[1:3])
                        answers.append(bounded_attention(query[within], keys[0], values[0], places, at[within], spec))
                out[within], lse[within] = _merged(answers)
        return out, lse

    def _node_blocks(self, sharing: Sharing) -> tuple[KeyBlocks, Sharing]:
        """The nodes with plain tokens as blocks of keys, in the tree's order, and the rows of each."""
        if self._last is None or self._last[0] is not sharing:
            names = [name for name in self.held if name not in self.coded]
            nodes: list[Any] = [self.held[name][0] for name in names]
            starts = [self.tree.nodes[name].stop - node.tokens for name, node in zip(names, nodes, strict=True)]
            keys, values = [node.prefix_keys[0] for node in nodes], [node.prefix_values[0] for node in nodes]
            plain = sharing
            if self.coded:
                rows = [rows for name, rows in zip(self.held, sharing.rows, strict=True) if name not in self.coded]
                plain = Sharing(rows, sharing.batch)
            self._last = sharing, KeyBlocks(keys, values, starts), plain
        return self._last[1:]

    def move(self, move: Promotion) -> None:
        """Turns the beginnings of suffixes into nodes."""
        assert self.dense is not None
        keys, values, visible = self.dense.held()
        for name, row, first, stop in move.nodes:
            columns = torch.arange(self.dense.length, device=keys.device)
            if visible is not None:
                columns = columns[visible[row]]
            # a sliding layer may have dropped the first tokens, and needs little more of a node than its window
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

    def cuts(self, name: int, tokens: int | None = None) -> bool:
        """True if the layer can cut the node to its first tokens, to any number or to this one: they are stored one by
        one, and on a sliding layer all that later queries will see are still held."""
        if name in self.coded:
            return False
        node: Any = self.held[name][0]
        start, stop = self.tree.nodes[name].start, self.tree.nodes[name].stop
        sees_from = start if tokens is None or self.window is None else max(start, start + tokens - self.window)
        return sees_from >= stop - node.tokens

    def cut(self, name: int, tokens: int, into: int) -> None:
        """Makes a node of the first tokens of another, or of the same, without a copy."""
        node: Any = self.held[name][0]
        held = max(0, tokens - (self.tree.nodes[name].tokens - node.tokens))
        self.held[into] = [NodeSegment(*(getattr(node, part)[:, :, :held] for part in NodeSegment.tensor_names))]
        self._last = None

    def check_reach(self, leaf: int, position: int) -> None:
        """Raises ValueError if a token at this position of a path would see what has left the window of a node."""
        for name in self.tree.path(leaf) if self.window is not None else ():
            node: Any = self.held[name][0]
            start, held_from = self.tree.nodes[name].start, self.tree.nodes[name].stop - getattr(node, "tokens", 0)
            reaches = max(start, position - (self.window or 0) + 1)
            if name not in self.coded and position >= start and reaches < held_from:
                raise ValueError(
                    f"token {position} of a row is fed again, but of the tokens in its window of {self.window}, "
                    f"{reaches} to {held_from - 1} are gone; take back or feed again no more than {SLACK} tokens, or "
                    "use attention_mask=cache.cover(mask)"
                )

    def check_own_reach(self, row: int, position: int, before: int) -> None:
        """Raises ValueError if a token at this position of a row would see own tokens that have left the window.

        Args:
            before: tokens of the row until now.
        """
        if self.window is None or self.dense is None:
            return
        _, _, visible = self.dense.held()
        own_from = before - (self.dense.length if visible is None else int(visible[row].sum()))
        reaches = max(self.tree.length(self.tree.leaves[row]), position - self.window + 1)
        if reaches < min(position, own_from):
            raise ValueError(
                f"token {position} of row {row} is fed again, but of the tokens in its window of {self.window}, "
                f"{reaches} to {min(position, own_from) - 1} are gone; take back no more than {SLACK} tokens"
            )

    def prune(self, names: list[int]) -> None:
        """Drops nodes."""
        for name in names:
            self.held.pop(name, None)
            self.coded.pop(name, None)
            self.borrowed.discard(name)
            self._last = None

    def _remap(self, remap: Tensor) -> None:
        visible = self.padding.visible
        assert visible is not None
        if self.padding.needs_suffix:
            assert self.padding.before is not None
            self.check_thaw()
            self.node_to_suffix(visible[:, : remap.shape[1]], self.padding.before, remap)
            if self.is_last:
                self.tree.node_to_suffix()
        elif self.dense is not None:
            self._hide(remap, torch.tensor(self.tree.lengths(), device=remap.device))

    def check_thaw(self) -> None:
        """Raises ValueError if the nodes hold anything but keys and values of tokens."""
        for name, segments in self.held.items():
            for segment in segments:
                if not isinstance(segment, NodeSegment):
                    raise ValueError(
                        f"node {name} is a {type(segment).__name__}: shared tokens in this form cannot be cropped, or "
                        "dropped by one sequence"
                    )

    def node_to_suffix(self, visible: Tensor | None, before: Tensor, remap: Tensor | None) -> None:
        """Gives each row its own copy of what it holds in nodes.

        Args:
            visible: the columns in which to put the tokens, [batch, columns] bool; None: every column is a token.
            before: tokens of each row until now, [batch].
            remap: [batch, tokens] int32, which of the visible columns each token goes to, EMPTY for those to drop;
                None: in order.
        """
        assert self.kv_shape is not None
        batch, kv_heads, _ = self.kv_shape
        columns = int(self.get_seq_length())
        nodes: dict[int, Any] = {name: segments[0] for name, segments in self.held.items()}
        like = [getattr(next(iter(nodes.values())), name) for name in NodeSegment.tensor_names]
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
                # tokens beyond its columns will be fed again
                known = place < int(before[row])
                if remap is not None:
                    known &= remap[row, place.clamp(max=columns - 1)] >= 0
                place = place[known]
                to = place if remap is None else remap[row, place].long()
                to = to if visible is None else visible[row].to(keys.device).nonzero()[to, 0]
                keys[row, :, to], values[row, :, to] = key[:, known], value[:, known]
                stored[row, to] = True
        if remap is not None and self.window is not None:
            warn_of_short_windows(self.window, (remap >= 0).sum(-1), stored.sum(-1).to(remap.device))
        self.held, self._last = {}, None
        self.dense = self.storage(keys, values)
        self.dense.append(keys, values, None if bool(stored.all()) else stored)
        gone = int(stored.any(0).to(torch.uint8).argmax()) if self.window is not None else 0
        if gone:
            self.dense.drop_first(gone)
            self.dropped = gone

    def suffix_columns(self) -> int:
        """How many columns the suffixes have."""
        return 0 if self.dense is None else self.dense.length

    def adopt(self, name: int, other: CompressedLayer, plain: dict[int, Segment] | None = None) -> None:
        """Makes a node of what another layer holds of one sequence.

        Args:
            plain: nodes already made from segments of plain tokens, by the segment's id, for layers that share one.
        """
        segments = segments_of(other)
        if isinstance(segments[0], DenseSegment):
            keys, values, _ = segments[0].held()
            made = {} if plain is None else plain
            if id(segments[0]) in made:
                self.borrowed.add(name)
            else:
                made[id(segments[0])] = NodeSegment(keys.contiguous(), values.contiguous())
            segments = [made[id(segments[0])]]
        else:
            self.coded[name] = other
            for segment in getattr(other, "kv_source", other).segments():
                if isinstance(segment, TailSegment):
                    # nothing more comes
                    segment.trim(0)
        self.held[name] = segments
        self.kv_shape, self.dtype, self.device = other.kv_shape, other.dtype, other.device
        self.is_initialized = True

    def tokens_kept(self) -> Tensor:
        assert self.kv_shape is not None
        batch, kv_heads, _ = self.kv_shape
        own = torch.zeros(batch, kv_heads, dtype=torch.int64) if self.dense is None else self.dense.kept().clone()
        of_node = {name: segments[0].kept()[0] for name, segments in self.held.items() if name not in self.coded}
        of_node |= {name: other.tokens_kept()[0] for name, other in self.coded.items()}
        for row, leaf in enumerate(self.tree.leaves):
            for name in self.tree.path(leaf):
                own[row] += of_node[name].to(own.device)
        return own

    def counters(self) -> dict[str, Tensor]:
        tensors = [tensor for each in self._last or () for tensor in each.tensors()]
        if self.is_first:
            tensors += self.tree.tensors() + ([] if self.padding.fed is None else [self.padding.fed])
        for other in self.coded.values():
            tensors += [*other.counters().values(), *other.statistics().values()]
        return {f"map {index}": tensor for index, tensor in enumerate(tensors)}

    def fetched_bytes(self) -> int:
        return sum(other.fetched_bytes() for other in self.coded.values())

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().dump()
        kinds: dict[int, list[str]] = {}
        coded: dict[int, dict[str, Any]] = {}
        for name, segments in self.held.items():
            kinds[name] = [type(segment).__name__ for segment in segments]
            if name in self.coded:
                parts, coded[name] = self.coded[name].dump()
            else:
                parts = segments[0].tensors()
                # a file stores shared memory once
                if name in self.borrowed or any(x.nbytes < x.untyped_storage().nbytes() for x in parts.values()):
                    parts = {part: tensor.clone() for part, tensor in parts.items()}
            tensors |= {f"nodes.{name}.0.{part}": tensor for part, tensor in parts.items()}
        if self.is_first:
            fed = self.padding.fed
            facts["fed"] = None if fed is None else [self.padding.fed_from, fed.tolist()]
            nodes = self.tree.nodes.items()
            facts["ids"] = {name: node.ids.tolist() for name, node in nodes if node.ids is not None}
        return tensors, facts | {"nodes": kinds, "coded": coded, "kv_shape": self.kv_shape}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        super().restore({name: tensor for name, tensor in tensors.items() if not name.startswith("nodes.")}, facts)
        adopted, self.coded = self.coded, {}
        for key in facts["nodes"]:
            name, prefix = int(key), f"nodes.{key}.0."
            parts = {part[len(prefix) :]: tensor for part, tensor in tensors.items() if part.startswith(prefix)}
            if key in facts.get("coded", {}):
                adopted[name].restore(parts, facts["coded"][key])
                self.adopt(name, adopted[name])
            else:
                self.held[name] = [NodeSegment.load(parts)]
                self.dtype, self.device = parts["prefix_keys"].dtype, parts["prefix_keys"].device
                self.is_initialized = True
        self.kv_shape = None if facts["kv_shape"] is None else tuple(facts["kv_shape"])
        if facts.get("fed") is not None:
            self.padding.fed_from, fed = facts["fed"]
            self.padding.fed = torch.tensor(fed, dtype=torch.int32)
        for key, ids in facts.get("ids", {}).items():
            node = self.tree.nodes[int(key)]
            self.tree.nodes[int(key)] = replace(node, ids=torch.tensor(ids, dtype=torch.int32))

    def reset(self) -> None:
        super().reset()
        self.held, self.coded, self.borrowed = {}, {}, set()
        self._last = None
        self.fetching_forwards = 0


def segments_of(layer: CompressedLayer) -> list[Segment]:
    """What a layer attends to: its segments that hold something, or those of the layer whose storage it shares."""
    layer = getattr(layer, "kv_source", layer)
    return [one for one in layer.segments() if not isinstance(one, TailSegment) or any(one.held)]


def _merged(answers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return answers[0] if len(answers) == 1 else merge_states(*map(list, zip(*answers, strict=True)))
