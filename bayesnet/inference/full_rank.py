r"""Full-rank Gaussian posterior over the last layer: every pair of weights has its own covariance.

    cov(w) = L L^T,    L (n, n) lower triangular with rows of length scale_i,  n = K (D + 1)
    T = sum_i log(scale_i / L_ii);    KL: gaussian_weight
    logits of an image with features f: mean M [f; 1], covariance G G^T with G_k = sum_d [f; 1]_d L_dk  (K, n)

Per image, the K x K covariance has a Cholesky factor, through which both the local estimator and the predictions draw.
Its diagonal is raised by a factor of 1 + 100 eps (12 parts in a million in float32): rounding in G G^T could otherwise
make a nearly singular matrix indefinite, and the check for that would wait for the device.
Training starts at the mean-field optimum (`start_at`), whose bound this one can then only improve.

Assumptions: the posterior is Gaussian; the prior is normal; the backbone is a point estimate, trained jointly on the
same bound.
Cost: n^2 parameters besides the means, half of them used; B n^2 multiplications and B K n numbers per step, which is
more than the parameters where B > D.
Reference: Challis and Barber 2013, "Gaussian Kullback-Leibler approximate inference", JMLR 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bayesnet.config import require
from bayesnet.inference.base import Family, Parts, Posterior, Start, no_finalize
from bayesnet.inference.gaussian_weight import (
    GaussianWeight,
    GaussianWeightConfig,
    GaussianWeightPosterior,
    WeightGuide,
    covariance_factor,
    require_fits,
    with_ones,
)
from bayesnet.inference.mean_field import MeanField
from bayesnet.inference.products import product
from bayesnet.types import LogitGaussian

MAX_CLASSES = 100
"""Most classes: the cost per image grows with the cube of their number."""

JITTER = 100
"""What is added to the variances of an image's logits, in units of rounding (eps) and of the variances themselves."""


@dataclass(frozen=True, kw_only=True)
class FullRankConfig(GaussianWeightConfig):
    """Settings of the full-rank head.

    Attributes:
        family: The name, "full_rank".
        start: "mean_field" trains the mean-field posterior first and starts at its optimum; "scratch" does not.
    """

    family: str = "full_rank"
    start: Literal["mean_field", "scratch"] = "mean_field"


class FullRankWeight(GaussianWeight):
    """The Gaussian: vec(w) = loc + L e with noise e (n,).

    The vector holds the weight column by column, the classes of a feature side by side: the rows of L are then (D + 1)
    blocks of (K, n), and all images' G are one product with L as it lies in memory.

    Args:
        loc_KD: Means.
        scale_KD: Marginal standard deviations.
        raw_nn: L, as `covariance_factor` takes it.
    """

    def __init__(self, loc_KD: Tensor, scale_KD: Tensor, raw_nn: Tensor) -> None:
        self.factor_nn, total_correlation = covariance_factor(raw_nn, scale_KD.T.flatten())
        super().__init__(loc_KD, scale_KD, total_correlation)

    def deviations(self, shape: torch.Size) -> Tensor:
        """Return L e."""
        drawn = self.loc.new_empty(shape).normal_().flatten(-2) @ self.factor_nn.T
        weight: Tensor = drawn.unflatten(-1, self.event_shape[::-1]).mT
        return weight

    def squared_distance(self, deviation: Tensor) -> Tensor:
        """Return the sum of squares of L^-1 vec(w - loc)."""
        vector = deviation.mT.flatten(-2).unsqueeze(-1)
        white: Tensor = torch.linalg.solve_triangular(self.factor_nn, vector, upper=False)
        return white.square().sum((-2, -1))

    def logit_moments(self, features_BD: Tensor) -> LogitGaussian:
        """Return the Gaussian of the logits: no independent part, a Cholesky factor (B, K, K) per image."""
        num_classes, num_columns = self.event_shape
        columns_BD = with_ones(features_BD)
        mean_BK = product(columns_BD, self.loc.T)
        spread_BKn = product(columns_BD, self.factor_nn.view(num_columns, -1)).view(
            -1, num_classes, len(self.factor_nn)
        )
        covariance_BKK = torch.bmm(spread_BKn, spread_BKn.mT)
        jitter = JITTER * torch.finfo(covariance_BKK.dtype).eps
        raised_BKK = covariance_BKK + jitter * torch.diag_embed(covariance_BKK.diagonal(dim1=1, dim2=2))
        factor_BKK, _ = torch.linalg.cholesky_ex(raised_BKK)
        return LogitGaussian(mean_BK, torch.zeros_like(mean_BK), factor_BKK)


