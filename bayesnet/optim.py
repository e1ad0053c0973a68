"""Two optimizers that together own every parameter once, their common schedule, and their state as plain tensors.

The backbone's optimizer is SGD, AdamW or bSAM with weight decay. The variational parameters have their own Adam with
its own learning rate, and are never decayed, since the KL is their prior. A posterior whose scales follow the
backbone's optimizer keeps the scale that it started with: a constant, not an inference.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from bayesnet.bsam import BSAM
from bayesnet.config import require
from bayesnet.errors import CheckpointError
from bayesnet.inference.base import Posterior
from bayesnet.types import JsonObject

PREFIX = "optimizer/"
NUMBER = ":number"
FUSED_DEVICES = ("cpu", "cuda")
ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1 / 25 / 1e4

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
"""Takes parameter groups, gives an optimizer of them."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizers and their schedule.

    Attributes:
        name: "sgd" (Nesterov momentum), "adamw" or "bsam" (Bayesian sharpness-aware, two passes a step), for all
            parameters that are not variational; "custom" is an optimizer given from Python.
        learning_rate: Its peak learning rate.
        momentum: Of SGD; beta1 of bSAM.
        weight_decay: On weights; not on biases and normalisation parameters, and never on variational parameters. For
            bSAM it is the prior's precision over N.
        rho: Size of bSAM's step uphill.
        beta2: Decay of bSAM's precision.
        damping: Added to bSAM's precision.
        schedule: Scales both optimizers' learning rates: "cosine" to zero over all epochs, "constant", "step" (times
            ``step_factor`` after every ``step_epochs``), or "one_cycle" (up from 1/25 and down to 1/250,000 of the peak
            by half cosines, Smith and Topin 2018, arXiv:1708.07120).
        warmup_epochs: Epochs of linear warm-up at the start; "one_cycle" has its own.
        step_epochs: Epochs between the steps of "step".
        step_factor: What each of them multiplies the rates by.
        peak_fraction: Share of the training after which "one_cycle" is at its peak.
        variational_learning_rate: Adam's peak learning rate on the variational parameters.
    """

    name: Literal["sgd", "adamw", "bsam", "custom"] = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rho: float = 0.05
    beta2: float = 0.999
    damping: float = 0.1
    schedule: Literal["cosine", "constant", "step", "one_cycle"] = "cosine"
    warmup_epochs: float = 1.0
    step_epochs: int = 10
    step_factor: float = 0.1
    peak_fraction: float = 0.3
    variational_learning_rate: float = 0.02

    def __post_init__(self) -> None:
        for name in ("learning_rate", "variational_learning_rate", "damping"):
            value = getattr(self, name)
            require(0 < value < math.inf, "must be positive and finite", where=f"optimizer.{name} = {value}")
        for name in ("momentum", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, "must be in [0, 1)", where=f"optimizer.{name} = {value}")
        require(0 <= self.rho < math.inf, "must not be negative", where=f"optimizer.rho = {self.rho}")
        require(0 <= self.weight_decay < math.inf, "must not be negative", where="optimizer.weight_decay")
        require(0 <= self.warmup_epochs < math.inf, "must not be negative", where="optimizer.warmup_epochs")
        require(self.step_epochs >= 1, "must be at least 1", where=f"optimizer.step_epochs = {self.step_epochs}")
        for name in ("step_factor", "peak_fraction"):
            value = getattr(self, name)
            require(0 < value < 1, "must be between 0 and 1", where=f"optimizer.{name} = {value}")


def build_optimizers(
    posterior: Posterior, config: OptimizerConfig, factory: OptimizerFactory | None = None, *, num_examples: int = 1
) -> tuple[Optimizer, ...]:
    """Return the optimizers that together own every trained parameter of the posterior once.

    Args:
        posterior: Its ``variational_parameters`` go to Adam, the rest to ``config.name``; frozen ones to none.
        config: Names, rates, weight decay.
        factory: Makes the optimizer of the rest, in place of ``config.name``, from parameter groups with "params" and
            "weight_decay". Its learning rates are its own; the schedule scales them.
        num_examples: N, for the noise of bSAM: far too large without it.

    Raises:
        ConfigError: The factory gives no optimizer, one of other parameters, or one that needs a closure; or the
            configuration names an optimizer of the caller's own and there is no factory.
    """
    what = "the optimizer is the caller's own"
    given = config.name != "custom" or factory is not None
    require(given, what, where="optimizer.name = custom", hint="give it again: BayesNetClassifier(optimizer=...)")
    variational = list(posterior.variational_parameters())
    taken = {id(parameter) for parameter in variational}
    others = [p for p in posterior.parameters() if p.requires_grad and id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # Fused steps are one operator per group and read no step count back to the host.
    fused = next(posterior.parameters()).device.type in FUSED_DEVICES
    optimizers: list[Optimizer] = []
    if groups and factory is not None:
        optimizers.append(_checked(factory(groups), others))
    elif groups:
        optimizers.append(_named(groups, config, num_examples, fused=fused))
    if variational:
        optimizers.append(Adam(variational, lr=config.variational_learning_rate, fused=fused))
    return tuple(optimizers)


def _named(groups: list[dict[str, Any]], config: OptimizerConfig, num_examples: int, *, fused: bool) -> Optimizer:
    """Return the optimizer that ``config.name`` names."""
    rate, momentum = config.learning_rate, config.momentum
    if config.name == "sgd":
        return SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0, fused=fused)
    if config.name == "adamw":
        return AdamW(groups, lr=rate, fused=fused)
    settings = {"rho": config.rho, "beta1": momentum, "beta2": config.beta2, "damping": config.damping}
    return BSAM(groups, lr=rate, num_examples=num_examples, **settings)


def _checked(optimizer: object, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Return what a user's factory gave, made sure to own these parameters and no others."""
    given = isinstance(optimizer, Optimizer)
    require(given, "the optimizer factory must give a torch.optim.Optimizer", where=type(optimizer).__name__)
    assert isinstance(optimizer, Optimizer)
    owned = sorted(id(p) for group in optimizer.param_groups for p in group["params"])
    what = "the optimizer factory must own the parameters that it was given, each once"
    require(owned == sorted(map(id, parameters)), what, where=type(optimizer).__name__)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is inspect.Parameter.empty
    require(not needs_closure, "the optimizer needs a closure, which training has not", where=type(optimizer).__name__)
    group_entries([optimizer])  # raises for what a checkpoint could not hold
    return optimizer


