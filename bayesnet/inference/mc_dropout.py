r"""Monte Carlo dropout: units are dropped while training and while predicting, each pattern of them one classifier.

    a mask z_d ~ Bernoulli(1 - rate) / (1 - rate) for each feature;  draw s of the logits = W (z_s * f) + b
    loss = mean cross-entropy, with new masks for every image while training and none in evaluation mode

The prior is the optimizer's weight decay: dropout with decay approximates a variational bound whose posterior switches
the columns of W on and off (Gal and Ghahramani 2016). No KL is computed; its slot in the loss is 0.

``scope = "head"`` drops features before the last layer: one backbone pass, all masks at once. ``scope = "network"``
also keeps the backbone's own ``nn.Dropout`` layers on (1d, 2d and 3d too): one pass per draw, at most ``max_draws``.
A draw has one mask for all images, so draws are joint; predictions take theirs from a fixed seed. Dropout that is a
function call or an option of another layer is only on while training.

Assumptions: the rate is given, not inferred. With it the spread of the logits is fixed relative to the weights.
Cost: a step costs as much as the twin's; "head" holds S x B x D numbers while predicting, "network" makes S passes.
Nothing is stored but 256 x D bits' worth of masks, so there is no size to refuse.
Reference: Gal and Ghahramani 2016, "Dropout as a Bayesian approximation", arXiv:1506.02142.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from bayesnet.config import require
from bayesnet.elbo import cross_entropy
from bayesnet.errors import ConfigError
from bayesnet.inference.base import Family, HeadPosterior, Parts, Posterior, no_finalize
from bayesnet.inference.draw_table import TABLE_SIZE
from bayesnet.types import Loss

ELEMENTWISE = (nn.Dropout,)
CHANNELWISE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
SEEDS_PER_TABLE = 2**16


@dataclass(frozen=True, kw_only=True)
class MCDropoutConfig:
    """Settings of Monte Carlo dropout.

    Attributes:
        family: The name, "mc_dropout".
        scope: "head", the features before the last layer, or "network", the backbone's own dropout layers too.
        rate: Probability that a feature is dropped.
        max_draws: Most passes per prediction with scope "network"; "head" has no limit of its own.
    """

    family: str = "mc_dropout"
    scope: Literal["head", "network"] = "head"
    rate: float = 0.2
    max_draws: int = 32

    def __post_init__(self) -> None:
        require(0 < self.rate < 1, "must be between 0 and 1", where=f"inference.rate = {self.rate}")
        require(1 <= self.max_draws <= 256, "must be from 1 to 256", where=f"inference.max_draws = {self.max_draws}")


class DropoutHead(nn.Module):
    """A linear layer whose inputs are dropped at random.

    Args:
        num_features: D.
        num_classes: K.
        rate: Probability that a feature is dropped.
        table_seed: Seed of the masks that predictions use.
    """

    def __init__(self, num_features: int, num_classes: int, rate: float, table_seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_classes)
        self.rate = rate
        self.register_buffer("keep_SD", keep_table(TABLE_SIZE, num_features, rate, seed=table_seed))

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return logits (B, K): with a mask for every image in training mode, without any in evaluation mode."""
        logits_BK: Tensor = self.linear(nn.functional.dropout(features_BD, self.rate, self.training))
        return logits_BK

    def masked(self, features_BD: Tensor, keep_SD: Tensor) -> Tensor:
        """Return logits (S, B, K) where all images share each draw's mask."""
        logits_SBK: Tensor = self.linear(features_BD * (keep_SD / (1 - self.rate)).unsqueeze(1))
        return logits_SBK

    def sample(self, num_samples: int) -> Tensor:
        """Return joint draws of the weight (S, K, D + 1), bias last, from torch's random state."""
        weight_KD, bias_K = self.linear.weight, self.linear.bias
        keep_SD = torch.rand(num_samples, weight_KD.shape[1], device=weight_KD.device) >= self.rate
        weight_SKD = weight_KD * (keep_SD / (1 - self.rate)).to(weight_KD.dtype).unsqueeze(1)
        return torch.cat([weight_SKD, bias_K.expand(num_samples, -1).unsqueeze(-1)], -1)


