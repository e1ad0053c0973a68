"""A step with bSAM: what both passes share and move, whose loss is reported, what comes back; no host sync, no SAM."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bayesnet.backbones import BackboneConfig, build_backbone
from bayesnet.batches import TrainingData
from bayesnet.bsam import BSAM, MOMENTUM, PRECISION
from bayesnet.data import ArrayExamples, Preprocessing
from bayesnet.data.augment import Augmentation
from bayesnet.engine import Engine
from bayesnet.errors import ConfigError
from bayesnet.inference import FAMILIES, build_inference_config, build_posterior
from bayesnet.inference.base import Parts, Posterior
from bayesnet.optim import OptimizerConfig, build_optimizers
from bayesnet.progress import TrainingConfig
from bayesnet.step import StepPlan, take_step
from bayesnet.testing import OperatorCounter
from bayesnet.training import fit
from bayesnet.types import Loss

NUM_CLASSES, NUM_EXAMPLES = 3, 50


class Mixed(Posterior):
    """A backbone weight under batch norm and dropout, and a mean and a spread of its own; remembers every call."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.backbone = nn.Linear(4, 4, bias=False)
        self.norm, self.dropout = nn.BatchNorm1d(4, affine=False), nn.Dropout(0.5)
        self.mean = nn.Parameter(torch.randn(NUM_CLASSES, 4, generator=generator))
        self.spread = nn.Parameter(torch.full((NUM_CLASSES, 4), -1.0))
        self.calls: list[dict[str, Tensor]] = []

    def loss(self, x_BCHW: Tensor, y: Tensor) -> Loss:
        features_BD = self.dropout(self.norm(self.backbone(x_BCHW.flatten(1))))
        noise_KD = torch.randn_like(self.mean)
        fit = nn.functional.cross_entropy(features_BD @ (self.mean + self.spread.exp() * noise_KD).T, y)
        kl = self.mean.square().sum() - self.spread.sum()
        parameters = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.calls.append(parameters | {"noise": noise_KD, "dropped": (features_BD == 0).detach()})
        return Loss(fit + kl / NUM_EXAMPLES, fit, kl, fit)

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        raise NotImplementedError

    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        raise NotImplementedError

    def variational_parameters(self) -> Sequence[nn.Parameter]:
        return (self.mean, self.spread)

    def scale_parameters(self) -> Sequence[nn.Parameter]:
        return (self.spread,)


def mixed(num_images: int = 12) -> tuple[Mixed, tuple[torch.optim.Optimizer, ...], Tensor, Tensor]:
    torch.manual_seed(0)
    posterior = Mixed()
    config = OptimizerConfig(name="bsam", learning_rate=0.1, rho=0.5)
    optimizers = build_optimizers(posterior, config, num_examples=NUM_EXAMPLES)
    return posterior, optimizers, torch.randn(num_images, 1, 2, 2), torch.arange(num_images) % NUM_CLASSES


@pytest.mark.parametrize("accumulation", [1, 3])
def test_both_passes_share_dropout_and_noise_and_move_the_backbone_alone(accumulation: int) -> None:
    posterior, optimizers, x, y = mixed()
    before = {name: p.detach().clone() for name, p in posterior.named_parameters()}
    take_step(posterior, optimizers, x, y, plan=StepPlan(accumulation))
    first, second = posterior.calls[:accumulation], posterior.calls[accumulation:]
    assert len(second) == accumulation
    for drawn, uphill in zip(first, second, strict=True):
        assert torch.equal(drawn["noise"], uphill["noise"])
        assert torch.equal(drawn["dropped"], uphill["dropped"])
        for name in ("mean", "spread"):
            assert torch.equal(drawn[name], before[name])
            assert torch.equal(uphill[name], before[name])
        for call in (drawn, uphill):
            assert not torch.equal(call["backbone.weight"], before["backbone.weight"])
    assert all(torch.equal(call["backbone.weight"], first[0]["backbone.weight"]) for call in first)
    # Both optimizers took a step, and the noise stands where the draw of the weights and one pass leave it.
    assert all(not torch.equal(p, before[name]) for name, p in posterior.named_parameters())
    after = torch.get_rng_state()
    again, _, x, y = mixed()
    torch.randn(4, 4)
    for part in x.tensor_split(accumulation):
        again.loss(part, torch.zeros(len(part), dtype=torch.int64))
    assert torch.equal(after, torch.get_rng_state())


