r"""Gaussians over the head's weight as marginals and correlations, and the posterior that is trained on one.

    q(w) = Gaussian with means loc, marginal standard deviations scale (both (K, D + 1)) and correlation matrix C
    KL(q || prod_kd Normal(m_kd, p_kd^2)) = sum_kd KL(Normal(loc_kd, scale_kd^2) || Normal(m_kd, p_kd^2)) + T
    T = -1/2 log det C >= 0, the total correlation,   since log det cov(w) = 2 sum_kd log scale_kd + log det C

An independent prior sees the marginals of q and, beyond them, only how far q is from independent. Families have
parameters for each of the two, so that a step in the correlations leaves the marginal sd where they are: one Adam step
on all of a long row of free Cholesky entries would multiply its sd. With C = I every family is the mean-field one.
"""

from __future__ import annotations

import contextlib
import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Independent, Normal, constraints, kl_divergence, register_kl
from torch.distributions.constraints import Constraint

from bayesnet.config import require
from bayesnet.elbo import local_loss, weight_space_loss
from bayesnet.inference.base import GaussianHeadPosterior, Parts
from bayesnet.inference.learned_prior import GaussianConfig, learned_prior
from bayesnet.model import WEIGHT
from bayesnet.types import LogitGaussian, Loss

MAX_PARAMETERS = 2**26
"""Most parameters of a guide: 256 MiB, four times that with gradient and Adam's two moments."""


class GaussianWeight(dist.TorchDistribution):
    """A Gaussian over the head's weight, event shape (K, D + 1); draws of a batch are independent and alike.

    Args:
        loc_KD: Means.
        scale_KD: Marginal standard deviations.
        total_correlation: -1/2 log det C, nats, 0-dimensional.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, loc_KD: Tensor, scale_KD: Tensor, total_correlation: Tensor) -> None:
        self.loc, self.scale, self.total_correlation = loc_KD, scale_KD, total_correlation
        super().__init__(torch.Size(), loc_KD.shape, validate_args=False)

    @abstractmethod
    def deviations(self, shape: torch.Size) -> Tensor:
        """Return draws (..., K, D + 1) of w - loc from torch's random state."""

    @abstractmethod
    def squared_distance(self, deviation: Tensor) -> Tensor:
        """Return the squared Mahalanobis distance (...) from loc of weights at deviations (..., K, D + 1)."""

    @abstractmethod
    def logit_moments(self, features_BD: Tensor) -> LogitGaussian:
        """Return the exact Gaussian of each image's logits."""

    @property
    def mean(self) -> Tensor:
        """The means, batch and event shape."""
        return self.loc.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """The marginal variances, batch and event shape."""
        return self.scale.square().expand(self.batch_shape + self.event_shape)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:  # noqa: ANN401 - torch's own signature
        """Return the same distribution with a batch shape; no parameter is copied."""
        expanded = copy.copy(self)
        expanded._batch_shape = torch.Size(batch_shape)
        return expanded

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return reparameterised draws (sample shape, batch shape, K, D + 1)."""
        return self.loc + self.deviations(self._extended_shape(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of weights (..., K, D + 1), nats."""
        distance = self.squared_distance(value - self.loc)
        constant = 0.5 * self.loc.numel() * math.log(2 * math.pi)
        return self.total_correlation - self.scale.log().sum() - 0.5 * distance - constant


@register_kl(GaussianWeight, Independent)  # type: ignore[untyped-decorator]
def _kl_independent(guide: GaussianWeight, prior: Independent[Normal]) -> Tensor:
    """Return KL(guide || independent normals): marginals, and the total correlation. No other prior has a form here."""
    if not isinstance(prior.base_dist, Normal):
        raise NotImplementedError
    ratio_KD = guide.scale / prior.base_dist.scale
    shift_KD = (guide.loc - prior.base_dist.loc) / prior.base_dist.scale
    marginals = (0.5 * (ratio_KD.square() + shift_KD.square() - 1) - ratio_KD.log()).sum((-2, -1))
    return (marginals + guide.total_correlation).expand(guide.batch_shape)


