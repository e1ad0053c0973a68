"""An engine that remembers what its steps were given."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from bayesnet.engine import Engine
from bayesnet.inference.base import Posterior
from bayesnet.step import PLAIN, StepPlan
from bayesnet.types import Loss


class SpyEngine(Engine):
    """Trains on the CPU, and remembers inputs, labels and weight of the KL of each step."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.steps: list[tuple[Tensor, Tensor, float]] = []

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
        self.steps.append((x_BCHW.clone(), y.clone(), float(kl_weight)))
        return super().train_step(posterior, optimizers, x_BCHW, y, kl_weight, plan)

    @property
    def seen(self) -> list[str]:
        """A digest of each step's images and labels."""
        return [hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest() for x, y, _ in self.steps]

    @property
    def labels(self) -> list[Tensor]:
        """Labels of each step."""
        return [y for _, y, _ in self.steps]

    @property
    def kl_weights(self) -> list[float]:
        """Weight of the KL of each step."""
        return [weight for *_, weight in self.steps]
