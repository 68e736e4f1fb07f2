"""Which rows have which tokens in common."""

import torch

from kvcompress.prefix.tree import ROOT, Shared, common_tokens, common_vectors, find_shared


def test_the_tree_of_a_batch_is_found():
    rows = [torch.tensor(row) for row in ([1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 7, 8], [6, 6], [1, 2, 3, 4, 8])]
    found = find_shared([4, 3, 3, 1, 4], common_tokens(rows), 1)
    assert found == [
        Shared(ROOT, 0, 2, (0, 1, 2, 4)),
        Shared(0, 2, 3, (0, 1, 4)),
        Shared(1, 3, 4, (0, 4)),
    ]
    # too short for a node of its own, a run counts as the beginning of the next
    assert find_shared([4, 3, 3, 1, 4], common_tokens(rows), 3) == [
        Shared(ROOT, 0, 3, (0, 1, 4)),
    ]
    assert find_shared([4, 3, 3, 1, 4], common_tokens(rows), 5) == []


def test_vectors_are_equal_up_to_rounding():
    rows = [torch.randn(6, 4) for _ in range(2)]
    rows.append(rows[0] * (1 + 1e-7))
    common = common_vectors(rows)
    assert common(0, 2, 0) == 6
    assert common(0, 1, 0) == 0
