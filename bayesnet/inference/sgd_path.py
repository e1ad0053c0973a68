"""The path of constant-rate SGD and the Gaussian of the weights along it, for SWAG.

Everything that is summed up is summed in float64 on the host, where it takes no device memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnet.errors import DivergedError
from bayesnet.inference.base import Batches

POOL_BYTES = 2**29
"""What is shuffled together: 512 MiB of images at a time, a small data set as a whole."""


class SgdPlan(NamedTuple):
    """SGD of constant learning rate.

    Attributes:
        epochs: T, passes over the data; a snapshot of the weights is taken after each.
        rank: R, how many of the last snapshots the low-rank part keeps.
        learning_rate: Of every step.
        momentum: Of every step, not Nesterov's.
        weight_decay: Added to the gradient of tensors with more than one dimension, as in training.
    """

    epochs: int
    rank: int
    learning_rate: float
    momentum: float
    weight_decay: float


class Spread(NamedTuple):
    """The Gaussian of the snapshots: covariance diag(scale^2) + factor factor'. On the host.

    Attributes:
        mean_P: Mean of all snapshots, float64.
        scale_P: Standard deviations of the independent part, float64.
        factor_PR: Low-rank factor, in the weights' own type.
    """

    mean_P: Tensor
    scale_P: Tensor
    factor_PR: Tensor

    def sample(self, num_samples: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield draws (P,), float64, one at a time: a stack of them would be the largest thing in memory."""
        num_weights, rank = self.factor_PR.shape
        for _ in range(num_samples):
            noise_P = torch.randn(num_weights, generator=generator, dtype=torch.float64)
            noise_R = torch.randn(rank, generator=generator, dtype=torch.float64)
            yield self.mean_P + self.scale_P * noise_P + self.factor_PR @ noise_R.to(self.factor_PR.dtype)


class Snapshots:
    """Running mean and variance of weight vectors, and the last few of them.

    Args:
        rank: How many of the last are kept.

    Example:
        >>> snapshots = Snapshots(rank=2)
        >>> for value in (0.0, 2.0):
        ...     snapshots.add(torch.tensor([value]))
        >>> spread = snapshots.spread()  # their variance is 2, half of it from each part
        >>> round(float(spread.scale_P**2), 6), round(float(spread.factor_PR.square().sum()), 6)
        (1.0, 1.0)
    """

    def __init__(self, rank: int) -> None:
        self.num = 0
        self.mean_P = self.squares_P = torch.zeros((), dtype=torch.float64)
        self.last: deque[Tensor] = deque(maxlen=rank)

    def add(self, weights_P: Tensor) -> None:
        """Take a snapshot: a copy, on the host."""
        weights_P = weights_P.detach().cpu().clone()
        self.num += 1
        # Welford's update: never a difference of large squares.
        deviation_P = weights_P - self.mean_P
        self.mean_P = self.mean_P + deviation_P / self.num
        self.squares_P = self.squares_P + deviation_P * (weights_P - self.mean_P)
        self.last.append(weights_P)

    def spread(self) -> Spread:
        """Return the Gaussian: half of the variance of all snapshots, and half of the covariance of the last ones.

        Raises:
            DivergedError: A snapshot was not finite.
        """
        assert self.num >= 2
        if not bool(self.squares_P.isfinite().all()):
            hint = "lower inference.learning_rate"
            raise DivergedError("SGD with a constant learning rate diverged", where="finalize", hint=hint)
        scale_P = (self.squares_P / (2 * (self.num - 1))).sqrt()
        factor_PR = torch.stack([(weights_P - self.mean_P).to(weights_P.dtype) for weights_P in self.last], 1)
        return Spread(self.mean_P, scale_P, factor_PR / math.sqrt(2 * (len(self.last) - 1)))


def follow_sgd(
    weights: Sequence[Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Batches,
    plan: SgdPlan,
    generator: torch.Generator,
) -> Spread:
    """Run SGD over reshuffled passes and return the Gaussian of the weights at their ends.

    Args:
        weights: Leaf tensors that want gradients, changed in place.
        loss: Mean loss of a batch, from inputs and labels.
        batches: Inputs and labels, in any order.
        plan: Epochs, rates, rank.
        generator: Of the order, on the CPU.

    Raises:
        DivergedError: The weights did not stay finite.
    """
    snapshots = Snapshots(plan.rank)
    velocities = [torch.zeros_like(weight) for weight in weights]
    for _ in range(plan.epochs):
        for inputs, y in shuffled(batches, generator):
            gradients = torch.autograd.grad(loss(inputs, y), weights)
            with torch.no_grad():
                for weight, velocity, gradient in zip(weights, velocities, gradients, strict=True):
                    decay = plan.weight_decay if weight.dim() > 1 else 0.0
                    velocity.mul_(plan.momentum).add_(gradient).add_(weight, alpha=decay)
                    weight.sub_(velocity, alpha=plan.learning_rate)
        snapshots.add(torch.cat([weight.detach().flatten() for weight in weights]))
    return snapshots.spread()


def shuffled(batches: Batches, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same rows in batches of about the first one's size, shuffled within pools of 512 MiB.

    What is given may be sorted by class. Sizes of a pool differ by one at most, so that no batch of one image is left
    over, which batch norm could not normalise.

    Example:
        >>> batches = [(torch.arange(4.0), torch.arange(4)), (torch.arange(4.0, 5.0), torch.arange(4, 5))]
        >>> [len(y) for _, y in shuffled(batches, torch.Generator())]
        [5]
    """
    pool: list[tuple[Tensor, Tensor]] = []
    size = num_bytes = 0
    for inputs, y in batches:
        size = size or len(y)
        pool.append((inputs, y))
        num_bytes += inputs.nbytes
        if num_bytes >= POOL_BYTES:
            yield from _mixed(pool, size, generator)
            pool, num_bytes = [], 0
    if pool:
        yield from _mixed(pool, size, generator)


def _mixed(
    pool: Sequence[tuple[Tensor, Tensor]], size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of a pool in random order, in batches of nearly one size."""
    inputs, labels = (torch.cat(parts) for parts in zip(*pool, strict=True))
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    for rows in order.tensor_split(max(1, round(len(order) / size))):
        yield inputs[rows], labels[rows]