def schedule_factor(config: OptimizerConfig, step: int, num_steps: int, steps_per_epoch: int) -> float:
    """Return the factor on the peak learning rates at a step counted from 0.

    Example:
        >>> config = OptimizerConfig(warmup_epochs=1)
        >>> [round(schedule_factor(config, step, 40, 10), 2) for step in (0, 9, 25, 39)]
        [0.1, 1.0, 0.5, 0.0]
        >>> config = OptimizerConfig(schedule="step", step_epochs=2, warmup_epochs=0)
        >>> [round(schedule_factor(config, step, 40, 10), 3) for step in (0, 19, 20, 39)]
        [1.0, 1.0, 0.1, 0.1]
    """
    if config.schedule == "one_cycle":
        return _one_cycle(step, num_steps, config.peak_fraction)
    warmup_steps = config.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1) if warmup_steps < 1 else min(1.0, (step + 1) / warmup_steps)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        return config.step_factor ** (step // (config.step_epochs * steps_per_epoch))
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1.0, num_steps - warmup_steps)))


def _one_cycle(step: int, num_steps: int, peak_fraction: float) -> float:
    """Return the factor of the one-cycle schedule: half a cosine up to the peak, another one down."""
    peak, last = peak_fraction * num_steps - 1, num_steps - 1
    if step <= peak:
        low, share = ONE_CYCLE_START, step / peak if peak > 0 else 1.0
        return low + (1 - low) * (1 - math.cos(math.pi * share)) / 2
    share = (step - peak) / max(1.0, last - peak)
    return ONE_CYCLE_END + (1 - ONE_CYCLE_END) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def optimizer_tensors(module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Return the optimizers' state under ``optimizer/PARAMETER/KEY``: plain tensors, no pickled object.

    Raises:
        ConfigError: A user's optimizer keeps state that is neither a tensor nor a number: it could not be resumed.
    """
    tensors: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for name, parameter in _owned(module, optimizer):
            for key, value in optimizer.state[parameter].items():
                kind = f"{type(optimizer).__name__}, {key}: {type(value).__name__}"
                what = "the optimizer keeps state that a checkpoint cannot hold"
                savable = value is None or isinstance(value, Tensor | float | int)
                require(savable, what, where=kind, hint="use one whose state is tensors and numbers")
                if isinstance(value, Tensor):
                    tensors[f"{PREFIX}{name}/{key}"] = value
                elif value is not None:
                    dtype = torch.int64 if isinstance(value, int) else torch.float64
                    tensors[f"{PREFIX}{name}/{key}{NUMBER}"] = torch.tensor(value, dtype=dtype)
    return tensors


def group_entries(optimizers: Sequence[Optimizer]) -> JsonObject:
    """Return what each optimizer keeps in its parameter groups, but for parameters and rates, which the schedule sets.

    Returns:
        ``classes``, the optimizers' names, and ``groups``: per optimizer and group, entry to plain value.

    Raises:
        ConfigError: An entry is no number, text or list of these: it could not be resumed.
    """
    groups: list[list[JsonObject]] = []
    for optimizer in optimizers:
        groups.append([])
        for group in optimizer.param_groups:
            entries = {key: value for key, value in group.items() if key not in ("params", "lr")}
            for key, value in entries.items():
                items = value if isinstance(value, tuple | list) else [value]
                plain = all(item is None or isinstance(item, bool | int | float | str) for item in items)
                where = f"{type(optimizer).__name__}, {key}: {type(value).__name__}"
                what = "the optimizer keeps an entry that a checkpoint cannot hold"
                require(plain, what, where=where, hint="use one whose groups hold numbers and texts")
            groups[-1].append({k: list(v) if isinstance(v, tuple) else v for k, v in entries.items()})
    return {"classes": [type(optimizer).__name__ for optimizer in optimizers], "groups": groups}


def restore_groups(optimizers: Sequence[Optimizer], entries: object) -> None:
    """Put back what `group_entries` gave.

    Raises:
        CheckpointError: The checkpoint was made by other optimizers.
    """
    try:
        assert isinstance(entries, dict)
        classes, saved = list(entries["classes"]), entries["groups"]
        found = [type(optimizer).__name__ for optimizer in optimizers]
        if classes != found:
            hint = f"give {', '.join(classes)} again"
            raise CheckpointError("the checkpoint was made by another optimizer", where=", ".join(found), hint=hint)
        for optimizer, groups in zip(optimizers, saved, strict=True):
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                for key, value in values.items():
                    group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError("malformed optimizer entries in the checkpoint", hint=str(error) or None) from error


def restore_optimizers(module: nn.Module, optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Put back the state that `optimizer_tensors` gave; the optimizers place it on their parameters' devices.

    Raises:
        CheckpointError: A tensor belongs to no parameter, or has the wrong shape.
    """
    saved: dict[str, dict[str, Tensor | float]] = {}
    for full_name, tensor in tensors.items():
        if full_name.startswith(PREFIX):
            name, _, key = full_name.removeprefix(PREFIX).rpartition("/")
            # Optimizers work in place, so they get a copy. A Python number comes back as one.
            value = tensor.item() if key.endswith(NUMBER) else tensor.clone()
            saved.setdefault(name, {})[key.removesuffix(NUMBER)] = value
    for optimizer in optimizers:
        state = {}
        for index, (name, parameter) in enumerate(_owned(module, optimizer)):
            values = saved.pop(name, {})
            tensors_of = [value for value in values.values() if isinstance(value, Tensor)]
            ours = isinstance(optimizer, SGD | Adam | BSAM)  # a user's state may have any shape
            if ours and any(t.dim() and t.shape != parameter.shape for t in tensors_of):
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
