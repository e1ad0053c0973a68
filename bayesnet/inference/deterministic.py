"""The deterministic twin: one linear layer on the features, trained by cross-entropy.

It is a posterior with a single draw, so that it shares data, training loop, checkpoints, prediction, metrics and report
with every Bayesian family, and its head starts from the same weights as theirs do for the same seed.

Cost: one backbone pass. Reference: the maximum-likelihood classifier.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesnet.elbo import cross_entropy
from bayesnet.inference.base import Family, Parts, Posterior, no_finalize
from bayesnet.types import Loss


@dataclass(frozen=True, kw_only=True)
class DeterministicConfig:
    """The twin has no settings of its own."""

    family: str = "deterministic"


class Deterministic(Posterior):
    """A point estimate: backbone and linear layer.

    Args:
        parts: Backbone and sizes.
    """

    max_draws = 1

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.backbone = parts.backbone
        self.head = nn.Linear(parts.num_features, parts.num_classes)

    def loss(self, x_BCHW: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy, nats; its KL is 0."""
        fit, nll = cross_entropy(self.head(self.backbone(x_BCHW)), y)
        return Loss(fit, nll, torch.zeros_like(fit), fit)

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return the logits as the only draw (1, B, K), whatever ``num_samples``."""
        return self.draws_and_features(x_BCHW, num_samples)[0]

    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return the logits as the only draw (1, B, K)."""
        return self.logits(x_BCHW, num_samples)

    def draws_and_features(self, x_BCHW: Tensor, num_samples: int) -> tuple[Tensor, Tensor | None]:
        """Return the logits as the only draw (1, B, K), and the features (B, D)."""
        features_BD: Tensor = self.backbone(x_BCHW)
        return self.head(features_BD).unsqueeze(0), features_BD


def build(parts: Parts, config: DeterministicConfig) -> Posterior:
    """Return an untrained twin."""
    return Deterministic(parts)


FAMILY = Family(
    name="deterministic",
    config=DeterministicConfig,
    build=build,
    finalize=no_finalize,
    description="one linear layer trained by cross-entropy: the twin",
    bayesian=False,
)
