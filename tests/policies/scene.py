"""Candidates as a cache would present them, small and random, and the attention in them computed by plain loops."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.policies.policy import Candidates, Policy

SCALE = 0.3


@dataclass
class Scene:
    """Candidates, and the same facts in lists: for a row its real queries' (index, place), for a head its tokens'."""

    candidates: Candidates
    queries: list[list[tuple[int, int]]]
    tokens: list[list[list[tuple[int, int]]]]

    @property
    def group(self) -> int:
        return self.candidates.query.shape[1] // self.candidates.positions.shape[1]

    def heads(self) -> list[tuple[int, int]]:
        """All pairs of row and KV head."""
        rows, heads = self.candidates.positions.shape[:2]
        return [(row, head) for row in range(rows) for head in range(heads)]


def scene(policy: Policy, queries: int, *, padded: bool = False, past: int = 9, slots: int = 7, seed: int = 0) -> Scene:
    """Candidates after a forward of some queries, over slots that hold some of `past` tokens in no order.

    Batch 2, 2 KV heads of 2 query heads, head_dim 8; two slots are empty. padded: the first row's queries start with
    two pads.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch, kv_heads, group, head_dim = 2, 2, 2, 8
    held = torch.full((batch, kv_heads, slots), -1, dtype=torch.int32)
    for row in range(batch):
        for head in range(kv_heads):
            places = torch.randperm(past, generator=generator)[: slots - 2]
            held[row, head, torch.randperm(slots, generator=generator)[: slots - 2]] = places.int()
    visible = torch.ones(batch, queries, dtype=torch.bool)
    if padded:
        visible[0, :2] = False
    query_positions = (past + visible.cumsum(-1) - 1).int()
    fresh = query_positions.masked_fill(~visible, -1)[:, None].expand(-1, kv_heads, -1)
    positions = torch.cat([held, fresh], -1)
    query = random(batch, kv_heads * group, queries, head_dim)
    parts = [
        (random(batch, kv_heads, count, head_dim), random(batch, kv_heads, count, head_dim))
        for count in (slots, queries)
    ]
    scores = torch.cat([random(batch, kv_heads, slots).abs(), torch.zeros(batch, kv_heads, queries)], -1)
    candidates = Candidates(
        positions,
        scores,
        None,
        query,
        query_positions,
        visible if padded else None,
        (past + visible.sum(-1)).int(),
        lambda: parts,
        SCALE,
    )
    seen = [
        [(index, int(query_positions[row, index])) for index in range(queries) if visible[row, index]]
        for row in range(batch)
    ]
    tokens = [
        [[(index, place) for index, place in enumerate(head.tolist()) if place >= 0] for head in row]
        for row in positions
    ]
    made = Scene(candidates, seen, tokens)
    if policy.observes != 0:
        candidates.attention = torch.zeros(positions.shape)
        for row, head in made.heads():
            observed = seen[row] if policy.observes is None else seen[row][-policy.observes :]
            for index, place in observed:
                for query_head in range(head * group, (head + 1) * group):
                    for token, probability in probabilities(made, row, head, query_head, index, place).items():
                        candidates.attention[row, head, token] += probability
    return made


def probabilities(made: Scene, row: int, head: int, query_head: int, index: int, place: int) -> dict[int, float]:
    """Softmax of one query of one head over the candidates not after it, by candidate."""
    keys, query = made.candidates.keys.double(), made.candidates.query.double()
    weights = {
        token: math.exp(SCALE * float(query[row, query_head, index] @ keys[row, head, token]))
        for token, at in made.tokens[row][head]
        if at <= place
    }
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def check(made: Scene, scores: Tensor, expected: dict[tuple[int, int, int], float]) -> None:
    """Scores of all candidates that are tokens; expected by (row, head, candidate)."""
    assert scores.shape == made.candidates.positions.shape
    assert scores.dtype == torch.float32
    for row, head in made.heads():
        for token, place in made.tokens[row][head]:
            wanted = expected[row, head, token]
            actual = float(scores[row, head, token])
            assert math.isclose(actual, wanted, rel_tol=1e-4, abs_tol=1e-6), (
                f"row {row} head {head} place {place}: {actual} for {wanted}"
            )
