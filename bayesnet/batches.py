"""The batches of an epoch: read, augmented, normalised and labelled, the same for every family and for the twin."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnet.data import Examples, Preprocessing
from bayesnet.data.augment import Augmentation, AugmentDraws, augment, epoch_draws
from bayesnet.data.loading import read_batches
from bayesnet.data.sampling import balanced_order, epoch_order, mix, mixup_shares, soft_labels
from bayesnet.engine import Engine
from bayesnet.progress import TrainingConfig


class TrainingData(NamedTuple):
    """What fit reads: training images and how they are normalised and augmented.

    Attributes:
        examples: Images and labels, every class at least once.
        preprocessing: How they are normalised.
        augmentation: What is done to them in training.
        workers: Processes that read ahead.
    """

    examples: Examples
    preprocessing: Preprocessing
    augmentation: Augmentation
    workers: int = 0


class Batch(NamedTuple):
    """One batch on the device.

    Attributes:
        x_BCHW: Normalised images.
        y: Labels (B,), or soft labels (B, K) where training smooths or mixes them.
    """

    x_BCHW: Tensor
    y: Tensor


def batch_bounds(num_examples: int, batch_size: int) -> list[tuple[int, int]]:
    """Return the (start, stop) of each batch; a last batch of one image joins the one before it.

    Example:
        >>> batch_bounds(9, 4)
        [(0, 4), (4, 9)]
    """
    starts = list(range(0, num_examples, batch_size))
    if len(starts) > 1 and num_examples - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_examples], strict=True))


def ordered_batches(
    data: TrainingData, engine: Engine, *, batch_size: int, seed: int = 0, epoch: int = 0
) -> Generator[Batch, None, None]:
    """Yield every image once with its label, in the images' own order.

    Args:
        data: What to read; its augmentation is drawn as `epoch_batches` draws it.
        engine: Where the batches go.
        batch_size: Images per batch.
        seed: Of the augmentation.
        epoch: Which draws of the augmentation.

    Raises:
        DataError: An image cannot be read.
        DeviceError: A worker process died or hangs.
    """
    num, labels_N = len(data.examples), data.examples.labels_N
    draws = epoch_draws(num, data.augmentation, seed=seed, epoch=epoch)
    indices = [torch.arange(start, stop) for start, stop in batch_bounds(num, batch_size)]
    with contextlib.closing(_images(data, engine, draws, [(each, each) for each in indices])) as images:
        for indices_B, x_BCHW in zip(indices, images, strict=True):
            yield Batch(x_BCHW, engine.put(labels_N[indices_B]))


def _images(
    data: TrainingData, engine: Engine, draws: AugmentDraws, places: Sequence[tuple[Tensor, Tensor]]
) -> Generator[Tensor, None, None]:
    """Yield images (B, C, H, W), read, augmented and normalised, for pairs of their indices and their rows of draws."""
    with contextlib.closing(read_batches(data.examples, [i for i, _ in places], workers=data.workers)) as pixels:
        for (_, drawn_B), pixels_BCHW in zip(places, pixels, strict=True):
            x_BCHW = engine.put(pixels_BCHW)
            if not data.augmentation.is_identity:
                x_BCHW = augment(x_BCHW, draws.select(drawn_B).to(engine.device))
            yield data.preprocessing.normalize(x_BCHW)


def epoch_batches(
    data: TrainingData, training: TrainingConfig, engine: Engine, *, epoch: int, bounds: Sequence[tuple[int, int]]
) -> Generator[Batch, None, None]:
    """Yield those batches of an epoch that ``bounds`` names; each is a function of seed, epoch and bounds alone.

    Args:
        data: What to read.
        training: Seed, balance, label smoothing, mixup.
        engine: Where the batches go.
        epoch: From 0.
        bounds: (start, stop) of each batch in the epoch's order.

    Raises:
        DataError: An image cannot be read.
        DeviceError: A worker process died or hangs.
    """
    labels_N, seed, num = data.examples.labels_N, training.seed, len(data.examples)
    if training.balanced:
        order_N = balanced_order(labels_N, seed=seed, epoch=epoch)
        drawn_N = torch.arange(num)  # an image that comes twice is augmented twice: draws go by position
    else:
        order_N = drawn_N = epoch_order(num, seed=seed, epoch=epoch)
    draws = epoch_draws(num, data.augmentation, seed=seed, epoch=epoch)
    share_N = mixup_shares(num, training.mixup, seed=seed, epoch=epoch) if training.mixup else None
    num_classes = int(labels_N.max()) + 1
    data = data._replace(examples=data.examples.for_epoch(seed, epoch))
    places = [(order_N[start:stop], drawn_N[start:stop]) for start, stop in bounds]
    with contextlib.closing(_images(data, engine, draws, places)) as images:
        for (indices_B, drawn_B), x_BCHW in zip(places, images, strict=True):
            y = engine.put(labels_N[indices_B])
            if training.label_smoothing or share_N is not None:
                y = soft_labels(y, num_classes, training.label_smoothing)
            if share_N is not None:
                share_B = engine.put(share_N[drawn_B])
                x_BCHW, y = mix(x_BCHW, share_B), mix(y, share_B)
            yield Batch(x_BCHW, y)
