"""Posterior temperature: fit + T KL / N, a posterior that is narrower or wider for it, and who has none.

A temperature of 1/4 is the evidence of four times the data: an equality, at which planted faults fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bayesnet.backbones import BackboneConfig, build_backbone
from bayesnet.batches import TrainingData
from bayesnet.data import ArrayExamples, Preprocessing
from bayesnet.data.augment import Augmentation
from bayesnet.errors import ConfigError
from bayesnet.inference import FAMILIES, build_inference_config, build_posterior
from bayesnet.inference.base import Parts, Posterior
from bayesnet.optim import OptimizerConfig
from bayesnet.progress import TrainingConfig
from bayesnet.step import PLAIN, StepPlan, take_step
from bayesnet.testing import fixed_noise
from bayesnet.training import fit
from bayesnet.types import Loss
from tests.engines import SpyEngine

NUM_IMAGES, NUM_CLASSES = 48, 3
POINT_FAMILIES = ("deterministic", "laplace", "nuts", "mc_dropout", "ensemble", "swag")
VARIATIONAL = tuple(name for name in FAMILIES if name not in POINT_FAMILIES)
CPU = torch.device("cpu")


class Untempered(SpyEngine):
    """The planted fault: every step with the whole KL."""

    def train_step(
        self,
        posterior: Posterior,
        optimizers: Sequence[torch.optim.Optimizer],
        x_BCHW: Tensor,
        y: Tensor,
        kl_weight: Tensor | float = 1.0,
        plan: StepPlan = PLAIN,
    ) -> Loss:
        """Take the step."""
        return super().train_step(posterior, optimizers, x_BCHW, y, 1.0, plan)


def posterior_of(family: str, num_examples: int = NUM_IMAGES) -> Posterior:
    def new() -> nn.Module:
        return build_backbone(BackboneConfig(width=2), channels=1, height=8, width=8)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = Parts(new(), NUM_CLASSES, num_examples, new_backbone=new)
        return build_posterior(parts, build_inference_config({"family": family}))


def fitted(
    directory: Path,
    temperature: float,
    *,
    family: str = "mean_field",
    num_examples: int = NUM_IMAGES,
    engine: SpyEngine | None = None,
    epochs: int = 20,
    kl_warmup_epochs: float = 0.0,
) -> Posterior:
    """Train on 48 images with a weak signal; ``num_examples`` is what the posterior takes N to be."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(NUM_IMAGES) % NUM_CLASSES
    images_NCHW = torch.randint(0, 200, (NUM_IMAGES, 1, 8, 8), generator=generator)
    for label in range(NUM_CLASSES):
        images_NCHW[labels_N == label, :, 2 * label : 2 * label + 3] += 30
    data = ArrayExamples(images_NCHW.to(torch.uint8), labels_N)
    posterior = posterior_of(family, num_examples)
    fit(
        posterior,
        TrainingData(data, Preprocessing(1, 8, 8, mean=(0.5,), std=(0.3,)), Augmentation()),
        lambda each: 1.0,
        directory,
        engine=engine or SpyEngine(),
        optimizer=OptimizerConfig(learning_rate=0.01, variational_learning_rate=0.05),
        training=TrainingConfig(
            epochs=epochs, batch_size=16, temperature=temperature, kl_warmup_epochs=kl_warmup_epochs
        ),
        metadata={},
    )
    return posterior


def median_sd(posterior: Posterior) -> float:
    scale = posterior.posterior_scale()
    assert scale is not None
    return float(scale.median())


@pytest.mark.parametrize("family", VARIATIONAL)
def test_the_temperature_scales_the_kl_part_of_the_objective_exactly(family: str) -> None:
    """The gradient of a step at T is that of the fit plus T times that of KL / N, in float64 to 1e-9."""
    temperature = 0.037
    x = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.arange(12) % NUM_CLASSES
    posterior = posterior_of(family).double().eval()
    parameters = [p for p in posterior.parameters() if p.requires_grad]
    with fixed_noise():
        loss = posterior.loss(x, y)
        of_fit, of_kl = (
            torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
            for part in (loss.fit, loss.kl / NUM_IMAGES)
        )
    before = [parameter.detach().clone() for parameter in parameters]
    with fixed_noise():
        reported = take_step(posterior, [torch.optim.SGD(parameters, lr=1.0)], x, y, temperature)
    for parameter, start, one, two in zip(parameters, before, of_fit, of_kl, strict=True):
        nothing = torch.zeros_like(start)
        expected = (nothing if one is None else one) + temperature * (nothing if two is None else two)
        assert torch.allclose(start - parameter, expected, rtol=1e-9, atol=1e-9)
    assert reported.kl.item() == pytest.approx(loss.kl.item())  # the divergence itself, unweighted
    assert reported.total.item() == pytest.approx((loss.fit + loss.kl / NUM_IMAGES).item())


def test_the_weight_of_the_kl_is_the_temperature_and_warms_up_to_it(tmp_path: Path) -> None:
    engine = SpyEngine()
    fitted(tmp_path / "constant", 0.25, engine=engine, epochs=2)
    assert engine.kl_weights == [0.25] * 6
    warming = SpyEngine()
    fitted(tmp_path / "warming", 0.25, engine=warming, epochs=3, kl_warmup_epochs=2)
    assert warming.kl_weights == pytest.approx([0.25 * min(1, (step + 1) / 6) for step in range(9)])


def test_a_quarter_of_the_temperature_is_four_times_the_data(tmp_path: Path) -> None:
    """fit + KL / (4 N) is the bound of 4 N images: training ends in the same place."""
    cold, more = fitted(tmp_path / "cold", 0.25), fitted(tmp_path / "more", 1.0, num_examples=4 * NUM_IMAGES)
    planted = fitted(tmp_path / "planted", 0.25, engine=Untempered())
    assert median_sd(cold) == pytest.approx(median_sd(more), rel=1e-4)
    for (name, left), right in zip(cold.named_parameters(), more.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-4), name
    assert median_sd(planted) > 1.1 * median_sd(cold), "a temperature that is not used would not be noticed"


@pytest.mark.parametrize(
    ("family", "temperatures"),
    [("mean_field", (0.01, 1.0, 100.0)), ("matrix_normal", (0.01, 1.0, 100.0)), ("mean_field_all", (1e-4, 0.01, 1.0))],
)
def test_the_posterior_widens_with_the_temperature(
    tmp_path: Path, family: str, temperatures: tuple[float, ...]
) -> None:
    """Its median sd rises by a tenth at least from each to the next, towards the prior's."""
    found = [median_sd(fitted(tmp_path / str(each), each, family=family)) for each in temperatures]
    assert found[0] < 0.9 * found[1] < 0.81 * found[2], found


@pytest.mark.parametrize("family", POINT_FAMILIES)
def test_families_without_a_spread_have_no_temperature(tmp_path: Path, family: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fitted(tmp_path, 0.5, family=family)
    assert str(caught.value) == (
        "the family fits no spread by its KL, and a mode does not depend on the temperature "
        "(training.temperature = 0.5): set it to 1, or take a variational family such as mean_field"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_temperatures_out_of_range(value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(temperature=value)
    assert str(caught.value) == f"must be positive and finite (training.temperature = {value})"
