"""The contract of a calibrator: a map on the log-probability vector of every posterior draw.

It is fitted on the negative log-likelihood of the mean of the mapped draws, the probability that is reported, and
applied to every draw, so that intervals and entropies belong to the calibrated model too. A calibrator that is
uncertain itself may give more draws than it takes: `Calibrator.num_draws` says how many.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bayesnet.errors import CheckpointError
from bayesnet.types import JsonObject

CHUNK_ELEMENTS = 500_000  # log-probabilities mapped at once: 4 MB a temporary, near a processor's cache


class Calibrator(ABC):
    """A map on the log-probability vectors of every draw, which treats each image on its own."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, log_probabilities_SBK: Tensor) -> Tensor:
        """Return the mapped log-probabilities.

        Args:
            log_probabilities_SBK: (draws, batch, classes), normalised, float32 or float64, on any device.

        Returns:
            (`num_draws` of the draws, batch, classes), normalised, of the same dtype and device. An image's rows do not
            depend on the other images.
        """

    def num_draws(self, num_draws: int) -> int:
        """Return how many draws come out where ``num_draws`` go in: as many, unless a calibrator says otherwise."""
        return num_draws

    @abstractmethod
    def to_json(self) -> JsonObject:
        """Return what `calibrator_from_json` reads, with the name under "name"."""


class CalibratorFamily(NamedTuple):
    """An entry of CALIBRATORS.

    Attributes:
        name: Its public name.
        fit: (log_probabilities_SNK, labels_N) -> Calibrator, never one with a higher `nll_of_mean` than no calibration.
        from_json: The inverse of `Calibrator.to_json`; raises CheckpointError.
    """

    name: str
    fit: Callable[[Tensor, Tensor], Calibrator]
    from_json: Callable[[JsonObject], Calibrator]


def nll_of_mean(log_probabilities_SNK: Tensor, labels_N: Tensor, calibrator: Calibrator | None = None) -> float:
    """Return the negative log-likelihood of the mean of the draws, mapped where a calibrator is given.

    -1/N sum_n log (1/S sum_s p_s(y_n)), in float64 by log-mean-exp, some examples at a time.

    Args:
        log_probabilities_SNK: (draws, examples, classes), normalised.
        labels_N: (examples,), integers.
        calibrator: Applied to each draw.

    Returns:
        Nats per example; infinite if a label has probability 0 in every draw.
    """
    num_draws, num_examples, num_classes = log_probabilities_SNK.shape
    num_mapped = num_draws if calibrator is None else calibrator.num_draws(num_draws)
    step = max(1, CHUNK_ELEMENTS // (num_mapped * num_classes))
    total = 0.0
    for start in range(0, num_examples, step):
        chunk_SBK = log_probabilities_SNK[:, start : start + step].double()
        mapped_SBK = chunk_SBK if calibrator is None else calibrator(chunk_SBK)
        index_SB1 = labels_N[start : start + step].expand(num_mapped, -1)[..., None]
        label_SB = mapped_SBK.gather(2, index_SB1)[..., 0]
        total += float(torch.logsumexp(label_SB, 0).sum())
    return math.log(num_mapped) - total / num_examples


def check_num_classes(name: str, num_classes: int, log_probabilities_SBK: Tensor) -> None:
    """Raise CheckpointError unless a calibrator with parameters for each class meets as many classes.

    Args:
        name: Of the calibrator.
        num_classes: Classes that it was fitted for.
        log_probabilities_SBK: What it is applied to.

    Raises:
        CheckpointError: The model has another number of classes.
    """
    if log_probabilities_SBK.shape[2] != num_classes:
        found = f"{num_classes} classes, the model has {log_probabilities_SBK.shape[2]}"
        raise CheckpointError(f"{name} calibrator is for {found}", hint="run calibrate again")


def is_number(value: object, low: float, high: float) -> bool:
    """Return whether a value read from JSON is a number (no boolean) from ``low`` to ``high``; NaN is none.

    Example:
        >>> is_number(1, 0, 2), is_number(True, 0, 2), is_number(float("nan"), 0, 2)
        (True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def check_calibration_data(log_probabilities_SNK: Tensor, labels_N: Tensor) -> None:
    """Raise ValueError unless the tensors are log-probabilities of draws and their labels.

    Raises:
        ValueError: Wrong shapes, no examples, NaN, rows that do not sum to 1 or labels out of range.
    """
    if log_probabilities_SNK.ndim != 3 or 0 in log_probabilities_SNK.shape:
        raise ValueError(
            f"log-probabilities must be (draws, examples, classes); got {tuple(log_probabilities_SNK.shape)}"
        )
    _, num_examples, num_classes = log_probabilities_SNK.shape
    if labels_N.shape != (num_examples,) or labels_N.dtype != torch.int64:
        raise ValueError(f"labels must be int64 ({num_examples},); got {labels_N.dtype} {tuple(labels_N.shape)}")
    bad_N = (labels_N < 0) | (labels_N >= num_classes)
    if bool(bad_N.any()):
        raise ValueError(f"row {int(bad_N.nonzero()[0])}: label is not in 0..{num_classes - 1}")
    sums_SN = torch.logsumexp(log_probabilities_SNK, 2)
    wrong_N = ~(sums_SN.abs() <= 1e-3).all(0)  # also true of NaN
    if bool(wrong_N.any()):
        raise ValueError(f"row {int(wrong_N.nonzero()[0])}: not normalised log-probabilities")
