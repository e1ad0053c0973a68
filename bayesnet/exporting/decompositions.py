"""Operators of torch that ONNX has none for, by operators that it has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def cholesky(matrix: Tensor, *, upper: bool = False, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """Return the lower Cholesky factor of positive definite matrices (..., K, K), column by column, and zeros.

    Example:
        >>> cholesky(torch.tensor([[4.0, 2.0], [2.0, 5.0]]))[0]
        tensor([[2., 0.],
                [1., 2.]])
    """
    assert not upper
    size = matrix.shape[-1]
    rows = torch.arange(size)
    columns: list[Tensor] = []
    for index in range(size):
        rest = matrix[..., index]
        if columns:
            before = torch.stack(columns, -1)
            rest = rest - (before * before[..., index : index + 1, :]).sum(-1)
        column = rest / rest[..., index : index + 1].sqrt()
        columns.append(torch.where(rows >= index, column, torch.zeros_like(column)))
    return torch.stack(columns, -1), torch.zeros(matrix.shape[:-2], dtype=torch.int32)


def searchsorted(
    knots: Tensor,
    values: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """Return how many of the rising knots (..., M) are at most each value (..., N), by bisection.

    Example:
        >>> searchsorted(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.5, 2.0, 9.0]), right=True)
        tensor([0, 3, 3])
    """
    assert right, "the other side is not needed by anything that is exported"
    assert not out_int32
    assert side is None
    assert sorter is None
    num_knots = knots.shape[-1]
    found = torch.zeros_like(values, dtype=torch.int64)
    step = 1 << (num_knots.bit_length() - 1)
    while step:
        more = found + step
        knot = knots.gather(-1, (more - 1).clamp(max=num_knots - 1))
        found = torch.where((more <= num_knots) & (knot <= values), more, found)
        step //= 2
    return found


FOR_ONNX: dict[torch._ops.OperatorBase, Callable[..., object]] = {
    torch.ops.aten.linalg_cholesky_ex.default: cholesky,
    torch.ops.aten.searchsorted.Tensor: searchsorted,
}
