r"""Draws of the last layer's exact posterior by the No-U-Turn sampler: the reference for all other families.

    training: the mode (MAP),  loss = mean NLL - log p(w) / N,  the log prior less its value at 0
    finalize: chains of NUTS over w on the features of all training images, computed once in evaluation mode
    p(k | x) = 1/S sum_s softmax(w_s [f; 1])_k      from S stored draws, thinned evenly from all chains

Assumptions: none on the posterior's shape; the backbone is a point estimate, trained jointly as for the mode.
Until `finalize` has sampled, the draws are the trained weight give or take a thousandth of the prior's scale.
Cost: training as the twin. Sampling takes chains x (warmup + draws) x about 30 gradients of 4 P (N + P) operations
each, P = K (D + 1) weights, on the CPU in float64, and 3 P^2 + N (D + 2 K) numbers of memory (`cost`); what would take
hours is refused. Predictions cost one backbone pass and one product with S stacked heads, S K (D + 1) numbers.
Reference: Hoffman and Gelman 2014, "The No-U-Turn Sampler", JMLR 15; Neal 1996, "Bayesian Learning for Neural
Networks", which samples all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesnet.config import require
from bayesnet.convergence import MIN_DRAWS
from bayesnet.elbo import cross_entropy
from bayesnet.errors import ConfigError, DivergedError
from bayesnet.inference.base import Batches, Family, FinalizeCost, HeadPosterior, Parts, Posterior
from bayesnet.inference.nuts_sampler import Chains, Diagnostics, HeadTarget, diagnose, sample_head
from bayesnet.model import PriorName, linear_logits
from bayesnet.types import JsonObject, Loss

MAX_WEIGHTS = 2048
"""Most weights: their whitening is a dense matrix, and the number of gradients per draw grows with them."""
MAX_HOURS = 2.0
_GRADIENTS_PER_DRAW = 30
_SECONDS_PER_GRADIENT = 1e-3
_OPERATIONS_PER_SECOND = 2e9
_PLACEHOLDER_SCALE = 1e-3


@dataclass(frozen=True, kw_only=True)
class NutsConfig:
    """Settings of the sampled head.

    Attributes:
        family: The name, "nuts".
        prior: "normal", "laplace" or "student_t" (4 degrees of freedom).
        prior_scale: Prior scale of the weights: the standard deviation of the normal prior.
        prior_bias_scale: Prior scale of the biases.
        chains: Markov chains, each begun at a draw of its own from the Laplace approximation.
        warmup: Draws per chain that adapt the sampler and are not kept.
        draws: Draws per chain after that.
        max_draws: How many of all draws are stored and predicted with.
        seed: Of the chains, added to the run's seed.
    """

    family: str = "nuts"
    prior: PriorName = "normal"
    prior_scale: float = 1.0
    prior_bias_scale: float = 1.0
    chains: int = 4
    warmup: int = 100
    draws: int = 128
    max_draws: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("chains", 2), ("warmup", 1), ("draws", MIN_DRAWS), ("max_draws", 1)):
            value = getattr(self, name)
            require(value >= least, f"must be at least {least}", where=f"inference.{name} = {value}")
        total = self.chains * self.draws
        where = f"inference.max_draws = {self.max_draws}"
        what, hint = f"must be at most chains x draws = {total}", f"set inference.max_draws = {total}, or draw more"
        require(self.max_draws <= total, what, where=where, hint=hint)


def cost(num_features: int, num_classes: int, num_examples: int, config: NutsConfig) -> FinalizeCost:
    """Return what sampling takes, within a factor of about three.

    Args:
        num_features: D.
        num_classes: K.
        num_examples: N.
        config: Chains and draws.

    Example:
        >>> hours = cost(512, 10, 50_000, NutsConfig()).seconds / 3600
        >>> print(f"{hours:.0f} hours")
        4 hours
    """
    num_weights = num_classes * (num_features + 1)
    num_gradients = config.chains * (config.warmup + config.draws) * _GRADIENTS_PER_DRAW
    operations = 4 * num_weights * (num_examples + num_weights)
    seconds = num_gradients * (_SECONDS_PER_GRADIENT + operations / _OPERATIONS_PER_SECOND)
    numbers = 3 * num_weights**2 + num_examples * (num_features + 1 + 3 * num_classes)
    return FinalizeCost(seconds, 8 * (numbers + config.chains * config.draws * num_weights))


class StoredDraws(nn.Module):
    """A finite distribution over the last layer: a trained weight, and how far each draw is from it.

    Args:
        prior_scale_KD: Prior scales (K, D + 1).
        num_draws: S.
        seed: Of the placeholders that stand in until draws are stored.
    """

    deviation_SKD: Tensor

    def __init__(self, prior_scale_KD: Tensor, num_draws: int, *, seed: int) -> None:
        super().__init__()
        num_classes, num_columns = prior_scale_KD.shape
        # The weight starts where the twin's layer does, so that both see the same first features for the same seed.
        layer = nn.Linear(num_columns - 1, num_classes)
        self.weight = nn.Parameter(torch.cat([layer.weight.data, layer.bias.data[:, None]], 1))
        # Deviations, so that the draws follow the weight while it is trained. They are not exactly 0: a posterior
        # without any spread would be a division by zero to whoever standardises its draws.
        noise_SKD = torch.randn(num_draws, *prior_scale_KD.shape, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("deviation_SKD", _PLACEHOLDER_SCALE * prior_scale_KD * noise_SKD)

    def first(self, num_samples: int) -> Tensor:
        """Return the first draws (S, K, D + 1), at most all that are stored."""
        return self.weight + self.deviation_SKD[:num_samples]

    def sample(self, num_samples: int) -> Tensor:
        """Return draws (S, K, D + 1) picked by torch's random state without repetition, at most all there are."""
        order_S = torch.randperm(len(self.deviation_SKD), device=self.weight.device)[:num_samples]
        return self.weight + self.deviation_SKD[order_S]

    @torch.no_grad()
    def store(self, draws_SKD: Tensor) -> None:
        """Replace the draws by others (S, K, D + 1) of any type and device."""
        weight_KD = self.weight.to(draws_SKD)
        self.deviation_SKD.copy_(draws_SKD - weight_KD)


