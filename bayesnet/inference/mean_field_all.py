r"""Mean-field Gaussian posterior over every weight of the network, trained by stochastic variational inference.

    q(w) = prod_i Normal(w_i | m_i, s_i^2),    prior p(w) = prod_i Normal(0, p_i^2)
    KL(q || p) = sum_i [ log(p_i / s_i) + (s_i^2 + m_i^2) / (2 p_i^2) - 1/2 ]   nats, over all weights and biases
    p_i of a layer's weights = prior_scale / sqrt(fan-in), Neal 1996's scaling, under which a unit's input has the same
    spread whatever the width; or prior_scale itself. Fan-in: inputs of a linear layer, in / groups x kernel of a
    convolution. p_i of biases = prior_bias_scale.

Assumptions: weights independent a posteriori. Scales and shifts of normalisation layers are point estimates without a
prior; they and the running statistics are shared by all draws. Layers other than nn.Linear, nn.Conv2d and normalisation
that have parameters are refused. The local estimator draws each layer's outputs, not its weights: a unit's output is
Normal(m x, s^2 x^2). That is exact for linear layers. In a convolution every position gets noise of its own although
all share the weights (Kingma et al. 2015, as all who do so): each output's distribution is exact, their correlation
between positions is dropped, so with convolutions the objective is a bound for another model, close to but not quite
this one. ``estimator = "weight"`` draws the weights once per batch: unbiased for any network, at a higher variance.
Predictions always draw whole networks. With far more weights than examples the bound is loose: training at a
``training.temperature`` of 1 ends near the prior.
Cost: 2 parameters per weight (and Adam's moments of both); two products per layer in a step instead of one; S passes
per prediction. Draws come from the device's generator: the same in every call on one kind of device.
Reference: Blundell et al. 2015, "Weight uncertainty in neural networks", arXiv:1505.05424; local reparameterisation by
Kingma et al. 2015, arXiv:1506.02557.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bayesnet.checkpoint import MAX_TENSORS_BYTES
from bayesnet.config import require
from bayesnet.elbo import cross_entropy
from bayesnet.errors import ConfigError
from bayesnet.inference.base import Family, Parts, Posterior, no_finalize
from bayesnet.inference.gaussian_layer import ALTERNATIVE, GaussianLayer, LayerPrior, replace_layers
from bayesnet.types import Loss

MAX_DRAWS = 256
TENSORS_PER_WEIGHT = 6
"""What a checkpoint of training holds of each weight: mean and log scale, and Adam's two moments of both."""

_Network = list[dict[str, Tensor]]  # weight and bias of each Gaussian layer


@dataclass(frozen=True, kw_only=True)
class MeanFieldAllConfig:
    """Settings of the whole-network mean field.

    Attributes:
        family: The name, "mean_field_all".
        prior_scaling: Prior standard deviation of a layer's weights: "fan_in" is ``prior_scale`` / sqrt(fan-in),
            "fixed" is ``prior_scale``.
        prior_scale: See ``prior_scaling``.
        prior_bias_scale: Prior standard deviation of the biases.
        initial_scale: Posterior standard deviation at the start, as a fraction of the prior's.
        estimator: "local" samples the outputs of each layer, "weight" the weights once per batch.
        max_draws: Whole networks that predictions draw at most, one pass each.
    """

    family: str = "mean_field_all"
    prior_scaling: Literal["fan_in", "fixed"] = "fan_in"
    prior_scale: float = 1.0
    prior_bias_scale: float = 1.0
    initial_scale: float = 0.2
    estimator: Literal["local", "weight"] = "local"
    max_draws: int = 32

    def __post_init__(self) -> None:
        for key in ("prior_scale", "prior_bias_scale", "initial_scale"):
            value = getattr(self, key)
            require(0 < value < math.inf, "must be positive and finite", where=f"inference.{key} = {value}")
        valid = 1 <= self.max_draws <= MAX_DRAWS
        require(valid, f"must be from 1 to {MAX_DRAWS}", where=f"inference.max_draws = {self.max_draws}")


