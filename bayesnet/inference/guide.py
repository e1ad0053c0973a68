r"""Any Pyro guide over the last layer, trained by stochastic variational inference: stock, or the caller's own.

    loss = mean NLL + KL(q || p) / N    with one joint draw of the head's weight per batch
    KL = closed form where the guide's site "weight" has one, or else the sampled log q - log p (`kl_is_exact`)

Stock Pyro guides: AutoNormal, AutoDiagonalNormal (independent Gaussians), AutoMultivariateNormal (full covariance),
AutoLowRankMultivariateNormal (diagonal and rank sqrt(number of weights)). Own guides come from Python.

Assumptions: those of the guide; the backbone is a point estimate, trained jointly on the same bound.
Cost: a Pyro program per step; predictions cost one backbone pass and one product with S stacked heads, whose memory is
S x K x (D + 1) numbers. AutoMultivariateNormal has (K (D + 1))^2 parameters.
Reference: Kucukelbir et al. 2017, "Automatic differentiation variational inference", JMLR 18(14).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuide,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from torch import Tensor, nn

from bayesnet.config import require
from bayesnet.elbo import trace_elbo, weight_space_loss
from bayesnet.errors import ConfigError
from bayesnet.inference.base import Family, GuideFactory, HeadPosterior, Parts, Posterior, no_finalize
from bayesnet.inference.draw_table import TABLE_SIZE
from bayesnet.inference.guide_module import GuideModule, make_guide
from bayesnet.model import WEIGHT, PriorName
from bayesnet.types import Loss

CUSTOM = "custom"
MEAN_WORDS = frozenset({"loc", "locs", "mean"})
SPREAD_WORDS = frozenset({"scale", "scales", "std", "log", "tril", "cov", "factor"})
MAX_FULL_COVARIANCE = 8192
"""Most weights of a head with a full covariance: 256 MiB of parameters, four times that with gradient and Adam."""

STOCK_GUIDES: dict[str, Callable[..., AutoGuide]] = {
    "AutoNormal": AutoNormal,
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
}


@dataclass(frozen=True, kw_only=True)
class GuideConfig:
    """Settings of a head with a Pyro guide.

    Attributes:
        family: The name, "guide".
        guide: A stock guide's name, or "custom" for the caller's own, given from Python.
        prior: "normal", "laplace" or "student_t" (4 degrees of freedom).
        prior_scale: Prior scale of the weights: the standard deviation of the normal prior.
        prior_bias_scale: Prior scale of the biases.
        initial_scale: Posterior standard deviation at the start, as a fraction of ``prior_scale``, for stock guides
            (biases too: these guides start from one scale).
    """

    family: str = "guide"
    guide: Literal[
        "AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal", "custom"
    ] = "AutoNormal"
    prior: PriorName = "normal"
    prior_scale: float = 1.0
    prior_bias_scale: float = 1.0
    initial_scale: float = 0.2

    def __post_init__(self) -> None:
        require(0 < self.initial_scale < math.inf, "must be positive and finite", where="inference.initial_scale")


class GuidePosterior(HeadPosterior):
    """Backbone, generative head and a Pyro guide.

    Args:
        parts: Backbone, sizes, and the guide where it is the caller's own.
        config: Settings.

    Raises:
        ConfigError: The guide is missing, is not one over the head's weight, or is too large.
    """

    def __init__(self, parts: Parts, config: GuideConfig) -> None:
        super().__init__(parts.classifier(config.prior_scale, config.prior_bias_scale, config.prior))
        head = self.model.head
        self.guide = make_guide(_stock_factory(parts, config) if config.guide != CUSTOM else _own(parts), head)
        self._is_stock = type(self.guide.owner) in STOCK_GUIDES.values()
        self._table_seed = parts.table_seed
        self._cache: tuple[object, Tensor] | None = None
        self._may_cache = False
        self._constant_SKD: Tensor | None = None
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            features_BD, y_B = torch.zeros(1, head.num_features), torch.zeros(1, dtype=torch.int64)
            self._kl_is_exact = trace_elbo(head, self.guide, features_BD, y_B).kl_is_exact
            weight_2KD = self._fixed_weights(2)
        what = "the guide is a point mass, not a distribution"
        hint = "family deterministic is the point estimate; name a guide with a spread"
        require(
            not torch.equal(*weight_2KD), what, where=type(self.guide.owner or self.guide.program).__name__, hint=hint
        )

    @property
    def head(self) -> GuideModule:
        """The guide, which is also the distribution over the last layer."""
        return self.guide

    @property
    def kl_is_exact(self) -> bool:
        """Whether the guide's site has a closed-form KL from the prior; stock guides end in a Delta, which has none."""
        return self._kl_is_exact

    def loss_from_features(self, features_BD: Tensor, y: Tensor) -> Loss:
        """Return the negative ELBO per example, from one draw of the weight."""
        if torch.is_grad_enabled():
            self._may_cache = False
        return weight_space_loss(self.model.head, self.guide, features_BD, y, self.num_examples)

    def draws_from_features(self, features_BD: Tensor, num_samples: int) -> Tensor:
        """Return logits (S, B, K) of S head weights drawn with the fixed seed; only the features get a gradient.

        Args:
            features_BD: Features (B, D).
            num_samples: S, a power of two up to 256, as for every family.

        Raises:
            ConfigError: ``num_samples`` is not such a number.
        """
        valid = 1 <= num_samples <= TABLE_SIZE and num_samples & (num_samples - 1) == 0
        require(valid, f"draws must be a power of two from 1 to {TABLE_SIZE}", where=f"samples = {num_samples}")
        weight_SKD = self._fixed_weights(num_samples) if self._constant_SKD is None else self._constant_SKD
        logits_SBK = torch.einsum("bd,skd->sbk", features_BD, weight_SKD[..., :-1])
        return logits_SBK + weight_SKD[:, None, :, -1]

    @contextlib.contextmanager
    def fixed_draws(self, num_samples: int) -> Iterator[None]:
        """Draw the weights once: the guide is a Pyro program."""
        self._constant_SKD = self._fixed_weights(num_samples)
        try:
            yield
        finally:
            self._constant_SKD = None

    def variational_parameters(self) -> Sequence[nn.Parameter]:
        """Return all parameters of the guide."""
        return tuple(self.guide.parameters())

    def scale_parameters(self) -> Sequence[nn.Parameter]:
        """Return the parameters that are not means: a mean has ``loc``, ``locs`` or ``mean`` as a word of its name.

        Words are parted by dots and underscores: ``loc`` and ``weight_loc`` are means, ``loc_scale`` is none.
        """
        return tuple(parameter for name, parameter in self.guide.named_parameters() if not _is_mean(name))

    def posterior_scale(self) -> Tensor:
        """Return the standard deviations (K, D + 1) of 256 draws with the fixed seed."""
        return self._fixed_weights(TABLE_SIZE).std(0)

    def train(self, mode: bool = True) -> GuidePosterior:
        """Set training or evaluation mode; the draws that predictions use are made anew, and kept while evaluating."""
        self._cache, self._may_cache = None, not mode
        super().train(mode)
        return self

    def _fixed_weights(self, num_samples: int) -> Tensor:
        """Return draws (S, K, D + 1) with the fixed seed.

        They are kept from `eval` on until a parameter changes. Version counters tell of most changes, but not of fused
        optimizers' steps and of recorded ones: so nothing is kept while training, or after a loss with a gradient.
        """
        tensors = (*self.guide.parameters(), *self.guide.buffers())
        key = (num_samples, *((t.data_ptr(), t._version, t.device, t.dtype) for t in tensors))
        if self._may_cache and self._cache is not None and self._cache[0] == key:
            return self._cache[1]
        # Tensors made in inference mode could not be used where gradients are wanted later.
        device = self.model.head.prior_loc.device
        with torch.inference_mode(False), torch.no_grad(), _seeded(self._table_seed, device):
            weight_SKD = self.guide.sample(num_samples).detach()
        self._cache = (key, weight_SKD) if self._may_cache else None
        return weight_SKD


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed on the CPU and the device, then go on as if nothing had been drawn."""
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
    if mps_state is not None:
        torch.mps.set_rng_state(mps_state)


def _own(parts: Parts) -> GuideFactory:
    """Return the caller's guide, or raise ConfigError where there is none."""
    if parts.guide is None:
        hint = "give it: bayesnet.load(run, guide=...)"
        raise ConfigError("the guide is the caller's own", where="inference.guide = custom", hint=hint)
    return parts.guide


