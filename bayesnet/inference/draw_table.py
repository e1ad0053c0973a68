"""The fixed table of standard normal draws that Gaussian heads predict with.

One quasi-random table per model makes predictions deterministic and independent of what else is in the batch, with less
Monte Carlo error than as many independent draws. Rows are draws; columns are the independent directions of one image's
logits. Scrambled Sobol points up to 32 columns, a Latin hypercube above: among the first 256 Sobol points some pairs of
many columns are strongly correlated (0.44 at 100 columns, 0.94 at 1,000), those of a Latin hypercube never are (0.3).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from bayesnet.config import require

TABLE_SIZE = 256
MAX_SOBOL_COLUMNS = 32


def normal_table(num_draws: int, num_columns: int, *, seed: int) -> Tensor:
    """Return a table of draws (num_draws, num_columns), each column with mean 0 and variance 1, float32.

    Args:
        num_draws: S, a power of two.
        num_columns: Independent directions per image.
        seed: Scrambling seed; the same seed gives the same table.

    Example:
        >>> table = normal_table(256, 3, seed=0)
        >>> table.shape, bool(table.mean(0).abs().max() < 1e-6)
        (torch.Size([256, 3]), True)
    """
    if num_columns <= MAX_SOBOL_COLUMNS:
        uniform_SE = SobolEngine(num_columns, scramble=True, seed=seed).draw(num_draws, dtype=torch.float64)
    else:
        generator = torch.Generator().manual_seed(seed)
        order_SE = torch.rand(num_draws, num_columns, generator=generator, dtype=torch.float64).argsort(0)
        uniform_SE = (order_SE + torch.rand(num_draws, num_columns, generator=generator)) / num_draws
    # Sobol points lie on a grid that includes 0; half a cell keeps the normal quantile finite.
    normal_SE = torch.special.ndtri(uniform_SE.clamp(2.0**-31, 1 - 2.0**-31))
    return _standardised(normal_SE).to(torch.float32)


def table_prefix(table_SE: Tensor, num_samples: int) -> Tensor:
    """Return the first ``num_samples`` rows (S, E), standardised again.

    A single row has no spread; it becomes zeros: the draw at the posterior mean.

    Raises:
        ConfigError: ``num_samples`` is no power of two or exceeds the table.
    """
    limit = len(table_SE)
    valid = 1 <= num_samples <= limit and num_samples & (num_samples - 1) == 0
    require(valid, f"draws must be a power of two from 1 to {limit}", where=f"samples = {num_samples}")
    if num_samples == limit:
        return table_SE
    return _standardised(table_SE[:num_samples].double()).to(table_SE.dtype)


def _standardised(values_SE: Tensor) -> Tensor:
    """Return the columns shifted and scaled to mean 0 and variance 1 (one row: zeros)."""
    centred_SE = values_SE - values_SE.mean(0)
    return centred_SE / centred_SE.square().mean(0).sqrt().clamp_min(torch.finfo(values_SE.dtype).tiny)