class FullRankGuide(WeightGuide):
    """The guide over the head's weight.

    Args:
        prior_scale_KD: Prior standard deviations (K, D + 1).
        initial_scale: Initial posterior standard deviation as a fraction of the prior's.
    """

    def __init__(self, prior_scale_KD: Tensor, initial_scale: float) -> None:
        super().__init__(prior_scale_KD)
        num_weights = prior_scale_KD.numel()
        self.log_scale = nn.Parameter((initial_scale * prior_scale_KD).log())
        self.raw = nn.Parameter(torch.zeros(num_weights, num_weights))

    def distribution(self) -> FullRankWeight:
        """Return q(w), event shape (K, D + 1)."""
        return FullRankWeight(self.loc, self.log_scale.exp(), self.raw)


class FullRank(GaussianWeightPosterior):
    """Backbone, generative head and full-rank guide.

    Args:
        parts: Backbone and sizes.
        config: Settings.

    Raises:
        ConfigError: More classes or parameters than fit.
    """

    guide: FullRankGuide

    def __init__(self, parts: Parts, config: FullRankConfig) -> None:
        num_classes, num_weights = parts.num_classes, parts.num_classes * (parts.num_features + 1)
        hint = "use matrix_normal or low_rank"
        what = f"a covariance per image of {num_classes} logits, of {MAX_CLASSES} at most"
        require(num_classes <= MAX_CLASSES, what, where="inference.family = full_rank", hint=hint)
        require_fits("full_rank", num_weights**2, f"a covariance of {num_weights:,} weights", hint=hint)
        super().__init__(parts, config, FullRankGuide, rank=num_classes)


@torch.no_grad()
def start_at(posterior: Posterior, mean_field: Posterior) -> None:
    """Make a full-rank posterior the mean-field one: backbone, means and scales, no correlation; the same bound.

    Raises:
        ConfigError: The two are over different weights or have different priors.
    """
    if not isinstance(posterior, FullRank) or not isinstance(mean_field, MeanField):
        raise TypeError("expected a full-rank and a mean-field posterior")
    own, other = posterior.model.head, mean_field.model.head
    same_shape = own.prior_scale.shape == other.prior_scale.shape
    where = f"weights {tuple(own.prior_scale.shape)} and {tuple(other.prior_scale.shape)}"
    require(same_shape, "the mean-field posterior is over another head", where=where)
    learned = posterior.learned_prior is not None  # then this one goes on learning where the other one ended
    same_prior = mean_field.prior_is_normal and (learned or torch.equal(own.prior_scale, other.prior_scale))
    hint = "give both families the same normal prior"
    require(same_prior, "the mean-field posterior has another prior", where="inference.prior", hint=hint)
    posterior.model.load_state_dict(mean_field.model.state_dict())
    posterior.guide.loc.copy_(mean_field.guide.loc)
    posterior.guide.log_scale.copy_(mean_field.guide.log_scale)
    posterior.guide.raw.zero_()


def build(parts: Parts, config: FullRankConfig) -> Posterior:
    """Return an untrained full-rank posterior."""
    return FullRank(parts, config)


FAMILY = Family(
    name="full_rank",
    config=FullRankConfig,
    build=build,
    finalize=no_finalize,
    description="one Gaussian with every covariance of the last layer's weights",
    start=Start("mean_field", start_at),
)
