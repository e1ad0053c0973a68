r"""Mean-field Gaussian posterior over the last layer, trained by stochastic variational inference.

    q(w) = prod_kd Normal(w_kd | m_kd, s_kd^2),    prior p(w) = prod_kd Normal(0, prior_scale^2), Laplace or Student-t
    KL(q || p) = sum_kd [ log(p_kd / s_kd) + (s_kd^2 + m_kd^2) / (2 p_kd^2) - 1/2 ]   nats, for the normal prior
    logits of an image with features f: independent Normal(m [f; 1], s^2 [f^2; 1])

Assumptions: weights independent a posteriori; the backbone is a point estimate, trained jointly on the same bound.
The KL from a Laplace prior is closed form too; that from a Student-t is log q - log p of one draw, and labelled so.
Cost: 2 x K x (D + 1) parameters, one more (B, D) x (D, K) product per step than the twin.
Reference: Graves 2011, "Practical variational inference for neural networks"; local reparameterisation by Kingma et al.
2015, arXiv:1506.02557.
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
from bayesnet.elbo import closed_form_divergence, divergence_or_draw, local_loss, weight_space_loss
from bayesnet.inference.base import Family, GaussianHeadPosterior, Parts, Posterior, no_finalize
from bayesnet.inference.learned_prior import GaussianConfig, learned_prior
from bayesnet.model import WEIGHT, PriorName
from bayesnet.types import LogitGaussian, Loss


@dataclass(frozen=True, kw_only=True)
class MeanFieldConfig(GaussianConfig):
    """Settings of the mean-field head.

    Attributes:
        family: The name, "mean_field".
        prior: "normal", "laplace" or "student_t" (4 degrees of freedom).
        estimator: "local" samples logits per image, "weight" one weight per batch; same mean.
    """

    family: str = "mean_field"
    prior: PriorName = "normal"
    estimator: Literal["local", "weight"] = "local"


class MeanFieldGuide(PyroModule):
    """The guide: an independent Normal on each entry of the head's weight.

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

    def forward(self, features_BD: Tensor, y_B: Tensor | None = None) -> Tensor:
        """Run the guide as a Pyro program; return the sampled weight (K, D + 1)."""
        weight_KD: Tensor = pyro.sample(WEIGHT, self.distribution())
        return weight_KD

    def distribution(self) -> dist.TorchDistribution:
        """Return q(w), event shape (K, D + 1)."""
        normal: dist.TorchDistribution = dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(2)
        return normal

    def logit_moments(self, features_BD: Tensor) -> LogitGaussian:
        """Return mean and standard deviation (B, K) of the logits; the factor has rank 0."""
        variance_KD = (2 * self.log_scale).exp()
        mean_BK = torch.addmm(self.loc[:, -1], features_BD, self.loc[:, :-1].T)
        variance_BK = torch.addmm(variance_KD[:, -1], features_BD.square(), variance_KD[:, :-1].T)
        return LogitGaussian(mean_BK, variance_BK.sqrt(), mean_BK.new_empty((*mean_BK.shape, 0)))

    def sample(self, num_samples: int) -> Tensor:
        """Return joint draws (S, K, D + 1) from torch's random state."""
        noise_SKD = torch.randn(num_samples, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.log_scale.exp() * noise_SKD

    def kl(self, prior_scale_KD: Tensor) -> Tensor:
        """Return the divergence from Normal(0, prior_scale_KD) in closed form, nats."""
        log_ratio_KD = self.log_scale - prior_scale_KD.log()
        return 0.5 * ((2 * log_ratio_KD).exp() + (self.loc / prior_scale_KD).square() - 1 - 2 * log_ratio_KD).sum()


class MeanField(GaussianHeadPosterior):
    """Backbone, generative head and mean-field guide.

    Args:
        parts: Backbone and sizes.
        config: Settings.
    """

    def __init__(self, parts: Parts, config: MeanFieldConfig) -> None:
        model = parts.classifier(config.prior_scale, config.prior_bias_scale, config.prior)
        super().__init__(model, rank=0, table_seed=parts.table_seed, learned_prior=learned_prior(config))
        self.guide = MeanFieldGuide(model.head.prior_scale, config.initial_scale)
        self.estimator = config.estimator
        self.prior_is_normal = config.prior == "normal"
        what, hint = "only the normal prior can be learned", "inference.prior = normal"
        require(self.prior_is_normal or not config.learn_prior, what, where="inference.learn_prior", hint=hint)

    @property
    def head(self) -> MeanFieldGuide:
        """The guide, which is also the distribution over the last layer."""
        return self.guide

    def loss_from_features(self, features_BD: Tensor, y: Tensor) -> Loss:
        """Return the negative ELBO per example by the chosen estimator."""
        if self.estimator == "weight":
            return weight_space_loss(self.model.head, self.guide, features_BD, y, self.num_examples)
        return local_loss(self.guide.logit_moments(features_BD), y, self.kl(), self.num_examples)

    def kl(self) -> Tensor:
        """Return the divergence from the prior, nats: closed form where there is one, or else of one draw."""
        if self.prior_is_normal:
            return self.guide.kl(self.model.head.prior_scale)
        return divergence_or_draw(self.guide.distribution(), self.model.head.prior())

    @property
    def kl_is_exact(self) -> bool:
        """Whether the KL from the prior is closed form."""
        return closed_form_divergence(self.guide.distribution(), self.model.head.prior()) is not None

    def variational_parameters(self) -> Sequence[nn.Parameter]:
        """Return the guide's parameters."""
        return (self.guide.loc, self.guide.log_scale)

    def scale_parameters(self) -> Sequence[nn.Parameter]:
        """Return the guide's log scales."""
        return (self.guide.log_scale,)

    def posterior_scale(self) -> Tensor:
        """Return the posterior standard deviations (K, D + 1)."""
        scale_KD: Tensor = self.guide.log_scale.detach().exp()
        return scale_KD


def build(parts: Parts, config: MeanFieldConfig) -> Posterior:
    """Return an untrained mean-field posterior."""
    return MeanField(parts, config)


FAMILY = Family(
    name="mean_field",
    config=MeanFieldConfig,
    build=build,
    finalize=no_finalize,
    description="independent Gaussian on every weight of the last layer",
)
