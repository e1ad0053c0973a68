"""Optimizers: every parameter has exactly one, variational ones are never decayed, and their state comes back."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import nn

from bayesnet.backbones import BackboneConfig, build_backbone
from bayesnet.errors import CheckpointError, ConfigError
from bayesnet.inference import build_inference_config, build_posterior
from bayesnet.inference.base import Parts, Posterior
from bayesnet.optim import OptimizerConfig, build_optimizers, optimizer_tensors, restore_optimizers, schedule_factor

Name = Literal["sgd", "adamw", "bsam"]
NAMES: tuple[Name, ...] = ("sgd", "adamw", "bsam")


def make_posterior(family: str = "mean_field", width: int = 2) -> Posterior:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(width=width), channels=1, height=8, width=8)
    return build_posterior(Parts(backbone, 3, 100), build_inference_config({"family": family}))


def take_steps(posterior: Posterior, config: OptimizerConfig, count: int) -> tuple[torch.optim.Optimizer, ...]:
    optimizers = build_optimizers(posterior, config)
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in posterior.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    return optimizers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["deterministic", "mean_field"])
def test_every_parameter_has_one_optimizer(family: str, name: Name) -> None:
    posterior = make_posterior(family)
    optimizers = build_optimizers(posterior, OptimizerConfig(name=name))
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(parameter) for parameter in posterior.parameters())
    assert len(optimizers) == (1 if family == "deterministic" else 2)
    assert [group["lr"] for group in optimizers[0].param_groups] == [0.05, 0.05]


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_touches_weights_alone(name: Name) -> None:
    """Without gradients, weights shrink; biases, normalisation and variational parameters keep every bit."""
    posterior = make_posterior()
    before = {key: parameter.detach().clone() for key, parameter in posterior.named_parameters()}
    optimizers = build_optimizers(posterior, OptimizerConfig(name=name, weight_decay=0.1))
    for parameter in posterior.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    shrunk = {key for key, parameter in posterior.named_parameters() if not torch.equal(parameter, before[key])}
    assert shrunk == {key for key in before if key.startswith("model.") and before[key].dim() > 1}
    assert all(
        float(parameter.detach().norm()) < float(before[key].norm())
        for key, parameter in posterior.named_parameters()
        if key in shrunk
    )


def test_the_variational_parameters_have_their_own_rate() -> None:
    posterior = make_posterior()
    _, variational = build_optimizers(posterior, OptimizerConfig(variational_learning_rate=0.5))
    assert isinstance(variational, torch.optim.Adam)
    assert not isinstance(variational, torch.optim.AdamW)
    assert [(group["lr"], group["weight_decay"]) for group in variational.param_groups] == [(0.5, 0)]
    assert {id(p) for p in variational.param_groups[0]["params"]} == {id(p) for p in posterior.variational_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_the_state_comes_back(name: Name) -> None:
    config = OptimizerConfig(name=name)
    straight = make_posterior()
    take_steps(straight, config, 5)

    halted = make_posterior()
    saved = optimizer_tensors(halted, take_steps(halted, config, 3))
    copies = {key: tensor.clone() for key, tensor in saved.items()}
    resumed = make_posterior()
    resumed.load_state_dict(halted.state_dict())
    optimizers = build_optimizers(resumed, config)
    restore_optimizers(resumed, optimizers, {**saved, "model/other": torch.ones(1)})
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        for parameter in resumed.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers if step >= 3 else ():
            optimizer.step()
    for key, parameter in straight.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(key)), key
    assert all(torch.equal(tensor, copies[key]) for key, tensor in saved.items())  # what was restored from is untouched


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_does_not_fit_is_refused(name: Name) -> None:
    posterior = make_posterior()
    config = OptimizerConfig(name=name)
    saved = optimizer_tensors(posterior, take_steps(posterior, config, 1))
    wide = make_posterior(width=4)
    with pytest.raises(CheckpointError, match="optimizer state does not fit the model"):
        restore_optimizers(wide, build_optimizers(wide, config), saved)
    twin = make_posterior("deterministic")
    with pytest.raises(CheckpointError, match="optimizer state of an unknown parameter"):
        restore_optimizers(twin, build_optimizers(twin, config), saved)


def test_bsam_has_the_settings_and_the_number_of_examples() -> None:
    config = OptimizerConfig(name="bsam", learning_rate=0.3, momentum=0.8, rho=0.2, beta2=0.99, damping=0.4)
    bsam, adam = build_optimizers(make_posterior(), config, num_examples=100)
    assert isinstance(adam, torch.optim.Adam)
    expected = {"lr": 0.3, "num_examples": 100, "rho": 0.2, "beta1": 0.8, "beta2": 0.99, "damping": 0.4}
    for group, decay in zip(bsam.param_groups, (5e-4, 0.0), strict=True):
        assert {key: value for key, value in group.items() if key != "params"} == expected | {"weight_decay": decay}


def test_only_variational_parameters_are_no_problem() -> None:
    class Head(nn.Module):
        """A posterior without a backbone to train."""

        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def variational_parameters(self) -> list[nn.Parameter]:
            """Return all there is."""
            return [self.loc]

    [optimizer] = build_optimizers(Head(), OptimizerConfig())  # type: ignore[arg-type]
    assert isinstance(optimizer, torch.optim.Adam)


def test_the_schedule() -> None:
    config = OptimizerConfig(warmup_epochs=2)
    factors = [schedule_factor(config, step, 100, 10) for step in range(100)]
    assert factors[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert factors[20:] == pytest.approx([(1 + math.cos(math.pi * step / 80)) / 2 for step in range(80)])
    assert all(0 < factor <= 1 for factor in factors)
    constant = OptimizerConfig(schedule="constant", warmup_epochs=0)
    assert {schedule_factor(constant, step, 100, 10) for step in range(100)} == {1.0}


@pytest.mark.parametrize("warmup_epochs", [0.0, 0.05, 0.25, 3.0, 50.0])
def test_no_warm_up_exceeds_the_peak_or_stops_the_training(warmup_epochs: float) -> None:
    """Shorter than a step, and longer than the whole training."""
    config = OptimizerConfig(warmup_epochs=warmup_epochs)
    factors = [schedule_factor(config, step, 30, 10) for step in range(30)]
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("learning_rate", 0.0, "must be positive and finite (optimizer.learning_rate = 0.0)"),
        ("learning_rate", math.inf, "must be positive and finite (optimizer.learning_rate = inf)"),
        ("learning_rate", math.nan, "must be positive and finite (optimizer.learning_rate = nan)"),
        ("variational_learning_rate", -1.0, "must be positive and finite (optimizer.variational_learning_rate = -1.0)"),
        ("momentum", 1.0, "must be in [0, 1) (optimizer.momentum = 1.0)"),
        ("beta2", 1.0, "must be in [0, 1) (optimizer.beta2 = 1.0)"),
        ("rho", -0.1, "must not be negative (optimizer.rho = -0.1)"),
        ("damping", 0.0, "must be positive and finite (optimizer.damping = 0.0)"),
        ("weight_decay", -0.1, "must not be negative (optimizer.weight_decay)"),
        ("warmup_epochs", math.nan, "must not be negative (optimizer.warmup_epochs)"),
    ],
)
def test_settings_out_of_range(key: str, value: float, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OptimizerConfig(**{key: value})  # type: ignore[arg-type]
    assert str(caught.value) == what


@pytest.mark.parametrize("peak_fraction", [0.1, 0.3, 0.6])
def test_one_cycle_is_torchs(peak_fraction: float) -> None:
    num_steps = 50
    parameter = nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        reference, max_lr=1.0, total_steps=num_steps, pct_start=peak_fraction, cycle_momentum=False
    )
    config = OptimizerConfig(schedule="one_cycle", peak_fraction=peak_fraction)
    for step in range(num_steps):
        expected = reference.param_groups[0]["lr"]
        assert schedule_factor(config, step, num_steps, 10) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        reference.step()
        if step + 1 < num_steps:
            schedule.step()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_one_cycle_of_few_steps_stays_in_range(num_steps: int) -> None:
    config = OptimizerConfig(schedule="one_cycle")
    factors = [schedule_factor(config, step, num_steps, 1) for step in range(num_steps)]
    assert all(0 < factor <= 1 for factor in factors)


def test_step_schedule_is_torchs() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(reference, step_size=3, gamma=0.2)
    config = OptimizerConfig(schedule="step", step_epochs=3, step_factor=0.2, warmup_epochs=0)
    for epoch in range(8):
        for batch in range(4):
            factor = schedule_factor(config, 4 * epoch + batch, 32, 4)
            assert factor == pytest.approx(reference.param_groups[0]["lr"])
        reference.step()
        schedule.step()


def test_frozen_parameters_have_no_optimizer() -> None:
    posterior = make_posterior("deterministic")
    posterior.backbone.requires_grad_(False)
    [optimizer] = build_optimizers(posterior, OptimizerConfig())
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in posterior.head.parameters()}  # type: ignore[union-attr]
