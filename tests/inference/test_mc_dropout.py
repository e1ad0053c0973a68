"""Monte Carlo dropout: its masks, that draws are those of masked heads and networks, that nothing is on by accident.

Masks are equalities or exact counts; the one stochastic test names its false alarm and its smallest fault.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bayesnet.backbones.custom import FrozenBackbone
from bayesnet.errors import ConfigError
from bayesnet.inference import mc_dropout
from bayesnet.inference.base import Family, Parts, Posterior
from bayesnet.inference.mc_dropout import FAMILY, HeadDropout, MCDropoutConfig, NetworkDropout, keep_table
from bayesnet.testing import (
    CHECKS,
    FlattenBackbone,
    OperatorCounter,
    build,
    check_draws_ignore_companions,
    check_draws_match_moments,
    check_loss_ignores_order_and_duplicates,
    check_same_seed_same_logits,
    toy_problem,
    train_toy,
)
from bayesnet.types import Loss


class DropoutBackbone(nn.Module):
    """A backbone whose own dropout layers are of every kind.

    Args:
        num_features: D, pixels of an image of one channel and one row.
    """

    def __init__(self, num_features: int = 4) -> None:
        super().__init__()
        self.num_features = num_features
        self.elements = nn.Dropout(0.25)
        self.channels = nn.Dropout2d(0.5)
        self.mix = nn.Linear(num_features, num_features)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features_BD: Tensor = self.mix(self.elements(x_BCHW.flatten(1)))
        dropped_BD: Tensor = self.channels(features_BD[:, :, None, None]).flatten(1)
        return dropped_BD.tanh()


def network_of(parts: Parts, config: MCDropoutConfig) -> NetworkDropout:
    parts = parts._replace(backbone=DropoutBackbone(parts.num_features))
    return NetworkDropout(parts, dataclasses.replace(config, scope="network"))


NETWORK = FAMILY._replace(build=network_of)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("family", [NETWORK], ids=["network"])
def test_conforms(family: Family, check: Callable[[Family], None]) -> None:
    check(family)


# Masks.


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
def test_each_feature_is_dropped_in_the_same_share_of_the_draws(rate: float) -> None:
    table_SD = keep_table(256, 500, rate, seed=0)
    dropped_D = (~table_SD).sum(0)
    assert set(dropped_D.tolist()) <= {math.floor(256 * rate), math.ceil(256 * rate)}


def test_features_are_dropped_independently_of_each_other() -> None:
    """Correlations of 200 columns at 256 draws: false alarm below 1e-6 (z 7.2, 19,900 pairs); catches one of 0.6."""
    table_SD = keep_table(256, 200, 0.25, seed=0).double()
    correlation_DD = torch.corrcoef(table_SD.T) - torch.eye(200)
    assert correlation_DD.abs().max() < 7.2 / math.sqrt(256)
    assert not torch.equal(table_SD, keep_table(256, 200, 0.25, seed=1).double())


def test_the_mean_logits_over_the_table_are_those_without_dropout() -> None:
    """Exactly so where the rate is a multiple of 1/256: the head is linear."""
    problem = toy_problem()
    posterior = build(FAMILY, problem, rate=0.25)
    assert isinstance(posterior, HeadDropout)
    with torch.no_grad():
        draws_SBK = posterior.predict_draws(problem.x_NCHW, 256)
        plain_BK = posterior.head(posterior.features(problem.x_NCHW))
    assert torch.allclose(draws_SBK.mean(0), plain_BK, atol=1e-5)


def test_spread_of_the_logits_is_that_of_independent_masks() -> None:
    """Var = rate / (1 - rate) sum_d (w_kd f_d)^2; the table's own error is below 10 % for the mean over logits."""
    problem = toy_problem(num_features=32)
    posterior = build(FAMILY, problem, rate=0.25)
    assert isinstance(posterior, HeadDropout)
    with torch.no_grad():
        features_BD = posterior.features(problem.x_NCHW)
        draws_SBK = posterior.predict_draws(problem.x_NCHW, 256)
        variance_BK = 0.25 / 0.75 * features_BD.square() @ posterior.head.linear.weight.square().T
    assert float(draws_SBK.var(0).mean() / variance_BK.mean()) == pytest.approx(1, abs=0.1)


