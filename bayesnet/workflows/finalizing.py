"""The pass after training, for families that fit something on the training images once their weights are found."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bayesnet.batches import TrainingData, ordered_batches
from bayesnet.checkpoint import first_non_finite
from bayesnet.data import ImageData
from bayesnet.data.augment import Augmentation
from bayesnet.engine import Engine
from bayesnet.errors import DivergedError
from bayesnet.inference import FAMILIES
from bayesnet.inference.base import Posterior, no_finalize
from bayesnet.settings import Settings

DIVERGED_HINT = "lower optimizer.learning_rate; the checkpoints of training are kept"


class TrainingImages:
    """The training images as finalize gets them: normalised, in their own order, not augmented; as often as asked.

    Args:
        data: The data.
        settings: Of the model: batch size and workers.
        engine: Where the batches go.
        workers: Another number of processes that read ahead than that of the settings.
    """

    def __init__(self, data: ImageData, settings: Settings, engine: Engine, workers: int | None = None) -> None:
        workers = settings.data.workers if workers is None else workers
        self.data = TrainingData(data.train, data.preprocessing, Augmentation(), workers)
        self.engine, self.batch_size = engine, settings.training.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pairs of images (B, C, H, W) and labels (B,) on the device."""
        return ordered_batches(self.data, self.engine, batch_size=self.batch_size)


def has_finalize(settings: Settings) -> bool:
    """Return whether the family of these settings has a pass after training."""
    return FAMILIES[settings.inference.family].finalize is not no_finalize


def finalize_posterior(
    posterior: Posterior, settings: Settings, data: ImageData, engine: Engine, *, workers: int | None = None
) -> None:
    """Run the family's pass over the training images, in place; it leaves the posterior in evaluation mode.

    Args:
        posterior: Trained; moved to the engine's device.
        settings: Of the model.
        data: Its training split is read.
        engine: Where to run.
        workers: Processes that read ahead; None takes those of the settings.

    Raises:
        DivergedError: A tensor of the posterior is not finite afterwards.
    """
    posterior.to(engine.device).eval()
    # The caller's random state is left as it was: finalizing is a function of the seed.
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        torch.manual_seed(settings.training.seed)
        FAMILIES[settings.inference.family].finalize(posterior, TrainingImages(data, settings, engine, workers))
    posterior.eval()
    name = first_non_finite(posterior.state_dict())
    if name is not None:
        where = f"{settings.inference.family}, {name}"
        raise DivergedError("finalizing diverged", where=where, hint=DIVERGED_HINT)
