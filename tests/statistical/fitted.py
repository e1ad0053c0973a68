"""Families fitted to small problems: by Adam on all examples at once, its rate falling, then `finalize`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import ExponentialLR

from bayesnet.inference.base import Family, HeadPosterior
from bayesnet.testing import ToyProblem


def fit(
    family: str,
    problem: ToyProblem,
    *,
    num_steps: int = 1000,
    repeats: int = 16,
    seed: int = 0,
    **settings: Any,  # noqa: ANN401 - as the configuration's fields are
) -> HeadPosterior:
    """Return a family's posterior, fitted, in evaluation mode; skip the test where there is no such family.

    Args:
        family: Its module's name in bayesnet.inference.
        problem: The data.
        num_steps: Of Adam, from a rate of 0.05 to 0.00005.
        repeats: How often each example is shown per step: with noise per image, as many draws in one.
        seed: Of initial weights and noise.
        settings: Fields of the family's configuration.
    """
    table: Family = pytest.importorskip(f"bayesnet.inference.{family}").FAMILY
    torch.manual_seed(seed)
    posterior = table.build(problem.parts(), replace(table.config(), **settings))
    assert isinstance(posterior, HeadPosterior)
    x_BCHW, y_B = problem.x_NCHW.repeat(repeats, 1, 1, 1), problem.y_N.repeat(repeats)
    optimizer = Adam(posterior.variational_parameters(), lr=0.05)
    schedule = ExponentialLR(optimizer, 1e-3 ** (1 / num_steps))
    posterior.train()
    for _ in range(num_steps):
        optimizer.zero_grad()
        torch.autograd.backward(posterior.loss(x_BCHW, y_B).total)
        optimizer.step()
        schedule.step()
    posterior.eval()
    table.finalize(posterior, [(problem.x_NCHW, problem.y_N)])
    return posterior
