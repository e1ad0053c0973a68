"""Mean field over the whole network: exact KL and moments, one mean for both estimators, and what is refused.

The comparison of the estimators is a z-test at |z| < 4.892 (false alarm 1e-6, fixed seeds); the smallest bias that it
catches with power 0.99 is (4.892 + 2.33) standard errors, below 0.2 nats here. All else are equalities.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from bayesnet.backbones import BackboneConfig, build_backbone
from bayesnet.elbo import cross_entropy
from bayesnet.engine import Engine
from bayesnet.errors import ConfigError
from bayesnet.inference import mean_field_all
from bayesnet.inference.base import Family, Parts, Posterior
from bayesnet.inference.deterministic import Deterministic
from bayesnet.inference.gaussian_layer import ALTERNATIVE, GaussianLayer
from bayesnet.inference.mean_field_all import MeanFieldAll, MeanFieldAllConfig, training_bytes
from bayesnet.optim import OptimizerConfig, build_optimizers
from bayesnet.testing import (
    CHECKS,
    OperatorCounter,
    check_batches_add_up,
    check_draws_ignore_companions,
    check_same_seed_same_logits,
    check_scale_is_fitted,
)
from bayesnet.types import Loss

Z_CUT = 4.892
SMALLEST_BIAS = 0.2  # nats
NUM_EXAMPLES = 40
IMAGES_BCHW = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS_B = torch.arange(4) % 3


class MLP(nn.Module):
    """Two linear layers with a bias."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, self.num_features))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features_BD: Tensor = self.layers(x_BCHW)
        return features_BD


def small_cnn() -> nn.Module:
    return build_backbone(BackboneConfig(width=2), channels=1, height=8, width=8)


def make(backbone: nn.Module | None = None, **settings: object) -> MeanFieldAll:
    torch.manual_seed(0)
    parts = Parts(backbone or small_cnn(), 3, NUM_EXAMPLES)
    return MeanFieldAll(parts, MeanFieldAllConfig(**settings)).eval()  # type: ignore[arg-type]


def _weight_space(parts: Parts, config: MeanFieldAllConfig) -> Posterior:
    return MeanFieldAll(parts, dataclasses.replace(config, estimator="weight"))


FAMILIES = {"local": mean_field_all.FAMILY, "weight": mean_field_all.FAMILY._replace(build=_weight_space)}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("estimator", ["weight"])
def test_the_family_conforms(estimator: str, check: Callable[[Family], None]) -> None:
    check(FAMILIES[estimator])


class KLPerBatch(MeanFieldAll):
    """Divides the KL by the batch."""

    def loss(self, x_BCHW: Tensor, y: Tensor) -> Loss:
        loss = super().loss(x_BCHW, y)
        return loss._replace(total=loss.fit + loss.kl / len(y))


class ScalesInSGD(MeanFieldAll):
    """Leaves all parameters to the backbone's optimizer."""

    def variational_parameters(self) -> tuple[()]:
        return ()


class LocalPredictions(MeanFieldAll):
    """Predicts with noise of its own for each image."""

    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        torch.manual_seed(0)
        return torch.stack([self.network(x_BCHW) for _ in range(min(num_samples, 32))])


class FreshDraws(MeanFieldAll):
    """Predicts with other networks each time."""

    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        return self.logits(x_BCHW, num_samples)


@pytest.mark.parametrize(
    ("planted", "check"),
    [
        (KLPerBatch, check_batches_add_up),
        (ScalesInSGD, check_scale_is_fitted),
        (LocalPredictions, check_draws_ignore_companions),
        (FreshDraws, check_same_seed_same_logits),
    ],
)
def test_planted_faults_are_caught(planted: type[MeanFieldAll], check: Callable[[Family], None]) -> None:
    with pytest.raises(AssertionError):
        check(mean_field_all.FAMILY._replace(build=planted))


def exact_kl(posterior: MeanFieldAll) -> Tensor:
    """Return the KL from torch.distributions, in the weights' own units."""
    total = torch.zeros(())
    for layer in posterior.layers:
        for name, mean in layer.means().items():
            prior = Normal(torch.zeros_like(mean), layer.prior_scales[name])
            total = total + kl_divergence(Normal(mean, layer.scale(name)), prior).sum()
    return total


@pytest.mark.parametrize("scaling", ["fan_in", "fixed"])
@pytest.mark.parametrize("backbone", [small_cnn, MLP])
def test_the_kl_and_its_gradients_are_exact(backbone: Callable[[], nn.Module], scaling: str) -> None:
    posterior = make(backbone(), prior_scaling=scaling, prior_scale=0.7, prior_bias_scale=1.3).double()
    parameters = posterior.variational_parameters()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    loss = posterior.loss(IMAGES_BCHW.double(), LABELS_B)
    expected = exact_kl(posterior)
    assert torch.allclose(loss.kl, expected, rtol=1e-12)
    assert torch.allclose(loss.total, loss.fit + expected / NUM_EXAMPLES, rtol=1e-12)
    left, right = torch.autograd.grad(loss.kl, parameters), torch.autograd.grad(expected, parameters)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(left, right, strict=True))


def z_score(local: MeanFieldAll, num_draws: int = 700) -> float:
    """Compare the likelihood term of the local loss with that of as many joint draws of all weights."""
    rows = 20 * num_draws
    with torch.no_grad():
        nll_N = nn.functional.cross_entropy(
            local.network(IMAGES_BCHW.repeat(rows, 1, 1, 1)), LABELS_B.repeat(rows), reduction="none"
        )
        drawn = []
        for _ in range(num_draws):
            with local.drawn():
                drawn.append(nn.functional.cross_entropy(local.network(IMAGES_BCHW), LABELS_B))
    left, right = nll_N.view(-1, 4).mean(1).double(), torch.stack(drawn).double()
    error = (left.var() / len(left) + right.var() / len(right)).sqrt()
    assert (Z_CUT + 2.33) * error < SMALLEST_BIAS
    return float((left.mean() - right.mean()) / error)


