"""Laplace posteriors at their modes, for the tests of the family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesnet.inference import laplace
from bayesnet.inference.base import Batches
from bayesnet.inference.laplace import Laplace, finalize
from bayesnet.inference.laplace_evidence import PriorFit
from bayesnet.inference.laplace_structures import StructureName
from bayesnet.testing import ToyProblem, build, toy_problem

PROBLEM = toy_problem()
PRIOR_SCALE, PRIOR_BIAS_SCALE = 0.6, 1.5


def batches(problem: ToyProblem = PROBLEM, size: int = 17) -> list[tuple[Tensor, Tensor]]:
    return list(zip(problem.x_NCHW.split(size), problem.y_N.split(size), strict=True))


def trained(structure: StructureName = "full", **settings: Any) -> Laplace:  # noqa: ANN401 - LaplaceConfig's
    """Return a float64 posterior at its mode, not yet finalized."""
    values = {"prior_scale": PRIOR_SCALE, "prior_bias_scale": PRIOR_BIAS_SCALE, "structure": structure, **settings}
    posterior = build(laplace.FAMILY, PROBLEM, **values)
    assert isinstance(posterior, Laplace)
    posterior.double()
    find_mode(posterior, PROBLEM.x_NCHW.double(), PROBLEM.y_N)
    return posterior


def fitted(structure: StructureName = "full", **settings: Any) -> Laplace:  # noqa: ANN401 - LaplaceConfig's
    posterior = trained(structure, **settings)
    finalize(posterior, doubled(batches()))
    return posterior


def doubled(pairs: Batches) -> Batches:
    return [(x.double(), y) for x, y in pairs]


def find_mode(posterior: Laplace, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.LBFGS([posterior.last_layer.loc], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = posterior.loss(x, y).total
        torch.autograd.backward(total)
        return total

    for _ in range(3):
        optimizer.step(closure)


def prior_fit(posterior: Laplace) -> PriorFit:
    found = posterior.prior_fit()
    assert found is not None
    return found
