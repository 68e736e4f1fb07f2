"""A cache of rows that continue from the nodes of a tree: keeps tree, layers and padding record consistent."""

import functools
import operator
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.layer import CompressedLayer, as_stored
from kvcompress.prefix.layer import SharedLayer
from kvcompress.prefix.padding import PrefixPadding
from kvcompress.prefix.promotion import Promotion
from kvcompress.prefix.tree import ROOT, UNKNOWN, Node, Tree
from kvcompress.storage.classes import class_named
from kvcompress.storage.padding import PaddingRecord


class TreeCache(CompressedCache):
    """Rows, each of which holds the nodes of its path and its own suffix."""

    layers: list[SharedLayer]  # type: ignore[assignment]
    padding: PrefixPadding
    # it leaves tokens of whole prompts to be fed, which are yet to come
    for_prompts = False

    def __init__(self, model: PreTrainedModel, *, min_tokens: int) -> None:
        """
        Args:
            min_tokens: shared runs of fewer tokens are stored for each row.
        """
        self.tree = Tree()
        self.min_tokens = operator.index(min_tokens)
        # how to build again the caches that nodes were made from
        self.donors: dict[int, dict[str, Any]] = {}
        super().__init__(model)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    @as_stored()
    def _select(self, rows: Tensor) -> None:
        before = set(self.tree.leaves)
        self.tree.select(rows)
        if set(self.tree.leaves) != before:
            self._prune()
        self._rows_changed()

    def _rows_changed(self) -> None:
        for layer in self.layers:
            layer.rows_changed()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = super().__deepcopy__(memo)
        copied._rows_changed()
        return copied

    @as_stored()
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row several times; what the copies have in common becomes a node if it is long enough."""
        if repeats > 1 and max(self.padding.own_lengths(int(self.get_seq_length())), default=0) >= self.min_tokens:
            self._suffix_to_node()
            # the rows continue as they were fed: their columns do not change
            self.padding.columns_fixed = True
        super().batch_repeat_interleave(repeats)
        self.tree.repeat(repeats)
        self._rows_changed()

    @as_stored()
    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Takes back the last tokens, exactly; if suffixes are shorter, shared tokens first become each row's own.

        Raises:
            ValueError: a node or a window cannot give them back; the cache is unchanged.
        """
        tokens_to_remove = int(tokens_to_remove)
        seen = int(self.get_seq_length()) + tokens_to_remove
        visible, rows = self.padding.visible, len(self.tree.leaves)
        left = [seen] * rows if visible is None else visible[:, :seen].sum(-1).tolist()
        ahead = [0] * rows if self.tree.overlap is None else self.tree.overlap.tolist()
        # a row may have fewer own tokens than the suffixes have columns
        in_nodes = any(stays < held - more for stays, held, more in zip(left, self.tree.lengths(), ahead, strict=True))
        if tokens_to_remove and self.tree.nodes and (in_nodes or -tokens_to_remove > self.layers[0].suffix_columns()):
            before = self.padding.shown(rows, int(self.get_seq_length())).tolist()
            for layer in self.layers:
                layer.check_thaw()
                for row, (leaf, tokens) in enumerate(zip(self.tree.leaves, left, strict=True)):
                    layer.check_reach(leaf, tokens)
                    layer.check_own_reach(row, tokens, before[row])
            self._thaw()
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.tree.clear()
        self.donors = {}
        self.padding.columns_fixed, self.padding.fed = True, None

    def _settings(self) -> dict[str, Any]:
        tree = self.tree
        ahead = None if tree.overlap is None else tree.overlap.tolist()
        nodes = {name: [node.parent, node.tokens, node.start] for name, node in tree.nodes.items()}
        return {
            "min_tokens": self.min_tokens,
            "donors": {
                name: donor for name, donor in self.donors.items() if any(name in layer.coded for layer in self.layers)
            },
            "tree": {"nodes": nodes, "leaves": tree.leaves, "ahead": ahead, "laid_out": self.padding.columns_fixed},
        }

    @classmethod
    def _rebuild(cls, model: PreTrainedModel, settings: dict[str, Any]) -> Self:
        cache = cls(model, min_tokens=settings["min_tokens"])
        tree = settings["tree"]
        cache.tree.nodes = {int(name): Node(*facts) for name, facts in tree["nodes"].items()}
        cache.tree.set_leaves(tree["leaves"])
        cache.tree.overlap = None if tree["ahead"] is None else torch.tensor(tree["ahead"])
        cache.padding.columns_fixed = tree["laid_out"]
        for name, donor in settings.get("donors", {}).items():
            cache.donors[int(name)] = donor
            other = class_named(CompressedCache, donor["cache"])._rebuild(model, donor["settings"])
            for layer, held in zip(cache.layers, other.layers, strict=True):
                layer.coded[int(name)] = held
        return cache

    def _check_model(self, model: PreTrainedModel) -> None:
        if hf.is_multimodal(model):
            raise ValueError(
                f"{type(model).__name__} is multimodal: where two prompts have the same tokens, their images may "
                f"differ, so that {type(self).__name__} cannot share them. Build it for the language model, or use "
                "another cache"
            )
        if self.states:
            raise ValueError(
                f"{type(model).__name__} has layers that keep states, of which a prefix would need its own wherever "
                f"rows part; {type(self).__name__} does not share those. clone() another cache for each continuation"
            )
        if hf.shares_kv(hf.text_config(model)):
            raise ValueError(
                f"{type(model).__name__} has layers that attend to keys and values of others, which "
                f"{type(self).__name__} does not serve; clone() another cache for each continuation"
            )

    def _record(self) -> PaddingRecord:
        return PrefixPadding(self.tree)

    def _layer(self, index: int, window: int | None) -> CompressedLayer:
        return SharedLayer(self.padding, window, index == self.attending[0], self.tree, self.min_tokens)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == 0 and not (torch.compiler.is_compiling() and self.is_traceable(key_states.shape[2])):
            self._meet(key_states.shape[0])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _meet(self, batch: int) -> None:
        """Before a forward of `batch` rows: repeats each row if there are more, as long as no row has own tokens."""
        rows = len(self.tree.leaves)
        if not rows:
            self.tree.set_leaves([ROOT] * batch)
        elif batch > rows and batch % rows == 0 and not self.padding.columns_fixed:
            self.padding.undo = functools.partial(
                self._put_back, list(self.tree.leaves), self.tree.overlap, self.padding.visible
            )
            self.tree.repeat(batch // rows)
            self.padding.repeat(batch // rows)
            self._set_rows(batch)

    def _put_back(self, leaves: list[int], ahead: Tensor | None, visible: Tensor | None) -> None:
        """Restores the rows as they were before `_meet`."""
        self.tree.set_leaves(leaves)
        self.tree.overlap, self.padding.visible = ahead, visible
        self._set_rows(len(leaves))

    def forward_begins(self, decoder: Any, input_ids: Tensor | None) -> None:
        """Records what is fed."""
        super().forward_begins(decoder, input_ids)
        self.padding.ids, self.padding.undo = input_ids, None
        self.for_prompts = False

    def _lay_out(self) -> None:
        """Makes columns for what the rows hold, each padded on the left to the longest."""
        lengths = self.tree.lengths()
        seen = max(lengths)
        self.padding.columns_fixed, self.padding.fed = False, None
        self.padding.visible = None
        if min(lengths) < seen:
            place = torch.arange(seen, device=self._device())
            self.padding.visible = place >= seen - torch.tensor(lengths, device=place.device)[:, None]
        for layer in self.layers:
            layer.dense = None
        self.padding.see(seen)
        self._set_rows(len(lengths))

    def _device(self) -> torch.device:
        model = self._model()
        assert model is not None
        return hf.input_device(model)

    def _set_rows(self, batch: int) -> None:
        for layer in self.layers:
            if layer.kv_shape is not None:
                layer.kv_shape = (batch, *layer.kv_shape[1:])
            if layer.dense is not None and layer.dense.length == 0:
                # room that was reserved for other rows
                layer.dense = None

    def _set_leaves(self, leaves: list[int]) -> None:
        self.tree.set_leaves(leaves)
        self.tree.overlap = None
        self._prune()

    def _prune(self) -> None:
        gone = self.tree.prune()
        for layer in self.layers:
            layer.prune(gone)

    def _suffix_to_node(self) -> None:
        """Turns each row's suffix into a node."""
        counts = self.padding.own_lengths(int(self.get_seq_length()))
        leaves = list(self.tree.leaves)
        nodes = []
        for row, count in enumerate(counts):
            if count:
                held = self.tree.length(leaves[row])
                ids = self.padding.row_ids(row, held + count)[held:].clone()
                leaves[row] = self.tree.add(leaves[row], count, ids if bool((ids != UNKNOWN).any()) else None)
                nodes.append((leaves[row], row, 0, count))
        if nodes:
            for layer in self.layers:
                layer.move(Promotion(nodes, counts, counts, leaves))
            self.tree.set_leaves(leaves)
            self.padding.columns_fixed, self.padding.fed = False, None

    def _thaw(self) -> None:
        """Turns all nodes into the rows' own tokens."""
        seen = int(self.get_seq_length())
        shown = self.padding.shown(len(self.tree.leaves), seen)
        visible = self.padding.visible
        visible = torch.ones(len(shown), seen, dtype=torch.bool) if visible is None else visible
        self.padding.lay_ids([self.padding.row_ids(row, int(tokens)) for row, tokens in enumerate(shown)], visible)
        for layer in self.layers:
            layer.node_to_suffix(self.padding.visible, shown, None)
        self.tree.node_to_suffix()
        self.padding.columns_fixed = True

    def cut_length(self, tokens: int) -> int:
        """The most tokens, up to this number, to which the single path of all rows can be cut."""
        path = self.tree.path(self.tree.leaves[0])
        lengths = [0] + [self.tree.nodes[name].stop for name in path]
        if all(layer.cuts(name) for layer in self.layers for name in path):
            return min(tokens, lengths[-1])
        return max(length for length in lengths if length <= tokens)

    def cut(self, tokens: int) -> None:
        """Drops all but the first tokens of the single path of all rows, as `cut_length` allows, without a copy."""
        for name in reversed(self.tree.path(self.tree.leaves[0])):
            node = self.tree.nodes[name]
            if node.start >= tokens:
                self._set_leaves([node.parent] * len(self.tree.leaves))
            elif node.stop > tokens:
                left = tokens - node.start
                for layer in self.layers:
                    layer.cut(name, left, name)
                ids = None if node.ids is None else node.ids[:left].clone()
                self.tree.nodes[name] = replace(node, tokens=left, ids=ids)
        self._lay_out()

    def tell_ids(self, ids: Tensor) -> None:
        """Tells the nodes of the single path of all rows their tokens, [tokens] on the CPU, where they are unknown."""
        for name in self.tree.path(self.tree.leaves[0]):
            node = self.tree.nodes[name]
            own = ids[node.start : node.stop].to(torch.int32)
            if node.ids is None or bool((node.ids == UNKNOWN).any()):
                self.tree.nodes[name] = replace(node, ids=own.clone())

    def gather_rows(self) -> None:
        """Replaces several rows that continue from the same node by one."""
        self._set_leaves(self.tree.leaves[:1])
        self._lay_out()
