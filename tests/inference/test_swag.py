"""SWAG through both scopes: what finalize fits, stores and leaves alone, and what predictions make of it.

Everything is deterministic. The Gaussian itself is tested in test_sgd_path.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from bayesnet.backbones import BackboneConfig, build_backbone
from bayesnet.backbones.custom import FrozenBackbone
from bayesnet.errors import ConfigError, DivergedError
from bayesnet.inference import swag
from bayesnet.inference.base import Family, Parts, Posterior
from bayesnet.inference.swag import FAMILY, SwagConfig, SwagHeadPosterior, SwagNetwork, finalize
from bayesnet.testing import (
    CHECKS,
    FlattenBackbone,
    OperatorCounter,
    ToyProblem,
    build,
    check_draws_match_moments,
    check_names_never_change,
    check_particles_equal_a_loop,
    toy_problem,
    train_toy,
)
from bayesnet.types import LogitGaussian

SCOPES: tuple[Literal["network", "head"], ...] = ("network", "head")


def family(scope: Literal["network", "head"], *, finalized: bool) -> Family:
    """Return the family with this scope; finalized, its posteriors come with a fitted Gaussian."""

    def build_one(parts: Parts, config: SwagConfig) -> Posterior:
        posterior = swag.build(parts, dataclasses.replace(config, scope=scope))
        if finalized:
            problem = toy_problem()
            finalize(posterior, [(problem.x_NCHW, problem.y_N)])
        return posterior

    return FAMILY._replace(build=build_one)


CASES = [
    pytest.param(family(scope, finalized=finalized), check, id=f"{scope}-{finalized}-{check.__name__}")
    for scope in SCOPES
    for finalized in (False, True)
    for check in CHECKS
    # A head without spread has no draws to compare with its moments: 0/0 in that check, tested below.
    if (scope, finalized, check) != ("head", False, check_draws_match_moments)
]


@pytest.mark.parametrize(("which", "check"), CASES)
def test_conforms(which: Family, check: Callable[[Family], None]) -> None:
    check(which)


def test_an_unfinalized_posterior_is_the_trained_point() -> None:
    problem = toy_problem()
    for scope in ("network", "head"):
        posterior = build(FAMILY, problem, scope=scope)
        with torch.no_grad():
            draws_SBK = posterior.predict_draws(problem.x_NCHW, 8)
            nll_B = nn.functional.cross_entropy(draws_SBK[-1], problem.y_N)
            assert nll_B == pytest.approx(float(posterior.loss(problem.x_NCHW, problem.y_N).total))
        assert torch.allclose(draws_SBK, draws_SBK[:1].expand_as(draws_SBK))
    assert build(FAMILY, problem).max_draws == 1


# Whole networks.


class SmallNetwork:
    """A CNN with batch norm on random images whose classes differ in brightness."""

    def __init__(
        self, *, max_draws: int = 4, learning_rate: float = 0.01, epochs: int = 4, frozen: bool = False
    ) -> None:
        torch.manual_seed(0)
        backbone = build_backbone(BackboneConfig(width=4, freeze=frozen), channels=1, height=8, width=8)
        config = SwagConfig(max_draws=max_draws, learning_rate=learning_rate, epochs=epochs, rank=2)
        posterior = swag.build(Parts(backbone, 3, 48), config)
        assert isinstance(posterior, SwagNetwork)
        self.posterior = posterior
        self.y_N = torch.arange(48) % 3
        self.x_NCHW = torch.randn(48, 1, 8, 8) + self.y_N[:, None, None, None]

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        order = self.y_N.argsort()  # sorted by class, as a folder of images is
        return list(zip(self.x_NCHW[order].split(16), self.y_N[order].split(16), strict=True))

    def train(self) -> None:
        train_toy(self.posterior, ToyProblem(self.x_NCHW, self.y_N, torch.zeros(3, 1)), steps=30)


def test_finalize_changes_nothing_but_its_own_buffers() -> None:
    case = SmallNetwork()
    case.train()
    for training in (True, False):
        case.posterior.train(training)
        before = {name: tensor.clone() for name, tensor in case.posterior.state_dict().items()}
        modes = [module.training for module in case.posterior.modules()]
        momenta = [module.momentum for module in case.posterior.modules() if isinstance(module, nn.BatchNorm2d)]
        random = torch.get_rng_state()
        finalize(case.posterior, case.batches())
        after = case.posterior.state_dict()
        assert {name for name in before if not torch.equal(before[name], after[name])} <= {"draws_SP", "has_draws"}
        assert modes == [module.training for module in case.posterior.modules()]
        assert momenta == [module.momentum for module in case.posterior.modules() if isinstance(module, nn.BatchNorm2d)]
        assert torch.equal(random, torch.get_rng_state())
        assert all(parameter.grad is None or parameter.requires_grad for parameter in case.posterior.parameters())
    assert case.posterior.max_draws == 4
    scale_P = case.posterior.posterior_scale()
    assert scale_P is not None
    assert float(scale_P.min()) >= 0
    assert len(scale_P) == sum(parameter.numel() for parameter in case.posterior.network.parameters())


def test_finalizing_twice_gives_the_same_draws_and_another_seed_others() -> None:
    case = SmallNetwork()
    case.train()
    draws = []
    for seed in (0, 0, 1):
        case.posterior._seed = seed
        finalize(case.posterior, case.batches())
        draws.append(case.posterior.get_buffer("draws_SP").clone())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_dropout_of_the_network_draws_from_the_seed() -> None:
    """Finalizing is a function of the seed even where layers draw from torch's random state."""
    problem = toy_problem()

    def draws() -> Tensor:
        backbone = nn.Sequential(FlattenBackbone(4), nn.Dropout(0.5))
        backbone.num_features = 4  # type: ignore[assignment]
        torch.manual_seed(0)
        posterior = swag.build(Parts(backbone, 3, 60), SwagConfig())
        torch.rand(1 + len(seen))  # leaves the random state elsewhere each time
        finalize(posterior, [(problem.x_NCHW, problem.y_N)])
        return posterior.get_buffer("draws_SP")

    seen: list[Tensor] = []
    for _ in range(2):
        seen.append(draws())
    assert torch.equal(*seen)


