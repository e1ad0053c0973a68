r"""Laplace approximation of the last layer: a Gaussian around the trained weights, from the likelihood's curvature.

    training:  total = mean NLL + 1/N sum_kd w_kd^2 / (2 c_kd^2), whose minimum w* is the mode under w ~ Normal(0, c^2)
    finalize:  q(w) = Normal(w*, (H + precision)^-1), H the generalised Gauss-Newton matrix of the training set at w*
    logits of an image with features f: Normal(w* [f; 1], [f; 1]' (H + precision)^-1 [f; 1])

The loss's ``kl`` is -log prior of the weights in nats, up to its constant, so that total = fit + kl / N.

H is taken as its diagonal, as a Kronecker product, or in full (laplace_structures.py). The bias is the weight of a
feature that is always 1 and has a prior standard deviation of its own. In units of c all weights have one prior, whose
one scale the marginal likelihood may choose: the bias's standard deviation keeps its ratio to the weights'. The mode
stays that of the configured prior.

Predictive: "sampled" draws logits. "probit" (softmax of mean / sqrt(1 + pi / 8 variance) per class) and "bridge" (mean
of the Dirichlet that the logits' Gaussian is the Laplace approximation of) are one probability vector without draws:
intervals and mutual information need "sampled". The bridge is crude: it does not tend to the softmax as variances
vanish, and hardly widens a confident prediction.

Assumptions: the posterior is near Gaussian; the backbone is a point estimate. Where features interpolate the training
set the curvature is almost 0, and Laplace is then wider than the posterior. Before `finalize` standard deviations are
0.01 of the prior's, so that predictions, as in validation, are those of the mode.
Cost: a training step is the twin's. `finalize` is one pass over the training images that keeps none of their features;
`finalize_cost` says what it takes. Full covariances end at 8,192 weights and 100 classes, Kronecker's at 1,000 classes.
References: Daxberger et al. 2021, "Laplace redux", arXiv:2106.14806; MacKay 1992 (evidence, probit); Hobbhahn et al.
2022, "Fast predictive uncertainty for classification with Bayesian deep networks", arXiv:2003.01227 (bridge).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bayesnet.config import require
from bayesnet.elbo import cross_entropy
from bayesnet.errors import DataError, DivergedError
from bayesnet.inference.base import Batches, Family, FinalizeCost, GaussianHeadPosterior, Parts, Posterior
from bayesnet.inference.laplace_evidence import PriorFit, best_precision, log_evidence, num_effective
from bayesnet.inference.laplace_predictive import PREDICTIVES, in_float64
from bayesnet.inference.laplace_structures import STRUCTURES, Cost, Covariance, StructureName, cost, require_fits
from bayesnet.inference.products import product
from bayesnet.model import linear_logits
from bayesnet.types import JsonObject, LogitGaussian, Loss

UNFITTED_FRACTION = 0.01


@dataclass(frozen=True, kw_only=True)
class LaplaceConfig:
    """Settings of the Laplace approximation.

    Attributes:
        family: The name, "laplace".
        structure: Of the curvature: "diagonal", "kronecker" or "full".
        predictive: "sampled" for draws of the logits, "probit" or "bridge" for one probability vector without draws.
        prior: "fixed", or "marginal_likelihood": `finalize` scales the prior to the highest Laplace evidence.
        prior_scale: Prior standard deviation of the weights: in training, and where the marginal likelihood starts.
        prior_bias_scale: Prior standard deviation of the biases; it is scaled by the same factor.
        prior_scale_floor: Lowest prior standard deviation of the weights that the marginal likelihood may choose.
    """

    family: str = "laplace"
    structure: StructureName = "kronecker"
    predictive: Literal["sampled", "probit", "bridge"] = "sampled"
    prior: Literal["fixed", "marginal_likelihood"] = "fixed"
    prior_scale: float = 1.0
    prior_bias_scale: float = 1.0
    prior_scale_floor: float = 0.01

    def __post_init__(self) -> None:
        floor, where = self.prior_scale_floor, f"inference.prior_scale_floor = {self.prior_scale_floor}"
        require(0 < floor < math.inf, "must be positive and finite", where=where)
        reachable = self.prior == "fixed" or floor <= self.prior_scale
        require(reachable, f"exceeds inference.prior_scale = {self.prior_scale}", where=where)


class LaplaceHead(nn.Module):
    """The Gaussian over the last layer: the trained weight as its mean, and a covariance.

    Args:
        prior_scale_KD: Prior standard deviations (K, D + 1).
        structure: Of the covariance.
    """

    def __init__(self, prior_scale_KD: Tensor, structure: StructureName) -> None:
        super().__init__()
        num_classes, num_columns = prior_scale_KD.shape
        # The mean starts where the twin's layer does, so that both see the same first features for the same seed.
        layer = nn.Linear(num_columns - 1, num_classes)
        self.loc = nn.Parameter(torch.cat([layer.weight.data, layer.bias.data[:, None]], 1))
        self.covariance: Covariance = STRUCTURES[structure](prior_scale_KD, UNFITTED_FRACTION)

    def logit_moments(self, features_BD: Tensor) -> LogitGaussian:
        """Return the exact Gaussian of the logits; its factor has rank 0 ("diagonal") or K."""
        columns_BD = nn.functional.pad(features_BD, (0, 1), value=1.0)
        return LogitGaussian(product(columns_BD, self.loc.T), *self.covariance.spread(columns_BD))

    def sample(self, num_samples: int) -> Tensor:
        """Return joint draws (S, K, D + 1) from torch's random state."""
        return self.loc + self.covariance.sample(num_samples)


