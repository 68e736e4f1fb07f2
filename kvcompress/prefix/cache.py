"""Exact attention over prefixes and trees that sequences share, each token stored, run and read once.

Hydragen, arXiv:2402.05099, for any model and any tree: a node holds the keys and values of tokens that several
sequences have in common. Its tokens go through the model once, its storage is one tensor for all of its sequences, and
the queries of all of them attend to it as one matrix (kernels/prefix.py). What differs is each sequence's suffix. The
outputs of nodes and suffix are merged by their log-sum-exps, which is exact.
"""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.layer import as_stored, ordinary_tensors
from kvcompress.prefix.coded import segments_of
from kvcompress.prefix.padding import same_tokens
from kvcompress.prefix.prompts import tree_of_prompts
from kvcompress.prefix.tree import ROOT, UNKNOWN, by_length
from kvcompress.prefix.tree_cache import TreeCache
from kvcompress.storage.classes import class_name
from kvcompress.storage.rerotated import RerotatedSlots

# sharing fewer tokens than this costs more, in another launch, than it saves
MIN_TOKENS = 32


class HydragenCache(TreeCache):
    """Keeps every token; tokens that sequences share are kept once. Exact.

        HydragenCache(model, input_ids, attention_mask)     a batch of prompts: finds what they share, as a tree
        HydragenCache.from_prefix(model, prefix_ids)        one prefix, for any number of prompts that begin with it
        HydragenCache.from_tree(model, pieces, parents)     any tree
        HydragenCache.from_cache(cache)                     what another kvcompress cache holds of one sequence
        HydragenCache(model)                                stores common beginnings of the rows that it is fed once

    The first four run shared tokens through the model once, and report them as seen: `model.generate` with the whole
    prompts feeds only what differs. It also takes the suffixes alone, with `attention_mask=cache.cover(mask)`. While no
    row has tokens of its own, a batch with several times as many rows repeats each row, so `num_return_sequences` and
    beams share their prompt.

    It remembers what it was fed, and refuses prompts with another beginning, or with the rows in another order. One
    cache is for one conversation: `clone()` it before each call. A prompt may end within a node; its row then continues
    from there.

    When it pays off (measured, README): a node saves memory and prefill from its first token on, and costs a decode
    step one more small attention and a merge. Shared runs of fewer than `min_tokens` tokens are therefore left in the
    suffixes, and a cache without nodes attends as DenseCache does.
    """

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
            ValueError: the model has something that kvcompress does not support, or padding is not on the left.
        """
        if min_tokens < 1 or copies < 1:
            raise ValueError(f"min_tokens and copies must be at least 1, got {min_tokens} and {copies}")
        super().__init__(model, min_tokens=min_tokens)
        if input_ids is not None:
            self._find(input_ids, attention_mask, copies)
            self.for_prompts = True

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
            parents: for each node the index of an earlier one, or -1 for a root.
            rows: for each sequence the node that it continues from; None: one sequence for each node without children.

        Raises:
            ValueError: a parent or a row does not name a node, or a node has no token.
        """
        cache = cls(model, **settings)
        ids = [torch.as_tensor(piece, device=hf.input_device(model)).reshape(-1) for piece in pieces]
        if len(ids) != len(parents) or not ids or any(not -1 <= parent < node for node, parent in enumerate(parents)):
            raise ValueError(
                f"from_tree needs for each of {len(ids)} pieces the index of an earlier one or -1, got {list(parents)}"
            )
        if any(len(piece) == 0 for piece in ids):
            raise ValueError("every node of a tree needs at least one token")
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
        """A cache whose prefix is what another one holds of one sequence, in that one's form.

        An evicting cache gives a prefix of its slots, a quantising one a prefix of packed blocks, ShadowKV one whose
        chunks the queries of all rows choose together. It is read once for all rows, whose suffixes are kept whole. The
        other cache must not be used any more.

        Args:
            cache: of one sequence, without padding.

        Raises:
            ValueError: it is empty, or holds several sequences, padding, or keys that are not at their true positions.
        """
        model = cache._model()
        if model is None:
            raise ValueError("the cache's model has been deleted; from_cache needs it")
        if not cache.get_seq_length():
            raise ValueError(f"from_cache takes a cache that has seen tokens, got an empty {type(cache).__name__}")
        if any(isinstance(segment, RerotatedSlots) for layer in cache.layers for segment in segments_of(layer)):
            raise ValueError(
                f"a {type(cache).__name__} with rerotated=True holds RerotatedSlots, whose keys have no fixed "
                "positions, so no sequence can continue from them; build it without rerotated=True"
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
        shared.donors[name] = {"cache": class_name(type(cache)), "settings": cache._settings()}
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
            raise ValueError("push needs at least one token for every row")
        parents = [leaf for leaf in (self.tree.leaves or [ROOT] * rows) for _ in range(batch // rows)]
        self._set_leaves(self._prefill(parents, pieces))
        self._lay_out()

    @as_stored()
    def pop(self) -> None:
        """Takes back the newest level, and all tokens that came after it.

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
        """A cache with `copies` continuations of each row, which shares all tokens seen so far with this one.

        Both continue independently; the copies of a row are adjacent. From then on all tokens seen so far are in nodes.
        """
        if copies < 1:
            raise ValueError(f"fork needs at least one copy, got {copies}")
        self._suffix_to_node()
        other = self.clone()
        other.batch_repeat_interleave(copies)
        return other

    def clone(self) -> Self:
        """An independent copy; the two share nodes, which never change."""
        shared: list[Any] = list(self.tree.nodes.values())
        for layer in self.layers:
            shared += [*layer.coded.values(), *(segment for node in layer.held.values() for segment in node)]
        memo: dict[int, Any] = {id(one): one for one in shared}
        return copy.deepcopy(self, memo)

    def known_ids(self, row: int = 0) -> Tensor:
        """The tokens of a row that the cache has seen, [tokens] int32 on the CPU, -1 for unknown ones."""
        return self.padding.row_ids(row, self.tree.lengths()[row] + self.own_lengths()[row])

    def own_lengths(self) -> list[int]:
        """For each row, how many of its tokens are its own, in no node."""
        return self.padding.own_lengths(int(self.get_seq_length()))

    def _step_back(self) -> Tensor:
        """Has the cache expect the last token of each row again, which it holds: feeding it gives its logits anew.

        Returns:
            Those tokens, [batch, 1] int64 on the device of the model's inputs.

        Raises:
            ValueError: a row's last token is unknown: it came as an embedding, in a compiled step or in another cache;
                or the cache waits for prompts whose last tokens it has not seen.
        """
        if self.for_prompts or self.tree.overlap is not None:
            raise ValueError(
                f"this {type(self).__name__} was made for whole prompts, and leaves the last token of each to be fed: "
                "feed it the prompts first, or build it of a document [tokens]"
            )
        self._suffix_to_node()
        paths = [self.tree.ids(leaf) for leaf in self.tree.leaves]
        unknown = [row for row, path in enumerate(paths) if not len(path) or int(path[-1]) == UNKNOWN]
        if unknown:
            raise ValueError(
                f"the cache does not know the last token of row {unknown[0]}, if it has one: it came as an embedding, "
                "in a compiled step or in another cache; pass last_logits, the model's logits after that token"
            )
        # each row's last token in the last column
        self._lay_out()
        seen = int(self.get_seq_length())
        self.padding.see(seen - 1)
        if self.padding.visible is not None:
            self.padding.visible = self.padding.visible[:, : seen - 1]
        return torch.stack([path[-1:] for path in paths]).long().to(self._device())

    # whole prompts

    def prompt_begins(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Compares whole prompts [batch, tokens] with what is held, and leaves at least one token of each to feed.

        Raises:
            ValueError: a prompt does not begin with what its row has seen; the cache is unchanged.
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
            # compiled steps leave no record; all tokens that they fed are real
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
        """Makes rows of a batch continue from fewer tokens of their paths than they hold, but at least one."""
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
            raise ValueError("HydragenCache takes prompts padded on the left; a row has padding after a token")
        rows = [ids[shown] for ids, shown in zip(input_ids.to(mask.device), mask, strict=True)]
        found = tree_of_prompts(rows, mask.shape[1], copies, self.min_tokens)
        if not found.shared:
            return
        names = self._grow(found.pieces(rows), [shared.parent for shared in found.shared])
        self._set_leaves([ROOT if end == ROOT else names[end] for end in found.ends])
        self._lay_out()
        shown = mask[:, : found.seen]
        self.padding.visible = None if bool(shown.all()) else shown.clone()
        self.padding.see(found.seen)

    # running what is shared

    def _grow(self, pieces: list[Tensor], parents: list[int]) -> list[int]:
        """Runs the pieces of a tree, with the index of each one's parent, level by level; returns the nodes' names."""
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
        """Runs pieces of tokens, each once, each as a node's continuation; returns the names of the new nodes."""
        names = [ROOT] * len(pieces)
        for group in by_length(len(piece) for piece in pieces):
            self.tree.set_leaves([parents[index] for index in group])
            self._lay_out()
            self._feed([pieces[index] for index in group])
            self._suffix_to_node()
            for index, name in zip(group, self.tree.leaves, strict=True):
                names[index] = name
        return names

    @torch.no_grad()
    def _feed(self, pieces: list[Tensor]) -> None:
        """Runs one forward, without logits, over one piece of tokens per row."""
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
            **hf.unread(decoder, ids),
        )
