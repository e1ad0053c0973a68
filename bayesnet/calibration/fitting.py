"""The table of calibrators, and fitting one to a split that may be too small to tell it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayesnet.calibration import bayesian_temperature, identity, isotonic, temperature, vector
from bayesnet.calibration.base import CHUNK_ELEMENTS, Calibrator, CalibratorFamily, check_calibration_data
from bayesnet.calibration.bayesian_temperature import BayesianTemperature
from bayesnet.calibration.identity import Identity
from bayesnet.calibration.temperature import Temperature, likelihood_interval
from bayesnet.registry import Registry

MIN_ERRORS = 10

CALIBRATORS: Registry[CalibratorFamily] = Registry(
    "calibrator",
    {
        family.name: family
        for family in (
            identity.FAMILY,
            temperature.FAMILY,
            vector.FAMILY,
            isotonic.FAMILY,
            bayesian_temperature.FAMILY,
        )
    },
)


class FittedCalibrator(NamedTuple):
    """A calibrator and what the user must know of it.

    Attributes:
        calibrator: The identity where the split cannot tell one.
        notice: Why none is applied, or how little is known of it; None where all is well.
    """

    calibrator: Calibrator
    notice: str | None


def fit_calibrator(name: str, log_probabilities_SNK: Tensor, labels_N: Tensor) -> FittedCalibrator:
    """Return the calibrator fitted on half A of the calibration split, or the identity; and a notice or None.

    Where every image is classified right, the NLL falls without end as T falls: the temperature that it asks for is the
    most overconfident one, and ruins the NLL of the first error elsewhere. So nothing is fitted. With errors the
    optimum is kept, at a bound of its range too: there the draws vote, and their vote is right more often than their
    mean says. But with few errors little is known of it, and the notice says how little.

    Args:
        name: A name of CALIBRATORS.
        log_probabilities_SNK: (draws, examples, classes), normalised, before calibration.
        labels_N: (examples,), int64.

    Raises:
        ConfigError: No calibrator has that name.
        ValueError: The tensors are not log-probabilities and labels.
    """
    family = CALIBRATORS[name]
    if name == Identity.name:
        return FittedCalibrator(family.fit(log_probabilities_SNK, labels_N), None)
    check_calibration_data(log_probabilities_SNK, labels_N)
    errors, num_images = _num_errors(log_probabilities_SNK, labels_N), len(labels_N)
    found = (
        f"half A has {errors} error{'' if errors == 1 else 's'} in {num_images} image{'s' if num_images > 1 else ''}"
    )
    impossible = _num_impossible(log_probabilities_SNK, labels_N)
    if impossible and name != isotonic.FAMILY.name:  # the other maps leave a probability of 0 as it is
        what = f"{impossible} label{' of half A has' if impossible == 1 else 's of half A have'} probability 0"
        return FittedCalibrator(Identity(), f"no {name} is applied: {what}, and so the NLL is infinite with any")
    if not errors:
        return FittedCalibrator(Identity(), f"no {name} is applied: {found}, which cannot tell one")
    calibrator = family.fit(log_probabilities_SNK, labels_N)
    if isinstance(calibrator, Identity):
        return FittedCalibrator(calibrator, f"no {name} is applied: on half A the NLL is no lower with it than without")
    bounded = isinstance(calibrator, Temperature) and calibrator.at_bound
    if errors >= MIN_ERRORS and not bounded:
        return FittedCalibrator(calibrator, None)
    known = _known(calibrator, log_probabilities_SNK, labels_N)
    if bounded and isinstance(calibrator, Temperature):
        return FittedCalibrator(
            calibrator, f"the temperature is at the bound of its range, {calibrator.temperature:g}: {found}; {known}"
        )
    return FittedCalibrator(calibrator, f"{found}, too few to fit well: {known}")


def _known(calibrator: Calibrator, log_probabilities_SNK: Tensor, labels_N: Tensor) -> str:
    """Return between which temperatures the best one lies, as far as the split can tell."""
    if isinstance(calibrator, BayesianTemperature):
        low, high = calibrator.interval(0.95)
        return f"the temperature lies between {low:.2f} and {high:.2f} (95 % posterior interval)"
    low, high = likelihood_interval(log_probabilities_SNK, labels_N)
    subject = "the" if isinstance(calibrator, Temperature) else "even a single"
    return f"{subject} temperature is only known to lie between {low:.2f} and {high:.2f} (95 % likelihood interval)"


def _num_impossible(log_probabilities_SNK: Tensor, labels_N: Tensor) -> int:
    """Return how many labels have probability 0 in every draw."""
    labels_SN1 = labels_N[None, :, None].expand(len(log_probabilities_SNK), -1, 1)
    return int(log_probabilities_SNK.gather(2, labels_SN1).isneginf().all(0).sum())


def _num_errors(log_probabilities_SNK: Tensor, labels_N: Tensor) -> int:
    """Return how many labels are not the class with the highest mean probability."""
    num_draws, _, num_classes = log_probabilities_SNK.shape
    step = max(1, CHUNK_ELEMENTS // (num_draws * num_classes))
    parts = [torch.logsumexp(part_SBK.double(), 0).argmax(1) for part_SBK in log_probabilities_SNK.split(step, 1)]
    return int((torch.cat(parts) != labels_N).sum())
