"""The two contracts: a Posterior over classifiers, and the Family that builds one from a name and a configuration.

Every family keeps these equalities, which bayesnet/testing.py checks: same seed, same logits; build + load_state_dict
gives bit-equal logits; parameter names never change; nothing shares storage; Pyro's global store stays empty; the loss
of a batch does not depend on its order or on duplicated rows; the losses of all batches, weighted by size, add up to N
times the full-data loss; draws have the shapes below at every B from 1 up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bayesnet.backbones import num_features
from bayesnet.inference.draw_table import TABLE_SIZE, normal_table, table_prefix
from bayesnet.inference.learned_prior import LearnedPrior
from bayesnet.model import BayesianClassifier, BayesianHead, PriorName, linear_logits
from bayesnet.types import JsonObject, LogitGaussian, Loss

Batches = Iterable[tuple[Tensor, Tensor]]
"""Pairs of normalised images (B, C, H, W) and labels (B,)."""

GuideFactory = Callable[[BayesianHead], object]
"""From the head's Pyro program to a Pyro guide over its site "weight": an automatic guide's class, or a function that
returns a PyroModule or a plain Pyro function."""


class Parts(NamedTuple):
    """What a family builds a posterior from.

    Attributes:
        backbone: Images (B, C, H, W) to features (B, D), with ``num_features``.
        num_classes: K.
        num_examples: N, the size of the training set.
        table_seed: Seed of the fixed draws that predictions use.
        guide: The caller's own guide, for the family "guide" alone.
        new_backbone: Makes another backbone of the same kind with fresh weights from torch's random state, for families
            of several networks. Weights that were loaded, or that a caller's own module came with, are the same again.
    """

    backbone: nn.Module
    num_classes: int
    num_examples: int
    table_seed: int = 0
    guide: GuideFactory | None = None
    new_backbone: Callable[[], nn.Module] | None = None

    @property
    def num_features(self) -> int:
        """D, the number of features of the backbone."""
        return num_features(self.backbone)

    def classifier(
        self, prior_scale: float = 1.0, prior_bias_scale: float = 1.0, prior: PriorName = "normal"
    ) -> BayesianClassifier:
        """Return the generative model of these parts: the backbone, and a head with this prior.

        Raises:
            ConfigError: A scale is not positive and finite.
        """
        return BayesianClassifier(
            self.backbone,
            self.num_classes,
            self.num_examples,
            prior_scale=prior_scale,
            prior_bias_scale=prior_bias_scale,
            prior=prior,
        )


class FinalizeCost(NamedTuple):
    """What a pass after training takes, roughly.

    Attributes:
        seconds: On one thread of a CPU.
        num_bytes: Memory at its peak.
    """

    seconds: float
    num_bytes: int


class Posterior(nn.Module, ABC):
    """A distribution over classifiers that can be trained, sampled and saved."""

    max_draws: int | None = None
    """How many draws there are, for a finite posterior; None where any number can be had."""

    finalize_epochs: int = 0
    """Passes over the training images that the pass after training takes at the price of training."""

    @abstractmethod
    def loss(self, x_BCHW: Tensor, y: Tensor) -> Loss:
        """Return the training objective on a batch of normalised images (B, C, H, W).

        Args:
            x_BCHW: Images.
            y: Labels (B,), int64, or soft labels (B, K), rows that add up to 1 (label smoothing, mixup).
        """

    @abstractmethod
    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return joint draws of the logits (S, B, K): each draw is one classifier applied to all images."""

    @abstractmethod
    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return draws of the logits (S, B, K), right for each image by itself and never for joint quantities."""

    def draws_and_features(self, x_BCHW: Tensor, num_samples: int) -> tuple[Tensor, Tensor | None]:
        """Return what `predict_draws` returns, and the features (B, D) that all draws share, or None."""
        return self.predict_draws(x_BCHW, num_samples), None

    def fixed_draws(self, num_samples: int) -> AbstractContextManager[None]:
        """Return a context in which `predict_draws` of S draws can be traced: it computes what depends on the images.

        What does not, and what no tracer follows (random numbers, Pyro programs, gradients by hand), is made on entry
        or in the first call and is a constant from then on. The draws are those of `predict_draws` outside of it.

        Args:
            num_samples: S.
        """
        return nullcontext()

    def members(self) -> tuple[Posterior, ...]:
        """Return the posteriors that are trained one after the other: itself, but for ensembles."""
        return (self,)

    def variational_parameters(self) -> Sequence[nn.Parameter]:
        """Return the parameters that the variational optimizer owns: never decayed, their prior is in the KL."""
        return ()

    def scale_parameters(self) -> Sequence[nn.Parameter]:
        """Return those of the variational parameters that are spreads: sharpness-aware training leaves them alone."""
        return ()

    def posterior_scale(self) -> Tensor | None:
        """Return the posterior standard deviations of the weights, any shape, or None for a point estimate."""
        return None

    def after_step(self) -> None:
        """Called after each optimisation step, for what is learned in closed form; must not wait for the device."""

    def facts(self) -> JsonObject:
        """Return what was found while fitting, for the user: a learned prior, whether chains converged; plain JSON."""
        return {}

    def finalize_cost(self) -> FinalizeCost:
        """Return what the family's pass after training takes, besides one backbone pass over the training images."""
        return FinalizeCost(0.0, 0)

    @property
    def kl_is_exact(self) -> bool:
        """Whether the KL of `loss` is closed form; otherwise it is a one-draw estimate, different in every call."""
        return True


class Head(Protocol):
    """A distribution over the last layer alone."""

    def sample(self, num_samples: int) -> Tensor:
        """Return joint draws of the weight (S, K, D + 1), bias last, from torch's random state."""


