"""The product of features and weights whose rows do not depend on their place."""

from __future__ import annotations

import itertools

import pytest
import torch

from bayesnet.inference.products import product


@pytest.mark.parametrize(("num_columns", "num_outputs"), list(itertools.product((5, 9, 16, 65, 129), (1, 4, 10, 130))))
def test_a_row_does_not_depend_on_its_place(num_columns: int, num_outputs: int) -> None:
    """For any number of columns: a plain product of 65 differs in the last bit on some processors."""
    generator = torch.Generator().manual_seed(num_columns)
    x_BD, matrix_DN = (
        torch.randn(*shape, generator=generator) for shape in ((64, num_columns), (num_columns, num_outputs))
    )
    order_B = torch.randperm(64, generator=generator)
    with torch.inference_mode():
        for matrix in (matrix_DN, matrix_DN.T.contiguous().T):
            found = product(x_BD, matrix)
            assert torch.equal(product(x_BD[order_B], matrix), found[order_B])
            torch.testing.assert_close(found, x_BD @ matrix)


def test_where_a_gradient_is_asked_for_it_is_the_plain_product() -> None:
    x_BD, matrix_DN = torch.randn(3, 5), torch.randn(5, 2, requires_grad=True)
    found = product(x_BD, matrix_DN)
    assert torch.equal(found, x_BD @ matrix_DN)
    assert found.requires_grad
