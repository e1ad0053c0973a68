"""Linear layers and convolutions with an independent Gaussian on every weight, and how they take others' places."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bayesnet import elbo
from bayesnet.config import require

ALTERNATIVE = "use the family mean_field, a posterior over the last layer"
"""What to do where a network cannot have such layers."""

NORMALISATION = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.RMSNorm,
)


class LayerPrior(NamedTuple):
    """The prior of a network's layers, and where their posteriors start.

    Attributes:
        scale: Prior standard deviation of weights, before scaling.
        bias_scale: Prior standard deviation of biases.
        by_fan_in: Whether a layer's weights have ``scale`` / sqrt(fan-in).
        initial_scale: Posterior standard deviation at the start, as a fraction of the prior's.
    """

    scale: float = 1.0
    bias_scale: float = 1.0
    by_fan_in: bool = True
    initial_scale: float = 0.2


class GaussianLayer(nn.Module):
    """A linear layer or convolution whose weight and bias are independent Gaussians.

    Parameters are in units of the prior's standard deviation, so that one learning rate suits every layer: the weight
    is ``weight_scale * (weight_mean + exp(weight_log_scale) * e)``, and the bias likewise.

    Args:
        layer: What it stands for; its weights are the initial means.
        prior: Of its weight and bias.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, prior: LayerPrior) -> None:
        super().__init__()
        fan_in = layer.weight[0].numel()
        self.prior_scales = {"weight": prior.scale / (fan_in**0.5 if prior.by_fan_in else 1.0)}
        if layer.bias is not None:
            self.prior_scales["bias"] = prior.bias_scale
        for name, scale in self.prior_scales.items():
            mean = layer.get_parameter(name).detach() / scale
            self.register_parameter(f"{name}_mean", nn.Parameter(mean))
            log_scale = torch.full_like(mean, math.log(prior.initial_scale))
            self.register_parameter(f"{name}_log_scale", nn.Parameter(log_scale))
        self.convolution = _Convolution(layer) if isinstance(layer, nn.Conv2d) else None
        self.in_use: dict[str, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs of the weight that is in use, or one draw of the outputs of each input by itself."""
        if self.in_use is not None:
            return self.affine(x, self.in_use)
        mean, variance = self.output_moments(x)
        return torch.addcmul(mean, variance.sqrt(), elbo.standard_normal(mean))

    def output_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means and variances of the outputs, each over the posterior of the weight."""
        variances = {name: self.scale(name).square() for name in self.prior_scales}
        # A floor below rounding: the square root of an exact zero, as of a black patch, has no finite gradient.
        return self.affine(x, self.means()), self.affine(x.square(), variances).clamp_min(1e-16)

    def affine(self, x: Tensor, values: dict[str, Tensor]) -> Tensor:
        """Return the layer's outputs for some value of its weight and bias."""
        if self.convolution is None:
            return functional.linear(x, values["weight"], values.get("bias"))
        return self.convolution(x, values["weight"], values.get("bias"))

    def means(self) -> dict[str, Tensor]:
        """Return the posterior means of weight and bias."""
        return {name: scale * self.get_parameter(f"{name}_mean") for name, scale in self.prior_scales.items()}

    def scale(self, name: str) -> Tensor:
        """Return the posterior standard deviations of "weight" or "bias"."""
        return self.prior_scales[name] * self.get_parameter(f"{name}_log_scale").exp()

    def draw(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return one draw of weight and bias, from torch's random state or a generator of the parameters' device."""
        values = {}
        for name, mean in self.means().items():
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
            values[name] = torch.addcmul(mean, self.scale(name), noise)
        return values

    def kl(self) -> Tensor:
        """Return the divergence from the prior in closed form, nats."""
        terms = []
        for name in self.prior_scales:
            mean, log_scale = self.get_parameter(f"{name}_mean"), self.get_parameter(f"{name}_log_scale")
            terms.append(0.5 * ((2 * log_scale).exp() + mean.square() - 1 - 2 * log_scale).sum())
        return torch.stack(terms).sum()


class _Convolution:
    """What a convolution does with a weight: stride, padding and the like."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        self.padding: str | tuple[int, ...] = layer.padding
        self.padding_mode, self.margins = layer.padding_mode, list(layer._reversed_padding_repeated_twice)

    def __call__(self, x_BCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x_BCHW, padding = functional.pad(x_BCHW, self.margins, mode=self.padding_mode), (0,)
        return functional.conv2d(x_BCHW, weight, bias, self.stride, padding, self.dilation, self.groups)


def replace_layers(network: nn.Module, prior: LayerPrior) -> nn.Module:
    """Return the network with its linear layers and convolutions replaced by Gaussian ones, in place.

    A layer that is used in several places stays one layer. The names of modules stay; a layer's ``weight`` becomes
    ``weight_mean`` and ``weight_log_scale``.

    Raises:
        ConfigError: It has parameters that are neither those of such layers nor of normalisation, or frozen ones.
    """
    new: dict[nn.Module | None, GaussianLayer] = {}
    seen: set[int] = set()
    for name, module in network.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or isinstance(module, NORMALISATION):
            continue
        where = f"{name or 'the backbone itself'} ({type(module).__name__})"
        # Subclasses may do something else with their weights.
        plain = type(module) in (nn.Linear, nn.Conv2d) and own.keys() <= {"weight", "bias"}
        require(plain, "mean_field_all has no posterior for this layer's parameters", where=where, hint=ALTERNATIVE)
        trained = all(parameter.requires_grad for parameter in own.values())
        require(trained, "mean_field_all needs a backbone that is trained", where=where, hint=ALTERNATIVE)
        alone = seen.isdisjoint(map(id, own.values()))
        require(alone, "mean_field_all has no posterior for parameters of two layers", where=where, hint=ALTERNATIVE)
        seen.update(map(id, own.values()))
        assert isinstance(module, nn.Linear | nn.Conv2d)
        new[module] = GaussianLayer(module, prior)
    if network in new:
        return new[network]
    for parent in list(network.modules()):
        for key, child in list(parent._modules.items()):
            if child in new:
                parent.register_module(key, new[child])
    return network
