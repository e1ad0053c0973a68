"""The one generative model: a CNN feature extractor under a Bayesian softmax head, as a complete Pyro program.

    w ~ Normal(0, prior_scale), or another prior; one matrix (K, D + 1), the bias its last column
    y_n ~ Categorical(softmax(W f(x_n) + b)),  n = 1 ... N

Weight and bias are one latent site because structured posteriors (full covariance, Kronecker) must couple them. Every
Pyro inference (SVI with any guide, Predictive, MCMC) runs on it unmodified; our own training path computes the features
first and runs the program of the head only, which gives the same ELBO.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from bayesnet.backbones import num_features
from bayesnet.config import require
from bayesnet.registry import Registry

WEIGHT = "weight"
LABEL = "label"
STUDENT_T_DF = 4.0

PriorName = Literal["normal", "laplace", "student_t"]
"""The names in PRIORS."""

PriorFactory = Callable[[Tensor, Tensor], dist.TorchDistribution]
"""From location and scale, both (K, D + 1), to a distribution over a tensor of that shape."""


def _normal(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
    prior: dist.TorchDistribution = dist.Normal(loc, scale, validate_args=False)
    return prior


def _laplace(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
    prior: dist.TorchDistribution = dist.Laplace(loc, scale, validate_args=False)
    return prior


def _student_t(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
    prior: dist.TorchDistribution = dist.StudentT(torch.full_like(loc, STUDENT_T_DF), loc, scale, validate_args=False)
    return prior


# Functions with names, so that a model can be pickled.
PRIORS: Registry[PriorFactory] = Registry("prior", {"normal": _normal, "laplace": _laplace, "student_t": _student_t})
"""Priors of the head's weights, independent, centred at 0. The scale is the standard deviation of the normal; the
Laplace's is sqrt(2) times its scale, the Student-t's (4 degrees of freedom) also."""


def linear_logits(features_BD: Tensor, weight_KD: Tensor) -> Tensor:
    """Return the logits of a linear head whose bias is the last column of its weight.

    Args:
        features_BD: Features (B, D).
        weight_KD: Weights (K, D + 1), or (S, K, D + 1), or (S, 1, K, D + 1) as Pyro's vectorised particles shape them:
            the 1 holds the place of the data plate. Without squeezing it a matrix product would broadcast to a wrong
            ELBO of the right shape, with no error.

    Returns:
        Logits (B, K) or (S, B, K).
    """
    if weight_KD.dim() > 3:
        weight_KD = weight_KD.squeeze(-3)
    return features_BD @ weight_KD[..., :-1].mT + weight_KD[..., -1].unsqueeze(-2)


class SoftCategorical(dist.TorchDistribution):
    """The likelihood of soft labels: log p(y) = sum_k y_k log softmax(logits)_k, for rows y that add up to 1.

    For a row that is 1 at one class it is the Categorical's. It can only be observed, not sampled.

    Args:
        logits: (..., K).
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {"logits": constraints.real_vector}
    support = constraints.simplex

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-likelihood (...) of soft labels (..., K)."""
        return (value * self.logits.log_softmax(-1)).sum(-1)


class BayesianHead(PyroModule):
    """The program from features to labels: prior, plate over the data, Categorical likelihood.

    Args:
        num_features: D.
        num_classes: K.
        num_examples: N, the size of the training set: the likelihood of a batch is scaled by N / B.
        prior_scale: Prior scale of the weights: the standard deviation of the normal prior.
        prior_bias_scale: Prior scale of the biases.
        prior: A name in PRIORS, or a function from location (zeros) and scale, (K, D + 1) both, to a distribution.

    Raises:
        ConfigError: A scale is not positive and finite, the prior's name is unknown, or its shape is not (K, D + 1).

    Example:
        >>> head = BayesianHead(4, 3, 100, 1.0, 1.0, lambda loc, scale: dist.Cauchy(loc, scale))
        >>> head.prior().event_shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        num_examples: int,
        prior_scale: float,
        prior_bias_scale: float,
        prior: PriorName | PriorFactory = "normal",
    ) -> None:
        super().__init__()
        for key, scale in (("prior_scale", prior_scale), ("prior_bias_scale", prior_bias_scale)):
            require(0 < scale < math.inf, "must be positive and finite", where=f"inference.{key} = {scale}")
        self.num_features = num_features
        self.num_classes = num_classes
        self.num_examples = num_examples
        scale_KD = torch.full((num_classes, num_features + 1), prior_scale)
        scale_KD[:, -1] = prior_bias_scale
        self.register_buffer("prior_scale", scale_KD)
        self.register_buffer("prior_loc", torch.zeros_like(scale_KD))
        self._prior_factory = PRIORS[prior] if isinstance(prior, str) else prior
        self._cached_prior: tuple[Tensor, dist.TorchDistribution] | None = None
        shape = self.prior().event_shape
        require(shape == scale_KD.shape, "the prior has another shape than the weight", where=f"prior {tuple(shape)}")

    def prior(self) -> dist.TorchDistribution:
        """Return the prior over the head's weight, event shape (K, D + 1)."""
        scale_KD = self.prior_scale
        if self._cached_prior is None or self._cached_prior[0] is not scale_KD:
            # Made once per device: some distributions turn Python numbers into tensors, which waits for the device.
            with torch.inference_mode(False):
                prior = self._prior_factory(self.prior_loc, scale_KD)
                self._cached_prior = scale_KD, prior.to_event(len(prior.batch_shape))
        return self._cached_prior[1]

    def forward(self, features_BD: Tensor, y_B: Tensor | None = None) -> Tensor:
        """Run the program on features (B, D) and labels (B,); return the logits (B, K) of the sampled weight.

        Labels may be soft, (B, K): the likelihood is then the product of the classes', each to the power of its share.
        """
        weight_KD = pyro.sample(WEIGHT, self.prior())
        logits_BK = linear_logits(features_BD, weight_KD)
        soft = y_B is not None and y_B.dim() == 2
        likelihood = SoftCategorical(logits_BK) if soft else dist.Categorical(logits=logits_BK)
        with pyro.plate("data", self.num_examples, subsample=features_BD):
            pyro.sample(LABEL, likelihood, obs=y_B)
        return logits_BK