def test_one_mask_serves_all_images() -> None:
    """Equal images get equal draws, in head and network."""
    problem = toy_problem()
    for family in (FAMILY, NETWORK):
        posterior = build(family, problem)
        same_BCHW = problem.x_NCHW[:1].expand(5, -1, -1, -1)
        with torch.no_grad():
            for draws_SBK in (posterior.logits(same_BCHW, 8), posterior.predict_draws(same_BCHW, 8)):
                assert torch.allclose(draws_SBK, draws_SBK[:, :1].expand_as(draws_SBK), atol=1e-6)
                assert float(draws_SBK.std(0).min()) > 0


def test_a_smaller_number_of_draws_is_the_beginning_of_a_larger_one() -> None:
    problem = toy_problem()
    for family in (FAMILY, NETWORK):
        posterior = build(family, problem)
        with torch.no_grad():
            draws = [posterior.predict_draws(problem.x_NCHW, num) for num in (4, 16)]
        assert torch.allclose(draws[0], draws[1][:4], atol=1e-6)


# The network's own layers.


def test_a_networks_draw_is_its_layers_under_a_mask() -> None:
    """The masks are drawn again by hand from the draw's seed, in the order of the layers."""
    problem = toy_problem()
    posterior = build(NETWORK, problem, rate=0.25)
    assert isinstance(posterior, NetworkDropout)
    backbone = posterior.backbone
    assert isinstance(backbone, DropoutBackbone)
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        elements_D = (torch.rand((1, 4), generator=generator) >= 0.25) / 0.75
        channels_D = (torch.rand((1, 4, 1, 1), generator=generator) >= 0.5).flatten() / 0.5
        head_D = (torch.rand(1, 4, generator=generator) >= 0.25) / 0.75
        with torch.no_grad():
            features_BD = (channels_D * backbone.mix(elements_D * problem.x_NCHW.flatten(1))).tanh()
            expected_BK = posterior.head.linear(head_D * features_BD)
            draws_SBK = posterior.predict_draws(problem.x_NCHW, 4)
        assert torch.allclose(draws_SBK[index], expected_BK, atol=1e-6)


def test_predicting_leaves_the_layers_as_they_were() -> None:
    """Afterwards the backbone in evaluation mode drops nothing, and no hook is left; so also after an error."""
    problem = toy_problem()
    posterior = build(NETWORK, problem)
    assert isinstance(posterior, NetworkDropout)
    with torch.no_grad():
        before_BD = posterior.backbone(problem.x_NCHW)
        posterior.predict_draws(problem.x_NCHW, 4)
        with pytest.raises(RuntimeError):
            posterior.predict_draws(problem.x_NCHW[..., :2], 4)
        assert torch.equal(before_BD, posterior.backbone(problem.x_NCHW))
    assert not any(layer._forward_hooks for layer in posterior.layers)


def test_predictions_leave_torchs_random_state_alone() -> None:
    problem = toy_problem()
    for family in (FAMILY, NETWORK):
        posterior = build(family, problem)
        before = torch.get_rng_state()
        posterior.predict_draws(problem.x_NCHW, 4)
        assert torch.equal(before, torch.get_rng_state())


def test_training_drops_features_of_every_image_by_itself_and_evaluation_none() -> None:
    problem = toy_problem()
    posterior = build(FAMILY, problem)
    assert isinstance(posterior, HeadDropout)
    same_BD = torch.ones(50, 4)
    assert float(posterior.head(same_BD).std(0).max().detach()) == pytest.approx(0, abs=1e-6)
    posterior.train()
    assert float(posterior.head(same_BD).std(0).min().detach()) > 0
    with OperatorCounter() as counter:
        torch.autograd.backward(posterior.loss(problem.x_NCHW, problem.y_N).total)
    assert counter.num_host_syncs == 0