class Nuts(HeadPosterior):
    """Backbone, generative head and stored draws of its weight.

    Args:
        parts: Backbone and sizes.
        config: Settings.

    Raises:
        ConfigError: Sampling would take too long or too much memory.
    """

    diagnostics_3: Tensor

    def __init__(self, parts: Parts, config: NutsConfig) -> None:
        _check_cost(parts, config)
        super().__init__(parts.classifier(config.prior_scale, config.prior_bias_scale, config.prior))
        self.config = config
        self.seed = config.seed + parts.table_seed
        self.max_draws = config.max_draws
        self.stored = StoredDraws(self.model.head.prior_scale, config.max_draws, seed=self.seed)
        self.register_buffer("diagnostics_3", torch.full((3,), -1.0))

    @property
    def head(self) -> StoredDraws:
        """The stored draws, which are also the distribution over the last layer."""
        return self.stored

    def loss_from_features(self, features_BD: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy plus ``kl / N``; its ``kl`` is -log prior of the weight, 0 at 0, nats."""
        weight_KD = self.stored.weight
        fit, nll = cross_entropy(linear_logits(features_BD, weight_KD), y)
        prior, zero_KD = self.model.head.prior(), self.model.head.prior_loc
        energy: Tensor = prior.log_prob(zero_KD) - prior.log_prob(weight_KD)
        return Loss(fit + energy / self.num_examples, nll, energy, fit)

    def draws_from_features(self, features_BD: Tensor, num_samples: int) -> Tensor:
        """Return logits (S, B, K) of the first S stored weights, at most all of them.

        Args:
            features_BD: Features (B, D).
            num_samples: S.
        """
        return linear_logits(features_BD, self.stored.first(num_samples))

    def variational_parameters(self) -> Sequence[nn.Parameter]:
        """Return the trained weight: its prior is in the loss, so it must not be decayed."""
        return (self.stored.weight,)

    def posterior_scale(self) -> Tensor | None:
        """Return the standard deviations (K, D + 1) of the stored draws; None until there are any."""
        return None if self.diagnostics() is None else self.stored.deviation_SKD.std(0)

    def facts(self) -> JsonObject:
        """Return the chains' diagnostics, once there are any."""
        found = self.diagnostics()
        return {} if found is None else dict(found._asdict())

    def finalize_cost(self) -> FinalizeCost:
        """Return what sampling takes, within a factor of about three."""
        head = self.model.head
        return cost(head.num_features, head.num_classes, head.num_examples, self.config)

    def diagnostics(self) -> Diagnostics | None:
        """Return whether the chains converged; None until `finalize` has run."""
        max_rhat, min_ess, num_divergences = self.diagnostics_3.tolist()
        return None if num_divergences < 0 else Diagnostics(max_rhat, min_ess, int(num_divergences))


def build(parts: Parts, config: NutsConfig) -> Posterior:
    """Return an untrained posterior, to be sampled by `finalize`."""
    return Nuts(parts, config)


def finalize(posterior: Posterior, batches: Batches) -> None:
    """Sample the head's weight given the features of all images, and store the draws and how well the chains mixed.

    Args:
        posterior: A trained one; the result does not depend on earlier calls.
        batches: All training images, normalised, and their labels.

    Raises:
        DivergedError: A feature is NaN or infinite.
    """
    assert isinstance(posterior, Nuts)
    config, stored = posterior.config, posterior.stored
    target = HeadTarget(posterior.model.head, *_cached_features(posterior, batches))
    found = sample_head(
        target,
        stored.weight,
        chains=config.chains,
        warmup=config.warmup,
        draws=config.draws,
        seed=posterior.seed,
    )
    stored.store(_thinned(found, config.max_draws, posterior.seed).view_as(stored.deviation_SKD))
    posterior.diagnostics_3.copy_(torch.tensor(diagnose(found)))


@torch.no_grad()
def _cached_features(posterior: Nuts, batches: Batches) -> tuple[Tensor, Tensor]:
    """Return features (N, D) and labels (N,) of all images, on the host, computed in evaluation mode."""
    was_training = posterior.training
    posterior.eval()
    pairs = [(posterior.features(x_BCHW).cpu(), y_B.cpu()) for x_BCHW, y_B in batches]
    posterior.train(was_training)
    features_ND, y_N = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
    if not features_ND.isfinite().all():
        hint = "train with a lower learning rate"
        raise DivergedError("the backbone gives features that are not finite", where="nuts", hint=hint)
    return features_ND, y_N


def _thinned(found: Chains, num_draws: int, seed: int) -> Tensor:
    """Return draws (S, P) spread evenly over every chain, in random order, so that any first few are as good."""
    draws_TP = found.draws_CSP.flatten(0, 1)
    kept_S = torch.linspace(0, len(draws_TP) - 1, num_draws, dtype=torch.float64).round().long()
    order_S = torch.randperm(num_draws, generator=torch.Generator().manual_seed(seed))
    return draws_TP[kept_S[order_S]]


def _check_cost(parts: Parts, config: NutsConfig) -> None:
    """Raise ConfigError where sampling would not end in reasonable time."""
    num_weights = parts.num_classes * (parts.num_features + 1)
    where = f"inference.family = nuts, {num_weights} weights"
    hint = "use laplace or full_rank, or a backbone with fewer features"
    require(num_weights <= MAX_WEIGHTS, f"NUTS samples at most {MAX_WEIGHTS} weights", where=where, hint=hint)
    hours = cost(parts.num_features, parts.num_classes, parts.num_examples, config).seconds / 3600
    if hours > MAX_HOURS:
        what = f"sampling with {parts.num_examples} images takes about {hours:.1f} hours, more than {MAX_HOURS:g}"
        raise ConfigError(what, where=where, hint="use laplace or full_rank, or fewer inference.draws and warmup")


FAMILY = Family(
    name="nuts",
    config=NutsConfig,
    build=build,
    finalize=finalize,
    description="draws of the last layer's exact posterior by the No-U-Turn sampler",
)