def _stock_factory(parts: Parts, config: GuideConfig) -> GuideFactory:
    """Return the factory of a stock guide, which starts where the twin's layer does for the same seed."""
    where = f"inference.guide = {config.guide}"
    if parts.guide is not None:
        raise ConfigError("a guide was given, but another is configured", where=where, hint=f"set it to '{CUSTOM}'")
    num_weights = parts.num_classes * (parts.num_features + 1)
    if config.guide == "AutoMultivariateNormal" and num_weights > MAX_FULL_COVARIANCE:
        what = f"a covariance of {num_weights} weights has {num_weights**2 * 4 / 2**30:.1f} GiB"
        raise ConfigError(what, where=where, hint="use AutoLowRankMultivariateNormal")
    layer = nn.Linear(parts.num_features, parts.num_classes)
    loc_KD = torch.cat([layer.weight.data, layer.bias.data[:, None]], 1)
    return partial(
        STOCK_GUIDES[config.guide],
        init_loc_fn=init_to_value(values={WEIGHT: loc_KD}),
        init_scale=config.initial_scale * config.prior_scale,
    )


def _is_mean(name: str) -> bool:
    """Return whether a parameter's name says that it is a mean."""
    words = set(re.split(r"[._]", name))
    return bool(words & MEAN_WORDS) and not words & SPREAD_WORDS


def build(parts: Parts, config: GuideConfig) -> Posterior:
    """Return an untrained posterior with a Pyro guide."""
    return GuidePosterior(parts, config)


FAMILY = Family(
    name="guide",
    config=GuideConfig,
    build=build,
    finalize=no_finalize,
    description="any Pyro guide over the last layer: stock or your own",
)