def test_both_estimators_have_one_mean_where_layers_are_linear() -> None:
    local = make(MLP(), initial_scale=0.8)
    assert abs(z_score(local)) < Z_CUT


def test_a_wrong_variance_is_caught_by_the_comparison() -> None:
    """The control: outputs with 0.7 of their standard deviation."""

    class Narrow(GaussianLayer):
        def output_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mean, variance = super().output_moments(x)
            return mean, 0.49 * variance

    local = make(MLP(), initial_scale=0.8)
    for layer in local.layers:
        layer.__class__ = Narrow
    assert abs(z_score(local)) > Z_CUT


def test_predictions_are_whole_networks_with_fixed_seeds() -> None:
    posterior = make(max_draws=4)
    with torch.no_grad():
        draws_SBK = posterior.predict_draws(IMAGES_BCHW, 256)
        assert len(draws_SBK) == len(posterior.logits(IMAGES_BCHW, 256)) == posterior.max_draws == 4
        assert torch.equal(posterior.predict_draws(IMAGES_BCHW, 2), draws_SBK[:2])
        for seed, logits_BK in enumerate(draws_SBK):
            with posterior.drawn(torch.Generator().manual_seed(seed)):
                assert torch.equal(posterior.network(IMAGES_BCHW), logits_BK)
    assert all(layer.in_use is None for layer in posterior.layers)
    other = MeanFieldAll(Parts(small_cnn(), 3, NUM_EXAMPLES, table_seed=1), MeanFieldAllConfig()).eval()
    other.load_state_dict(posterior.state_dict())
    with torch.no_grad():
        assert not torch.allclose(other.predict_draws(IMAGES_BCHW, 4), draws_SBK)


def test_it_starts_where_the_twin_does() -> None:
    posterior = make(initial_scale=1e-9)
    torch.manual_seed(0)
    twin = Deterministic(Parts(small_cnn(), 3, NUM_EXAMPLES)).eval()
    with torch.no_grad():
        assert torch.allclose(posterior.network(IMAGES_BCHW), twin.logits(IMAGES_BCHW, 1)[0], atol=1e-5)


def test_module_names_stay_and_normalisation_is_left_alone() -> None:
    posterior = make()
    names = set(posterior.state_dict())
    assert {"backbone.layers.0.weight_mean", "backbone.layers.0.weight_log_scale", "head.bias_mean"} <= names
    assert {"backbone.layers.1.weight", "backbone.layers.1.running_mean"} <= names
    assert isinstance(posterior.get_submodule("backbone.layers.1"), nn.BatchNorm2d)
    variational = {id(parameter) for parameter in posterior.variational_parameters()}
    others = [name for name, parameter in posterior.named_parameters() if id(parameter) not in variational]
    owners = {type(posterior.get_submodule(name.rpartition(".")[0])) for name in others}
    assert owners == {nn.BatchNorm2d}
    assert len(posterior.layers) == 5
    assert len(posterior.scale_parameters()) * 2 == len(posterior.variational_parameters())
    assert posterior.posterior_scale().numel() * 2 == sum(p.numel() for p in posterior.variational_parameters())


@pytest.mark.parametrize("estimator", ["local", "weight"])
def test_a_step_never_waits_for_the_device(estimator: str) -> None:
    posterior = make(estimator=estimator).train()
    engine, optimizers = Engine(torch.device("cpu")), build_optimizers(posterior, OptimizerConfig())
    engine.train_step(posterior, optimizers, IMAGES_BCHW, LABELS_B)
    with OperatorCounter() as counter:
        engine.train_step(posterior, optimizers, IMAGES_BCHW, LABELS_B)
    assert counter.num_host_syncs == 0


def test_soft_labels() -> None:
    y_BK = torch.full((4, 3), 0.1) + 0.7 * nn.functional.one_hot(LABELS_B, 3)
    posterior = make(estimator="weight")
    torch.manual_seed(5)
    loss = posterior.loss(IMAGES_BCHW, y_BK)
    assert torch.allclose(loss.kl, exact_kl(posterior))
    assert torch.allclose(loss.total, loss.fit + loss.kl / NUM_EXAMPLES)
    torch.manual_seed(5)
    with posterior.drawn():
        fit, nll = cross_entropy(posterior.network(IMAGES_BCHW), y_BK)
    assert torch.equal(loss.fit, fit)
    assert torch.equal(loss.nll, nll)


def test_what_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = small_cnn()
    monkeypatch.setattr(mean_field_all, "MAX_TENSORS_BYTES", training_bytes(backbone) - 1)
    with pytest.raises(ConfigError) as caught:
        mean_field_all.build(Parts(backbone, 3, 10), MeanFieldAllConfig())
    assert str(caught.value) == f"the network is too large for mean_field_all (0.0 GiB, at most 0.0): {ALTERNATIVE}"


@pytest.mark.parametrize("key", ["prior_scale", "prior_bias_scale", "initial_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_settings_out_of_range(key: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        MeanFieldAllConfig(**{key: value})  # type: ignore[arg-type]
    assert str(caught.value) == f"must be positive and finite (inference.{key} = {value})"


def test_the_number_of_draws_is_bounded() -> None:
    with pytest.raises(ConfigError, match=r"^must be from 1 to 256 \(inference.max_draws = 257\)$"):
        MeanFieldAllConfig(max_draws=257)