class GaussianHead(Head, Protocol):
    """A Gaussian over the last layer alone."""

    @property
    def loc(self) -> Tensor:
        """Means (K, D + 1)."""

    def logit_moments(self, features_BD: Tensor) -> LogitGaussian:
        """Return the exact Gaussian of each image's logits."""


class HeadPosterior(Posterior):
    """A posterior over the last layer: one backbone pass, then only the head is drawn.

    Args:
        model: The generative model, backbone and head.
    """

    def __init__(self, model: BayesianClassifier) -> None:
        super().__init__()
        self.model = model
        self.num_classes = model.head.num_classes
        self.num_examples = model.head.num_examples

    @property
    @abstractmethod
    def head(self) -> Head:
        """The distribution over the last layer."""

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the backbone's features (B, D)."""
        features_BD: Tensor = self.model.backbone(x_BCHW)
        return features_BD

    @abstractmethod
    def loss_from_features(self, features_BD: Tensor, y: Tensor) -> Loss:
        """Return the training objective on features (B, D) and labels (B,) or soft labels (B, K)."""

    def loss(self, x_BCHW: Tensor, y: Tensor) -> Loss:
        """Return the training objective on a batch: one backbone pass, then `loss_from_features`."""
        return self.loss_from_features(self.features(x_BCHW), y)

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return joint draws of the logits (S, B, K) from one backbone pass."""
        return linear_logits(self.features(x_BCHW), self.head.sample(num_samples))

    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return draws of the logits (S, B, K) from one backbone pass, the same in every call."""
        return self.draws_and_features(x_BCHW, num_samples)[0]

    def draws_and_features(self, x_BCHW: Tensor, num_samples: int) -> tuple[Tensor, Tensor | None]:
        """Return draws of the logits (S, B, K) and the features (B, D) of one backbone pass."""
        features_BD = self.features(x_BCHW)
        return self.draws_from_features(features_BD, num_samples), features_BD

    @abstractmethod
    def draws_from_features(self, features_BD: Tensor, num_samples: int) -> Tensor:
        """Return what `predict_draws` returns for images with these features (B, D)."""


class GaussianHeadPosterior(HeadPosterior):
    """A Gaussian posterior over the last layer: predictions are closed form and a fixed table of draws.

    Args:
        model: The generative model, backbone and head.
        rank: R, columns of the low-rank factor in the logits' Gaussian.
        table_seed: Seed of the fixed table of draws.
        learned_prior: Of the model's head, where its prior is learned with the posterior.
    """

    def __init__(
        self, model: BayesianClassifier, *, rank: int, table_seed: int, learned_prior: LearnedPrior | None = None
    ) -> None:
        super().__init__(model)
        self.learned_prior = learned_prior
        self.register_buffer("table_SE", normal_table(TABLE_SIZE, self.num_classes + rank, seed=table_seed))

    @property
    @abstractmethod
    def head(self) -> GaussianHead:
        """The Gaussian over the last layer."""

    def after_step(self) -> None:
        """Move the prior towards its optimum for this posterior, where the family learns it."""
        scale_KD = None if self.learned_prior is None else self.posterior_scale()
        if scale_KD is not None and self.learned_prior is not None:
            self.learned_prior.update(self.model.head, self.head.loc, scale_KD)

    def facts(self) -> JsonObject:
        """Return the learned prior, where it is learned."""
        return {} if self.learned_prior is None else self.learned_prior.facts(self.model.head)

    def draws_from_features(self, features_BD: Tensor, num_samples: int) -> Tensor:
        """Return ``mean + scale * e + factor @ e'`` with (e, e') the first rows of the table: (S, B, K).

        Args:
            features_BD: Features (B, D).
            num_samples: S, a power of two, at most the table's 256 rows.

        Raises:
            ConfigError: ``num_samples`` is not such a number.
        """
        mean_BK, scale_BK, factor_BKR = self.head.logit_moments(features_BD)
        table_SE = table_prefix(self.get_buffer("table_SE"), num_samples)
        draws_SBK = torch.addcmul(mean_BK, scale_BK, table_SE[:, None, : self.num_classes])
        if factor_BKR.shape[-1]:
            draws_SBK = draws_SBK + torch.einsum("sr,bkr->sbk", table_SE[:, self.num_classes :], factor_BKR)
        return draws_SBK


class FamilyConfig(Protocol):
    """A frozen dataclass of the family's settings, the keys of the section ``[inference]``."""

    family: str


class Start(NamedTuple):
    """Another family at whose optimum a family's training starts.

    Attributes:
        family: Its name. It is trained first, with the settings that the two have in common.
        load: Makes an untrained posterior of this family the same distribution as a trained one of the other.
    """

    family: str
    load: Callable[[Posterior, Posterior], None]


class Family(NamedTuple):
    """A row of the table FAMILIES.

    Attributes:
        name: Public name.
        config: Frozen dataclass of its settings.
        build: Parts and settings to an untrained posterior.
        finalize: A pass after training over batches of training data (Laplace, SWAG, NUTS); writes only buffers that
            ``build`` made.
        description: One line for lists.
        bayesian: Whether it has more than one draw.
        start: Where training starts, unless the settings have ``start = "scratch"``.
    """

    name: str
    config: type[Any]
    build: Callable[[Parts, Any], Posterior]
    finalize: Callable[[Posterior, Batches], None]
    description: str
    bayesian: bool = True
    start: Start | None = None


def no_finalize(posterior: Posterior, batches: Batches) -> None:
    """Do nothing: for families that training alone fits."""
