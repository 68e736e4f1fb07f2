"""Rows that begin alike, trees of tokens, and what each row says alone."""

import torch

from tests.contract.drive import feed
from tests.contract.models import prompt

SUFFIXES = [prompt(7, seed=11)[0], prompt(1, seed=12)[0], prompt(4, seed=13)[0], prompt(7, seed=14)[0]]
PREFIX = prompt(40, seed=3)[0]
WHOLE = [torch.cat([PREFIX, suffix]) for suffix in SUFFIXES]


@torch.no_grad()
def alone(model, row):
    """Logits of a row by itself, without any cache, [tokens, vocabulary]."""
    return model(row[None], use_cache=False).logits[0]


def assert_rows_equal_singles(model, cache, rows, ids, mask):
    """Feeding these columns gives each row's real tokens the logits of the whole row [tokens] alone."""
    logits = feed(model, cache, ids, mask)
    fresh = mask[:, -ids.shape[1] :].bool()
    for row, whole in enumerate(rows):
        ours = logits[row][fresh[row]]
        torch.testing.assert_close(ours, alone(model, whole)[-len(ours) :], rtol=1e-4, atol=2e-4)


def nodes(cache):
    return [segment for layer in cache.layers for node in layer.held.values() for segment in node]


def pointers(cache):
    return [tensor.data_ptr() for node in nodes(cache) for tensor in node.tensors().values()]


A, B, C, D, E = (prompt(tokens, seed=20 + tokens)[0] for tokens in (23, 5, 9, 31, 2))
#        A              D
#      /   \            |
#     B     C       (two rows)
#    / \    |
#  (2)  E  (1)
TREE = ([A, B, C, E, D], [-1, 0, 0, 1, -1])
ROWS = [1, 2, 4, 3, 4, 1]
PATHS = [[A, B], [A, C], [D], [A, B, E], [D], [A, B]]
