r"""Variational Bayesian last layer: a Gaussian head trained on a deterministic bound, with no sampling in the loss.

    q(w) = prod_k Normal(w_k | m_k, S_k),    prior p(w) = prod_kd Normal(0, prior_scale^2)
    logits of an image with features f: independent Normal(mu_k, s_k^2), mu_k = m_k [f; 1], s_k^2 = [f; 1]' S_k [f; 1]
    E_q[log p(y | f, w)] >= mu_y - log sum_k exp(mu_k + s_k^2 / 2)

since log is concave: E log sum_k exp z_k <= log sum_k E exp z_k, and E exp z_k = exp(mu_k + s_k^2 / 2). The bound holds
for any joint Gaussian of the logits. It exceeds the expectation by 1/2 sum_k p_k^2 s_k^2 + O(s^4) nats, with p the
softmax of mu: nothing where the spreads vanish. Loss = bound on the mean NLL + KL(q || p) / N, at least -ELBO / N.

``nll`` of the loss is that bound: like a variational head's it estimates E_q[-log p(y | f, w)], from above instead of
by a draw, so it may exceed another family's at the same posterior but never flatters. The NLL of validation and test
comes from the posterior predictive, as for every family.

Assumptions: independent rows, each with a diagonal or a dense covariance; the backbone is a point estimate, trained
jointly. Unlike the paper, the logits have no noise of their own (this is the library's one generative model), the prior
is not learned, and the weight of the KL is 1/N.
Cost: diagonal as mean_field. Dense has K x (D + 1)^2 parameters, four times that with gradient and Adam, refused above
67 million, and one more (B, D) x (D, D) product for each class.
Reference: Harrison, Willes and Snoek 2024, "Variational Bayesian last layers", arXiv:2404.11599.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from bayesnet.config import require
from bayesnet.inference.base import Family, GaussianHeadPosterior, Parts, Posterior, no_finalize
from bayesnet.inference.learned_prior import GaussianConfig, learned_prior
from bayesnet.inference.mean_field import MeanFieldGuide
from bayesnet.inference.products import product
from bayesnet.model import WEIGHT
from bayesnet.types import LogitGaussian, Loss

MAX_COVARIANCE = 2**26
"""Most entries of the dense covariances: 256 MiB of parameters, four times that with gradient and Adam."""


@dataclass(frozen=True, kw_only=True)
class VBLLConfig(GaussianConfig):
    """Settings of the head trained on the deterministic bound.

    Attributes:
        family: The name, "vbll".
        covariance: Of each class's weights, "diagonal" or "dense".
    """

    family: str = "vbll"
    covariance: Literal["diagonal", "dense"] = "diagonal"


class DenseGuide(PyroModule):
    """The guide: an independent Gaussian with a dense covariance on each class's weights.

    S_k = L_k L_k' with L_k = diag(exp(log_scale_k)) (I + strictly lower triangle of lower_k), so that a step of the
    optimizer moves the shape of the posterior relative to its width.

    Args:
        prior_scale_KD: Prior standard deviations (K, D + 1).
        initial_scale: Initial posterior standard deviation as a fraction of the prior's.
    """

    def __init__(self, prior_scale_KD: Tensor, initial_scale: float) -> None:
        super().__init__()
        num_classes, num_columns = prior_scale_KD.shape
        # The means start where the twin's layer does, so that both see the same first features for the same seed.
        layer = nn.Linear(num_columns - 1, num_classes)
        self.loc = nn.Parameter(torch.cat([layer.weight.data, layer.bias.data[:, None]], 1))
        self.log_scale = nn.Parameter((initial_scale * prior_scale_KD).log())
        self.lower = nn.Parameter(torch.zeros(num_classes, num_columns, num_columns))
        self.register_buffer("identity_DD", torch.eye(num_columns), persistent=False)

    def forward(self, features_BD: Tensor, y_B: Tensor | None = None) -> Tensor:
        """Run the guide as a Pyro program; return the sampled weight (K, D + 1)."""
        weight_KD: Tensor = pyro.sample(WEIGHT, self.distribution())
        return weight_KD

    def distribution(self) -> dist.TorchDistribution:
        """Return q(w), event shape (K, D + 1)."""
        rows = dist.MultivariateNormal(self.loc, scale_tril=self.cholesky(), validate_args=False)
        joint: dist.TorchDistribution = rows.to_event(1)
        return joint

    def cholesky(self) -> Tensor:
        """Return the Cholesky factors of the covariances (K, D + 1, D + 1)."""
        return self.log_scale.exp().unsqueeze(-1) * (self.lower.tril(-1) + self.get_buffer("identity_DD"))

    def logit_moments(self, features_BD: Tensor) -> LogitGaussian:
        """Return mean and standard deviation (B, K) of the logits; the factor has rank 0."""
        augmented_BD = nn.functional.pad(features_BD, (0, 1), value=1.0)
        mean_BK = product(augmented_BD, self.loc.T)
        scale_BK = torch.linalg.vector_norm(augmented_BD @ self.cholesky(), dim=-1).T
        return LogitGaussian(mean_BK, scale_BK, mean_BK.new_empty((*mean_BK.shape, 0)))

    def sample(self, num_samples: int) -> Tensor:
        """Return joint draws (S, K, D + 1) from torch's random state."""
        noise_SKD = torch.randn(num_samples, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + torch.einsum("kde,ske->skd", self.cholesky(), noise_SKD)

    def kl(self, prior_scale_KD: Tensor) -> Tensor:
        """Return the divergence from Normal(0, prior_scale_KD) in closed form, nats."""
        white_KDE = torch.cat([self.cholesky(), self.loc.unsqueeze(-1)], -1) / prior_scale_KD.unsqueeze(-1)
        log_ratio_KD = self.log_scale - prior_scale_KD.log()
        return 0.5 * (white_KDE.square().sum() - log_ratio_KD.numel()) - log_ratio_KD.sum()

    def scale(self) -> Tensor:
        """Return the marginal standard deviations (K, D + 1)."""
        scale_KD: Tensor = torch.linalg.vector_norm(self.cholesky(), dim=-1)
        return scale_KD


class VBLL(GaussianHeadPosterior):
    """Backbone, generative head and a guide with independent rows.

    Args:
        parts: Backbone and sizes.
        config: Settings.

    Raises:
        ConfigError: The dense covariances are too large.
    """

    guide: MeanFieldGuide | DenseGuide

    def __init__(self, parts: Parts, config: VBLLConfig) -> None:
        _check_size(parts, config)
        model = parts.classifier(config.prior_scale, config.prior_bias_scale)
        super().__init__(model, rank=0, table_seed=parts.table_seed, learned_prior=learned_prior(config))
        guide = DenseGuide if config.covariance == "dense" else MeanFieldGuide
        self.guide = guide(model.head.prior_scale, config.initial_scale)

    @property
    def head(self) -> MeanFieldGuide | DenseGuide:
        """The guide, which is also the distribution over the last layer."""
        return self.guide

    def loss_from_features(self, features_BD: Tensor, y: Tensor) -> Loss:
        """Return the bound per example; nothing in it is random."""
        return bound_loss(self.guide.logit_moments(features_BD), y, self.kl(), self.num_examples)

    def kl(self) -> Tensor:
        """Return the divergence from the prior in closed form, nats."""
        return self.guide.kl(self.model.head.prior_scale)

    def variational_parameters(self) -> Sequence[nn.Parameter]:
        """Return the guide's parameters."""
        return tuple(self.guide.parameters())

    def scale_parameters(self) -> Sequence[nn.Parameter]:
        """Return the guide's parameters but for the means."""
        return tuple(parameter for parameter in self.guide.parameters() if parameter is not self.guide.loc)

    @torch.no_grad()
    def posterior_scale(self) -> Tensor:
        """Return the marginal posterior standard deviations (K, D + 1)."""
        guide = self.guide
        scale_KD: Tensor = guide.scale() if isinstance(guide, DenseGuide) else guide.log_scale.exp()
        return scale_KD


def bound_loss(moments: LogitGaussian, y: Tensor, kl: Tensor, num_examples: int) -> Loss:
    """Return the deterministic bound per example: mean of -mu_y + log sum_k exp(mu_k + s_k^2 / 2), plus KL / N.

    Args:
        moments: The Gaussian of the logits; their covariances do not matter, so a factor only adds to the variances.
        y: Labels (B,), int64, or soft labels (B, K), rows that add up to 1. With soft labels ``nll`` is the bound at
            the most probable label.
        kl: Divergence from the prior, nats.
        num_examples: N.

    Example:
        >>> moments = LogitGaussian(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2, 0))
        >>> bound_loss(moments, torch.tensor([0]), torch.tensor(0.0), 10).fit  # log 2 + 1/2
        tensor(1.1931)
    """
    variance_BK = moments.scale_BK.square()
    if moments.factor_BKR.shape[-1]:
        variance_BK = variance_BK + moments.factor_BKR.square().sum(-1)
    log_partition_B = torch.logsumexp(moments.mean_BK + 0.5 * variance_BK, -1)
    label_B = y if y.dim() == 1 else y.argmax(1)
    nll = (log_partition_B - moments.mean_BK.gather(1, label_B[:, None]).squeeze(1)).mean()
    if y.dim() == 1:
        return Loss(nll + kl / num_examples, nll, kl, nll)
    fit = (log_partition_B - (y * moments.mean_BK).sum(-1)).mean()
    return Loss(fit + kl / num_examples, nll.detach(), kl, fit)


def _check_size(parts: Parts, config: VBLLConfig) -> None:
    """Raise ConfigError where the dense covariances would not fit."""
    num_entries = parts.num_classes * (parts.num_features + 1) ** 2
    require(
        config.covariance == "diagonal" or num_entries <= MAX_COVARIANCE,
        f"{parts.num_classes} dense covariances of {parts.num_features + 1} weights have {num_entries:,} entries,"
        f" at most {MAX_COVARIANCE:,} fit",
        where="inference.covariance = dense",
        hint='use covariance = "diagonal", or the family low_rank',
    )


def build(parts: Parts, config: VBLLConfig) -> Posterior:
    """Return an untrained posterior."""
    return VBLL(parts, config)


FAMILY = Family(
    name="vbll",
    config=VBLLConfig,
    build=build,
    finalize=no_finalize,
    description="Gaussian last layer trained on a deterministic bound",
)