def test_loading_a_finalized_state_makes_a_finalized_posterior() -> None:
    source, target = SmallNetwork(), SmallNetwork()
    finalize(source.posterior, source.batches())
    assert target.posterior.max_draws == 1
    target.posterior.load_state_dict(source.posterior.state_dict())
    assert target.posterior.max_draws == 4
    with torch.no_grad():
        draws = [case.posterior.eval().predict_draws(source.x_NCHW, 8) for case in (source, target)]
    assert torch.equal(*draws)
    assert draws[0].shape == (4, 48, 3)


def test_each_draw_has_its_own_batch_norm_statistics() -> None:
    """They equal the mean over the data of what the drawn network's layers see, computed again layer by layer."""
    case = SmallNetwork(learning_rate=0.05)
    case.train()
    finalize(case.posterior, [(case.x_NCHW, case.y_N)])  # one batch, so that its statistics are the data's
    for index in range(4):
        values = case.posterior._draw(index)
        seen_BCHW = nn.functional.conv2d(case.x_NCHW, values["backbone.layers.0.weight"], padding=1)
        assert torch.allclose(values["backbone.layers.1.running_mean"], seen_BCHW.mean((0, 2, 3)), atol=1e-5)
        assert torch.allclose(values["backbone.layers.1.running_var"], seen_BCHW.var((0, 2, 3)), rtol=1e-4)


def test_statistics_are_the_mean_over_ragged_batches() -> None:
    case = SmallNetwork(max_draws=1)
    batches = list(zip(case.x_NCHW.split(20), case.y_N.split(20), strict=True))
    finalize(case.posterior, batches)
    values = case.posterior._draw(0)
    seen_BCHW = nn.functional.conv2d(case.x_NCHW, values["backbone.layers.0.weight"], padding=1)
    assert torch.allclose(values["backbone.layers.1.running_mean"], seen_BCHW.mean((0, 2, 3)), atol=1e-5)