class HeadDropout(HeadPosterior):
    """Backbone and a head with dropout on its features.

    Args:
        parts: Backbone and sizes.
        config: Settings.
    """

    def __init__(self, parts: Parts, config: MCDropoutConfig) -> None:
        super().__init__(parts.classifier())
        self.dropout_head = DropoutHead(parts.num_features, parts.num_classes, config.rate, parts.table_seed)

    @property
    def head(self) -> DropoutHead:
        """The last layer, which is also the distribution over it."""
        return self.dropout_head

    def loss_from_features(self, features_BD: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy, nats; the KL is 0, weight decay is the prior."""
        return _point_loss(self.dropout_head(features_BD), y)

    def draws_from_features(self, features_BD: Tensor, num_samples: int) -> Tensor:
        """Return logits (S, B, K) under the first masks of the fixed table.

        Args:
            features_BD: Features (B, D).
            num_samples: S, a power of two up to 256, as for every family.

        Raises:
            ConfigError: ``num_samples`` is not such a number.
        """
        valid = 1 <= num_samples <= TABLE_SIZE and num_samples & (num_samples - 1) == 0
        require(valid, f"draws must be a power of two from 1 to {TABLE_SIZE}", where=f"samples = {num_samples}")
        return self.dropout_head.masked(features_BD, self.dropout_head.get_buffer("keep_SD")[:num_samples])


class NetworkDropout(Posterior):
    """A network whose dropout layers stay on, and dropout before its last layer.

    Args:
        parts: Backbone and sizes.
        config: Settings.

    Raises:
        ConfigError: The backbone has no dropout layer that training uses, or one of an unknown kind.
    """

    def __init__(self, parts: Parts, config: MCDropoutConfig) -> None:
        super().__init__()
        self.backbone = parts.backbone
        self.head = DropoutHead(parts.num_features, parts.num_classes, config.rate, parts.table_seed)
        self.max_draws = config.max_draws
        self.layers = _dropout_layers(self.backbone)
        self._first_seed = SEEDS_PER_TABLE * parts.table_seed
        self._constants: list[_Masks] | None = None

    def loss(self, x_BCHW: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy, nats; the KL is 0, weight decay is the prior."""
        return _point_loss(self.head(self.backbone(x_BCHW)), y)

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return joint draws of the logits (S, B, K), one pass each, their seed from torch's random state."""
        return self._passes(x_BCHW, self._masks(num_samples, int(torch.randint(2**62, ()))))

    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return draws of the logits (S, B, K), one pass each, the same in every call."""
        return self._passes(x_BCHW, self._constants or self._masks(num_samples, self._first_seed))

    def _masks(self, num_samples: int, first_seed: int) -> list[_Masks]:
        """Return the masks of at most ``max_draws`` passes."""
        assert self.max_draws is not None
        return [_Masks(seed) for seed in range(first_seed, first_seed + min(num_samples, self.max_draws))]

    def _passes(self, x_BCHW: Tensor, masks: Sequence[_Masks]) -> Tensor:
        """Return logits (S, B, K), one pass for each set of masks."""
        draws = []
        for each in masks:
            keep = each.begin()
            with _shared_masks(self.layers, keep):
                features_BD = self.backbone(x_BCHW)
            keep_SD = keep((1, features_BD.shape[1]), self.head.rate)
            draws.append(self.head.masked(features_BD, keep_SD.to(features_BD.device)))
        return torch.cat(draws)

    @contextlib.contextmanager
    def fixed_draws(self, num_samples: int) -> Iterator[None]:
        """Keep the masks that the first call draws: their shapes are those of the images."""
        self._constants = self._masks(num_samples, self._first_seed)
        try:
            yield
        finally:
            self._constants = None


class _Masks:
    """The masks of one pass, in the order in which the layers ask for them; asked again, the same.

    Args:
        seed: They come from a generator of the CPU, so that they are the same on every device.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: list[Tensor] = []

    def begin(self) -> Callable[[tuple[int, ...], float], Tensor]:
        """Return a function from a shape and a rate to the next mask, true where a unit stays."""
        place = itertools.count()

        def keep(shape: tuple[int, ...], rate: float) -> Tensor:
            if (index := next(place)) == len(self._drawn):
                self._drawn.append(torch.rand(shape, generator=self._generator) >= rate)
            return self._drawn[index]

        return keep


def keep_table(num_draws: int, num_features: int, rate: float, *, seed: int) -> Tensor:
    """Return masks (num_draws, num_features), true where a feature stays; each entry is true with probability 1 - rate.

    Each feature is dropped in the same share of the draws, to one draw (a Latin hypercube), so that the mean of the
    draws is nearly that of all masks.

    Example:
        >>> table = keep_table(256, 3, 0.25, seed=0)
        >>> table.dtype, (~table).sum(0).tolist()
        (torch.bool, [64, 64, 64])
    """
    generator = torch.Generator().manual_seed(seed)
    order_SD = torch.rand(num_draws, num_features, generator=generator, dtype=torch.float64).argsort(0)
    uniform_SD = (order_SD + torch.rand(num_draws, num_features, generator=generator)) / num_draws
    return uniform_SD >= rate


@contextlib.contextmanager
def _shared_masks(layers: Sequence[_DropoutNd], keep: Callable[[tuple[int, ...], float], Tensor]) -> Iterator[None]:
    """Make the layers drop units although they are in evaluation mode, the same ones of every image."""

    def drop(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer, _DropoutNd)
        dims = output.dim()
        shape = (1, *output.shape[1:]) if isinstance(layer, ELEMENTWISE) else (1, output.shape[1], *[1] * (dims - 2))
        return output * (keep(shape, layer.p) / (1 - layer.p)).to(output)

    handles = [layer.register_forward_hook(drop) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dropout_layers(backbone: nn.Module) -> tuple[_DropoutNd, ...]:
    """Return the dropout layers that are on while the backbone is trained.

    Raises:
        ConfigError: There are none, or one is of a kind that has no mask.
    """
    backbone.train()
    layers = {name: m for name, m in backbone.named_modules() if isinstance(m, _DropoutNd) and m.training and m.p > 0}
    for name, layer in layers.items():
        if not isinstance(layer, (*ELEMENTWISE, *CHANNELWISE)) or layer.p >= 1:
            where = f"{name}: {type(layer).__name__}({layer.p})"
            hint = 'use nn.Dropout with a rate below 1, or scope = "head"'
            raise ConfigError("this dropout layer cannot stay on in predictions", where=where, hint=hint)
    what, hint = "no dropout layer of the backbone is on while training", 'use scope = "head"'
    require(bool(layers), what, where="inference.scope = network", hint=hint)
    return tuple(layers.values())


def _point_loss(logits_BK: Tensor, y: Tensor) -> Loss:
    """Return the loss of a point estimate: cross-entropy alone."""
    fit, nll = cross_entropy(logits_BK, y)
    return Loss(fit, nll, torch.zeros_like(fit), fit)


def build(parts: Parts, config: MCDropoutConfig) -> Posterior:
    """Return an untrained posterior."""
    return HeadDropout(parts, config) if config.scope == "head" else NetworkDropout(parts, config)


FAMILY = Family(
    name="mc_dropout",
    config=MCDropoutConfig,
    build=build,
    finalize=no_finalize,
    description="dropout that stays on while predicting",
)
