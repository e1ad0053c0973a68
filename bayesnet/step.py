r"""One optimisation step: the gradient of a batch, in parts where memory asks for it, clipped, sharpness-aware.

Sharpness-aware training (SAM) takes its gradient where the loss is worst nearby, w + rho * g / ||g||, from a second
pass over the same batch with the same dropout and posterior noise. The neighbourhood is that of the backbone and of the
posterior's mean; spreads stay where they are. Only the first pass moves running statistics, and the weights come back
from a copy, bit for bit. With bSAM among the optimizers the first pass is at a draw of the weights that it owns; only
the second one, uphill from their mean, is reported and moves running statistics: a draw's would not fit the mean.

Cost: SAM and bSAM double a step. Reference: Foret et al. 2021, "Sharpness-aware minimization", arXiv:2010.01412.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from bayesnet.bsam import BSAM
from bayesnet.inference.base import Posterior
from bayesnet.types import Loss


class StepPlan(NamedTuple):
    """How the gradient of a batch is computed.

    Attributes:
        accumulation: Parts that a batch is computed in, one after the other, to save memory; a part has at least two
            images, since batch norm needs them.
        clip_norm: Largest Euclidean norm of the gradient of all parameters together; 0 does not clip.
        sam_rho: Radius of sharpness-aware training; 0 is the ordinary step.
    """

    accumulation: int = 1
    clip_norm: float = 0.0
    sam_rho: float = 0.0


PLAIN = StepPlan()


def take_step(
    posterior: Posterior,
    optimizers: Sequence[Optimizer],
    x_BCHW: Tensor,
    y: Tensor,
    kl_weight: Tensor | float = 1.0,
    plan: StepPlan = PLAIN,
) -> Loss:
    """Take one optimisation step and return the detached loss before it, without waiting for the device.

    Args:
        posterior: What is trained, in training mode.
        optimizers: Stepped in this order; together they own every trained parameter once.
        x_BCHW: Normalised images on the device.
        y: Labels (B,) or soft labels (B, K) on the device.
        kl_weight: Weight of KL / N in the minimised objective; 1 is the ELBO.
        plan: Parts, clipping, sharpness.
    """
    batch = _Batch(posterior, x_BCHW, y, kl_weight, min(plan.accumulation, max(1, len(x_BCHW) // 2)))
    _forget_gradients(optimizers)
    bsam = next((optimizer for optimizer in optimizers if isinstance(optimizer, BSAM)), None)
    if bsam is not None:
        loss = _bsam_gradient(batch, optimizers, bsam, plan.clip_norm)
    elif plan.sam_rho:
        loss = _sharpness_aware_gradient(batch, optimizers, plan.sam_rho)
    else:
        loss = batch.backward()
    batch.clip(plan.clip_norm)
    for optimizer in optimizers:
        optimizer.step()
    posterior.after_step()
    return loss


def _forget_gradients(optimizers: Sequence[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


class _Batch(NamedTuple):
    """A batch whose gradient is wanted."""

    posterior: Posterior
    x_BCHW: Tensor
    y: Tensor
    kl_weight: Tensor | float
    num_parts: int

    def backward(self) -> Loss:
        """Add the gradient of the whole batch to the parameters; return its detached loss, the KL counted once."""
        if self.num_parts == 1:
            return self._backward(self.x_BCHW, self.y, 1.0)
        weighted: list[list[Tensor]] = []
        for x_bCHW, y in zip(
            self.x_BCHW.tensor_split(self.num_parts), self.y.tensor_split(self.num_parts), strict=True
        ):
            share = len(x_bCHW) / len(self.x_BCHW)
            weighted.append([share * term for term in self._backward(x_bCHW, y, share)])
        return Loss(*(torch.stack(terms).sum(0) for terms in zip(*weighted, strict=True)))

    def _backward(self, x_bCHW: Tensor, y: Tensor, share: float) -> Loss:
        loss = self.posterior.loss(x_bCHW, y)
        objective = loss.tempered(self.kl_weight)
        torch.autograd.backward(objective if share == 1.0 else share * objective)
        return Loss(*(part.detach() for part in loss))

    def clip(self, max_norm: float) -> None:
        """Scale the gradient of all parameters together down to a norm; 0 does not clip."""
        if max_norm:
            parameters = [p for p in self.posterior.parameters() if p.grad is not None]
            clip_grad_norm_(parameters, max_norm, foreach=True)


def _sharpness_aware_gradient(batch: _Batch, optimizers: Sequence[Optimizer], rho: float) -> Loss:
    """Leave the gradient at the perturbed weights in the parameters; return the loss at the weights themselves."""
    device = batch.x_BCHW.device
    noise = random_state(device)
    loss = batch.backward()
    spreads = {id(parameter) for parameter in batch.posterior.scale_parameters()}
    moved: list[Tensor] = [p for p in batch.posterior.parameters() if p.grad is not None and id(p) not in spreads]
    with _restored([*moved, *batch.posterior.buffers()]):
        gradients = [p.grad for p in moved if p.grad is not None]
        scale = rho / (get_total_norm(gradients, foreach=True) + 1e-12)
        with torch.no_grad():
            torch._foreach_add_(moved, list(torch._foreach_mul(gradients, scale)))
        _forget_gradients(optimizers)
        set_random_state(device, noise)
        batch.backward()
    return loss


def _bsam_gradient(batch: _Batch, optimizers: Sequence[Optimizer], bsam: BSAM, clip_norm: float) -> Loss:
    """Leave the gradient uphill from the means in the parameters; return the loss there.

    All other parameters, those of the posterior among them, stay where they are; both gradients are clipped.
    """
    device = batch.x_BCHW.device
    owned = bsam.parameters()
    with _restored([*owned, *batch.posterior.buffers()]):
        bsam.add_noise()
        noise = random_state(device)
        batch.backward()
    batch.clip(clip_norm)
    with _restored(owned):
        bsam.ascend()
        _forget_gradients(optimizers)
        set_random_state(device, noise)
        return batch.backward()


@contextlib.contextmanager
def _restored(tensors: Sequence[nn.Parameter | Tensor]) -> Iterator[None]:
    """Put back what the tensors held, bit for bit."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)


def random_state(device: torch.device) -> Tensor:
    """Return the state of the random generator that a device draws from, without waiting for the device."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Put back what `random_state` gave."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)