class Laplace(GaussianHeadPosterior):
    """Backbone, generative head and a Gaussian around the trained weights.

    Args:
        parts: Backbone and sizes.
        config: Settings.

    Raises:
        ConfigError: The structure is too large for the classes and features.
    """

    def __init__(self, parts: Parts, config: LaplaceConfig) -> None:
        require_fits(config.structure, parts.num_classes, parts.num_features)
        model = parts.classifier(config.prior_scale, config.prior_bias_scale)
        rank = 0 if config.structure == "diagonal" else parts.num_classes
        super().__init__(model, rank=rank, table_seed=parts.table_seed)
        self.last_layer = LaplaceHead(model.head.prior_scale, config.structure)
        self.config = config
        self.cost: Cost = cost(config.structure, parts.num_classes, parts.num_features, parts.num_examples)
        self.max_draws = None if config.predictive == "sampled" else 1
        for name, size in (("prior_factor", 1), ("log_evidence", 2), ("num_effective", 1)):
            self.register_buffer(name, torch.zeros(size))  # a factor of 0 says that `finalize` has not run

    @property
    def head(self) -> LaplaceHead:
        """The Gaussian over the last layer."""
        return self.last_layer

    def loss_from_features(self, features_BD: Tensor, y: Tensor) -> Loss:
        """Return the cross-entropy at the mean weight, and -log prior as the KL, up to the prior's constant."""
        fit, nll = cross_entropy(linear_logits(features_BD, self.last_layer.loc), y)
        neg_log_prior = 0.5 * (self.last_layer.loc / self.model.head.prior_scale).square().sum()
        return Loss(fit + neg_log_prior / self.num_examples, nll, neg_log_prior, fit)

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return joint draws (S, B, K), or for a predictive without draws what `predict_draws` gives."""
        if self.config.predictive == "sampled":
            return super().logits(x_BCHW, num_samples)
        return self.predict_draws(x_BCHW, num_samples)

    def draws_from_features(self, features_BD: Tensor, num_samples: int) -> Tensor:
        """Return draws of the logits (S, B, K), or the log-probabilities of "probit" or "bridge" as the only draw."""
        if self.config.predictive == "sampled":
            return super().draws_from_features(features_BD, num_samples)
        return PREDICTIVES[self.config.predictive](self.last_layer.logit_moments(features_BD)).unsqueeze(0)

    def variational_parameters(self) -> Sequence[nn.Parameter]:
        """Return the mean weight: its prior is in the loss, so no weight decay may be added."""
        return (self.last_layer.loc,)

    def posterior_scale(self) -> Tensor | None:
        """Return the posterior standard deviations (K, D + 1); None before `finalize`."""
        return self.last_layer.covariance.marginal_scale() if self.prior_fit() else None

    def facts(self) -> JsonObject:
        """Return the prior that was used and the evidence for it, once it is known."""
        fitted = self.prior_fit()
        if fitted is None:
            return {}
        return {
            "prior_scale": {"initial": fitted.initial_scale, "final": fitted.final_scale, "floor": fitted.floor},
            "log_evidence": {"initial": fitted.initial_log_evidence, "final": fitted.final_log_evidence},
            "num_effective": fitted.num_effective,
        }

    def finalize_cost(self) -> FinalizeCost:
        """Return what curvature and eigenvectors take, at two thousand million multiplications a second."""
        return FinalizeCost(self.cost.operations / 2e9, self.cost.peak_bytes)

    def prior_fit(self) -> PriorFit | None:
        """Return the prior that `finalize` used and the evidence for it; None before."""
        factor, count = float(self.get_buffer("prior_factor")), float(self.get_buffer("num_effective"))
        if factor == 0:
            return None
        config, (initial, final) = self.config, self.get_buffer("log_evidence").tolist()
        return PriorFit(
            config.prior_scale, factor * config.prior_scale, config.prior_scale_floor, initial, final, count
        )


def build(parts: Parts, config: LaplaceConfig) -> Posterior:
    """Return an untrained Laplace posterior."""
    return Laplace(parts, config)


class _Curvature(NamedTuple):
    """Sums over the images of one pass.

    Attributes:
        sums: Of the structure.
        num_images: How many.
        log_likelihood: Of their labels at the mean weight, nats.
    """

    sums: tuple[Tensor, ...]
    num_images: int
    log_likelihood: float


@torch.no_grad()
def finalize(posterior: Posterior, batches: Batches) -> None:
    """Fit the covariance, and the prior's scale where that is asked for, at the weights as they are.

    The curvature is that of N images, whatever their number in ``batches``: a pass over several augmented copies of
    each counts every image once. Called again after more training it starts over; what it found before has no effect.

    Args:
        posterior: A `Laplace`, trained.
        batches: Pairs of normalised, un-augmented training images and labels.

    Raises:
        DataError: There is no batch.
        DivergedError: The curvature or the likelihood is not finite.
    """
    assert isinstance(posterior, Laplace)
    was_training = posterior.training
    posterior.eval()
    try:
        curvature = _accumulate(posterior, batches)
    finally:
        posterior.train(was_training)
    _check_finite(curvature)
    _fit(posterior, curvature)


def _fit(posterior: Laplace, curvature: _Curvature) -> None:
    """Write covariance, prior and evidence into the posterior's buffers."""
    covariance, config = posterior.last_layer.covariance, posterior.config
    scaling = posterior.num_examples / curvature.num_images
    eigen = covariance.eigen(curvature.sums, curvature.num_images)
    eigen = eigen._replace(values=eigen.values * scaling)
    values, log_likelihood = eigen.values.cpu(), curvature.log_likelihood * scaling
    prior_scale_KD = in_float64(posterior.model.head.prior_scale)
    squared_norm = float((in_float64(posterior.last_layer.loc) / prior_scale_KD).square().sum())
    precision = 1.0
    if config.prior == "marginal_likelihood":
        precision = best_precision(squared_norm, values, (config.prior_scale / config.prior_scale_floor) ** 2)
    covariance.store(eigen, precision, prior_scale_KD[0])
    evidence = [log_evidence(log_likelihood, squared_norm, values, each) for each in (1.0, precision)]
    posterior.get_buffer("log_evidence").copy_(torch.tensor(evidence))
    posterior.get_buffer("num_effective").fill_(num_effective(values, precision))
    posterior.get_buffer("prior_factor").fill_(precision**-0.5)


