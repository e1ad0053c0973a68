"""Temperature scaling: every draw becomes softmax(log p / T), with one T for all images and classes.

T > 1 lowers confidence, T < 1 raises it; no draw's ranking of the classes changes, though that of their mean can.
Cost: some forty evaluations of the negative log-likelihood, no gradient.

Reference: Guo, Pleiss, Sun & Weinberger, On Calibration of Modern Neural Networks, 2017.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bayesnet.calibration.base import Calibrator, CalibratorFamily, check_calibration_data, nll_of_mean
from bayesnet.errors import CheckpointError
from bayesnet.types import JsonObject

MIN_TEMPERATURE = 0.05
MAX_TEMPERATURE = 20.0
_GRID_POINTS = 17


class Temperature(Calibrator):
    """Divide the log-probabilities by a temperature and normalise; a temperature of 1 changes no bit.

    Args:
        temperature: From MIN_TEMPERATURE to MAX_TEMPERATURE.

    Example:
        >>> hot = Temperature(2.0)(torch.tensor([[[0.8, 0.2]]]).log())
        >>> [round(p, 4) for p in hot.exp().flatten().tolist()]
        [0.6667, 0.3333]
    """

    name: ClassVar[str] = "temperature"

    def __init__(self, temperature: float) -> None:
        if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:  # also refuses NaN
            raise ValueError(f"temperature must be from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}; got {temperature!r}")
        self.temperature = float(temperature)

    def __call__(self, log_probabilities_SBK: Tensor) -> Tensor:
        """Return log softmax(log p / T) of every draw."""
        if self.temperature == 1:
            return log_probabilities_SBK
        return torch.log_softmax(log_probabilities_SBK / self.temperature, 2)

    @property
    def at_bound(self) -> bool:
        """Whether T is at an end of its range: every label was the top class (low end) or labels look random (high)."""
        bounds = (MIN_TEMPERATURE, MAX_TEMPERATURE)
        return any(math.isclose(self.temperature, bound, rel_tol=1e-4) for bound in bounds)

    def to_json(self) -> JsonObject:
        """Return the name and the temperature."""
        return {"name": self.name, "temperature": self.temperature}


def fit(log_probabilities_SNK: Tensor, labels_N: Tensor) -> Temperature:
    """Return the temperature with the lowest NLL of the mean of the mapped draws, or 1 if none is below that of 1.

    For one draw the NLL is unimodal in T; for more it need not be, so each dip of a coarse grid of log T is refined by
    a bounded Brent search. If the top class is the label everywhere, the NLL falls all the way and T ends at the lower
    bound, 0.05: the split is then too small to say more. A label with probability 0 in every draw makes every
    NLL infinite, and T stays 1.

    Args:
        log_probabilities_SNK: (draws, examples, classes), normalised, of the calibration split.
        labels_N: (examples,), int64.

    Raises:
        ValueError: The tensors are not log-probabilities and labels.
    """
    from scipy.optimize import minimize_scalar  # half a second to import, and predicting needs none of it

    check_calibration_data(log_probabilities_SNK, labels_N)

    def loss(log_temperature: float) -> float:
        return nll_of_mean(log_probabilities_SNK, labels_N, _at(log_temperature))

    grid = np.linspace(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE), _GRID_POINTS)
    losses = [loss(point) for point in grid]
    candidates = list(zip(losses, grid, strict=True))
    if math.isfinite(min(losses)):
        for index in _dips(losses):
            bounds = (grid[max(index - 1, 0)], grid[min(index + 1, _GRID_POINTS - 1)])
            found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-7})
            candidates.append((float(found.fun), float(found.x)))
    best, log_temperature = min(candidates)
    before = nll_of_mean(log_probabilities_SNK, labels_N)
    return _at(log_temperature) if best < before else Temperature(1.0)


def from_json(entry: JsonObject) -> Temperature:
    """Return the calibrator that `Temperature.to_json` wrote.

    Raises:
        CheckpointError: Other keys, or a temperature that is not a number in range.
    """
    if set(entry) != {"name", "temperature"}:
        raise CheckpointError("temperature calibrator has unexpected keys", where=", ".join(sorted(map(str, entry))))
    value = entry["temperature"]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
        hint = f"expected a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}; run calibrate again"
        raise CheckpointError("temperature cannot be used", where=repr(value), hint=hint)
    return Temperature(value)


def _at(log_temperature: float) -> Temperature:
    """Return exp(log T), which can miss the bounds by a rounding error."""
    return Temperature(min(max(math.exp(log_temperature), MIN_TEMPERATURE), MAX_TEMPERATURE))


def _dips(losses: list[float]) -> list[int]:
    """Return the indices of the grid points that no neighbour is below."""
    padded = [math.inf, *losses, math.inf]
    return [index for index in range(len(losses)) if padded[index + 1] <= min(padded[index], padded[index + 2])]


FAMILY = CalibratorFamily(Temperature.name, fit, from_json)
