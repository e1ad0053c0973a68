"""Two optimizers that together own every parameter once, their common schedule, and their state as plain tensors.

The backbone's optimizer is SGD or AdamW with weight decay. The variational parameters have their own Adam with its own
learning rate, and are never decayed, since the KL is their prior. A posterior whose scales follow the backbone's
optimizer keeps the scale that it started with: a constant, not an inference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from bayesnet.config import require
from bayesnet.errors import CheckpointError
from bayesnet.inference.base import Posterior

PREFIX = "optimizer/"
FUSED_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizers and their schedule.

    Attributes:
        name: "sgd" (Nesterov momentum) or "adamw", for all parameters that are not variational.
        learning_rate: Its peak learning rate.
        momentum: Of SGD.
        weight_decay: On weights; not on biases and normalisation parameters, and never on variational parameters.
        schedule: "cosine" to zero over all epochs, or "constant"; it scales both optimizers' learning rates.
        warmup_epochs: Epochs of linear warm-up at the start.
        variational_learning_rate: Adam's peak learning rate on the variational parameters.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 1.0
    variational_learning_rate: float = 0.02

    def __post_init__(self) -> None:
        for name in ("learning_rate", "variational_learning_rate"):
            value = getattr(self, name)
            require(0 < value < math.inf, "must be positive and finite", where=f"optimizer.{name} = {value}")
        require(0 <= self.momentum < 1, "must be in [0, 1)", where=f"optimizer.momentum = {self.momentum}")
        require(0 <= self.weight_decay < math.inf, "must not be negative", where="optimizer.weight_decay")
        require(0 <= self.warmup_epochs < math.inf, "must not be negative", where="optimizer.warmup_epochs")


def build_optimizers(posterior: Posterior, config: OptimizerConfig) -> tuple[Optimizer, ...]:
    """Return the optimizers that together own every parameter of the posterior once.

    Args:
        posterior: Its ``variational_parameters`` go to Adam, the rest to ``config.name``.
        config: Names, rates, weight decay.
    """
    variational = list(posterior.variational_parameters())
    taken = {id(parameter) for parameter in variational}
    others = [parameter for parameter in posterior.parameters() if id(parameter) not in taken]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # Fused steps are one operator per group and read no step count back to the host.
    fused = next(posterior.parameters()).device.type in FUSED_DEVICES
    optimizers: list[Optimizer] = []
    if groups and config.name == "sgd":
        momentum = config.momentum
        optimizers.append(SGD(groups, lr=config.learning_rate, momentum=momentum, nesterov=momentum > 0, fused=fused))
    elif groups:
        optimizers.append(AdamW(groups, lr=config.learning_rate, fused=fused))
    if variational:
        optimizers.append(Adam(variational, lr=config.variational_learning_rate, fused=fused))
    return tuple(optimizers)


def schedule_factor(config: OptimizerConfig, step: int, num_steps: int, steps_per_epoch: int) -> float:
    """Return the factor on the peak learning rates at a step counted from 0.

    Example:
        >>> config = OptimizerConfig(warmup_epochs=1)
        >>> [round(schedule_factor(config, step, 40, 10), 2) for step in (0, 9, 25, 39)]
        [0.1, 1.0, 0.5, 0.0]
    """
    warmup_steps = config.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1) if warmup_steps < 1 else min(1.0, (step + 1) / warmup_steps)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1.0, num_steps - warmup_steps)))


def optimizer_tensors(module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Return the optimizers' state under ``optimizer/PARAMETER/KEY``: plain tensors, no pickled object."""
    return {
        f"{PREFIX}{name}/{key}": value
        for optimizer in optimizers
        for name, parameter in _owned(module, optimizer)
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def restore_optimizers(module: nn.Module, optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Put back the state that `optimizer_tensors` gave; the optimizers place it on their parameters' devices.

    Raises:
        CheckpointError: A tensor belongs to no parameter, or has the wrong shape.
    """
    saved: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        if full_name.startswith(PREFIX):
            name, _, key = full_name.removeprefix(PREFIX).rpartition("/")
            saved.setdefault(name, {})[key] = tensor.clone()  # optimizers work in place
    for optimizer in optimizers:
        state = {}
        for index, (name, parameter) in enumerate(_owned(module, optimizer)):
            values = saved.pop(name, {})
            if any(tensor.dim() and tensor.shape != parameter.shape for tensor in values.values()):
                raise CheckpointError("optimizer state does not fit the model", where=name)
            if values:
                state[index] = values
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if saved:
        raise CheckpointError("optimizer state of an unknown parameter", where=next(iter(saved)))


def _owned(module: nn.Module, optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Return the optimizer's parameters with their names in the module, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [(names[id(parameter)], parameter) for group in optimizer.param_groups for parameter in group["params"]]