def test_training_makes_the_posterior_narrow_where_dropout_hurts() -> None:
    """Dropout penalises large weights: trained with it, the loss without it is above the twin's, and finite."""
    problem = toy_problem()
    losses = []
    for rate in (0.01, 0.5):
        posterior = build(FAMILY, problem, rate=rate)
        train_toy(posterior, problem, steps=200)
        losses.append(float(posterior.loss(problem.x_NCHW, problem.y_N).total.detach()))
    assert losses[0] < losses[1] < math.log(3)


# Errors.


def test_a_network_without_dropout_is_refused() -> None:
    config = MCDropoutConfig(scope="network")
    expected = 'no dropout layer of the backbone is on while training (inference.scope = network): use scope = "head"'
    frozen = FrozenBackbone(DropoutBackbone())
    for backbone in (FlattenBackbone(4), frozen):
        with pytest.raises(ConfigError) as caught:
            mc_dropout.build(Parts(backbone, 3, 10), config)
        assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("layer", "words"), [(nn.AlphaDropout(0.2), "elements: AlphaDropout(0.2)"), (nn.Dropout(1.0), "Dropout(1.0)")]
)
def test_dropout_of_another_kind_is_refused(layer: nn.Module, words: str) -> None:
    backbone = DropoutBackbone()
    backbone.elements = layer  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="this dropout layer cannot stay on in predictions") as caught:
        mc_dropout.build(Parts(backbone, 3, 10), MCDropoutConfig(scope="network"))
    assert words in str(caught.value)
    assert 'use nn.Dropout with a rate below 1, or scope = "head"' in str(caught.value)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^must be between 0 and 1 \(inference.rate = 1.0\)$"):
        MCDropoutConfig(rate=1.0)
    with pytest.raises(ConfigError, match=r"^must be from 1 to 256 \(inference.max_draws = 0\)$"):
        MCDropoutConfig(max_draws=0)
    problem = toy_problem()
    with pytest.raises(ConfigError, match=r"^draws must be a power of two from 1 to 256 \(samples = 3\)$"):
        build(FAMILY, problem).predict_draws(problem.x_NCHW, 3)


# Planted faults.


class MaskPerImage(HeadDropout):
    """Predicts with a mask for every image, as a plain dropout layer would."""

    def draws_from_features(self, features_BD: Tensor, num_samples: int) -> Tensor:
        noise = torch.Generator().manual_seed(0)
        keep_SBD = torch.rand(num_samples, *features_BD.shape, generator=noise) >= self.head.rate
        logits_SBK: Tensor = self.head.linear(features_BD * keep_SBD / (1 - self.head.rate))
        return logits_SBK


class FreshMasks(HeadDropout):
    """Predicts with new masks each time."""

    def draws_from_features(self, features_BD: Tensor, num_samples: int) -> Tensor:
        keep_SD = torch.rand(num_samples, features_BD.shape[1]) >= self.head.rate
        return self.head.masked(features_BD, keep_SD)


class NoScaling(HeadDropout):
    """Forgets 1 / (1 - rate) while predicting."""

    def draws_from_features(self, features_BD: Tensor, num_samples: int) -> Tensor:
        return super().draws_from_features(features_BD * (1 - self.head.rate), num_samples)


class NoDropout(HeadDropout):
    """Predicts with no dropout at all."""

    def draws_from_features(self, features_BD: Tensor, num_samples: int) -> Tensor:
        logits_BK: Tensor = self.head(features_BD)
        return logits_BK.expand(num_samples, -1, -1)


class DropoutInEvaluation(HeadDropout):
    """Leaves dropout on in the loss of evaluation mode."""

    def loss_from_features(self, features_BD: Tensor, y: Tensor) -> Loss:
        self.dropout_head.train()
        return super().loss_from_features(features_BD, y)


@pytest.mark.parametrize(
    ("planted", "check"),
    [
        (MaskPerImage, check_draws_ignore_companions),
        (FreshMasks, check_same_seed_same_logits),
        (NoScaling, check_draws_match_moments),
        (NoDropout, check_draws_match_moments),
        (DropoutInEvaluation, check_loss_ignores_order_and_duplicates),
    ],
)
def test_planted_fault_is_caught(
    planted: Callable[[Parts, MCDropoutConfig], Posterior], check: Callable[[Family], None]
) -> None:
    with pytest.raises(AssertionError):
        check(FAMILY._replace(build=planted))
