"""Tokens of suffixes that become nodes, and how they are found in what a batch is fed first."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvcompress.layer import AttentionInput
from kvcompress.prefix.tree import ROOT, Tree, common_vectors, find_shared


@dataclass(frozen=True)
class Promotion:
    """Tokens of the suffix that become nodes.

    nodes: for each new node its name, a row that holds its tokens, and which of the row's suffix tokens they are,
    padding not counted: first .. stop. taken: for each row how many of its first suffix tokens are now in nodes.
    counts: for each row how many suffix tokens it has. leaves: for each row the node that it then continues from.
    """

    nodes: list[tuple[int, int, int, int]]
    taken: list[int]
    counts: list[int]
    leaves: list[int]


def find_promotion(
    chunk: AttentionInput, tree: Tree, ids_of: Callable[[int], Tensor], min_tokens: int
) -> Promotion | None:
    """What rows turn out to have in common: in the first layer, equal keys mean equal tokens at equal positions.

    Args:
        chunk: the rows' first tokens. tree: where the nodes are added; it has none.
        ids_of: gives the tokens that a row is fed, [tokens]. min_tokens: shared runs of fewer tokens get no node.
    """
    rows = [key.transpose(0, 1).flatten(1) for key in chunk.key]
    if chunk.visible is not None:
        rows = [row[shown] for row, shown in zip(rows, chunk.visible, strict=True)]
    counts = [len(row) for row in rows]
    found = find_shared(counts, common_vectors(rows), min_tokens)
    if not found:
        return None
    names: list[int] = []
    leaves, taken = list(tree.leaves), [0] * len(rows)
    for shared in found:
        ids = ids_of(shared.rows[0])[shared.start : shared.stop]
        names.append(tree.add(ROOT if shared.parent == ROOT else names[shared.parent], shared.tokens, ids))
        for row in shared.rows:
            leaves[row], taken[row] = names[-1], shared.stop
    # on a sliding layer, the shortest row still holds most of a node's tokens, and all that any row will look at
    nodes = [
        (name, min(shared.rows, key=counts.__getitem__), shared.start, shared.stop)
        for name, shared in zip(names, found, strict=True)
    ]
    return Promotion(nodes, taken, counts, leaves)
