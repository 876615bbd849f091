"""Products and factors in blocks, against double precision."""

import pytest
import torch

from halfbyte.products import cholesky, product, solved

# One group and several, smaller than a block and of several blocks, the last of them short.
SHAPES = [(1, 5, 3), (3, 7, 2), (1, 300, 40), (1, 600, 130), (2, 300, 4)]


def definite(groups: int, k: int) -> torch.Tensor:
    x = torch.randn(groups, 2 * k, k, generator=torch.Generator().manual_seed(k))
    return x.transpose(1, 2) @ x / (2 * k) + 0.1 * torch.eye(k)


@pytest.mark.parametrize(("groups", "k", "rows"), SHAPES)
def test_product_is_that_of_double_precision(groups: int, k: int, rows: int) -> None:
    a, b = torch.randn(groups, rows, k), torch.randn(groups, 2 * k, k)
    expected = a.double() @ b.double().transpose(1, 2)
    assert torch.allclose(product(a, b).double(), expected, atol=1e-4)
    turned = a.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.allclose(product(turned, b[:, ::2]).double(), expected[:, :, ::2], atol=1e-4)


@pytest.mark.parametrize(("groups", "k", "rows"), SHAPES)
def test_factor_and_solution_fulfil_their_equations(groups: int, k: int, rows: int) -> None:
    gram, right = definite(groups, k), torch.randn(groups, rows, k)
    lower = cholesky(gram)
    assert lower is not None and torch.equal(lower, lower.tril())
    assert torch.allclose(lower @ lower.transpose(1, 2), gram, atol=1e-5)
    expected = torch.linalg.solve(gram.double(), right.double().transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(solved(right, lower).double(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("at", [0, 299])
def test_no_factor_of_what_is_not_definite(at: int) -> None:
    gram = definite(1, 300)
    gram[0, at, at] = -1.0
    assert cholesky(gram) is None
