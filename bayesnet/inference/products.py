"""Products of features and weights in which the result of an image does not depend on its place in the chunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ALIGNMENT = 16  # numbers: 64 bytes of float32, a cache line and the widest vector of today's processors


def product(x_BD: Tensor, matrix_DN: Tensor) -> Tensor:
    """Return x @ matrix, (B, N).

    Libraries of linear algebra choose how to sum by how a row lies in memory. Where a row has, say, 65 numbers, each
    begins elsewhere in its cache line, and on some processors the same features give results that differ in the last
    bit by their place in the batch. So where no gradient is asked for, on a CPU, rows are filled up with zeros to whole
    cache lines, and the matrix lies in memory by its columns.

    Args:
        x_BD: Features, a row an image.
        matrix_DN: Weights.
    """
    if torch.is_grad_enabled() or x_BD.device.type != "cpu":
        return x_BD @ matrix_DN
    missing = -x_BD.shape[1] % _ALIGNMENT
    filled_ND = nn.functional.pad(matrix_DN.T, (0, missing)).contiguous()
    return nn.functional.linear(nn.functional.pad(x_BD, (0, missing)).contiguous(), filled_ND)