class MeanFieldAll(Posterior):
    """A network whose linear layers and convolutions are Gaussian, the head among them.

    Args:
        parts: Backbone and sizes; the backbone's layers are replaced in place.
        config: Settings.
    """

    def __init__(self, parts: Parts, config: MeanFieldAllConfig) -> None:
        super().__init__()
        fan_in = config.prior_scaling == "fan_in"
        prior = LayerPrior(config.prior_scale, config.prior_bias_scale, fan_in, config.initial_scale)
        self.backbone = replace_layers(parts.backbone, prior)
        # Made after the backbone, as the twin's is: the same seed gives the same first means.
        self.head = GaussianLayer(nn.Linear(parts.num_features, parts.num_classes), prior)
        self.num_examples = parts.num_examples
        self.table_seed = parts.table_seed
        self.max_draws = config.max_draws
        self.estimator = config.estimator
        self._constants: list[_Network] | None = None

    @property
    def layers(self) -> list[GaussianLayer]:
        """The Gaussian layers, each once."""
        return [module for module in self.modules() if isinstance(module, GaussianLayer)]

    def network(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits (B, K) of the weights that are in use, or of local draws."""
        logits_BK: Tensor = self.head(self.backbone(x_BCHW))
        return logits_BK

    def loss(self, x_BCHW: Tensor, y: Tensor) -> Loss:
        """Return the negative ELBO per example by the chosen estimator."""
        if self.estimator == "weight":
            with self.drawn():
                fit, nll = cross_entropy(self.network(x_BCHW), y)
        else:
            fit, nll = cross_entropy(self.network(x_BCHW), y)
        kl = self.kl()
        return Loss(fit + kl / self.num_examples, nll, kl, fit)

    def kl(self) -> Tensor:
        """Return the divergence of all weights from their prior in closed form, nats."""
        return torch.stack([layer.kl() for layer in self.layers]).sum()

    @contextlib.contextmanager
    def drawn(self, generator: torch.Generator | None = None) -> Iterator[None]:
        """Use one joint draw of all weights, from torch's random state or a generator of the parameters' device."""
        with self._using(self._draw(generator)):
            yield

    def _draw(self, generator: torch.Generator | None) -> _Network:
        return [layer.draw(generator) for layer in self.layers]

    @contextlib.contextmanager
    def _using(self, network: _Network) -> Iterator[None]:
        """Use these weights of the layers."""
        layers = self.layers
        try:
            for layer, values in zip(layers, network, strict=True):
                layer.in_use = values
            yield
        finally:
            for layer in layers:
                layer.in_use = None

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return joint draws of the logits (S, B, K), a pass for each; S is at most ``max_draws``."""
        num_draws = min(num_samples, self.max_draws or num_samples)
        return self._passes(x_BCHW, (self._draw(None) for _ in range(num_draws)))

    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return draws of the logits (S, B, K), each of one network that is the same in every call."""
        return self._passes(x_BCHW, self._constants or self._fixed_networks(num_samples))

    def _fixed_networks(self, num_samples: int) -> Iterator[_Network]:
        """Yield the networks that predictions draw."""
        num_draws = min(num_samples, self.max_draws or num_samples)
        device = self.head.get_parameter("weight_mean").device
        # A CPU's generator looks at the low 32 bits of a seed alone.
        seeds = [MAX_DRAWS * self.table_seed + draw for draw in range(num_draws)]
        return (self._draw(torch.Generator(device).manual_seed(seed)) for seed in seeds)

    def _passes(self, x_BCHW: Tensor, networks: Iterable[_Network]) -> Tensor:
        logits = []
        for network in networks:
            with self._using(network):
                logits.append(self.network(x_BCHW))
        return torch.stack(logits)

    @contextlib.contextmanager
    def fixed_draws(self, num_samples: int) -> Iterator[None]:
        """Draw the networks once: that is S copies of all weights."""
        with torch.no_grad():
            self._constants = list(self._fixed_networks(num_samples))
        try:
            yield
        finally:
            self._constants = None

    def variational_parameters(self) -> Sequence[nn.Parameter]:
        """Return the Gaussian layers' parameters."""
        return [parameter for layer in self.layers for parameter in layer.parameters()]

    def scale_parameters(self) -> Sequence[nn.Parameter]:
        """Return the Gaussian layers' log scales."""
        named = (pair for layer in self.layers for pair in layer.named_parameters())
        return [parameter for name, parameter in named if name.endswith("_log_scale")]

    def posterior_scale(self) -> Tensor:
        """Return the posterior standard deviations of all weights and biases in one vector."""
        return torch.cat([layer.scale(name).detach().flatten() for layer in self.layers for name in layer.prior_scales])


def training_bytes(network: nn.Module) -> int:
    """Return about how many bytes a checkpoint of training takes: means, scales and the optimizer's moments of both.

    Example:
        >>> training_bytes(nn.Linear(9, 10))
        2400
    """
    num_bytes: int = sum(TENSORS_PER_WEIGHT * parameter.nbytes for parameter in network.parameters())
    return num_bytes


def build(parts: Parts, config: MeanFieldAllConfig) -> Posterior:
    """Return an untrained whole-network mean-field posterior.

    Raises:
        ConfigError: The network is larger than a checkpoint can be, or has layers that it has no posterior for.
    """
    num_bytes = training_bytes(parts.backbone)
    if num_bytes > MAX_TENSORS_BYTES:
        size = f"{num_bytes / 2**30:.1f} GiB, at most {MAX_TENSORS_BYTES / 2**30:.1f}"
        raise ConfigError("the network is too large for mean_field_all", where=size, hint=ALTERNATIVE)
    return MeanFieldAll(parts, config)


FAMILY = Family(
    name="mean_field_all",
    config=MeanFieldAllConfig,
    build=build,
    finalize=no_finalize,
    description="independent Gaussian on every weight of the network, normalisation aside",
)
