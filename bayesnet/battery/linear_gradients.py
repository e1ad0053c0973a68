"""T5: gradients of the ELBO of a linear regression, whose draws and mean both have formulas.

(a) For one draw, autograd equals the formula (1e-6 relative) in float64: no false alarm. (b) The mean of 4,096
gradients equals the gradient of the exact ELBO at |z| < 5.612 in each of at most 50 coordinates: a false alarm below
1e-6 for each of the three means. With power 0.99 they catch a bias of (5.612 + 2.33) standard errors in a coordinate:
at most 12 % of the gradient's norm.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesnet.battery import faults
from bayesnet.battery.base import Check, Findings, Outcome
from bayesnet.battery.gradients import NUM_GRADIENTS, Z_BOUND_OF_50, deviations, largest_z, recorded
from bayesnet.battery.linear_gaussian import NOISE_SCALE, Regressions, regressions
from bayesnet.battery.seeding import seeded
from bayesnet.elbo import trace_elbo
from bayesnet.inference.mean_field import MeanFieldGuide
from bayesnet.model import WEIGHT


class DenseGuide(nn.Module):
    """A multivariate normal guide, whose KL torch has no closed form for: the sampled one is used.

    Args:
        loc_RD: Means.
        tril_RDD: Cholesky factors.
    """

    def __init__(self, loc_RD: Tensor, tril_RDD: Tensor) -> None:
        super().__init__()
        self.loc, self.tril = nn.Parameter(loc_RD), nn.Parameter(tril_RDD)

    def forward(self, x_RBD: Tensor, y_RB: Tensor) -> Tensor:
        """Run the guide; return the weights (R, D)."""
        posterior = dist.MultivariateNormal(self.loc, scale_tril=self.tril.tril())
        weight_RD: Tensor = pyro.sample(WEIGHT, posterior.to_event(1))
        return weight_RD


Case = tuple[str, MeanFieldGuide | DenseGuide, bool]
"""A name, a guide, and whether its KL is closed form."""


def linear_cases(problem: Regressions, num_copies: int = 1) -> list[Case]:
    """Return guides near, not at, the posterior of a regression; the copies of a guide's parameters are equal."""
    exact = problem.posterior()
    loc_RD = (exact.mean + 0.5 * exact.stddev).expand(num_copies, -1).clone()
    with seeded(0):
        mean_field = MeanFieldGuide(torch.ones_like(loc_RD), 1.0).double()
    with torch.no_grad():
        mean_field.loc.copy_(loc_RD)
        mean_field.log_scale.copy_((1.3 * exact.stddev).log().expand_as(loc_RD))
    dense = DenseGuide(loc_RD, (0.8 * exact.scale_tril).expand(num_copies, -1, -1).clone())
    return [
        ("mean field, closed-form KL", mean_field, True),
        ("mean field, sampled KL", mean_field, False),
        ("full covariance", dense, False),
    ]


def linear_gradients(
    problem: Regressions, guide: nn.Module, seed: int, *, closed_form_kl: bool, num_copies: int = 1
) -> tuple[Tensor, ...]:
    """Return the gradients of minus the ELBO, summed over copies, from the first 10 of 30 examples."""
    x_RBD, y_RB = (part[:, :10].expand(num_copies, *[-1] * (part.dim() - 1)) for part in problem)
    with seeded(seed):
        terms = trace_elbo(problem.program(30), guide, x_RBD, y_RB, closed_form_kl=closed_form_kl)
    return torch.autograd.grad(terms.kl - terms.log_likelihood, tuple(guide.parameters()))


def linear_gradient_of_a_draw(seed: int) -> Findings:
    """T5: -log p(y | w) has gradient -N/B X' (y - X w) / sigma^2; the sampled KL adds w, the closed form its own."""
    problem = regressions(1, seed=1 + seed)
    x_BD, y_B = problem.x_RND[0, :10], problem.y_RN[0, :10]
    outcomes = []
    for name, guide, closed_form_kl in linear_cases(problem):
        with recorded(guide) as drawn:
            actual = linear_gradients(problem, guide, seed, closed_form_kl=closed_form_kl)
        [[w_D]], mean_D = drawn, guide.loc[0].detach()
        slope_D = -(30 / 10) * x_BD.T @ (y_B - x_BD @ w_D) / NOISE_SCALE**2
        by_mean_D = slope_D + (mean_D if closed_form_kl else w_D)
        if isinstance(guide, MeanFieldGuide):
            scale_D = guide.log_scale[0].detach().exp()
            by_kl_D = scale_D**2 if closed_form_kl else w_D * (w_D - mean_D)
            by_spread = slope_D * (w_D - mean_D) + by_kl_D - 1
        else:
            tril_DD = guide.tril[0].detach()
            noise_D = torch.linalg.solve_triangular(tril_DD, (w_D - mean_D)[:, None], upper=False)[:, 0]
            by_spread = torch.outer(slope_D + w_D, noise_D).tril() - torch.diag(1 / tril_DD.diagonal())
        names = [f"{part}, {name}" for part in ("means", "spreads")]
        outcomes += deviations(names, actual, (by_mean_D[None], by_spread[None]))
    return Findings(outcomes)


def linear_mean(problem: Regressions, case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """Return 4,096 gradients (S, P) of a guide of as many copies, and their exact mean (P,).

    By the means: A m - t, A the precision of 10 examples that stand for 30; by the spreads S: A S - 1 / S.
    """
    x_BD, y_B = problem.x_RND[0, :10], problem.y_RN[0, :10]
    precision_DD = torch.eye(3).double() + 30 / 10 * x_BD.T @ x_BD / NOISE_SCALE**2
    target_D = 30 / 10 * x_BD.T @ y_B / NOISE_SCALE**2
    _, guide, closed_form_kl = case
    found = linear_gradients(problem, guide, seed, closed_form_kl=closed_form_kl, num_copies=NUM_GRADIENTS)
    by_mean_D = precision_DD @ guide.loc[0].detach() - target_D
    if isinstance(guide, MeanFieldGuide):
        by_spread = precision_DD.diagonal() * (2 * guide.log_scale[0].detach()).exp() - 1
    else:
        tril_DD = guide.tril[0].detach()
        rows, columns = torch.tril_indices(3, 3)
        whole_DD = (precision_DD @ tril_DD).tril() - torch.diag(1 / tril_DD.diagonal())
        by_spread, found = whole_DD[rows, columns], (found[0], found[1][:, rows, columns])
    return torch.cat(found, 1), torch.cat([by_mean_D, by_spread])


def mean_linear_gradient(seed: int) -> Findings:
    """T5: the mean of 4,096 gradients of a regression against the closed form."""
    problem = regressions(1, seed=1 + seed)
    outcomes = []
    for case in linear_cases(problem, NUM_GRADIENTS):
        gradients_SP, expected_P = linear_mean(problem, case, seed)
        words = f"largest |z| of {len(expected_P)} coordinates, {case[0]}"
        outcomes.append(Outcome(words, largest_z(gradients_SP, expected_P), Z_BOUND_OF_50))
    return Findings(outcomes)


CHECKS: tuple[Check, ...] = (
    Check("T5", "gradient of a draw, regression", linear_gradient_of_a_draw, (faults.KL_TIMES_2,)),
    Check("T5", "mean gradient, regression", mean_linear_gradient, (faults.KL_TIMES_2,)),
)