def test_the_loss_and_the_running_statistics_are_those_of_the_second_pass() -> None:
    posterior, optimizers, x, y = mixed()
    loss = take_step(posterior, optimizers, x, y)
    seen = posterior.calls[1]
    features_BD = x.flatten(1) @ seen["backbone.weight"].T
    assert torch.allclose(posterior.norm.running_mean, 0.1 * features_BD.mean(0), atol=1e-6)  # type: ignore[arg-type]
    assert int(posterior.norm.num_batches_tracked) == 1  # type: ignore[arg-type]
    scaled_BD = nn.functional.batch_norm(features_BD, None, None, training=True).masked_fill(seen["dropped"], 0) * 2
    weight_KD = seen["mean"] + seen["spread"].exp() * seen["noise"]
    assert loss.nll.item() == pytest.approx(nn.functional.cross_entropy(scaled_BD @ weight_KD.T, y).item(), rel=1e-5)


@pytest.mark.parametrize("failing", [0, 1])
def test_the_means_come_back_when_a_pass_fails(failing: int) -> None:
    posterior, optimizers, x, y = mixed()
    before = {name: p.detach().clone() for name, p in posterior.named_parameters()}
    loss, fails = posterior.loss, iter([failing == 0, True])

    def broken(x_BCHW: Tensor, y: Tensor) -> Loss:
        if next(fails):
            raise MemoryError
        return loss(x_BCHW, y)

    posterior.loss = broken  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        take_step(posterior, optimizers, x, y)
    assert all(torch.equal(p, before[name]) for name, p in posterior.named_parameters())


def test_both_gradients_are_clipped() -> None:
    """From s = 1 the precision moves to 0.999 + 0.001 (|g| + 5e-4 + 0.1), the momentum to 0.1 (g + 5e-4 w)."""
    posterior, optimizers, x, y = mixed()
    weight = posterior.backbone.weight
    decay_norm = 5e-4 * weight.detach().norm().item()
    take_step(posterior, optimizers, x, y, plan=StepPlan(clip_norm=1e-3))
    state = optimizers[0].state[weight]
    assert 0 < (state[PRECISION] - 0.9991005).norm().item() < 0.001 * 1e-3 + 4 * 6e-8  # rounding of 16 entries near 1
    assert 0 < state[MOMENTUM].norm().item() <= 0.1 * (1e-3 + decay_norm) * 1.001


def real_posterior(family: str) -> Posterior:
    torch.manual_seed(0)
    new = functools.partial(build_backbone, BackboneConfig(width=2), channels=1, height=8, width=8)
    config = build_inference_config({"family": family})
    return build_posterior(Parts(new(), NUM_CLASSES, NUM_EXAMPLES, new_backbone=new), config).train()


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("plan", [StepPlan(), StepPlan(accumulation=3, clip_norm=1.0)], ids=str)
def test_no_step_waits_for_the_device_whatever_the_family(family: str, plan: StepPlan) -> None:
    """Soft labels, as mixup and smoothing give them."""
    posterior = real_posterior(family)
    optimizers = build_optimizers(posterior, OptimizerConfig(name="bsam"), num_examples=NUM_EXAMPLES)
    x, y_BK = torch.randn(12, 1, 8, 8), torch.full((12, NUM_CLASSES), 1 / NUM_CLASSES)
    take_step(posterior, optimizers, x, y_BK, plan=plan)
    before = {name: p.detach().clone() for name, p in posterior.named_parameters()}
    with OperatorCounter() as counter:
        loss = take_step(posterior, optimizers, x, y_BK, plan=plan)
    assert counter.num_host_syncs == 0
    assert bool(torch.isfinite(loss.total))
    assert any(not torch.equal(p, before[name]) for name, p in posterior.named_parameters())


def test_sam_beside_it_is_refused(tmp_path: Path) -> None:
    images = ArrayExamples(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4) % 2)
    with pytest.raises(ConfigError) as caught:
        fit(
            real_posterior("mean_field"),
            TrainingData(images, Preprocessing(1, 8, 8, mean=(0.5,), std=(0.3,)), Augmentation()),
            lambda posterior: 1.0,
            tmp_path,
            engine=Engine(torch.device("cpu")),
            optimizer=OptimizerConfig(name="bsam"),
            training=TrainingConfig(sam_rho=0.1),
            metadata={},
        )
    assert str(caught.value) == (
        "bSAM and SAM are two forms of one thing (optimizer.name = bsam, training.sam_rho = 0.1): "
        "set training.sam_rho = 0"
    )


def test_a_parameter_without_gradient_stays() -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = BSAM([{"params": parameters}], lr=0.1, num_examples=10, weight_decay=0.1)
    parameters[0].grad = torch.ones(2)
    optimizer.ascend()
    optimizer.step()
    assert torch.equal(parameters[1], torch.ones(2))
    assert not torch.equal(parameters[0], torch.ones(2))
