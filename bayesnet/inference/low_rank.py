r"""Low-rank Gaussian posterior over the last layer: mean-field plus R directions that all weights share.

    cov(w) = diag(a^2) + F F^T,    F = (K (D + 1), R),    in marginals:  scale_i^2 = a_i^2 + |F_i|^2,  N_i = F_i / a_i
    T = 1/2 [ sum_i log(1 + |N_i|^2) - log det(I_R + N^T N) ]    by the matrix determinant lemma;  KL: gaussian_weight
    logits of an image with features f: variances a^2 [f^2; 1] plus the factor F^T [f; 1] per class, (K, R)

Parameters are the means, the log marginal scales, and sqrt(K (D + 1)) N, so that an optimizer's step of one size in all
entries of a direction means the same for any number of them. N starts small and random: at N = 0 its gradient is 0.
Assumptions: beyond R directions, weights are independent a posteriori; the prior is normal; the backbone is a point
estimate, trained jointly on the same bound.
Cost: K (D + 1) (R + 2) parameters; (B, D) x (D, K R) products and one R x R Cholesky more per step than mean-field.
Reference: Ong, Nott and Smith 2018, "Gaussian variational approximation with a factor covariance structure",
arXiv:1701.03208.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bayesnet.config import require
from bayesnet.inference.base import Family, Parts, Posterior, no_finalize
from bayesnet.inference.gaussian_weight import (
    GaussianWeight,
    GaussianWeightConfig,
    GaussianWeightPosterior,
    WeightGuide,
    require_fits,
    with_ones,
)
from bayesnet.inference.products import product
from bayesnet.types import LogitGaussian

INITIAL_LENGTH = 0.5
"""Length of each direction of N at the start, about: the covariance in units of a^2 is 1.25 along it, 1 elsewhere."""


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(GaussianWeightConfig):
    """Settings of the low-rank head.

    Attributes:
        family: The name, "low_rank".
        rank: R, directions that the weights share.
    """

    family: str = "low_rank"
    rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, "must be at least 1", where=f"inference.rank = {self.rank}")


class LowRankWeight(GaussianWeight):
    """The Gaussian: w = loc + a (e + N e'), with noise e (K, D + 1) and e' (R,).

    Args:
        loc_KD: Means.
        scale_KD: Marginal standard deviations.
        ratio_KDR: N, the factor in units of the independent part.
    """

    def __init__(self, loc_KD: Tensor, scale_KD: Tensor, ratio_KDR: Tensor) -> None:
        flat_nR = ratio_KDR.flatten(0, 1)
        identity_RR = torch.eye(ratio_KDR.shape[-1], dtype=loc_KD.dtype, device=loc_KD.device)
        # Not checked: the matrix is at least I, and reading the check back would wait for the device.
        self.capacitance_RR, _ = torch.linalg.cholesky_ex(identity_RR + flat_nR.T @ flat_nR)
        # (1 + |N|^2)^(1/2): the marginal sd in units of the weight's own.
        length_KD = (1 + ratio_KDR.square().sum(-1)).sqrt()
        self.ratio, self.own_scale = ratio_KDR, scale_KD / length_KD
        total_correlation = length_KD.log().sum() - self.capacitance_RR.diagonal().log().sum()
        super().__init__(loc_KD, scale_KD, total_correlation)

    def deviations(self, shape: torch.Size) -> Tensor:
        """Return a (e + N e')."""
        own = self.loc.new_empty(shape).normal_()
        shared = self.loc.new_empty((*shape[:-2], self.ratio.shape[-1])).normal_()
        return self.own_scale * (own + torch.einsum("kdr,...r->...kd", self.ratio, shared))

    def squared_distance(self, deviation: Tensor) -> Tensor:
        """Return the distance by the Woodbury identity."""
        own = deviation / self.own_scale
        shared_Rn = torch.einsum("kdr,...kd->...r", self.ratio, own).reshape(-1, self.ratio.shape[-1]).T
        white_Rn = torch.linalg.solve_triangular(self.capacitance_RR, shared_Rn, upper=False)
        distance: Tensor = own.square().sum((-2, -1)) - white_Rn.square().sum(0).reshape(deviation.shape[:-2])
        return distance

    def logit_moments(self, features_BD: Tensor) -> LogitGaussian:
        """Return the Gaussian of the logits: independent scales (B, K) and a factor (B, K, R)."""
        columns_BD = with_ones(features_BD)
        # The means and all directions of all classes in one product: (B, D + 1) x (D + 1, K (1 + R)).
        shared_KDR = torch.cat([self.loc.unsqueeze(-1), self.own_scale.unsqueeze(-1) * self.ratio], -1)
        shared_BKR = product(columns_BD, shared_KDR.transpose(0, 1).flatten(1)).unflatten(1, (len(self.loc), -1))
        variance_BK = product(columns_BD.square(), self.own_scale.square().T)
        return LogitGaussian(shared_BKR[..., 0], variance_BK.sqrt(), shared_BKR[..., 1:])


class LowRankGuide(WeightGuide):
    """The guide over the head's weight.

    Args:
        prior_scale_KD: Prior standard deviations (K, D + 1).
        initial_scale: Initial posterior standard deviation as a fraction of the prior's.
        rank: R.
    """

    def __init__(self, prior_scale_KD: Tensor, initial_scale: float, rank: int) -> None:
        super().__init__(prior_scale_KD)
        self.log_scale = nn.Parameter((initial_scale * prior_scale_KD).log())
        self.raw = nn.Parameter(INITIAL_LENGTH * torch.randn(*prior_scale_KD.shape, rank))

    def distribution(self) -> LowRankWeight:
        """Return q(w), event shape (K, D + 1)."""
        return LowRankWeight(self.loc, self.log_scale.exp(), self.raw / math.sqrt(self.loc.numel()))


class LowRank(GaussianWeightPosterior):
    """Backbone, generative head and low-rank guide.

    Args:
        parts: Backbone and sizes.
        config: Settings.

    Raises:
        ConfigError: More directions than weights, or more parameters than fit.
    """

    def __init__(self, parts: Parts, config: LowRankConfig) -> None:
        num_weights = parts.num_classes * (parts.num_features + 1)
        where = f"inference.rank = {config.rank}"
        require(config.rank <= num_weights, f"more directions than the head's {num_weights} weights", where=where)
        what = f"rank {config.rank} for {num_weights:,} weights"
        require_fits("low_rank", num_weights * (config.rank + 2), what, hint="lower inference.rank, or use mean_field")
        super().__init__(parts, config, partial(LowRankGuide, rank=config.rank), rank=config.rank)


def build(parts: Parts, config: LowRankConfig) -> Posterior:
    """Return an untrained low-rank posterior."""
    return LowRank(parts, config)


FAMILY = Family(
    name="low_rank",
    config=LowRankConfig,
    build=build,
    finalize=no_finalize,
    description="independent Gaussians plus a few directions that all weights of the last layer share",
)
