"""The rotation of values: orthogonal, taken back exactly, and the same on every machine and in every file."""

import pytest
import torch

from kvcompress.kernels.hadamard import rotate, rotate_reference


@pytest.mark.parametrize("dim", [1, 3, 16, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("back", [False, True])
def test_it_agrees_with_the_reference(dim, back):
    x = torch.randn(2, 3, 5, dim, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, back), rotate_reference(x, back), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotate(x.float(), back), rotate_reference(x.float(), back), rtol=1e-5, atol=1e-5)
    half = x.to(torch.bfloat16)
    torch.testing.assert_close(rotate(x, at_once=True), rotate_reference(x), rtol=1e-12, atol=1e-12)
    assert rotate(half).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(half, back), rotate_reference(half, back), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dim", [3, 64, 80, 96, 256])
def test_it_keeps_lengths_and_is_taken_back(dim):
    x = torch.randn(7, dim, dtype=torch.float64)
    torch.testing.assert_close(rotate(x).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(rotate(x), back=True), x)


def test_what_stands_out_is_spread_over_all():
    x = torch.zeros(64, dtype=torch.float64)
    x[5] = 8.0
    assert torch.equal(rotate(x).abs().round(decimals=9), torch.ones(64, dtype=torch.float64))


def test_files_rely_on_these_signs():
    first = rotate(torch.eye(16, dtype=torch.float64))[:, 0].sign().int().tolist()
    assert first == [-1, -1, 1, 1, 1, 1, -1, 1, -1, -1, 1, 1, -1, -1, 1, 1]


def test_what_it_prepares_in_inference_mode_serves_training_too():
    with torch.inference_mode():
        rotate(torch.randn(2, 40))
    x = torch.randn(2, 40, requires_grad=True)
    rotate(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dim", [16, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_vector_does_not_depend_on_those_beside_it(dim, dtype):
    x = torch.randn(3, 2, 70, dim).to(dtype)
    whole = rotate(x)
    assert torch.equal(rotate(x[1:2, :, 33:41]), whole[1:2, :, 33:41])
    assert torch.equal(rotate(x[2, 1, 69]), whole[2, 1, 69])
    assert torch.equal(rotate(x.transpose(1, 2)), whole.transpose(1, 2))
