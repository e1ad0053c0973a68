r"""SWAG: a Gaussian fitted to the path that constant-rate SGD takes around the trained weights.

    q(w) = Normal(mean, diag(variance) / 2 + D D' / (2 (R - 1)))    over T snapshots, one after each further epoch
    mean, variance = the snapshots' own (unbiased, float64);  D = the last R snapshots minus the mean

Trained as the twin is: the loss is the cross-entropy, weight decay is the prior, the KL slot is 0. `finalize` then goes
on from the trained weights with SGD of constant learning rate for T epochs, in its own order, on images that are not
augmented, and writes q into buffers; the trained weights, and so the loss, stay as they are. Until then the posterior
is a point: its draws are the trained network.

``scope = "network"``: q covers every trained weight; ``max_draws`` networks are drawn from it with a fixed seed, and
each gets batch norm statistics of its own from one more pass over the images (with another's it would be ruined).
Predictions make one pass per draw. ``scope = "head"``: q covers the last layer, on features computed once; the moments
of the logits are closed form and predictions make one backbone pass.

Assumptions: the spread of SGD's iterates stands for the posterior's, which holds at a learning rate that matches the
batch size and the curvature (Mandt et al. 2017, arXiv:1704.04289) and is otherwise a scale to be judged by its NLL.
Unlike the paper, D is centred at the final mean, not the running one: where R = T, D D' / (R - 1) is the snapshots'
covariance exactly.
Cost: training as the twin; `finalize` T epochs more, and "network" a forward epoch for each draw. "network" stores
max_draws x 4 bytes for every weight, in each checkpoint too, and works with 3 R + 8 floats for each on the host; "head"
stores (R + 2) x K x (D + 1) numbers and works with N x D features. More than 2 GiB to store is refused.
Reference: Maddox et al. 2019, "A simple baseline for Bayesian uncertainty in deep learning", arXiv:1902.02476.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from bayesnet.config import require
from bayesnet.elbo import cross_entropy
from bayesnet.inference.base import Batches, Family, GaussianHeadPosterior, Parts, Posterior
from bayesnet.inference.sgd_path import SgdPlan, follow_sgd, shuffled
from bayesnet.inference.swag_head import SwagHead
from bayesnet.types import Loss

MAX_STORED_BYTES = 2**31


@dataclass(frozen=True, kw_only=True)
class SwagConfig:
    """Settings of SWAG.

    Attributes:
        family: The name, "swag".
        scope: "network", every trained weight, or "head", those of the last layer.
        epochs: T, epochs of constant-rate SGD after training, one snapshot after each.
        rank: R, how many of the last snapshots the low-rank part keeps.
        max_draws: Networks that are drawn and stored with scope "network"; "head" has no limit of its own.
        learning_rate: Of the constant-rate SGD.
        momentum: Of the constant-rate SGD.
        weight_decay: Of the constant-rate SGD, on weights, not on biases and normalisation parameters; training's own
            is ``optimizer.weight_decay``.
    """

    family: str = "swag"
    scope: Literal["network", "head"] = "network"
    epochs: int = 20
    rank: int = 10
    max_draws: int = 16
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        require(self.epochs >= 2, "must be at least 2", where=f"inference.epochs = {self.epochs}")
        where = f"inference.rank = {self.rank}"
        require(2 <= self.rank <= self.epochs, f"must be from 2 to epochs = {self.epochs}", where=where)
        require(1 <= self.max_draws <= 256, "must be from 1 to 256", where=f"inference.max_draws = {self.max_draws}")
        where = f"inference.learning_rate = {self.learning_rate}"
        require(0 < self.learning_rate < math.inf, "must be positive and finite", where=where)
        require(0 <= self.momentum < 1, "must be in [0, 1)", where=f"inference.momentum = {self.momentum}")
        require(0 <= self.weight_decay < math.inf, "must not be negative", where="inference.weight_decay")

    @property
    def plan(self) -> SgdPlan:
        """The constant-rate SGD."""
        return SgdPlan(self.epochs, self.rank, self.learning_rate, self.momentum, self.weight_decay)


class SwagNetwork(Posterior):
    """A network trained as the twin is, and networks drawn around it.

    Args:
        parts: Backbone and sizes.
        config: Settings.

    Raises:
        ConfigError: The draws would not fit.
    """

    def __init__(self, parts: Parts, config: SwagConfig) -> None:
        super().__init__()
        head = nn.Linear(parts.num_features, parts.num_classes)
        # Training mode shows which layers are frozen: those stay in evaluation mode.
        self.network = nn.Sequential(OrderedDict(backbone=parts.backbone, head=head)).train()
        self.config, self._seed = config, parts.table_seed
        self.finalize_epochs = config.epochs
        self._weights = {name: p.shape for name, p in self.network.named_parameters() if p.requires_grad}
        self._norms = tuple(
            name
            for name, module in self.network.named_modules()
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
        )
        statistics = [f"{name}.{key}" for name in self._norms for key in ("running_mean", "running_var")]
        self._shapes = self._weights | {name: self.network.get_buffer(name).shape for name in statistics}
        num_numbers = sum(shape.numel() for shape in self._shapes.values())
        hint = 'lower it, use scope = "head", or the family laplace'
        _check_size(config.max_draws, num_numbers, where=f"inference.max_draws = {config.max_draws}", hint=hint)
        self.register_buffer("draws_SP", torch.zeros(config.max_draws, num_numbers))
        self.register_buffer("has_draws", torch.tensor(False))
        self.register_load_state_dict_post_hook(_count_draws)  # type: ignore[no-untyped-call]
        self._count_draws()

    def loss(self, x_BCHW: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy, nats; the KL is 0, weight decay is the prior."""
        return _point_loss(self.network(x_BCHW), y)

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return the logits (S, B, K) of the first stored networks, or of the trained one before `finalize`."""
        if not self._num_draws:
            trained_BK: Tensor = self.network(x_BCHW)
            return trained_BK.unsqueeze(0)
        draws = [self._draw(index) for index in range(min(num_samples, self._num_draws))]
        return torch.stack([functional_call(self.network, draw, (x_BCHW,)) for draw in draws])

    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return what `logits` does: there are no other draws."""
        return self.logits(x_BCHW, num_samples)

    def posterior_scale(self) -> Tensor | None:
        """Return the standard deviations of the stored weights (P,), or None where fewer than two are stored."""
        if self._num_draws < 2:
            return None
        num_weights = sum(shape.numel() for shape in self._weights.values())
        return self.get_buffer("draws_SP")[:, :num_weights].std(0)

    def fit_spread(self, batches: Batches) -> None:
        """Run the constant-rate SGD, draw the networks, and estimate their batch norm statistics.

        Raises:
            DivergedError: The weights did not stay finite.
        """
        draws_SP = self.get_buffer("draws_SP")
        tensors = (*self.network.named_parameters(), *self.network.named_buffers())
        state = {name: tensor.detach().clone() for name, tensor in tensors}
        weights = [state[name].requires_grad_() for name in self._weights]

        def loss(x_BCHW: Tensor, y_B: Tensor) -> Tensor:
            return cross_entropy(functional_call(self.network, state, (x_BCHW,)), y_B)[0]

        generator = torch.Generator().manual_seed(self._seed)
        devices = [draws_SP.device] if draws_SP.device.type == "cuda" else []
        with _modes_restored(self.network), torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._seed)  # for the network's own dropout
            self.network.train()
            spread = follow_sgd(weights, loss, batches, self.config.plan, generator)
            for index, draw_P in enumerate(spread.sample(len(draws_SP), generator)):
                draws_SP[index, : len(draw_P)] = draw_P.to(draws_SP.dtype)
            self._estimate_statistics(batches, state, generator)
        self.get_buffer("has_draws").fill_(True)
        self._count_draws()

    @torch.no_grad()
    def _estimate_statistics(self, batches: Batches, state: dict[str, Tensor], generator: torch.Generator) -> None:
        """Write the mean batch norm statistics of one pass over the images to every draw, dropout being off."""
        norms = [self.network.get_submodule(name) for name in self._norms]
        self.network.eval()
        for norm in norms:
            norm.train()
        num_seen = 0
        for x_BCHW, _ in shuffled(batches, generator) if norms else ():
            num_seen += len(x_BCHW)
            for norm in norms:
                assert isinstance(norm, _BatchNorm)
                norm.momentum = len(x_BCHW) / num_seen  # makes the running value the mean so far
            for index in range(len(self.get_buffer("draws_SP"))):
                functional_call(self.network, state | self._draw(index), (x_BCHW,))

    def _draw(self, index: int) -> dict[str, Tensor]:
        """Return the weights and statistics of a stored network by name: views, which batch norm may write to."""
        values = self.get_buffer("draws_SP")[index].split([shape.numel() for shape in self._shapes.values()])
        return {name: value.view(shape) for (name, shape), value in zip(self._shapes.items(), values, strict=True)}

    def _count_draws(self) -> None:
        """Note on the host how many networks there are, so that predicting need not ask the device."""
        self._num_draws = len(self.get_buffer("draws_SP")) if bool(self.get_buffer("has_draws")) else 0
        self.max_draws = self._num_draws or 1


