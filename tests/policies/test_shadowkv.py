import pytest
import torch

from kvcompress.policies.shadowkv import ShadowKV, fit_basis, gram, landmarks_of, measure, project


def keys(tokens=200, width=48, seed=0):
    """Keys that fill their space unevenly, as a model's do, [2, tokens, width]."""
    torch.manual_seed(seed)
    return torch.randn(2, tokens, width) @ torch.diag(0.9 ** torch.arange(width)) @ torch.randn(width, width)


@pytest.mark.parametrize("rank", [1, 7, 30, 47, 48])
def test_the_error_of_the_factors_is_that_of_a_truncated_svd(rank):
    x = keys()
    basis, missed = fit_basis(gram(x), rank)
    coefficients, (norm, error) = project(x, basis), measure(x, basis)
    singular = torch.linalg.svdvals(x.double())
    left_out, whole = (singular[:, rank:] ** 2).sum(1).float(), (singular**2).sum(1).float()
    torch.testing.assert_close(norm, whole)
    torch.testing.assert_close(error, left_out, rtol=1e-4, atol=1e-6 * float(whole.max()))
    torch.testing.assert_close(missed, left_out / whole, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close((x - coefficients @ basis).square().sum((1, 2)), error)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(rank).expand(2, -1, -1), rtol=0.0, atol=1e-5)


def test_the_gram_matrix_adds_up_over_pieces():
    x = keys()
    # sums of 200 products in another order
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(gram(x), x.mT @ x, **close)
    torch.testing.assert_close(gram(x, largest=33), gram(x), **close)
    torch.testing.assert_close(sum(gram(piece) for piece in x.split(70, 1)), gram(x), **close)
    basis, _ = fit_basis(gram(x), 9)
    for whole, pieces in zip(measure(x, basis), measure(x, basis, largest=33), strict=True):
        torch.testing.assert_close(whole, pieces, **close)


def test_keys_in_16_bits_are_summed_in_32():
    x = keys().to(torch.bfloat16)
    assert gram(x).dtype == torch.float32
    torch.testing.assert_close(gram(x), x.float().mT @ x.float(), rtol=1e-4, atol=1e-4)
    assert project(x, fit_basis(gram(x), 9)[0]).dtype == torch.bfloat16


def test_coefficients_for_a_basis_of_longer_rows_are_shorter():
    x = keys()
    basis, _ = fit_basis(gram(x), 9)
    torch.testing.assert_close(project(x, basis, 8.0) @ (8.0 * basis), project(x, basis) @ basis)


def test_keys_that_are_all_zero_miss_nothing():
    _, missed = fit_basis(torch.zeros(1, 4, 4), 2)
    assert missed.tolist() == [0.0]


def test_a_landmark_is_the_mean_and_an_outlier_is_unlike_it():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 1, 1, 16) + 0.1 * torch.randn(2, 3, 5, 8, 16)
    x[0, 1, 3, 6] *= -1
    means, cosines = landmarks_of(x)
    torch.testing.assert_close(means, x.mean(3))
    each = torch.cosine_similarity(x, x.mean(3, keepdim=True), dim=-1)
    torch.testing.assert_close(cosines, each.amin(-1))
    assert cosines[0, 1].argmin() == 3
    assert cosines[0, 1, 3] < 0 < cosines[0, 1, 2]


@pytest.mark.parametrize(("width", "rank"), [(1024, 160), (192, 30), (512, 80), (32, 5), (1, 1)])
def test_the_default_rank_is_the_papers_share(width, rank):
    assert ShadowKV().rank_of(width) == rank


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"outlier_chunks": -1}, "outlier_chunks must be at least 0, got -1"),
        ({"local_chunks": 0}, "local_chunks must be at least 1"),
        ({"fold": 0}, "fold must be at least 1"),
        ({"select_queries": 0}, "select_queries must be at least 1"),
        ({"rank": 0}, "rank must be None or at least 1, got 0"),
        ({"dense_below": -1}, "dense_below must be None or at least 0, got -1"),
        ({"drift": 0.5}, "drift must be at least 1.*got 0.5"),
        ({"group": "median"}, "'max', 'mean' or 'sum', got 'median'"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ShadowKV(**settings)


def test_a_rank_beyond_the_width_is_refused():
    with pytest.raises(ValueError, match=r"rank must be at most kv_heads \* head_dim = 64, got 65"):
        ShadowKV(rank=65).rank_of(64)
