"""Exact attention over prefixes and trees that sequences share, each token stored, run and read once.

Hydragen, arXiv:2402.05099, for any model and any tree: a node holds the keys and values of tokens that several
sequences have in common. Its tokens go through the model once, its storage is one tensor for all of its sequences, and
the queries of all of them meet it as one matrix (kernels/prefix.py). What differs is each sequence's suffix. The
answers of nodes and suffix merge by their log-sum-exps, which is exact.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.layer import CompressedLayer, as_stored, ordinary_tensors
from kvcompress.prefix.layer import SharedLayer, segments_of
from kvcompress.prefix.padding import PrefixPadding, Promotion, same_tokens
from kvcompress.prefix.tree import ROOT, Node, Shared, Tree, by_length, common_tokens, find_shared
from kvcompress.storage.padding import PaddingRecord
from kvcompress.storage.rerotated import RerotatedSlots

# fewer shared tokens than these cost more in another launch than they save
MIN_TOKENS = 32
# tokens fed for nothing that are as dear as another node
_OWN_NODE = 64


class HydragenCache(CompressedCache):
    """Keeps every token, those that sequences share once. Exact.

        HydragenCache(model, input_ids, attention_mask)     a batch of prompts: finds what they share, as a tree
        HydragenCache.from_prefix(model, prefix_ids)        one prefix, for any number of prompts that begin with it
        HydragenCache.from_tree(model, pieces, parents)     any tree
        HydragenCache.from_cache(cache)                     what another kvcompress cache holds of one sequence
        HydragenCache(model)                                stores equal beginnings of the rows it meets once

    The first four run shared tokens through the model once, and report them as seen: `model.generate` with the whole
    prompts feeds only what differs. It also takes the suffixes alone, with `attention_mask=cache.cover(mask)`. While no
    row has tokens of its own, a batch of several times as many rows repeats each, so `num_return_sequences` and beams
    share their prompt.

    It remembers what it was fed, and refuses prompts that begin otherwise, or with the rows in another order. One cache
    serves one conversation: `clone()` it before each call. A prompt that ends within a node leaves it there.

    What pays (measured, README): a node saves memory and prefill from its first token on, and costs a decode step one
    more small attention and a merge. Shared runs of fewer than `min_tokens` tokens are therefore left in the suffixes,
    and a cache without nodes attends as DenseCache does.
    """

    layers: list[SharedLayer]  # type: ignore[assignment]
    padding: PrefixPadding

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        copies: int = 1,
        min_tokens: int = MIN_TOKENS,
    ) -> None:
        """
        Args:
            model: the model the cache will be used with.
            input_ids: the prompts [batch, tokens] that `generate` will be called with, padded on the left.
            attention_mask: [batch, tokens], 0 for padding; None: no padding.
            copies: sequences that `generate` will make of each prompt (num_return_sequences, num_beams). With
                more than one, and for a single prompt, all of a prompt but its last token is shared.
            min_tokens: shared runs of fewer tokens are stored for each row.

        Raises:
            ValueError: the model has something kvcompress does not handle, or padding is not on the left.
        """
        if min_tokens < 1 or copies < 1:
            raise ValueError(f"min_tokens and copies must be at least 1, got {min_tokens} and {copies}")
        self.tree = Tree()
        self.min_tokens = min_tokens
        # how to build the caches again that hold nodes
        self.donors: dict[int, dict[str, Any]] = {}
        super().__init__(model)
        if input_ids is not None:
            self._find(input_ids, attention_mask, copies)

    @classmethod
    def from_prefix(cls, model: PreTrainedModel, prefix_ids: Tensor | Sequence[int], **settings: Any) -> Self:
        """A cache that holds one prefix.

        Args:
            prefix_ids: [tokens] or [1, tokens].
        """
        return cls.from_tree(model, [prefix_ids], [ROOT], **settings)

    @classmethod
    def from_tree(
        cls,
        model: PreTrainedModel,
        pieces: Sequence[Tensor | Sequence[int]],
        parents: Sequence[int],
        rows: Sequence[int] | None = None,
        **settings: Any,
    ) -> Self:
        """A cache that holds a tree.

        Args:
            pieces: the tokens of each node, [tokens] or [1, tokens].
            parents: for each node the index of an earlier one, or -1 for a beginning.
            rows: for each sequence the node that it goes on from; None: one for each node without children.

        Raises:
            ValueError: a parent or a row names no node, or a node has no token.
        """
        cache = cls(model, **settings)
        ids = [torch.as_tensor(piece, device=hf.input_device(model)).reshape(-1) for piece in pieces]
        if len(ids) != len(parents) or not ids or any(not -1 <= parent < node for node, parent in enumerate(parents)):
            raise ValueError(
                f"from_tree needs for each of {len(ids)} pieces the index of an earlier one, or -1; got {list(parents)}"
            )
        if any(len(piece) == 0 for piece in ids):
            raise ValueError("every node of a tree needs a token")
        if rows is None:
            rows = [node for node in range(len(ids)) if node not in parents]
        if not rows or any(not 0 <= row < len(ids) for row in rows):
            raise ValueError(f"rows must name nodes 0 to {len(ids) - 1}, got {list(rows)}")
        names = cache._grow(ids, list(parents))
        cache._set_leaves([names[row] for row in rows])
        cache._lay_out()
        return cache

    @classmethod
    def from_cache(cls, cache: CompressedCache, **settings: Any) -> Self:
        """A cache whose prefix is what another one holds of one sequence, as that one holds it.

        An evicting cache gives a prefix of its slots, a quantising one a prefix of packed blocks, ShadowKV one whose
        chunks the queries of all rows choose together: read once for all rows, whose suffixes are kept whole. The other
        cache must not be used any more.

        Args:
            cache: of one sequence, without padding.

        Raises:
            ValueError: it has seen nothing, or holds several sequences, padding, or keys that do not stand at their
                true positions.
        """
        model = cache._model()
        if model is None:
            raise ValueError("the model of the cache is gone")
        if not cache.get_seq_length():
            raise ValueError(f"from_cache takes a cache that has seen something, got an empty {type(cache).__name__}")
        if any(isinstance(segment, RerotatedSlots) for layer in cache.layers for segment in segments_of(layer)):
            raise ValueError(
                f"a {type(cache).__name__} with rerotated=True holds RerotatedSlots, keys that stand at no position of "
                "their own, and no sequence can go on from them; build it without rerotated=True"
            )
        if cache.batch_size != 1 or cache.padding.visible is not None:
            raise ValueError(
                f"from_cache takes a cache of one sequence without padding, got {cache.batch_size} sequences"
                + (" with padding" if cache.padding.visible is not None else "")
            )
        if isinstance(cache, cls):
            return cache.fork()
        shared = cls(model, **settings)
        name = shared.tree.add(ROOT, int(cache.get_seq_length()))
        plain: dict[int, Any] = {}
        for layer, other in zip(shared.layers, cache.layers, strict=True):
            layer.adopt(name, other, plain)
        shared.donors[name] = {"cache": type(cache).__name__, "settings": cache._settings()}
        shared.tree.set_leaves([name])
        shared._lay_out()
        return shared

    # levels and forks

    @ordinary_tensors()
    def push(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Adds a level: each row's new tokens become a node, which all of its continuations share.

        Args:
            input_ids: [batch, tokens], padded on the left; `batch` as many as there are rows, or several times as many.
            attention_mask: [batch, tokens], 0 for padding; None: no padding.
        """
        batch = len(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = len(self.tree.leaves) or batch
        if batch % rows:
            raise ValueError(f"push needs tokens for each of {rows} rows, or several for each; got {batch} rows")
        self._suffix_to_node()
        pieces = [ids[shown.bool()] for ids, shown in zip(input_ids, mask, strict=True)]
        if any(len(piece) == 0 for piece in pieces):
            raise ValueError("push needs a token for every row")
        parents = [leaf for leaf in (self.tree.leaves or [ROOT] * rows) for _ in range(batch // rows)]
        self._set_leaves(self._prefill(parents, pieces))
        self._lay_out()

    @as_stored()
    def pop(self) -> None:
        """Takes the newest level back, and all tokens that came after it.

        Raises:
            ValueError: there is no level.
        """
        if not self.tree.nodes:
            raise ValueError("there is no level to take back")
        parents = {leaf: self.tree.nodes[leaf].parent for leaf in self.tree.leaves if leaf != ROOT}
        self._set_leaves([parents.get(leaf, ROOT) for leaf in self.tree.leaves])
        if self.tree.nodes:
            self._lay_out()
        else:
            rows = len(self.tree.leaves)
            self.reset()
            self.tree.set_leaves([ROOT] * rows)

    def fork(self, copies: int = 1) -> Self:
        """A cache of `copies` continuations of each row, which shares all that was seen until now with this one.

        Both go on independently, the rows of a copy side by side. All tokens seen lie in nodes from then on.
        """
        if copies < 1:
            raise ValueError(f"fork needs at least one copy, got {copies}")
        self._suffix_to_node()
        other = self.clone()
        other.batch_repeat_interleave(copies)
        return other

    def clone(self) -> Self:
        """An independent copy; nodes are shared with it, as they never change."""
        shared: list[Any] = list(self.tree.nodes.values())
        for layer in self.layers:
            shared += [*layer.coded.values(), *(segment for node in layer.held.values() for segment in node)]
        memo: dict[int, Any] = {id(one): one for one in shared}
        return copy.deepcopy(self, memo)

    def cover(self, mask: Tensor) -> Tensor:
        """The attention mask of all tokens, for new ones alone.

        Args:
            mask: of the new tokens, [batch, new].

        Returns:
            [batch, tokens seen + new].
        """
        seen = int(self.get_seq_length())
        past = self.padding.visible
        past = mask.new_ones(1, seen) if past is None else past.to(mask)
        return torch.cat([past.repeat_interleave(len(mask) // len(past), 0), mask], 1)

    def cut_length(self, tokens: int) -> int:
        """The most tokens, up to this number, to which the one path of all rows can be cut."""
        path = self.tree.path(self.tree.leaves[0])
        lengths = [0] + [self.tree.nodes[name].stop for name in path]
        if all(layer.cuts(name) for layer in self.layers for name in path):
            return min(tokens, lengths[-1])
        return max(length for length in lengths if length <= tokens)

    def cut(self, tokens: int) -> None:
        """Forgets all but the first tokens of the one path of all rows, as `cut_length` allows; nothing is copied."""
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

    def gather_rows(self) -> None:
        """One row in place of several that go on from the same node."""
        self._set_leaves(self.tree.leaves[:1])
        self._lay_out()

    # rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        before = set(self.tree.leaves)
        self.tree.select(rows)
        if set(self.tree.leaves) != before:
            self._prune()

    @as_stored()
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times; what they then have in common becomes a node, where it is long enough."""
        if repeats > 1 and max(self.own_lengths(), default=0) >= self.min_tokens:
            self._suffix_to_node()
            # the rows go on as they were fed: their columns stay what they are
            self.padding.columns_fixed = True
        super().batch_repeat_interleave(repeats)
        self.tree.repeat(repeats)

    @as_stored()
    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Takes back the last tokens, exactly; where suffixes are shorter, shared tokens become each row's own first.

        Raises:
            ValueError: a node or a window cannot give them back; nothing has changed.
        """
        tokens_to_remove = int(tokens_to_remove)
        seen = int(self.get_seq_length()) + tokens_to_remove
        visible, rows = self.padding.visible, len(self.tree.leaves)
        left = [seen] * rows if visible is None else visible[:, :seen].sum(-1).tolist()
        ahead = [0] * rows if self.tree.overlap is None else self.tree.overlap.tolist()
        # a row may have fewer tokens of its own than the suffixes have columns
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
            other = _kind(donor["cache"])._rebuild(model, donor["settings"])
            for layer, held in zip(cache.layers, other.layers, strict=True):
                layer.coded[int(name)] = held
        return cache

    def _record(self) -> PaddingRecord:
        return PrefixPadding(self.tree)

    def _layer(self, index: int, window: int | None, layers: int) -> CompressedLayer:
        return SharedLayer(self.padding, window, index == 0, self.tree, self.min_tokens)

    # forwards

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == 0:
            self._meet(key_states.shape[0])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _meet(self, batch: int) -> None:
        """Before a forward of `batch` rows: as long as nothing is a row's own, each may stand for several."""
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
        """The rows as they were before `_meet`."""
        self.tree.set_leaves(leaves)
        self.tree.overlap, self.padding.visible = ahead, visible
        self._set_rows(len(leaves))

    def forward_begins(self, decoder: Any, input_ids: Tensor | None) -> None:
        """Remembers what is fed."""
        super().forward_begins(decoder, input_ids)
        self.padding.ids, self.padding.undo = input_ids, None

    def prompt_begins(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Compares whole prompts [batch, tokens] with what is held, and leaves of each a token to feed.

        Raises:
            ValueError: a prompt does not begin with what its row has seen; nothing has changed.
        """
        rows, (batch, width) = len(self.tree.leaves), input_ids.shape
        if self.padding.columns_fixed or not self.tree.nodes:
            super().prompt_begins(input_ids, attention_mask)
        if not rows or batch % rows or (self.padding.columns_fixed and batch != rows):
            return
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids, mask = input_ids.cpu(), mask.cpu().bool()
        if self.padding.columns_fixed:
            seen = int(self.get_seq_length())
            held = torch.ones(rows, seen, dtype=torch.bool) if self.padding.visible is None else self.padding.visible
            # compiled steps left no record; what they fed is visible
            held = torch.nn.functional.pad(held.cpu(), (0, seen - held.shape[1]), value=True)
            for row in range(rows):
                both = held[row] & mask[row, :seen]
                known = self.padding.row_ids(row, int(held[row].sum()))[both[held[row]]]
                places = both.nonzero()[:, 0]
                same_tokens(row, ids[row, places], known, places)
            return
        ends: dict[int, int] = {}
        for row in range(batch):
            own, path = ids[row, mask[row]], self.tree.ids(self.tree.leaves[row * rows // batch])
            common = min(len(own), len(path))
            same_tokens(row, own[:common], path[:common], torch.arange(common))
            if len(own) < len(path):
                ends[row] = len(own)
        self._end_rows(ends, batch)
        if width <= self.get_seq_length():
            # one token is left to feed
            self.padding.see(width - 1)
            if self.padding.visible is not None:
                self.padding.visible = self.padding.visible[:, : width - 1]

    def _end_rows(self, ends: dict[int, int], batch: int) -> None:
        """Rows of a batch go on from fewer tokens of their paths, at least one, than they hold."""
        copies = batch // len(self.tree.leaves)
        leaves = [leaf for leaf in self.tree.leaves for _ in range(copies)]
        wanted: dict[tuple[int, int], int] = {}
        for row, tokens in ends.items():
            name = self.tree.node_at(leaves[row], tokens)
            left = 0 if name == ROOT else tokens - self.tree.nodes[name].start
            wanted[name, left] = name
            if name != ROOT and left < self.tree.nodes[name].tokens:
                for layer in self.layers:
                    if not layer.cuts(name, left):
                        kind = "sliding window" if layer.window is not None else type(layer.held[name][0]).__name__
                        raise ValueError(
                            f"the prompt of row {row} ends after {tokens} tokens, within a node of "
                            f"{self.tree.nodes[name].tokens} that is held as {kind} and cannot be cut there; pass "
                            "prompts that hold the whole prefix, or build a HydragenCache of these prompts"
                        )
        if not ends:
            return
        if copies > 1:
            self._meet(batch)
            self.padding.undo = None
        for name, left in wanted:
            if name != ROOT and left < self.tree.nodes[name].tokens:
                node = self.tree.nodes[name]
                into = self.tree.add(node.parent, left, None if node.ids is None else node.ids[:left].clone())
                wanted[name, left] = into
                for layer in self.layers:
                    layer.cut(name, left, into)
        for row, tokens in ends.items():
            name = self.tree.node_at(leaves[row], tokens)
            left = 0 if name == ROOT else tokens - self.tree.nodes[name].start
            leaves[row] = wanted[name, left]
        self._set_leaves(leaves)

    def known_ids(self, row: int = 0) -> Tensor:
        """The tokens of a row that the cache has seen, [tokens] int32 on the CPU, -1 where it was not told."""
        return torch.cat([self.tree.ids(self.tree.leaves[row]), self.padding.own_ids(row)])

    def _set_rows(self, batch: int) -> None:
        for layer in self.layers:
            if layer.kv_shape is not None:
                layer.kv_shape = (batch, *layer.kv_shape[1:])

    def _grow(self, pieces: list[Tensor], parents: list[int]) -> list[int]:
        """Runs the pieces of a tree, given with the index of each one's parent, level by level; the nodes' names."""
        depth: list[int] = []
        for parent in parents:
            depth.append(0 if parent == ROOT else depth[parent] + 1)
        names = [ROOT] * len(pieces)
        for level in range(max(depth, default=ROOT) + 1):
            of_level = [index for index in range(len(pieces)) if depth[index] == level]
            above = [ROOT if parents[index] == ROOT else names[parents[index]] for index in of_level]
            for index, name in zip(of_level, self._prefill(above, [pieces[index] for index in of_level]), strict=True):
                names[index] = name
        return names

    def _prefill(self, parents: list[int], pieces: list[Tensor]) -> list[int]:
        """Runs pieces of tokens, each once, as the continuation of a node each; the names of the new nodes."""
        names = [ROOT] * len(pieces)
        for group in by_length(len(piece) for piece in pieces):
            self.tree.set_leaves([parents[index] for index in group])
            self._lay_out()
            self._feed([pieces[index] for index in group])
            self._suffix_to_node()
            for index, name in zip(group, self.tree.leaves, strict=True):
                names[index] = name
        return names

    def _lay_out(self) -> None:
        """Columns for what the rows hold, each padded on the left to the longest."""
        lengths = self.tree.lengths()
        seen = max(lengths)
        self.padding.columns_fixed, self.padding.fed = False, None
        self.padding.visible = None
        if min(lengths) < seen:
            place = torch.arange(seen, device=self._device())
            self.padding.visible = place >= seen - torch.tensor(lengths, device=place.device)[:, None]
        for layer in self.layers:
            layer.dense = None
            layer._seen = seen
        self._set_rows(len(lengths))

    @torch.no_grad()
    def _feed(self, pieces: list[Tensor]) -> None:
        """One forward, without logits, of a piece of tokens for each row."""
        model: Any = self._model()
        width = max(len(piece) for piece in pieces)
        ids = torch.stack([torch.nn.functional.pad(piece, (width - len(piece), 0)) for piece in pieces])
        place = torch.arange(width, device=ids.device)
        fresh = place >= width - torch.tensor([len(piece) for piece in pieces], device=ids.device)[:, None]
        held = torch.tensor(self.tree.lengths(), device=ids.device)[:, None]
        decoder = hf.decoder_of(model)
        decoder(
            input_ids=ids,
            attention_mask=self.cover(fresh),
            position_ids=held + (fresh.long().cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            **hf.cache_argument(decoder, self),
        )

    def _suffix_to_node(self) -> None:
        """Turns each row's suffix into a node."""
        counts = self.own_lengths()
        leaves = list(self.tree.leaves)
        nodes = []
        for row, count in enumerate(counts):
            if count:
                ids = self.padding.own_ids(row)
                leaves[row] = self.tree.add(leaves[row], count, ids if len(ids) == count else None)
                nodes.append((leaves[row], row, 0, count))
        if nodes:
            for layer in self.layers:
                layer.move(Promotion(nodes, counts, counts, leaves))
            self.tree.set_leaves(leaves)
            self.padding.columns_fixed, self.padding.fed = False, None

    def _set_leaves(self, leaves: list[int]) -> None:
        self.tree.set_leaves(leaves)
        self.tree.overlap = None
        self._prune()

    def _prune(self) -> None:
        gone = self.tree.prune()
        for layer in self.layers:
            layer.prune(gone)

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

    def own_lengths(self) -> list[int]:
        """Tokens of each row that are its own and in no node."""
        seen = int(self.get_seq_length())
        rows, ahead = len(self.tree.leaves), self.tree.overlap
        if not self.padding.columns_fixed or not rows:
            return [0] * rows
        own = self.padding.shown(rows, seen).cpu() - torch.tensor(self.tree.lengths())
        return (own if ahead is None else own + ahead.cpu()).tolist()

    def _device(self) -> torch.device:
        model = self._model()
        assert model is not None
        return hf.input_device(model)

    # finding what is shared

    def _find(self, input_ids: Tensor, attention_mask: Tensor | None, copies: int) -> None:
        """Builds the tree of a batch of prompts [batch, tokens] and runs what it holds."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if input_ids.dim() != 2 or mask.shape != input_ids.shape:
            raise ValueError(
                "HydragenCache takes input_ids and attention_mask of one shape [batch, tokens], got "
                f"{list(input_ids.shape)} and {list(mask.shape)}"
            )
        mask = mask.to(self._device()).bool()
        if bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise ValueError("HydragenCache takes prompts padded on the left; a row has padding behind a token")
        rows = [ids[shown] for ids, shown in zip(input_ids.to(mask.device), mask, strict=True)]
        # every row has a token to feed
        limits = [max(0, len(row) - 1) for row in rows]
        found = find_shared(limits, common_tokens(rows), self.min_tokens)
        if len(rows) == 1 and limits[0]:
            found = [Shared(ROOT, 0, limits[0], (0,))]
        ends = [ROOT] * len(rows)
        for index, shared in enumerate(found):
            for row in shared.rows:
                ends[row] = index
        held = [0 if end == ROOT else found[end].stop for end in ends]
        pads = [mask.shape[1] - len(row) for row in rows]
        if copies > 1:
            seen = mask.shape[1] - 1
        elif found:
            seen = _columns([pad + length for pad, length in zip(pads, held, strict=True)])
        else:
            return
        for row, (pad, length) in enumerate(zip(pads, held, strict=True)):
            # a row of its own up to there, so that the others need not be fed again what they share
            if min(seen - pad, limits[row]) > length:
                found.append(Shared(ends[row], length, min(seen - pad, limits[row]), (row,)))
                ends[row] = len(found) - 1
        if not found:
            return
        pieces = [rows[shared.rows[0]][shared.start : shared.stop] for shared in found]
        names = self._grow(pieces, [shared.parent for shared in found])
        self._set_leaves([ROOT if end == ROOT else names[end] for end in ends])
        self._lay_out()
        self.padding.visible = None if bool(mask[:, :seen].all()) else mask[:, :seen].clone()
        for layer in self.layers:
            layer._seen = seen


def _kind(name: str) -> type[CompressedCache]:
    """The cache of this name."""
    queue: list[type[CompressedCache]] = [CompressedCache]
    while queue:
        kind = queue.pop()
        if kind.__name__ == name:
            return kind
        queue += kind.__subclasses__()
    raise ValueError(f"the file's prefix lies in a {name}, and no cache of that name is imported")


def _columns(ends: list[int]) -> int:
    """How many columns of a batch to report as seen.

    A row that holds more is fed the rest again, for nothing; one that holds fewer must hold a node of its own.

    Args:
        ends: for each row the column up to which it holds what others hold too.
    """

    def cost(seen: int) -> int:
        return sum(end - seen if end >= seen else _OWN_NODE for end in ends)

    return min(sorted(set(ends), reverse=True), key=cost)
