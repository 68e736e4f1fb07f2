"""The nodes that a layer holds: how they are made, cut, read and dropped."""

from typing import Any

from kvcompress.caches.dense import SLACK, DenseLayer
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.shared_blocks import KeyBlocks, Sharing
from kvcompress.kernels.shared_attention import BlockTables, block_tables
from kvcompress.layer import CompressedLayer
from kvcompress.prefix.coded import segments_of
from kvcompress.prefix.padding import PrefixPadding
from kvcompress.prefix.segments import NodeSegment
from kvcompress.prefix.steps import SharedSteps
from kvcompress.prefix.tree import Tree
from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.segment import Segment
from kvcompress.storage.tail import TailSegment


class NodeLayer(DenseLayer):
    """Holds nodes, and what kernels must know about them.

    held: the segments of each node, in the tree's order. coded: for a node made from another cache, that cache's layer;
    its segments never change either.
    """

    padding: PrefixPadding
    takes_spans = False
    steps = SharedSteps
    _steps: SharedSteps | None = None
    # query heads per KV head, and how logits are made
    _asked: tuple[int, LogitSpec] | None = None

    def __init__(self, padding: PrefixPadding, window: int | None, is_first: bool, tree: Tree) -> None:
        super().__init__(padding, window, is_first)
        self.tree = tree
        self.held: dict[int, list[Segment]] = {}
        self.coded: dict[int, CompressedLayer] = {}
        # nodes that another layer also holds
        self.borrowed: set[int] = set()
        self._last: tuple[Sharing, KeyBlocks, Sharing] | None = None
        self._tables: BlockTables | None = None

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
            self._forget_tables()
            self._last = sharing, KeyBlocks(keys, values, starts), plain
        return self._last[1:]

    def _forget_tables(self) -> None:
        self._last = self._tables = None
        if self._steps is not None:
            self._steps.tables = None

    def _step_tables(self) -> BlockTables:
        """The nodes, none of which is coded, as a step of decoding takes them."""
        assert self._asked is not None
        blocks, sharing = self._node_blocks(self.tree.sharing())
        if self._tables is None:
            self._tables = block_tables(blocks, sharing, *self._asked)
        return self._tables

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
        cut = NodeSegment(*(getattr(node, part)[:, :, :held] for part in NodeSegment.tensor_names))
        cut.codings = node.codings
        self.held[into] = [cut]
        self._forget_tables()

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

    def prune(self, names: list[int]) -> None:
        """Drops nodes."""
        for name in names:
            self.held.pop(name, None)
            self.coded.pop(name, None)
            self.borrowed.discard(name)
            self._forget_tables()

    def check_thaw(self) -> None:
        """Raises ValueError if the nodes hold anything but keys and values of tokens."""
        for name, segments in self.held.items():
            for segment in segments:
                if not isinstance(segment, NodeSegment):
                    raise ValueError(
                        f"node {name} is a {type(segment).__name__}: shared tokens in this form cannot be cropped, or "
                        "dropped by one sequence"
                    )

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
