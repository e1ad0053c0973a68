r"""bSAM, sharpness-aware training as variational inference: an Adam-like optimizer with a Gaussian over its weights.

    q(w) = Normal(m, 1 / (N s)),    prior precision N delta,    s starts at 1; of a batch, with e standard normal noise:
    g     = gradient of the mean loss at m + e / sqrt(N s)
    g'    = gradient of the mean loss at m + rho g / s
    s     = beta2 s + (1 - beta2) (sqrt(s) |g| + delta + damping)
    v     = beta1 v + (1 - beta1) (g' + delta m)
    m     = m - learning_rate v / s

Predictions use the mean m. Assumptions: weights independent. sqrt(s) |g| stands for the curvature as it does in Adam,
and is no estimate of it: on a loss of curvature h, all examples in each batch, s ends at sqrt(2 / (pi N)) h + delta +
damping on average, where the exact posterior has h + delta. So 1 / (N s) is the scale of the optimizer's noise, not a
posterior to report. It is exact, without damping, for weights that the loss does not depend on: the prior's variance.
Cost: two passes per step, two tensors per weight.
Reference: Moellenhoff and Khan 2023, "SAM as an optimal relaxation of Bayes", arXiv:2210.01620, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

PRECISION, MOMENTUM = "precision", "momentum"


class BSAM(Optimizer):
    """The optimizer; a step is `add_noise`, a gradient, `ascend` from the mean, a gradient, and `step` from the mean.

    `bayesnet.step.take_step` does so. Nothing in it waits for the device.

    Args:
        params: Parameter groups; their ``weight_decay`` is delta, the prior's precision over N.
        lr: Learning rate.
        num_examples: N.
        rho: Size of the step uphill.
        beta1: Decay of the mean gradient.
        beta2: Decay of the precision.
        damping: Added to the precision.
        weight_decay: delta of groups that have none of their own.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = BSAM([{"params": [weight]}], lr=0.5, num_examples=100)
        >>> weight.grad = torch.tensor([2.0])
        >>> optimizer.ascend()
        >>> weight
        Parameter containing:
        tensor([1.1000], requires_grad=True)
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        *,
        lr: float,
        num_examples: int,
        rho: float = 0.05,
        beta1: float = 0.9,
        beta2: float = 0.999,
        damping: float = 0.1,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "num_examples": num_examples, "rho": rho, "beta1": beta1, "beta2": beta2}
        super().__init__(params, defaults | {"damping": damping, "weight_decay": weight_decay})

    def parameters(self) -> list[Tensor]:
        """Return all parameters that it owns."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def add_noise(self) -> None:
        """Move every parameter from its mean to a draw of its Gaussian, from torch's random state."""
        for group in self.param_groups:
            parameters = group["params"]
            precisions = [self._state_of(parameter)[PRECISION] for parameter in parameters]
            noise = [torch.randn_like(parameter) for parameter in parameters]
            roots = torch._foreach_sqrt(torch._foreach_mul(precisions, group["num_examples"]))
            torch._foreach_addcdiv_(parameters, noise, list(roots))

    @torch.no_grad()
    def ascend(self) -> None:
        """Move from the mean uphill along the gradient that the parameters hold, and learn the precision from it."""
        for group, (parameters, gradients, precisions, _) in self._with_gradients():
            torch._foreach_addcdiv_(parameters, gradients, precisions, value=group["rho"])
            targets = list(torch._foreach_mul(torch._foreach_sqrt(precisions), torch._foreach_abs(gradients)))
            torch._foreach_add_(targets, group["weight_decay"] + group["damping"])
            torch._foreach_lerp_(precisions, targets, 1 - group["beta2"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the mean along the gradient that the parameters hold."""
        for group, (parameters, gradients, precisions, momenta) in self._with_gradients():
            directions = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
            torch._foreach_lerp_(momenta, directions, 1 - group["beta1"])
            torch._foreach_addcdiv_(parameters, momenta, precisions, value=-group["lr"])

    def _with_gradients(self) -> Iterator[tuple[dict[str, Any], _Lists]]:
        """Yield each group, and what belongs to those of its parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                gradients = [parameter.grad for parameter in parameters]
                states = [self._state_of(parameter) for parameter in parameters]
                precisions, momenta = ([state[key] for state in states] for key in (PRECISION, MOMENTUM))
                yield group, _Lists(parameters, gradients, precisions, momenta)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state[PRECISION] = torch.ones_like(parameter, memory_format=torch.preserve_format)
            state[MOMENTUM] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


class _Lists(NamedTuple):
    """Tensors of equal lengths, one entry per parameter."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    precisions: list[Tensor]
    momenta: list[Tensor]
