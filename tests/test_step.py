"""One step: SAM against its formula, the same noise in both passes, parts of a batch, clipping; no host sync."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from bayesnet.backbones import BackboneConfig, build_backbone
from bayesnet.inference import build_inference_config, build_posterior
from bayesnet.inference.base import Parts, Posterior
from bayesnet.optim import OptimizerConfig, build_optimizers
from bayesnet.step import StepPlan, take_step
from bayesnet.testing import OperatorCounter, fixed_noise
from bayesnet.types import Loss

NUM_CLASSES, NUM_EXAMPLES = 3, 50
RHO = 0.1


class Recording(Posterior):
    """A linear model with dropout and a spread; remembers its parameters, its noise and its parts at each call."""

    def __init__(self, *, dropout: float = 0.5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(NUM_CLASSES, 4, generator=generator))
        self.spread = nn.Parameter(torch.full((NUM_CLASSES, 4), -1.0))
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.calls: list[tuple[Tensor, Tensor, Tensor, int]] = []

    def loss(self, x_BCHW: Tensor, y: Tensor) -> Loss:
        """Return a loss in which everything above has a part."""
        features_BD = self.dropout(self.norm(x_BCHW.flatten(1)))
        noise_KD = torch.randn_like(self.weight)
        logits_BK = features_BD @ (self.weight + self.spread.exp() * noise_KD).T
        nll = nn.functional.cross_entropy(logits_BK, y)
        kl = self.weight.square().sum() - self.spread.sum()
        self.calls.append((self.weight.detach().clone(), self.spread.detach().clone(), noise_KD, len(y)))
        return Loss(nll + kl / NUM_EXAMPLES, nll, kl, nll)

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Not needed."""
        raise NotImplementedError

    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Not needed."""
        raise NotImplementedError

    def variational_parameters(self) -> Sequence[nn.Parameter]:
        """Return mean and spread."""
        return (self.weight, self.spread)

    def scale_parameters(self) -> Sequence[nn.Parameter]:
        """Return the spread."""
        return (self.spread,)


def batch(num_images: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_images, 1, 2, 2, generator=generator), torch.arange(num_images) % NUM_CLASSES


def real_posterior(family: str, *, width: int = 2) -> Posterior:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = build_backbone(BackboneConfig(width=width), channels=1, height=8, width=8)
        config = build_inference_config({"family": family})
        return build_posterior(Parts(backbone, NUM_CLASSES, NUM_EXAMPLES), config).train()


def gradients(posterior: Posterior, x: Tensor, y: Tensor, *, seed: int = 3) -> dict[str, Tensor]:
    """Return the gradient of the whole batch's objective under one seed, by plain autograd."""
    torch.manual_seed(seed)
    posterior.zero_grad(set_to_none=True)
    torch.autograd.backward(posterior.loss(x, y).total)
    return {name: p.grad.clone() for name, p in posterior.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["deterministic", "mean_field"])
def test_sam_takes_the_gradient_of_the_worst_neighbour(family: str) -> None:
    """The parameters move by -lr times the gradient at w + rho g / |g|, computed here by hand, spreads unmoved."""
    x, y = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % NUM_CLASSES
    reference, stepped = real_posterior(family), real_posterior(family)
    spreads = {id(p) for p in reference.scale_parameters()}
    first = gradients(reference, x, y)
    moved = {name: p for name, p in reference.named_parameters() if id(p) not in spreads}
    norm = torch.stack([first[name].square().sum() for name in moved]).sum().sqrt()
    with torch.no_grad():
        for name, parameter in moved.items():
            parameter.add_(RHO * first[name] / norm)
    expected = gradients(reference, x, y)
    before = {name: p.detach().clone() for name, p in stepped.named_parameters()}
    torch.manual_seed(3)
    take_step(stepped, [SGD(stepped.parameters(), lr=0.5)], x, y, plan=StepPlan(sam_rho=RHO))
    for name, parameter in stepped.named_parameters():
        assert torch.allclose(parameter, before[name] - 0.5 * expected[name], atol=1e-6), name


def test_sam_is_not_the_plain_step() -> None:
    """What the test above would miss if the second gradient were the first: here the two differ visibly."""
    x, y = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % NUM_CLASSES
    ends = []
    for rho in (0.0, RHO):
        posterior = real_posterior("mean_field")
        torch.manual_seed(3)
        take_step(posterior, [SGD(posterior.parameters(), lr=0.5)], x, y, plan=StepPlan(sam_rho=rho))
        ends.append(nn.utils.parameters_to_vector(posterior.parameters()).detach())
    assert (ends[0] - ends[1]).abs().max() > 1e-4