def _accumulate(posterior: Laplace, batches: Batches) -> _Curvature:
    """Return the sums over all batches, in float64."""
    loc_KD = in_float64(posterior.last_layer.loc)
    prior_scale_D = in_float64(posterior.model.head.prior_scale)[0]
    sums = posterior.last_layer.covariance.new_sums(loc_KD.device)
    log_likelihood, num_images = torch.zeros((), dtype=torch.float64, device=loc_KD.device), 0
    device = posterior.last_layer.loc.device
    for x_BCHW, y in batches:
        features_BD = in_float64(posterior.features(x_BCHW.to(device)))
        logits_BK = linear_logits(features_BD, loc_KD)
        y = y.to(loc_KD.device)
        fit, _ = cross_entropy(logits_BK, y if y.dim() == 1 else y.double())
        log_likelihood -= fit * len(y)
        num_images += len(y)
        columns_BD = prior_scale_D * nn.functional.pad(features_BD, (0, 1), value=1.0)
        posterior.last_layer.covariance.add(sums, logits_BK.softmax(1), columns_BD)
    if not num_images:
        raise DataError("there are no training images", where="finalize of laplace", hint="give at least one batch")
    return _Curvature(sums, num_images, float(log_likelihood))


def _check_finite(curvature: _Curvature) -> None:
    """Raise DivergedError unless all sums are finite: no eigenvectors could be had of the others."""
    finite = math.isfinite(curvature.log_likelihood) and all(bool(each.isfinite().all()) for each in curvature.sums)
    if not finite:
        hint = "lower optimizer.learning_rate or raise optimizer.warmup_epochs"
        raise DivergedError("the curvature of the likelihood is not finite", where="finalize of laplace", hint=hint)


FAMILY = Family(
    name="laplace",
    config=LaplaceConfig,
    build=build,
    finalize=finalize,
    description="Gaussian around the trained last layer, from the curvature of the likelihood",
)