def test_without_its_own_statistics_a_draw_would_be_another_network() -> None:
    """Planted: every draw keeps the trained network's statistics; its first layer's are then wrong."""
    case = SmallNetwork(learning_rate=0.2)
    case.train()
    finalize(case.posterior, [(case.x_NCHW, case.y_N)])
    own = case.posterior._draw(0)["backbone.layers.1.running_mean"]
    trained = case.posterior.network.get_buffer("backbone.layers.1.running_mean")
    assert not torch.allclose(own, trained, atol=1e-3)


def test_a_frozen_backbone_is_neither_drawn_nor_moved() -> None:
    case = SmallNetwork(frozen=True)
    assert isinstance(case.posterior.network.get_submodule("backbone"), FrozenBackbone)
    assert case.posterior.get_buffer("draws_SP").shape == (4, 3 * 17)
    finalize(case.posterior, case.batches())
    assert case.posterior.eval().predict_draws(case.x_NCHW, 8).shape == (4, 48, 3)


def test_predicting_never_asks_the_device_for_a_value() -> None:
    case = SmallNetwork()
    finalize(case.posterior, case.batches())
    for training in (True, False):
        with OperatorCounter() as counter:
            case.posterior.train(training).loss(case.x_NCHW, case.y_N)
        assert counter.num_host_syncs == 0
    with torch.inference_mode(), OperatorCounter() as counter:
        case.posterior.predict_draws(case.x_NCHW, 4)
    assert counter.num_host_syncs == 0


# The head.


def test_head_moments_and_draws_are_those_of_the_iterates() -> None:
    """The head's path is computed again by autograd on a plain layer, and its moments by hand."""
    problem = toy_problem()
    posterior = build(FAMILY, problem, scope="head")
    assert isinstance(posterior, SwagHeadPosterior)
    train_toy(posterior, problem, steps=20)
    finalize(posterior, [(problem.x_NCHW, problem.y_N)])
    layer = nn.Linear(4, 3)
    layer.load_state_dict(posterior.head.linear.state_dict())
    features_BD, ends = problem.x_NCHW.flatten(1), []
    velocities = [torch.zeros_like(parameter) for parameter in layer.parameters()]
    for _ in range(20):
        layer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(layer(features_BD), problem.y_N))
        with torch.no_grad():
            for parameter, velocity, decay in zip(layer.parameters(), velocities, (5e-4, 0.0), strict=True):
                assert parameter.grad is not None
                velocity.mul_(0.9).add_(parameter.grad + decay * parameter)
                parameter.sub_(0.01 * velocity)
        ends.append(torch.cat([layer.weight, layer.bias[:, None]], 1).detach().clone())
    ends_TKD = torch.stack(ends).double()
    deviations_RKD = ends_TKD[-10:] - ends_TKD.mean(0)
    augmented_BD = torch.cat([features_BD, torch.ones(len(features_BD), 1)], 1).double()
    moments = posterior.head.logit_moments(features_BD)
    assert torch.allclose(moments.mean_BK.double(), augmented_BD @ ends_TKD.mean(0).T, atol=1e-4)
    variance_BK = augmented_BD.square() @ (ends_TKD.var(0) / 2).T
    assert torch.allclose(moments.scale_BK.double(), variance_BK.sqrt(), rtol=1e-2)
    factor_BKR = torch.einsum("bd,rkd->bkr", augmented_BD, deviations_RKD) / math.sqrt(18)
    assert torch.allclose(moments.factor_BKR.double(), factor_BKR, atol=1e-4)