class BayesianClassifier(PyroModule):
    """A CNN feature extractor with a Bayesian classifier head: the whole model as one Pyro program.

    Args:
        backbone: A module from images (B, C, H, W) to features (B, D), with ``num_features`` = D.
        num_classes: K.
        num_examples: N, the size of the training set.
        prior_scale: Prior scale of the head's weights: the standard deviation of the normal prior.
        prior_bias_scale: Prior scale of the head's biases.
        prior: "normal", "laplace", "student_t" (4 degrees of freedom), or a function from location and scale to any
            Pyro distribution over the weight.

    Example:
        >>> import torch
        >>> from bayesnet.backbones import BackboneConfig, build_backbone
        >>> backbone = build_backbone(BackboneConfig(), channels=1, height=8, width=8)
        >>> model = BayesianClassifier(backbone, num_classes=10, num_examples=1000)
        >>> model(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        num_examples: int,
        *,
        prior_scale: float = 1.0,
        prior_bias_scale: float = 1.0,
        prior: PriorName | PriorFactory = "normal",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = BayesianHead(
            num_features(backbone), num_classes, num_examples, prior_scale, prior_bias_scale, prior
        )

    def forward(self, x_BCHW: Tensor, y_B: Tensor | None = None) -> Tensor:
        """Run the program on images (B, C, H, W) and labels (B,); return the logits (B, K) of the sampled weight."""
        logits_BK: Tensor = self.head(self.backbone(x_BCHW), y_B)
        return logits_BK
