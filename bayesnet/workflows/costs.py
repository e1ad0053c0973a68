"""What a model will take, told before it is trained: memory counted, time measured on a step that is thrown away."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import torch

from bayesnet.data import ImageData
from bayesnet.engine import Engine
from bayesnet.errors import ConfigError
from bayesnet.inference.base import FinalizeCost, Posterior
from bayesnet.optim import OptimizerFactory, build_optimizers
from bayesnet.settings import Settings
from bayesnet.types import JsonObject
from bayesnet.workflows.starting import start_of

COPIES = 3
"""Further copies of what is trained: gradient and two moments (Adam); other optimizers have fewer."""


class Cost(NamedTuple):
    """What a model takes.

    Attributes:
        num_trained: Trained numbers, of one member.
        stored_bytes: The model, and each checkpoint, without the optimizer.
        training_bytes: Model, gradient and optimizer; what the network computes for a batch comes to it.
        step_seconds: One training step on the largest batch.
        num_steps: Of all epochs and members, with what the pass after training takes of the kind.
        finalize: Of the pass after training.
    """

    num_trained: int
    stored_bytes: int
    training_bytes: int
    step_seconds: float
    num_steps: int
    finalize: FinalizeCost

    def __str__(self) -> str:
        """One line for the user."""
        text = (
            f"{self.num_trained:,} trained numbers, {size(self.stored_bytes)}, "
            f"{size(self.training_bytes)} while training besides activations; "
            f"{1e3 * self.step_seconds:.1f} ms a step, {duration(self.step_seconds * self.num_steps)} of training"
        )
        if self.finalize.num_bytes or self.finalize.seconds:
            text += f", then {duration(self.finalize.seconds)} and {size(self.finalize.num_bytes)} to finalize"
        return text


def size(num_bytes: int) -> str:
    """Return a number of bytes in the largest unit that leaves a number above 1.

    Example:
        >>> size(900), size(2_500_000), size(3 * 2**30)
        ('0.9 KiB', '2.4 MiB', '3.0 GiB')
    """
    for exponent, unit in ((3, "GiB"), (2, "MiB")):
        if num_bytes >= 1024**exponent:
            return f"{num_bytes / 1024**exponent:,.1f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB"


def duration(seconds: float) -> str:
    """Return a rough time in the largest unit that leaves a number above 1.

    Example:
        >>> [duration(seconds) for seconds in (0.2, 12, 400, 40_000)]
        ['about 1 s', 'about 12 s', 'about 7 min', 'about 11.1 h']
    """
    if seconds < 120:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"


def count_cost(posterior: Posterior, settings: Settings, num_images: int) -> Cost:
    """Return what a model takes, but for the time of a step.

    Args:
        posterior: Untrained.
        settings: Of the model.
        num_images: N, of the training split.
    """
    trained = [parameter for parameter in posterior.members()[0].parameters() if parameter.requires_grad]
    stored = sum(tensor.nbytes for tensor in posterior.state_dict().values())
    rounds = len(posterior.members()) + (start_of(settings) is not None)
    epochs = rounds * settings.training.epochs + posterior.finalize_epochs
    return Cost(
        num_trained=sum(parameter.numel() for parameter in trained),
        stored_bytes=stored,
        training_bytes=stored + COPIES * sum(parameter.nbytes for parameter in trained),
        step_seconds=0.0,
        num_steps=epochs * -(-num_images // settings.training.batch_size),
        finalize=posterior.finalize_cost(),
    )


def time_step(
    posterior: Posterior,
    settings: Settings,
    data: ImageData,
    engine: Engine,
    factory: OptimizerFactory | None = None,
) -> float:
    """Return the seconds of a training step on the largest batch, of black images; the posterior is of no use after it.

    Args:
        posterior: Untrained, on the engine's device.
        settings: Of the model.
        data: Numbers and shapes of its images or features.
        engine: Where it will be trained.
        factory: The caller's own optimizer, where the settings name it.
    """
    member = posterior.members()[0].train()
    optimizers = build_optimizers(member, settings.optimizer, factory, num_examples=len(data.train))
    rows = min(settings.training.batch_size, len(data.train))
    x_BCHW = data.preprocessing.normalize(engine.put(torch.zeros(rows, *data.preprocessing.shape)))
    y_B = engine.put(torch.arange(rows) % len(data.classes))
    started = 0.0
    for _ in range(2):  # the first one also allocates
        engine.synchronize()
        started = time.perf_counter()
        engine.train_step(member, optimizers, x_BCHW, y_B, plan=settings.training.plan)
        engine.synchronize()
    return time.perf_counter() - started


def check_fits(cost: Cost, family: str, device: torch.device) -> None:
    """Raise ConfigError where a model takes more memory than its device, or for finalizing the machine, has.

    Args:
        cost: Of the model.
        family: Its family.
        device: Where it is trained.
    """
    on_device = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else physical_memory()
    needs = (
        ("training", cost.training_bytes, on_device),
        ("finalizing", cost.finalize.num_bytes, physical_memory()),
    )
    for what, needed, available in needs:
        if needed > available:
            text = f"{what} takes {size(needed)}, of {size(available)} that there are"
            raise ConfigError(text, where=f"inference.family = {family}", hint="use mean_field, or a smaller backbone")


def physical_memory() -> int:
    """Return the machine's memory, bytes; a tebibyte where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 2**40


def facts_line(facts: JsonObject) -> str:
    """Return what was found while fitting as one line.

    Example:
        >>> facts_line({"prior_scale": {"initial": 1.0, "final": 0.138}, "num_divergences": 0})
        'prior scale initial 1, final 0.138; num divergences 0'
    """

    def value(entry: object) -> str:
        if isinstance(entry, dict):
            return ", ".join(f"{key} {value(inner)}" for key, inner in entry.items())
        return f"{entry:.4g}" if isinstance(entry, float) else str(entry)

    return "; ".join(f"{key.replace('_', ' ')} {value(entry)}" for key, entry in facts.items())