@pytest.mark.parametrize("accumulation", [1, 3])
def test_both_passes_of_sam_share_batch_dropout_and_noise(accumulation: int) -> None:
    posterior = Recording()
    x, y = batch()
    torch.manual_seed(0)
    take_step(posterior, [SGD(posterior.parameters(), lr=0.1)], x, y, plan=StepPlan(accumulation, sam_rho=RHO))
    after = torch.get_rng_state()
    first, second = posterior.calls[:accumulation], posterior.calls[accumulation:]
    assert len(second) == accumulation
    for (weight, spread, noise, size), (moved, same, noise_again, size_again) in zip(first, second, strict=True):
        assert torch.equal(noise, noise_again)
        assert torch.equal(spread, same), "the perturbation moved a spread"
        assert (moved - weight).norm().item() == pytest.approx(RHO, rel=1e-5)
        assert size == size_again
    # Afterwards the generator stands where one pass alone would have left it.
    plain = Recording()
    torch.manual_seed(0)
    take_step(plain, [SGD(plain.parameters(), lr=0.1)], x, y, plan=StepPlan(accumulation))
    assert torch.equal(after, torch.get_rng_state())


def test_only_the_first_pass_moves_running_statistics_and_weights_come_back() -> None:
    posterior, plain = Recording(), Recording()
    x, y = batch()
    for each, plan in ((posterior, StepPlan(sam_rho=RHO)), (plain, StepPlan())):
        torch.manual_seed(0)
        take_step(each, [SGD(each.parameters(), lr=0.0)], x, y, plan=plan)
    for name, tensor in plain.state_dict().items():  # parameters too: the learning rate is 0
        assert torch.equal(posterior.state_dict()[name], tensor), name


def test_weights_come_back_when_the_second_pass_fails() -> None:
    posterior = Recording()
    before = posterior.weight.detach().clone()
    x, y = batch()
    fails = iter([False, True])
    loss = posterior.loss

    def failing(x_BCHW: Tensor, y: Tensor) -> Loss:
        if next(fails):
            raise MemoryError
        return loss(x_BCHW, y)

    posterior.loss = failing  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        take_step(posterior, [SGD(posterior.parameters(), lr=0.1)], x, y, plan=StepPlan(sam_rho=RHO))
    assert torch.equal(posterior.weight, before)


@pytest.mark.parametrize("num_images", [2, 3, 7, 12])
@pytest.mark.parametrize("accumulation", [2, 3, 6])
def test_parts_give_the_gradient_and_loss_of_the_whole_batch(num_images: int, accumulation: int) -> None:
    """Frozen batch norm and zero noise, ragged parts included; the KL is counted once. Every part has two images."""
    whole, parts = Recording(dropout=0.0).double().eval(), Recording(dropout=0.0).double().eval()
    x, y = batch(num_images)
    x = x.double()
    with fixed_noise(), torch.no_grad():
        whole.spread.fill_(-60.0)
        parts.spread.fill_(-60.0)
    losses = []
    for each, count in ((whole, 1), (parts, accumulation)):
        optimizer = SGD(each.parameters(), lr=1.0)
        losses.append(take_step(each, [optimizer], x, y, plan=StepPlan(count)))
    assert torch.allclose(whole.weight, parts.weight, rtol=1e-9)
    assert [float(part) for part in losses[0]] == pytest.approx([float(part) for part in losses[1]], rel=1e-9)
    sizes = [call[3] for call in parts.calls]
    assert sum(sizes) == num_images
    assert min(sizes) >= min(2, num_images)
    assert len(sizes) == min(accumulation, max(1, num_images // 2))


def test_clipping_keeps_the_direction_and_limits_the_norm() -> None:
    x, y = batch()
    moves = []
    for clip_norm in (0.0, 0.01, 1e6):
        posterior = Recording()
        before = nn.utils.parameters_to_vector(posterior.parameters()).detach().clone()
        torch.manual_seed(0)
        take_step(posterior, [SGD(posterior.parameters(), lr=1.0)], x, y, plan=StepPlan(clip_norm=clip_norm))
        moves.append(before - nn.utils.parameters_to_vector(posterior.parameters()).detach())
    plain, clipped, untouched = moves
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert torch.allclose(clipped / clipped.norm(), plain / plain.norm(), atol=1e-4)
    assert torch.equal(plain, untouched)


@pytest.mark.parametrize("plan", [StepPlan(sam_rho=RHO), StepPlan(accumulation=3), StepPlan(clip_norm=1.0)], ids=str)
def test_no_step_waits_for_the_device(plan: StepPlan) -> None:
    posterior = real_posterior("mean_field")
    optimizers = build_optimizers(posterior, OptimizerConfig())
    x, y = torch.randn(12, 1, 8, 8), torch.arange(12) % NUM_CLASSES
    take_step(posterior, optimizers, x, y, plan=plan)  # the first step makes the optimizers' state
    with OperatorCounter() as counter:
        take_step(posterior, optimizers, x, y, plan=plan)
    assert counter.num_host_syncs == 0
