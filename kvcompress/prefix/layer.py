"""A layer whose past is partly shared: nodes that many sequences pass through, and each sequence's own suffix."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcompress.caches.dense import SLACK
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.merge import merge_states, with_sinks
from kvcompress.kernels.prefix import merge_blocks, prefix_attention
from kvcompress.kernels.shared_attention import shared_attention
from kvcompress.layer import AttentionInput
from kvcompress.prefix.coded import attend_segments, is_fetched
from kvcompress.prefix.nodes import NodeLayer
from kvcompress.prefix.padding import PrefixPadding
from kvcompress.prefix.promotion import Promotion, find_promotion
from kvcompress.prefix.segments import NodeSegment, SuffixSegment
from kvcompress.prefix.tree import Tree
from kvcompress.storage.padding import warn_of_short_windows
from kvcompress.storage.segment import Segment
from kvcompress.storage.transform_coding import Coding, Places


class SharedLayer(NodeLayer):
    """Keeps every token: those of nodes once, those of the suffixes for each row."""

    storage = SuffixSegment
    reserves_on_gpu = True

    def __init__(self, padding: PrefixPadding, window: int | None, is_first: bool, tree: Tree, min_tokens: int) -> None:
        """
        Args:
            is_first: whether it is the first layer of the cache.
            tree: the cache's.
            min_tokens: shared runs of fewer tokens stay in the suffixes.
        """
        super().__init__(padding, window, is_first, tree)
        self.min_tokens = min_tokens
        padding.layers.append(self)

    def __getstate__(self) -> dict[str, Any]:
        # what compiled steps wrote is taken in; addresses are of no use in a copy
        _ = self.dense
        return self.__dict__ | {"_last": None, "_tables": None, "_steps": None}

    def segments(self) -> list[Segment]:
        own: list[Segment] = [] if self.dense is None else [self.dense]
        return own + [segment for node in self.held.values() for segment in node]

    def map_tensors(self, change: Any) -> None:
        if self.dense is not None:
            self.dense.map_tensors(change)

    def batch_select_indices(self, indices: Tensor) -> None:
        _ = self.dense
        # the tree's rows are selected only after the layers': then it is made ready
        ready, self._is_ready = self._is_ready, False
        super().batch_select_indices(indices)
        self._is_ready = ready

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return super().is_compileable and not self.coded

    def is_traceable(self, tokens: int) -> bool:
        return super().is_traceable(tokens) and not self.coded

    def _is_followed(self) -> bool:
        return super()._is_followed() and self.tree.is_laid_out

    def rows_changed(self) -> None:
        """Makes ready anew for compiled steps, if it was, after rows or nodes have changed."""
        if self._is_ready:
            self._make_ready(0)

    def _make_ready(self, steps: int) -> None:
        dense = self.dense
        self._is_ready = False
        holds = dense is not None or self.held
        if not holds or self.coded or self.tree.overlap is not None or self._asked is None:
            # the next forward cannot be compiled
            return
        if dense is None:
            # all rows end in nodes
            assert self.kv_shape is not None
            node: Any = next(segments[0] for segments in self.held.values())
            like = [tensor.expand(self.kv_shape[0], -1, -1, -1) for tensor in node.tensors().values()]
            self.dense = self.storage(*like)
        super()._make_ready(steps)
        self.tree.sharing()
        if self.is_first:
            self.padding.note_steps()
        assert self._steps is not None
        own = torch.tensor(self.padding.own_lengths(int(self.get_seq_length())))
        lengths = (own + torch.tensor(self.tree.lengths())).to(self.device, torch.int32)
        self._steps.follow(lengths, self._step_tables() if self.held else None)

    def attend(self, query: Tensor, visible: Tensor | None, spec: LogitSpec, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            out = super().attend(query, visible, spec, **kwargs)
            self.padding.columns_fixed = True
            return out
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
        if torch.compiler.is_compiling():
            return super()._attend(chunk)
        self._asked = chunk.query.shape[1] // chunk.key.shape[1], chunk.spec
        stored = self.padding.stored
        own = replace(chunk, visible=None if stored is None else stored.to(chunk.key.device))
        if self._attends_at_once(own):
            return self._attend_step(own)
        out, lse = self._attend_dense(own)
        outs, lses = [out], [lse]
        if self.is_first and self.clock.seen == 0 and not self.held and len(chunk.key) > 1:
            self.padding.found = find_promotion(own, self.tree, self.padding.own_ids, self.min_tokens)
        if self.padding.found is not None:
            self.move(self.padding.found)
        elif self.held:
            out, lse = self._attend_nodes(chunk)
            outs, lses = [out, *outs], [lse, *lses]
        if chunk.sinks is not None:
            outs, lses = with_sinks(outs, lses, chunk.sinks)
        return merge_states(outs, lses)[0] if len(outs) > 1 else outs[0]

    def _attends_at_once(self, own: AttentionInput) -> bool:
        """Whether one op attends to nodes and suffix: for one token per row, and nodes of plain tokens."""
        # a window counts columns of the suffix
        padded = own.visible is not None or (self.dense is not None and self.dense.visible is not None)
        is_plain = not self.coded and not self.padding.again and (self.window is None or not padded)
        return bool(self.held) and own.tokens == 1 and is_plain

    def _attend_step(self, own: AttentionInput) -> Tensor:
        self._store(own)
        assert self.dense is not None
        keys, values, shown = self.dense.held()
        at = None if self.window is None else self.padding.positions(own.query.device)
        out = shared_attention(own.query, keys, values, self._step_tables(), own.spec, shown, None, at, own.sinks)
        self._drop()
        return out

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
                    self.fetching_forwards += is_fetched(self.held[name])
                    tokens = self.tree.nodes[name].tokens if again else None
                    found = attend_segments(self.held[name], chunk.query[rows], at, chunk.spec, tokens)
                    nodes_outs[block], nodes_lses[block] = found
            out, lse = merge_blocks(nodes_outs, nodes_lses, sharing, chunk.query, chunk.value.shape[-1])
            outs, lses = [*outs, out], [*lses, lse]
        return merge_states(outs, lses) if len(outs) > 1 else (outs[0], lses[0])

    def move(self, move: Promotion) -> None:
        """Turns the beginnings of suffixes into nodes."""
        assert self.dense is not None
        keys, values, visible = self.dense.held()
        self._is_ready = False
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
        self.held = {}
        self._forget_tables()
        self.dense = self.storage(keys, values)
        self.dense.append(keys, values, None if bool(stored.all()) else stored)
        gone = int(stored.any(0).to(torch.uint8).argmax()) if self.window is not None else 0
        if gone:
            self.dense.drop_first(gone)
            self.dropped = gone

    def suffix_columns(self) -> int:
        """How many columns the suffixes have."""
        return 0 if self.dense is None else self.dense.length

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

    def constants(self) -> dict[str, list[Tensor]]:
        found = super().constants()
        for other in self.coded.values():
            for name, tensors in other.constants().items():
                found.setdefault(name, []).extend(tensors)
        return found

    def counters(self) -> dict[str, Tensor]:
        tensors = [tensor for each in self._last or () for tensor in each.tensors()]
        tensors += [] if self._tables is None else self._tables.tensors()
        if self.is_first:
            tensors += self.tree.tensors() + ([] if self.padding.fed is None else [self.padding.fed])
        for segment in (segments[0] for segments in self.held.values()):
            if isinstance(segment, NodeSegment):
                tensors += [coding.sizes for coding in segment.codings.values()]
        for other in self.coded.values():
            tensors += [*other.counters().values(), *other.statistics().values()]
        return super().counters() | {f"map {index}": tensor for index, tensor in enumerate(tensors)}

    def fetched_bytes(self) -> int:
        return sum(other.fetched_bytes() for other in self.coded.values())

    def plain_tokens(self) -> dict[str, Places]:
        found = super().plain_tokens()
        for name, segments in self.held.items():
            if name in self.coded:
                continue
            node: Any = segments[0]
            first = self.tree.nodes[name].stop - node.tokens
            for part, side in zip(NodeSegment.tensor_names, ("keys", "values"), strict=True):
                places = Places(side, node.tokens, None, [first], [0], node.codings.get(part))
                found[f"nodes.{name}.0.{part}"] = places
        return found

    def _row_lengths(self) -> list[int]:
        own = self.padding.own_lengths(int(self.get_seq_length()))
        return [length + more for length, more in zip(self.tree.lengths(), own, strict=True)]

    def note_codings(self, codings: dict[str, Coding]) -> None:
        for name, segments in self.held.items():
            if name not in self.coded:
                node: Any = segments[0]
                prefix = f"nodes.{name}.0."
                node.codings = {part: codings[prefix + part] for part in node.tensor_names if prefix + part in codings}

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
        self._forget_tables()
        self.fetching_forwards = 0
