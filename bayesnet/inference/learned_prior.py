r"""Empirical Bayes for a normal prior: its standard deviation is learned with the posterior, not given.

    E_q[log p(w | s)] is largest at s^2 = mean_kd E_q[w_kd^2] = mean_kd (loc_kd^2 + scale_kd^2)     over the weights

That is the M step of EM, in closed form; the posterior's optimizer is its E step, and the ELBO at its fixed point is a
stationary point of the ELBO in s, a bound on the marginal likelihood. Each training step moves the variance a tenth of
the way there, so that the first random weights do not decide; the fixed point is the same. The biases' prior stays: K
numbers near 0 would teach it that they are 0. A floor keeps a head that explains nothing from ending at s = 0.

Cost: one mean over K D numbers per step. Reference: MacKay 1992, "Bayesian interpolation".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnet.config import require
from bayesnet.model import BayesianHead
from bayesnet.types import JsonObject

RATE = 0.1
"""How far a training step moves the prior's variance towards its optimum, as a share."""


@dataclass(frozen=True, kw_only=True)
class GaussianConfig:
    """Settings that the Gaussian heads which are fitted by a bound have in common.

    Attributes:
        family: Its name.
        prior_scale: Prior standard deviation of the weights.
        prior_bias_scale: Prior standard deviation of the biases.
        learn_prior: Whether the weights' prior standard deviation is learned with the posterior (closed-form EM).
        prior_scale_floor: Lowest prior standard deviation that can be learned.
        initial_scale: Posterior standard deviation at the start, as a fraction of the prior's.
    """

    family: str
    prior_scale: float = 1.0
    prior_bias_scale: float = 1.0
    learn_prior: bool = False
    prior_scale_floor: float = 0.01
    initial_scale: float = 0.2

    def __post_init__(self) -> None:
        require(0 < self.initial_scale < math.inf, "must be positive and finite", where="inference.initial_scale")
        where = f"inference.prior_scale_floor = {self.prior_scale_floor}"
        require(0 < self.prior_scale_floor < math.inf, "must be positive and finite", where=where)


class LearnedPrior:
    """The normal prior of a head, learned while its posterior trains.

    Args:
        initial: Prior standard deviation of the weights at the start.
        floor: Lowest standard deviation that can be learned.

    Raises:
        ConfigError: The floor is above the start.
    """

    def __init__(self, initial: float, floor: float) -> None:
        what = f"exceeds inference.prior_scale = {initial}"
        require(floor <= initial, what, where=f"inference.prior_scale_floor = {floor}")
        self.initial, self.floor = initial, floor

    @torch.no_grad()
    def update(self, head: BayesianHead, loc_KD: Tensor, scale_KD: Tensor) -> None:
        """Move the prior of the weights towards the optimum for a posterior, in place, without waiting for the device.

        Args:
            head: Whose prior it is.
            loc_KD: Posterior means (K, D + 1), bias last.
            scale_KD: Posterior standard deviations (K, D + 1).
        """
        optimum = (loc_KD.square() + scale_KD.square())[:, :-1].mean()
        weights_KD = head.prior_scale[:, :-1]
        weights_KD.copy_(torch.lerp(weights_KD.square(), optimum.expand_as(weights_KD), RATE).sqrt_())
        weights_KD.clamp_(min=self.floor)

    def facts(self, head: BayesianHead) -> JsonObject:
        """Return where the prior began, where it stands, and its floor."""
        return {"prior_scale": {"initial": self.initial, "final": float(head.prior_scale[0, 0]), "floor": self.floor}}


def learned_prior(config: GaussianConfig) -> LearnedPrior | None:
    """Return the learned prior that a head's settings ask for, or None."""
    return LearnedPrior(config.prior_scale, config.prior_scale_floor) if config.learn_prior else None
