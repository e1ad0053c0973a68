"""Gaussian layers: exact moments and draws from the posterior, and which layers they may stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from bayesnet.errors import ConfigError
from bayesnet.inference.gaussian_layer import ALTERNATIVE, GaussianLayer, LayerPrior, replace_layers

PRIOR = LayerPrior()


def test_the_prior_is_scaled_by_fan_in() -> None:
    prior = LayerPrior(scale=2.0, bias_scale=0.5)
    assert GaussianLayer(nn.Linear(16, 3), prior).prior_scales == {"weight": 0.5, "bias": 0.5}
    assert GaussianLayer(nn.Conv2d(8, 4, 2, groups=2, bias=False), prior).prior_scales == {"weight": 0.5}
    assert GaussianLayer(nn.Linear(16, 3), prior._replace(by_fan_in=False)).prior_scales["weight"] == 2.0


CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(2, 3, 3),
    "padded, no bias": lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False),
    "same": lambda: nn.Conv2d(2, 3, 3, padding="same"),
    "strided, dilated": lambda: nn.Conv2d(2, 3, (3, 2), stride=2, dilation=(1, 2), padding=(2, 1)),
    "grouped": lambda: nn.Conv2d(2, 4, 3, groups=2),
    "reflecting": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"),
}


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_the_moments_of_a_convolutions_outputs_are_exact(name: str) -> None:
    """An output is linear in the weight, with a Jacobian J: its mean is J m, its variance J^2 s^2."""
    convolution = CONVOLUTIONS[name]().double()
    layer = GaussianLayer(convolution, LayerPrior(initial_scale=0.3))
    x_BCHW = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    names = list(layer.prior_scales)
    means = tuple(layer.means().values())

    def outputs(*values: Tensor) -> Tensor:
        return layer.affine(x_BCHW, dict(zip(names, values, strict=True)))

    jacobians = torch.autograd.functional.jacobian(outputs, means)
    expected = sum(
        (j.square() * layer.scale(n).square()).flatten(4).sum(-1) for n, j in zip(names, jacobians, strict=True)
    )
    mean, variance = layer.output_moments(x_BCHW)
    assert torch.allclose(mean, convolution(x_BCHW), rtol=1e-10)
    assert torch.allclose(variance, torch.as_tensor(expected), rtol=1e-10)


def test_local_noise_of_a_convolution_drops_the_correlation_between_positions() -> None:
    """What the docstring says: all 25 outputs of a constant image are one number in truth, and independent locally."""
    layer = GaussianLayer(nn.Conv2d(1, 1, 1, bias=False), LayerPrior(initial_scale=0.5))
    x_BCHW = torch.ones(1, 1, 5, 5)
    torch.manual_seed(0)
    with torch.no_grad():
        local = torch.stack([layer(x_BCHW).mean() for _ in range(2000)])
        layer.in_use = layer.draw()
        assert float(layer(x_BCHW).std()) == pytest.approx(0, abs=1e-6)
    assert float(local.std()) == pytest.approx(0.5 / 5, rel=0.1)  # 6 standard errors


def test_joint_draws_come_from_the_posterior() -> None:
    """False alarm 1e-6 per number at 5 standard errors; catches a scale that is wrong by 8 %."""
    layer = GaussianLayer(nn.Linear(3, 2), LayerPrior(initial_scale=0.4)).double()
    torch.manual_seed(0)
    with torch.no_grad():
        draws = [layer.draw() for _ in range(4000)]
        for name, mean in layer.means().items():
            values = torch.stack([draw[name] for draw in draws])
            z = (values - mean) / layer.scale(name)
            assert (z.mean(0).abs() < 5 / 4000**0.5).all()
            assert ((z.square().mean(0) - 1).abs() < 5 * (2 / 4000) ** 0.5).all()


def test_a_black_patch_has_finite_gradients() -> None:
    layer = GaussianLayer(nn.Conv2d(1, 2, 3, bias=False), PRIOR)
    gradients = torch.autograd.grad(layer(torch.zeros(2, 1, 8, 8)).sum(), list(layer.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_layer_in_two_places_stays_one_layer() -> None:
    layer = nn.Linear(5, 5)
    network = replace_layers(nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer)), PRIOR)
    assert network.get_submodule("0") is network.get_submodule("1.1")
    assert sorted(network.state_dict())[:2] == ["0.bias_log_scale", "0.bias_mean"]
    assert sum(isinstance(module, GaussianLayer) for module in network.modules()) == 1


def test_a_network_that_is_one_layer_becomes_one() -> None:
    assert isinstance(replace_layers(nn.Linear(3, 2), PRIOR), GaussianLayer)


class OwnConvolution(nn.Conv2d):
    """May do anything with its weights."""


class OwnParameter(nn.Module):
    """Has a parameter that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))


def tied() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, second)


NO_POSTERIOR = "mean_field_all has no posterior for this layer's parameters"


@pytest.mark.parametrize(
    ("module", "what", "where"),
    [
        (lambda: nn.LSTM(4, 4), NO_POSTERIOR, "inner (LSTM)"),
        (lambda: nn.MultiheadAttention(4, 2), NO_POSTERIOR, "inner (MultiheadAttention)"),
        (lambda: nn.Sequential(nn.Conv1d(4, 4, 2)), NO_POSTERIOR, "inner.0 (Conv1d)"),
        (lambda: nn.Embedding(4, 4), NO_POSTERIOR, "inner (Embedding)"),
        (lambda: OwnConvolution(4, 4, 2), NO_POSTERIOR, "inner (OwnConvolution)"),
        (OwnParameter, NO_POSTERIOR, "inner (OwnParameter)"),
        (lambda: weight_norm(nn.Linear(4, 4)), NO_POSTERIOR, "inner (ParametrizedLinear)"),
        (tied, "mean_field_all has no posterior for parameters of two layers", "inner.1 (Linear)"),
        (
            lambda: nn.Linear(4, 4).requires_grad_(False),
            "mean_field_all needs a backbone that is trained",
            "inner (Linear)",
        ),
    ],
)
def test_unknown_layers_are_refused_by_name(module: Callable[[], nn.Module], what: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace_layers(nn.ModuleDict({"inner": module()}), PRIOR)
    assert str(caught.value) == f"{what} ({where}): {ALTERNATIVE}"


def test_known_layers_without_weights_to_learn_are_taken() -> None:
    layers = nn.Sequential(nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.Dropout(), nn.PixelShuffle(2), nn.InstanceNorm2d(4))
    before = [type(layer) for layer in layers]
    assert [type(layer) for layer in replace_layers(layers, PRIOR).children()] == before
