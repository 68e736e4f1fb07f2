"""Which tokens sequences share: a tree of nodes, the rows that continue from them, and how to find the tree."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcompress.kernels.common.shared_blocks import Sharing

ROOT = -1
# stands for a token's id that was not given, as with embeddings
UNKNOWN = -1


@dataclass(frozen=True)
class Node:
    """Tokens start .. start + tokens of every sequence that passes through the node; parent: ROOT or a node's name.

    ids: [tokens] int32 on the CPU, what they are; None if unknown.
    """

    parent: int
    tokens: int
    start: int
    ids: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def stop(self) -> int:
        return self.start + self.tokens


@dataclass
class Tree:
    """The nodes by name, and for each row the node that it continues from, or ROOT.

    overlap: [rows] int64, how many tokens a row's path holds beyond the columns that the cache reports as seen: they
    will be fed again and dropped. None if there are none.
    """

    nodes: dict[int, Node] = field(default_factory=dict)
    leaves: list[int] = field(default_factory=list)
    overlap: Tensor | None = None
    _sharing: Sharing | None = None

    def path(self, leaf: int) -> list[int]:
        """The nodes from the root to a leaf, by name."""
        path = []
        while leaf != ROOT:
            path.append(leaf)
            leaf = self.nodes[leaf].parent
        return path[::-1]

    def length(self, leaf: int) -> int:
        """How many tokens are on the path to a leaf, which is the next token's position."""
        return 0 if leaf == ROOT else self.nodes[leaf].stop

    def lengths(self) -> list[int]:
        """How many tokens each row's path holds."""
        return [self.length(leaf) for leaf in self.leaves]

    def ids(self, leaf: int) -> Tensor:
        """The tokens on the path to a leaf, [tokens] int32 on the CPU, UNKNOWN where they were not given."""
        nodes = [self.nodes[name] for name in self.path(leaf)]
        parts = [torch.full((node.tokens,), UNKNOWN) if node.ids is None else node.ids for node in nodes]
        return torch.cat([torch.empty(0, dtype=torch.int32), *parts]).to(torch.int32)

    def add(self, parent: int, tokens: int, ids: Tensor | None = None) -> int:
        """Adds a node below another, and returns its name."""
        name = max(self.nodes, default=ROOT) + 1
        self.nodes[name] = Node(parent, tokens, self.length(parent), ids)
        self._sharing = None
        return name

    def node_at(self, leaf: int, tokens: int) -> int:
        """The node of a path that holds its token number `tokens` - 1, ROOT if none does."""
        return next((name for name in self.path(leaf) if self.nodes[name].stop >= tokens), ROOT) if tokens else ROOT

    def set_leaves(self, leaves: list[int]) -> None:
        """Sets which node each row continues from."""
        if leaves != self.leaves:
            self._sharing = None
        self.leaves = leaves

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, in this order."""
        if self.leaves:
            order = torch.arange(len(self.leaves))[rows.cpu()].tolist()
            self.set_leaves([self.leaves[row] for row in order])
            self.overlap = None if self.overlap is None else self.overlap[rows.to(self.overlap.device)]

    def repeat(self, repeats: int) -> None:
        """Repeats each row several times."""
        self.set_leaves([leaf for leaf in self.leaves for _ in range(repeats)])
        self.overlap = None if self.overlap is None else self.overlap.repeat_interleave(repeats, 0)

    def prune(self) -> list[int]:
        """Drops the nodes that no row passes through, and returns their names."""
        reached = {name for leaf in set(self.leaves) for name in self.path(leaf)}
        gone = [name for name in self.nodes if name not in reached]
        for name in gone:
            del self.nodes[name]
        if gone:
            self._sharing = None
        return gone

    def node_to_suffix(self) -> None:
        """Drops all nodes; the rows stay."""
        self.nodes, self.overlap, self._sharing = {}, None, None
        self.set_leaves([ROOT] * len(self.leaves))

    def clear(self) -> None:
        """Drops all nodes and rows."""
        self.node_to_suffix()
        self.set_leaves([])

    def tensors(self) -> list[Tensor]:
        """The tensors of the tree itself."""
        own = [node.ids for node in self.nodes.values() if node.ids is not None]
        own += [] if self.overlap is None else [self.overlap]
        return own if self._sharing is None else own + self._sharing.tensors()

    @property
    def is_laid_out(self) -> bool:
        """Whether `sharing` is known: nothing has changed since."""
        return self._sharing is not None

    def sharing(self) -> Sharing:
        """The rows of each node, in the order of `nodes`."""
        if self._sharing is None:
            rows: dict[int, list[int]] = {name: [] for name in self.nodes}
            for row, leaf in enumerate(self.leaves):
                for name in self.path(leaf):
                    rows[name].append(row)
            self._sharing = Sharing([rows[name] for name in self.nodes], len(self.leaves))
        return self._sharing


@dataclass(frozen=True)
class Shared:
    """Tokens start .. stop that some rows have in common; parent: the index of an earlier one, or ROOT."""

    parent: int
    start: int
    stop: int
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def find_shared(limits: Sequence[int], common: Callable[[int, int, int], int], least: int) -> list[Shared]:
    """The tree of what rows have in common, parents before children.

    Args:
        limits: how many tokens of each row may be shared.
        common: (row, other, start) -> how many tokens from `start` on the two rows have in common.
        least: fewer tokens get no node of their own, and count as the beginning of what follows.
    """
    found: list[Shared] = []

    def split(rows: list[int], parent: int, start: int, known: int) -> None:
        # all of these rows agree on the tokens start .. known
        if len(rows) < 2:
            return
        first = rows[0]
        agrees = {row: min(known + common(first, row, known), limits[first], limits[row]) for row in rows[1:]}
        agrees[first] = limits[first]
        stop = min(agrees.values())
        if stop - start >= max(1, least):
            found.append(Shared(parent, start, stop, tuple(rows)))
            parent, start = len(found) - 1, stop
        left = [row for row in rows if limits[row] > stop]
        while left:
            branch = [row for row in left if row == left[0] or common(left[0], row, stop) > 0]
            split(branch, parent, start, stop)
            left = [row for row in left if row not in branch]

    split([row for row, limit in enumerate(limits) if limit > 0], ROOT, 0, 0)
    return found


def common_tokens(rows: Sequence[Tensor]) -> Callable[[int, int, int], int]:
    """A function that tells how many tokens two rows of ids, each [tokens], have in common from a position on."""

    def common(row: int, other: int, start: int) -> int:
        return leading(rows[row][start:], rows[other][start:], torch.eq)

    return common


def common_vectors(rows: Sequence[Tensor]) -> Callable[[int, int, int], int]:
    """The same for rows of vectors [tokens, size], which are equal up to rounding if their tokens are."""
    bound = 1e-5 * max((float(row.abs().amax()) for row in rows if row.numel()), default=0.0)

    def close(ours: Tensor, theirs: Tensor) -> Tensor:
        return (ours - theirs).abs().amax(-1) <= bound

    def common(row: int, other: int, start: int) -> int:
        return leading(rows[row][start:], rows[other][start:], close)

    return common


def leading(ours: Tensor, theirs: Tensor, equal: Callable[[Tensor, Tensor], Tensor]) -> int:
    """How many positions, from the first on, are equal."""
    size = min(len(ours), len(theirs))
    if size == 0:
        return 0
    differs = ~equal(ours[:size], theirs[:size])
    return int(differs.to(torch.uint8).argmax()) if bool(differs.any()) else size


def by_length(lengths: Iterable[int]) -> list[list[int]]:
    """Indexes in groups of similar length, so that padding a group to one length at most doubles its cost."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length.bit_length(), []).append(index)
    return list(groups.values())