def test_the_head_follows_only_features() -> None:
    """The backbone is in evaluation mode while its features are cached, and stays as it was."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(width=4), channels=1, height=8, width=8)
    posterior = swag.build(Parts(backbone, 3, 48), SwagConfig(scope="head", epochs=3, rank=2)).train()
    case = SmallNetwork()
    before = {name: tensor.clone() for name, tensor in posterior.state_dict().items()}
    finalize(posterior, case.batches())
    changed = {name for name, tensor in posterior.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"swag_head.{name}" for name in ("offset_KD", "scale_KD", "factor_KDR")}
    assert all(module.training for module in posterior.modules())


# Errors and planted faults.


def test_what_cannot_fit_is_refused_in_words() -> None:
    with pytest.raises(ConfigError) as caught:
        swag.build(Parts(FlattenBackbone(99_999), 1000, 100), SwagConfig(max_draws=16))
    assert str(caught.value) == (
        "SWAG would store 16 x 100,000,000 numbers, 6.0 GiB, at most 2 fit (inference.max_draws = 16):"
        ' lower it, use scope = "head", or the family laplace'
    )
    with pytest.raises(ConfigError) as caught:
        swag.build(Parts(FlattenBackbone(99_999), 1000, 100), SwagConfig(scope="head"))
    assert str(caught.value) == (
        "SWAG would store 12 x 100,000,000 numbers, 4.5 GiB, at most 2 fit (inference.rank = 10):"
        " lower it, or use the family laplace"
    )


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"epochs": 1, "rank": 2}, "must be at least 2 (inference.epochs = 1)"),
        ({"rank": 21}, "must be from 2 to epochs = 20 (inference.rank = 21)"),
        ({"max_draws": 0}, "must be from 1 to 256 (inference.max_draws = 0)"),
        ({"learning_rate": 0.0}, "must be positive and finite (inference.learning_rate = 0.0)"),
        ({"momentum": 1.0}, "must be in [0, 1) (inference.momentum = 1.0)"),
        ({"weight_decay": -1.0}, "must not be negative (inference.weight_decay)"),
    ],
)
def test_wrong_settings_are_refused(setting: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SwagConfig(**setting)  # type: ignore[arg-type]
    assert str(caught.value) == words


@pytest.mark.parametrize("scope", ["network", "head"])
def test_divergence_is_an_error_and_leaves_the_posterior_unfinalized(scope: str) -> None:
    problem = toy_problem()
    posterior = build(FAMILY, problem, scope=scope, learning_rate=1e30)
    before = {name: tensor.clone() for name, tensor in posterior.state_dict().items()}
    with pytest.raises(DivergedError) as caught:
        finalize(posterior, [(problem.x_NCHW, problem.y_N)])
    words = "SGD with a constant learning rate diverged (finalize): lower inference.learning_rate"
    assert str(caught.value) == words
    assert all(torch.equal(tensor, before[name]) for name, tensor in posterior.state_dict().items())


class FullVariance(SwagHeadPosterior):
    """Predicts with the whole diagonal variance beside the low-rank part."""

    def draws_from_features(self, features_BD: Tensor, num_samples: int) -> Tensor:
        self.head.get_buffer("scale_KD").mul_(math.sqrt(2))
        draws_SBK = super().draws_from_features(features_BD, num_samples)
        self.head.get_buffer("scale_KD").div_(math.sqrt(2))
        return draws_SBK


class WithoutFactor(SwagHeadPosterior):
    """Leaves the low-rank part out of predictions."""

    def draws_from_features(self, features_BD: Tensor, num_samples: int) -> Tensor:
        moments: LogitGaussian = self.head.logit_moments(features_BD)
        table_SE = self.get_buffer("table_SE")[:num_samples, None, : self.num_classes]
        return moments.mean_BK + moments.scale_BK * table_SE


class MeanForDraws(SwagHeadPosterior):
    """Gives the mean for each joint draw."""

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        logits_BK: Tensor = self.head.linear(self.features(x_BCHW))
        return logits_BK.expand(num_samples, -1, -1)


@pytest.mark.parametrize(
    ("planted", "check"),
    [
        (FullVariance, check_draws_match_moments),
        (WithoutFactor, check_draws_match_moments),
        (MeanForDraws, check_particles_equal_a_loop),
    ],
)
def test_planted_fault_of_the_head_is_caught(planted: type[SwagHeadPosterior], check: Callable[[Family], None]) -> None:
    def build_one(parts: Parts, config: SwagConfig) -> Posterior:
        posterior = planted(parts, config)
        problem = toy_problem()
        finalize(posterior, [(problem.x_NCHW, problem.y_N)])
        return posterior

    with pytest.raises(AssertionError):
        check(FAMILY._replace(build=build_one))


def test_a_finalize_that_makes_a_buffer_is_caught() -> None:
    def grows(posterior: Posterior, batches: object) -> None:
        posterior.register_buffer("late", torch.zeros(1))

    with pytest.raises(AssertionError, match="state changed"):
        check_names_never_change(FAMILY._replace(finalize=grows))
