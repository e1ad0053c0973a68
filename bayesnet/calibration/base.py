"""The contract of a calibrator: a map on the log-probability vector of every posterior draw.

It is fitted on the negative log-likelihood of the mean of the mapped draws, the probability that is reported, and
applied to every draw, so that intervals and entropies belong to the calibrated model too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bayesnet.types import JsonObject

CHUNK_ELEMENTS = 4_000_000  # log-probabilities mapped at once: 32 MB a temporary


class Calibrator(ABC):
    """A map on log-probability vectors, the same for every draw and image."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, log_probabilities_SBK: Tensor) -> Tensor:
        """Return the mapped log-probabilities.

        Args:
            log_probabilities_SBK: (draws, batch, classes), normalised, float32 or float64, on any device.

        Returns:
            The same shape, dtype and device, normalised.
        """

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
    step = max(1, CHUNK_ELEMENTS // (num_draws * num_classes))
    total = 0.0
    for start in range(0, num_examples, step):
        chunk_SBK = log_probabilities_SNK[:, start : start + step].double()
        mapped_SBK = chunk_SBK if calibrator is None else calibrator(chunk_SBK)
        index_SB1 = labels_N[start : start + step].expand(num_draws, -1)[..., None]
        label_SB = mapped_SBK.gather(2, index_SB1)[..., 0]
        total += float(torch.logsumexp(label_SB, 0).sum())
    return math.log(num_draws) - total / num_examples


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