class SwagHeadPosterior(GaussianHeadPosterior):
    """Backbone and a last layer trained as the twin is, and a Gaussian around the layer.

    Args:
        parts: Backbone and sizes.
        config: Settings.

    Raises:
        ConfigError: The low-rank factor would not fit.
    """

    def __init__(self, parts: Parts, config: SwagConfig) -> None:
        model = parts.classifier()
        num_weights = parts.num_classes * (parts.num_features + 1)
        where, hint = f"inference.rank = {config.rank}", "lower it, or use the family laplace"
        _check_size(config.rank + 2, num_weights, where=where, hint=hint)
        super().__init__(model, rank=config.rank, table_seed=parts.table_seed)
        self.swag_head = SwagHead(parts.num_features, parts.num_classes, config.rank)
        self.config, self._seed = config, parts.table_seed

    @property
    def head(self) -> SwagHead:
        """The Gaussian over the last layer."""
        return self.swag_head

    def loss_from_features(self, features_BD: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy, nats; the KL is 0, weight decay is the prior."""
        return _point_loss(self.swag_head.linear(features_BD), y)

    def posterior_scale(self) -> Tensor:
        """Return the standard deviations of the weights (K, D + 1), zero before `finalize`."""
        scale_KD, factor_KDR = self.swag_head.get_buffer("scale_KD"), self.swag_head.get_buffer("factor_KDR")
        return (scale_KD.square() + factor_KDR.square().sum(-1)).sqrt()

    def fit_spread(self, batches: Batches) -> None:
        """Compute the features once, then run the constant-rate SGD on them.

        Raises:
            DivergedError: The weights did not stay finite.
        """
        with _modes_restored(self.model.backbone), torch.no_grad():
            self.model.backbone.eval()
            cached = [(self.features(x_BCHW), y_B) for x_BCHW, y_B in batches]
        self.swag_head.fit_spread(cached, self.config.plan, self._seed)


def _count_draws(posterior: nn.Module, incompatible_keys: object) -> None:
    """Count the draws again after `load_state_dict`."""
    assert isinstance(posterior, SwagNetwork)
    posterior._count_draws()


@contextlib.contextmanager
def _modes_restored(network: nn.Module) -> Iterator[None]:
    """Put back every layer's mode, and the momentum of its batch norm."""
    modes = [(module, module.training, getattr(module, "momentum", None)) for module in network.modules()]
    try:
        yield
    finally:
        for module, training, momentum in modes:
            module.training = training
            if isinstance(module, _BatchNorm):
                module.momentum = momentum


def _point_loss(logits_BK: Tensor, y: Tensor) -> Loss:
    """Return the loss of a point estimate: cross-entropy alone."""
    fit, nll = cross_entropy(logits_BK, y)
    return Loss(fit, nll, torch.zeros_like(fit), fit)


def _check_size(num_copies: int, num_weights: int, *, where: str, hint: str) -> None:
    """Raise ConfigError where so many copies of the weights would not fit."""
    num_bytes = 4 * num_copies * num_weights
    what = f"SWAG would store {num_copies} x {num_weights:,} numbers, {num_bytes / 2**30:.1f} GiB, at most"
    require(num_bytes <= MAX_STORED_BYTES, f"{what} {MAX_STORED_BYTES / 2**30:.0f} fit", where=where, hint=hint)


def build(parts: Parts, config: SwagConfig) -> Posterior:
    """Return an untrained posterior."""
    return SwagHeadPosterior(parts, config) if config.scope == "head" else SwagNetwork(parts, config)


def finalize(posterior: Posterior, batches: Batches) -> None:
    """Fit the Gaussian around the trained weights.

    Raises:
        DivergedError: The weights did not stay finite.
    """
    assert isinstance(posterior, SwagNetwork | SwagHeadPosterior)
    posterior.fit_spread(batches)


FAMILY = Family(
    name="swag",
    config=SwagConfig,
    build=build,
    finalize=finalize,
    description="Gaussian around the path of constant-rate SGD",
)
