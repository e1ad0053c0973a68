"""Where and how the arithmetic runs: devices, and the one training step of every family and of the twin.

Training and prediction go through an Engine, so that the deterministic twin gets exactly the treatment that the
Bayesian model gets. This engine runs eagerly in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from bayesnet.errors import DeviceError
from bayesnet.inference.base import Posterior
from bayesnet.step import PLAIN, StepPlan, take_step
from bayesnet.types import Loss


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where to run.

    Attributes:
        devices: "auto" (the accelerator if there is one), or a comma-separated list such as "cpu" or "cuda:0,cuda:1".
    """

    devices: str = "auto"


def available_devices() -> tuple[str, ...]:
    """Return the names of the devices that exist here, accelerators first, "cpu" last."""
    names: list[str] = []
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            names = [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    return (*names, "cpu")


def resolve_devices(devices: str) -> tuple[torch.device, ...]:
    """Return the devices that a list names, in its order; names may repeat.

    Args:
        devices: "auto", or comma-separated names. "cuda" means "cuda:0".

    Raises:
        DeviceError: A device does not exist; the message lists those that do.

    Example:
        >>> resolve_devices("cpu,cpu")
        (device(type='cpu'), device(type='cpu'))
    """
    existing = available_devices()
    if devices.strip() == "auto":
        return (torch.device(existing[0]),)
    names = [part.strip() for part in devices.split(",")]
    if not all(names):
        raise DeviceError("empty device name", where=repr(devices), hint=f"this machine has {', '.join(existing)}")
    resolved = []
    for name in names:
        full_name = name if ":" in name or name == "cpu" else f"{name}:0"
        if full_name not in existing:
            raise DeviceError("no such device", where=name, hint=f"this machine has {', '.join(existing)}")
        resolved.append(torch.device(full_name))
    return tuple(resolved)


class Engine:
    """Runs training steps and predictions on one device.

    Args:
        device: Where.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    def for_one(cls, devices: str) -> Engine:
        """Return the engine for a list that names one device.

        Raises:
            DeviceError: The device does not exist, or the list names several.
        """
        resolved = resolve_devices(devices)
        if len(resolved) > 1:
            raise DeviceError("one device at a time", where=devices, hint=f"name one, such as --devices {resolved[0]}")
        return cls(resolved[0])

    def put(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device."""
        return tensor.to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until the device has finished; nothing to wait for on a CPU."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def train_step(
        self,
        posterior: Posterior,
        optimizers: Sequence[Optimizer],
        x_BCHW: Tensor,
        y: Tensor,
        kl_weight: Tensor | float = 1.0,
        plan: StepPlan = PLAIN,
    ) -> Loss:
        """Take one optimisation step and return the detached loss, without waiting for the device.

        Args:
            posterior: What is trained, in training mode.
            optimizers: Stepped in this order; together they own every parameter once.
            x_BCHW: Normalised images on the device.
            y: Labels (B,) or soft labels (B, K) on the device.
            kl_weight: Weight of KL / N in the minimised objective; 1 is the ELBO.
            plan: Parts, clipping, sharpness.
        """
        return take_step(posterior, optimizers, x_BCHW, y, kl_weight, plan)
