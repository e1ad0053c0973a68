r"""Sampling a softmax head on cached features: its exact density, the coordinates that make it round, chains of NUTS.

    U(w) = (N / rows) sum_n NLL(y_n | W f_n + b) - log p(w)       the potential, nats
    w = mode + T u,   T T' = H^-1,   H = Hessian of U at the mode, with 1 / prior_scale^2 for the prior's part

In the coordinates u a posterior that is Gaussian has unit covariance, so one step size fits every direction. For a
normal prior H is exact (a softmax likelihood's Hessian is its Gauss-Newton matrix) and U is convex, with one mode. All
is float64 on the CPU: a chain is thousands of small steps, each followed by decisions on the host.

Reference: Hoffman and Gelman 2014, "The No-U-Turn Sampler", JMLR 15; `pyro.infer.mcmc.NUTS` is the engine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.infer.mcmc import NUTS
from torch import Tensor, nn
from torch.distributions import Normal

from bayesnet.convergence import ess_bulk, rhat
from bayesnet.elbo import private_pyro
from bayesnet.model import WEIGHT, BayesianHead

PotentialAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a vector (P,) to minus the log-density, 0-dimensional, nats, and its gradient (P,)."""

MAX_MODE_STEPS = 1000


class HeadTarget:
    """The posterior density of a head's weight given cached features.

    Args:
        head: The model.
        features_ND: Features of all training images.
        y_N: Their labels, int64. Their likelihood counts for the head's N examples, as in the training objective.
    """

    def __init__(self, head: BayesianHead, features_ND: Tensor, y_N: Tensor) -> None:
        self.head = copy.deepcopy(head).cpu().double()
        self.columns_NE = nn.functional.pad(features_ND.to("cpu", torch.float64), (0, 1), value=1.0)
        self.y_N = y_N.cpu()
        self.one_hot_NK = nn.functional.one_hot(self.y_N, head.num_classes).double()
        self.likelihood_scale = head.num_examples / len(y_N)
        self.precision_KD = self.head.prior_scale**-2
        prior = self.head.prior()
        self.prior_is_normal = isinstance(getattr(prior, "base_dist", None), Normal)
        self.log_normaliser = -prior.log_prob(self.head.prior_loc)

    def potential_and_gradient(self, weight_KD: Tensor) -> tuple[Tensor, Tensor]:
        """Return -log p(y, w) of a weight (K, D + 1), nats, 0-dimensional, and its gradient (K, D + 1)."""
        log_probability_NK = (self.columns_NE @ weight_KD.T).log_softmax(-1)
        nll = nn.functional.nll_loss(log_probability_NK, self.y_N, reduction="sum")
        gradient_KD = (log_probability_NK.exp() - self.one_hot_NK).T @ self.columns_NE
        energy, prior_gradient_KD = self._prior_energy(weight_KD)
        return self.likelihood_scale * nll + energy, self.likelihood_scale * gradient_KD + prior_gradient_KD

    def _prior_energy(self, weight_KD: Tensor) -> tuple[Tensor, Tensor]:
        """Return -log p(w), nats, and its gradient (K, D + 1)."""
        if self.prior_is_normal:  # by hand, since half of a small head's time would go into differentiating this
            scaled_KD = weight_KD * self.precision_KD
            return self.log_normaliser + 0.5 * (scaled_KD * weight_KD).sum(), scaled_KD
        with torch.enable_grad():
            variable_KD = weight_KD.detach().requires_grad_()
            energy = -self.head.prior().log_prob(variable_KD)
            [gradient_KD] = torch.autograd.grad(energy, [variable_KD])
        return energy.detach(), gradient_KD

    def mode(self, start_KD: Tensor) -> Tensor:
        """Return the weight (K, D + 1) of highest density, found from a start by L-BFGS."""
        from scipy.optimize import minimize  # half a second to import, and only this needs it

        def function(weight_P: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            potential, gradient_KD = self.potential_and_gradient(torch.from_numpy(weight_P).view(start_KD.shape))
            return float(potential), gradient_KD.flatten().numpy()

        start_P = start_KD.detach().to("cpu", torch.float64).flatten().numpy()
        options = {"maxiter": MAX_MODE_STEPS, "maxfun": 2 * MAX_MODE_STEPS, "gtol": 1e-7, "ftol": 0.0}
        found = minimize(function, start_P, jac=True, method="L-BFGS-B", options=options)
        return torch.from_numpy(found.x).view(start_KD.shape)

    @torch.no_grad()
    def curvature(self, weight_KD: Tensor) -> Tensor:
        """Return the Hessian (P, P) of the potential, P = K (D + 1), with 1 / prior_scale^2 for the prior's part."""
        num_classes, num_columns = weight_KD.shape
        probability_NK = (self.columns_NE @ weight_KD.T).softmax(-1)
        blocks_KDKD = weight_KD.new_zeros(num_classes, num_columns, num_classes, num_columns)
        for k in range(num_classes):
            for other in range(k + 1):
                share_N = float(k == other) - probability_NK[:, other]
                scaled_NE = (self.likelihood_scale * probability_NK[:, k] * share_N)[:, None] * self.columns_NE
                blocks_KDKD[k, :, other] = blocks_KDKD[other, :, k] = self.columns_NE.T @ scaled_NE
        hessian_PP: Tensor = blocks_KDKD.reshape(weight_KD.numel(), -1) + self.precision_KD.flatten().diag()
        return hessian_PP


class Chains(NamedTuple):
    """What a sampler gives.

    Attributes:
        draws_CSP: Draws of each chain, float64.
        num_divergences: Draws after warm-up on whose way the energy went astray: a region may be missed.
        num_gradients: Evaluations of the potential with its gradient, warm-up included.
    """

    draws_CSP: Tensor
    num_divergences: int
    num_gradients: int


class _Potential(torch.autograd.Function):
    """Hands Pyro, which differentiates by autograd, the gradient that was computed with the value."""

    @staticmethod
    def forward(ctx: Any, u_P: Tensor, function: PotentialAndGradient) -> Tensor:  # noqa: ANN401 - torch's context
        potential, gradient_P = function(u_P.detach())
        ctx.save_for_backward(gradient_P)
        return potential

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        [gradient_P] = ctx.saved_tensors
        return weights[0] * gradient_P, None


def run_chains(
    function: PotentialAndGradient, start_CP: Tensor, *, num_warmup: int, num_draws: int, seed: int
) -> Chains:
    """Run Pyro's NUTS from each start, one chain after the other.

    Args:
        function: Minus the log-density and its gradient.
        start_CP: Where each chain begins, float64.
        num_warmup: Draws per chain that adapt the step size and the diagonal mass matrix and are not kept.
        num_draws: Draws per chain that are kept.
        seed: Chain c draws from seed + c, and torch's own random state is left as it was.
    """
    num_gradients = 0

    def counted(parameters: dict[str, Tensor]) -> Tensor:
        nonlocal num_gradients
        num_gradients += 1
        potential: Tensor = _Potential.apply(parameters[WEIGHT], function)
        return potential

    draws: list[Tensor] = []
    num_divergences = 0
    # Tensors made in inference mode have no gradient.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]), private_pyro():
        for chain, start_P in enumerate(start_CP):
            torch.manual_seed(seed + chain)
            kernel = NUTS(potential_fn=counted)
            kernel.initial_params = parameters = {WEIGHT: start_P.clone()}
            kernel.setup(num_warmup)
            for step in range(num_warmup + num_draws):
                parameters = kernel.sample(parameters)
                if step >= num_warmup:
                    draws.append(parameters[WEIGHT].detach().clone())
            num_divergences += len(kernel.diagnostics()["divergences"])
            kernel.cleanup()
    draws_CSP = torch.stack(draws).reshape(len(start_CP), num_draws, -1)
    return Chains(draws_CSP, num_divergences, num_gradients)


def sample_head(target: HeadTarget, start_KD: Tensor, *, chains: int, warmup: int, draws: int, seed: int) -> Chains:
    """Return draws of a head's weight by chains in whitened coordinates.

    Each begins at a draw of its own from the Laplace approximation.

    Args:
        target: The density.
        start_KD: Where the search for the mode begins.
        chains: C.
        warmup: Draws per chain that are not kept.
        draws: S, draws per chain that are kept.
        seed: Of all randomness.

    Returns:
        The chains; ``draws_CSP`` holds the weights (K, D + 1), flattened.
    """
    mode_P = target.mode(start_KD).flatten()
    factor_PP = torch.linalg.cholesky(target.curvature(mode_P.view(start_KD.shape)))
    identity_PP = torch.eye(len(mode_P), dtype=torch.float64)
    transform_PP = torch.linalg.solve_triangular(factor_PP.T, identity_PP, upper=True)

    def function(u_P: Tensor) -> tuple[Tensor, Tensor]:
        weight_KD = torch.addmv(mode_P, transform_PP, u_P).view(start_KD.shape)
        potential, gradient_KD = target.potential_and_gradient(weight_KD)
        return potential, transform_PP.T @ gradient_KD.flatten()

    generator = torch.Generator().manual_seed(seed)
    start_CP = torch.randn(chains, len(mode_P), generator=generator, dtype=torch.float64)
    found = run_chains(function, start_CP, num_warmup=warmup, num_draws=draws, seed=seed)
    return found._replace(draws_CSP=mode_P + found.draws_CSP @ transform_PP.T)


class Diagnostics(NamedTuple):
    """Whether the chains can be trusted, the worst of all weights.

    Attributes:
        max_rhat: Rank-normalised split R-hat; above 1.01 run longer chains (with 4 x 128 draws, 1.05 is noise).
        min_ess: Effective number of draws among all that the chains made.
        num_divergences: Draws on whose way the energy went astray.
    """

    max_rhat: float
    min_ess: float
    num_divergences: int


def diagnose(found: Chains) -> Diagnostics:
    """Return the worst R-hat and effective sample size of all weights, and the number of divergences."""
    columns = found.draws_CSP.permute(2, 0, 1).numpy()
    max_rhat = max(rhat(draws_CS) for draws_CS in columns)
    return Diagnostics(max_rhat, min(ess_bulk(draws_CS) for draws_CS in columns), found.num_divergences)
