"""What a batch of prompts has in common, and what of it is worth a node."""

from dataclasses import dataclass

from torch import Tensor

from kvcompress.prefix.tree import ROOT, Shared, common_tokens, find_shared

# feeding this many tokens for nothing costs as much as another node
_OWN_NODE = 64


@dataclass(frozen=True)
class PromptTree:
    """The nodes of a batch of prompts.

    shared: the nodes, parents before children. ends: for each row the index of the node that it continues from, or
    ROOT. seen: how many columns of the batch to report as seen.
    """

    shared: list[Shared]
    ends: list[int]
    seen: int

    def pieces(self, rows: list[Tensor]) -> list[Tensor]:
        """The tokens of each node, taken from rows of ids [tokens]."""
        return [rows[shared.rows[0]][shared.start : shared.stop] for shared in self.shared]


def tree_of_prompts(rows: list[Tensor], columns: int, copies: int, least: int) -> PromptTree:
    """The nodes to make of a batch of prompts, so that at least one token of each prompt is left to feed.

    Args:
        rows: for each prompt the ids without padding, [tokens].
        columns: the number of columns of the batch, in which prompts are padded on the left.
        copies: sequences made of each prompt; with more than one, everything that they share becomes a node.
        least: shared runs of fewer tokens become no node.
    """
    limits = [max(0, len(row) - 1) for row in rows]
    found = find_shared(limits, common_tokens(rows), least)
    if len(rows) == 1 and limits[0]:
        found = [Shared(ROOT, 0, limits[0], (0,))]
    ends = [ROOT] * len(rows)
    for index, shared in enumerate(found):
        for row in shared.rows:
            ends[row] = index
    held = [0 if end == ROOT else found[end].stop for end in ends]
    pads = [columns - len(row) for row in rows]
    seen = 0
    if copies > 1:
        seen = columns - 1
    elif found:
        seen = _columns_seen([pad + length for pad, length in zip(pads, held, strict=True)])
    for row, (pad, length) in enumerate(zip(pads, held, strict=True)):
        # the row's own node up to there, so that the others need not be fed again what they share
        if min(seen - pad, limits[row]) > length:
            found.append(Shared(ends[row], length, min(seen - pad, limits[row]), (row,)))
            ends[row] = len(found) - 1
    return PromptTree(found, ends, seen)


def _columns_seen(ends: list[int]) -> int:
    """How many columns of a batch to report as seen.

    A row whose nodes reach further is fed the rest again, for nothing; one whose nodes end earlier needs its own node.

    Args:
        ends: for each row the column up to which its tokens are shared.
    """

    def cost(seen: int) -> int:
        return sum(end - seen if end >= seen else _OWN_NODE for end in ends)

    return min(sorted(set(ends), reverse=True), key=cost)
