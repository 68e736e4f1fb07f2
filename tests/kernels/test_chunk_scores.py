import pytest
import torch

from kvcompress.kernels.chunk_scores import chunk_scores, chunk_scores_reference
from kvcompress.kernels.common.logits import LogitSpec
from tests.kernels.inputs import DEVICE, DTYPES, heads

# group, queries, chunks, head_dim, options
CASES = [
    (1, 1, 1, 64, {}),
    (4, 1, 70, 80, {}),
    (3, 1, 700, 64, {"softcap": 5.0}),
    (1, 5, 7, 96, {}),
    (3, 7, 65, 64, {"group": "mean"}),
    (2, 40, 300, 129, {"softcap": 5.0, "group": "sum"}),
    (64, 1, 20, 64, {"group": "mean"}),
]


def scene(group, queries, chunks, head_dim, dtype=torch.float32):
    torch.manual_seed(0)
    # some chunks are closed; of the last head all
    is_open = torch.rand(2, 2, chunks, device=DEVICE) < 0.8
    is_open[..., 0], is_open[1, 1] = True, False
    return heads(2, 2 * group, queries, head_dim, dtype), heads(2, 2, chunks, head_dim, dtype), is_open


@pytest.mark.parametrize(("group", "queries", "chunks", "head_dim", "options"), CASES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_scores_agree_with_the_reference(group, queries, chunks, head_dim, options, padded):
    arguments = scene(group, queries, chunks, head_dim)
    visible = torch.rand(2, queries, device=DEVICE) < 0.6 if padded else None
    arguments = (*arguments, LogitSpec(0.2, softcap=options.get("softcap")), visible, options.get("group", "max"))
    torch.testing.assert_close(chunk_scores(*arguments), chunk_scores_reference(*arguments))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_scores_agree_with_the_reference_in_16_bits(dtype, queries):
    arguments = scene(4, queries, 100, 64, dtype)
    found = chunk_scores(*arguments, LogitSpec(0.1))
    wide = [x.float() if x.is_floating_point() else x for x in arguments]
    torch.testing.assert_close(found, chunk_scores_reference(*wide, LogitSpec(0.1)))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_products_beyond_the_range_of_16_bits_are_scored_as_in_32(dtype, queries):
    """Products up to 4e6, which the scale brings down to hundreds."""
    query, landmarks, is_open = scene(4, queries, 100, 64, dtype)
    arguments = (query * 100 + 100, landmarks * 100 + 100, is_open)
    assert (arguments[0].float()[:, ::4] @ arguments[1].float().mT).abs().max() > 1e6
    found = chunk_scores(*arguments, LogitSpec(1e-4))
    wide = [x.float() if x.is_floating_point() else x for x in arguments]
    torch.testing.assert_close(found, chunk_scores_reference(*wide, LogitSpec(1e-4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 3])
def test_the_scores_are_the_formula(queries):
    """Head by head, query by query, with nothing shared between them."""
    query, landmarks, is_open = scene(3, queries, 33, 64)
    found = chunk_scores(query, landmarks, is_open, LogitSpec(0.3))
    for row in range(2):
        for kv_head in range(2):
            chosen = is_open[row, kv_head]
            assert (found[row, kv_head][~chosen] == -torch.inf).all()
            shares = [
                sum((query[row, head, i] @ landmarks[row, kv_head][chosen].T * 0.3).softmax(-1) for i in range(queries))
                for head in range(3 * kv_head, 3 * kv_head + 3)
            ]
            expected = torch.stack(shares).amax(0)
            torch.testing.assert_close(found[row, kv_head][chosen], expected)


def test_with_one_head_per_kv_head_all_ways_to_agree_give_the_same():
    arguments = scene(1, 4, 50, 64)
    scores = [chunk_scores(*arguments, LogitSpec(0.2), group=group) for group in ("max", "mean", "sum")]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


def test_a_query_that_is_padding_chooses_nothing():
    query, landmarks, is_open = scene(2, 6, 40, 64)
    visible = torch.tensor([[True] * 6, [False, False, True, True, True, True]], device=DEVICE)
    found = chunk_scores(query, landmarks, is_open, LogitSpec(0.2), visible)
    alone = chunk_scores(query[1:, :, 2:], landmarks[1:], is_open[1:], LogitSpec(0.2))
    torch.testing.assert_close(found[1:], alone)


def test_shapes_that_do_not_fit_together_are_refused():
    query, landmarks, is_open = scene(2, 1, 40, 64)
    with pytest.raises(ValueError, match=r"is_open \[batch, kv_heads, chunks\].*\[2, 2, 39\]"):
        chunk_scores(query, landmarks, is_open[..., 1:], LogitSpec(1.0))


def test_a_window_is_refused():
    with pytest.raises(ValueError, match="a landmark has no position; got window = 8"):
        chunk_scores(*scene(2, 1, 40, 64), LogitSpec(1.0, window=8))


@pytest.mark.parametrize("group", ["max", "mean"])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("where", ["query", "landmark"])
def test_nan_comes_through(where, queries, group):
    query, landmarks = heads(2, 6, queries, 64), heads(2, 2, 40, 64)
    is_open = torch.rand(2, 2, 40, device=DEVICE) < 0.8
    is_open[1, 0, 7] = True
    (query[1, 0, -1] if where == "query" else landmarks[1, 0, 7])[3] = torch.nan
    found = chunk_scores(query, landmarks, is_open, LogitSpec(0.125), group=group)
    expected = chunk_scores_reference(query, landmarks, is_open, LogitSpec(0.125), group=group)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[1, 0].isnan().sum() == is_open[1, 0].sum()