class _CovarianceFactor(torch.autograd.Function):
    """`covariance_factor`; a gradient by hand, since that of a matrix of all weights is most of a full-rank step."""

    @staticmethod
    def forward(ctx: Any, raw_nn: Tensor, scale_n: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - torch's context
        factor_nn = raw_nn.tril(-1)
        unit = math.sqrt(len(raw_nn))
        factor_nn.diagonal().fill_(unit)
        length_n1 = torch.linalg.vector_norm(factor_nn, dim=1, keepdim=True)
        factor_nn *= scale_n.unsqueeze(1) / length_n1
        ctx.save_for_backward(factor_nn, scale_n, length_n1)
        return factor_nn, (length_n1 / unit).log().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope_nn: Tensor, slope_of_total: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        factor_nn, scale_n, length_n1 = ctx.saved_tensors
        scale_n1 = scale_n.unsqueeze(1)
        radial_n1 = (slope_nn * factor_nn).sum(1, keepdim=True)
        below_nn = slope_nn * (scale_n1 / length_n1)
        below_nn.addcmul_(factor_nn, (slope_of_total - radial_n1) / (scale_n1 * length_n1))
        return below_nn.tril_(-1), radial_n1.squeeze(1) / scale_n


def covariance_factor(raw_nn: Tensor, scale_n: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor (n, n) of a covariance with these standard deviations, and -1/2 log det C, nats.

    Row i is that of [raw below the diagonal; sqrt(n)], at length scale_i; every covariance has exactly one such raw.
    Because of sqrt(n), an optimizer's step of one size in all of a row turns it by an angle that does not grow with n.

    Args:
        raw_nn: Unconstrained; what is on or above the diagonal is not used. Zeros give C = I.
        scale_n: Marginal standard deviations.

    Example:
        >>> raw = torch.tensor([[9.0, 9.0], [0.75 * 2**0.5, 9.0]])
        >>> factor, total_correlation = covariance_factor(raw, torch.tensor([1.0, 2.0]))
        >>> factor @ factor.T
        tensor([[1.0000, 1.2000],
                [1.2000, 4.0000]])
        >>> round(float(total_correlation), 4) == round(-0.5 * math.log(1 - 0.6**2), 4)
        True
    """
    factor_nn, total_correlation = _CovarianceFactor.apply(raw_nn, scale_n)
    return factor_nn, total_correlation


class WeightGuide(PyroModule):
    """A guide that draws the head's weight from one `GaussianWeight`.

    Args:
        prior_scale_KD: Prior standard deviations (K, D + 1).
    """

    def __init__(self, prior_scale_KD: Tensor) -> None:
        super().__init__()
        num_classes, num_columns = prior_scale_KD.shape
        # The means start where the twin's layer does, so that both see the same first features for the same seed.
        layer = nn.Linear(num_columns - 1, num_classes)
        self.loc = nn.Parameter(torch.cat([layer.weight.data, layer.bias.data[:, None]], 1))
        self.constant: GaussianWeight | None = None

    def distribution(self) -> GaussianWeight:
        """Return q(w), event shape (K, D + 1)."""
        raise NotImplementedError

    def weight(self) -> GaussianWeight:
        """Return q(w) as predictions use it: that of `GaussianWeightPosterior.fixed_draws` while it is open."""
        return self.constant or self.distribution()

    def forward(self, features_BD: Tensor, y_B: Tensor | None = None) -> Tensor:
        """Run the guide as a Pyro program; return the sampled weight (K, D + 1)."""
        weight_KD: Tensor = pyro.sample(WEIGHT, self.distribution())
        return weight_KD

    def logit_moments(self, features_BD: Tensor) -> LogitGaussian:
        """Return the exact Gaussian of each image's logits."""
        return self.weight().logit_moments(features_BD)

    def sample(self, num_samples: int) -> Tensor:
        """Return joint draws (S, K, D + 1) from torch's random state."""
        return self.distribution().rsample((num_samples,))


@dataclass(frozen=True, kw_only=True)
class GaussianWeightConfig(GaussianConfig):
    """Settings of a head whose posterior is one Gaussian.

    Attributes:
        estimator: "local" samples logits per image, "weight" one weight per batch; same mean.
    """

    estimator: Literal["local", "weight"] = "local"


class GaussianWeightPosterior(GaussianHeadPosterior):
    """Backbone, generative head with a normal prior, and a guide that is one Gaussian.

    Args:
        parts: Backbone and sizes.
        config: Settings.
        new_guide: From the prior's standard deviations (K, D + 1) and ``initial_scale`` to the guide.
        rank: R, columns of the factor in the logits' Gaussian.
    """

    def __init__(
        self,
        parts: Parts,
        config: GaussianWeightConfig,
        new_guide: Callable[[Tensor, float], WeightGuide],
        *,
        rank: int,
    ) -> None:
        model = parts.classifier(config.prior_scale, config.prior_bias_scale)
        super().__init__(model, rank=rank, table_seed=parts.table_seed, learned_prior=learned_prior(config))
        self.guide = new_guide(model.head.prior_scale, config.initial_scale)
        self.estimator = config.estimator

    @property
    def head(self) -> WeightGuide:
        """The guide, which is also the distribution over the last layer."""
        return self.guide

    def loss_from_features(self, features_BD: Tensor, y: Tensor) -> Loss:
        """Return the negative ELBO per example by the chosen estimator."""
        if self.estimator == "weight":
            return weight_space_loss(self.model.head, self.guide, features_BD, y, self.num_examples)
        return self.local_loss(features_BD, y)

    def local_loss(self, features_BD: Tensor, y: Tensor) -> Loss:
        """Return the negative ELBO per example from one draw of each image's logits."""
        weight = self.guide.distribution()
        return local_loss(weight.logit_moments(features_BD), y, self.kl(weight), self.num_examples)

    def kl(self, weight: GaussianWeight) -> Tensor:
        """Return the divergence of q(w) from the prior in closed form, nats."""
        return kl_divergence(weight, self.model.head.prior())

    @contextlib.contextmanager
    def fixed_draws(self, num_samples: int) -> Iterator[None]:
        """Make q(w) once: its factors have gradients by hand, and the same value for all images."""
        with torch.no_grad():
            self.guide.constant = self.guide.distribution()
        try:
            yield
        finally:
            self.guide.constant = None

    def variational_parameters(self) -> Sequence[nn.Parameter]:
        """Return the guide's parameters."""
        return tuple(self.guide.parameters())

    def scale_parameters(self) -> Sequence[nn.Parameter]:
        """Return those of the guide's parameters that are no means: scales and correlations."""
        return tuple(parameter for name, parameter in self.guide.named_parameters() if name != "loc")

    @torch.no_grad()
    def posterior_scale(self) -> Tensor:
        """Return the marginal posterior standard deviations (K, D + 1)."""
        return self.guide.distribution().scale


def require_fits(family: str, num_parameters: int, what: str, *, hint: str) -> None:
    """Raise ConfigError where a guide would have more than MAX_PARAMETERS parameters.

    Args:
        family: Its name.
        num_parameters: Of the guide.
        what: What is too large, such as "a covariance of 40,000 weights".
        hint: What to use instead.
    """
    size, limit = num_parameters * 4 / 2**20, MAX_PARAMETERS * 4 // 2**20
    text = f"{what} has {num_parameters:,} parameters, {size:,.0f} MiB, of {limit} MiB at most"
    require(num_parameters <= MAX_PARAMETERS, text, where=f"inference.family = {family}", hint=hint)


def with_ones(features_BD: Tensor) -> Tensor:
    """Return the features (B, D + 1) with a last column of ones, which the bias multiplies."""
    return nn.functional.pad(features_BD, (0, 1), value=1.0)
