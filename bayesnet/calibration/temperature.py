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

from bayesnet.calibration.base import Calibrator, CalibratorFamily, check_calibration_data, is_number
from bayesnet.calibration.draw_chunks import DrawChunks
from bayesnet.errors import CheckpointError
from bayesnet.types import JsonObject

MIN_TEMPERATURE = 0.05
MAX_TEMPERATURE = 20.0
LIKELIHOOD_DROP = 1.92
_GRID_POINTS = 17
_TOLERANCE = 1e-7  # of log T


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

    For one draw the NLL is convex in 1 / T; for more it need not be, so each dip of a coarse grid of log T is refined
    by a bounded Brent search. If the top class is the label everywhere, the NLL falls all the way and T ends at the
    lower bound, 0.05: the split is then too small to say more, and `fit_calibrator` applies none. A label with
    probability 0 in every draw makes every NLL infinite, and T stays 1.

    Args:
        log_probabilities_SNK: (draws, examples, classes), normalised, of the calibration split.
        labels_N: (examples,), int64.

    Raises:
        ValueError: The tensors are not log-probabilities and labels.
    """
    check_calibration_data(log_probabilities_SNK, labels_N)
    chunks = DrawChunks(log_probabilities_SNK, labels_N)
    best, log_temperature = min(_minima(chunks))
    # A gain within rounding is none: NLL is summed in another order where it is reported.
    return _at(log_temperature) if best < chunks.tempered_nll(0.0) - 1e-12 else Temperature(1.0)


def likelihood_interval(log_probabilities_SNK: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """Return between which temperatures the log-likelihood of the split is within 1.92 of its best.

    1.92 is half the 95 % quantile of chi squared with 1 degree of freedom: for a large split the interval holds the
    temperature that fits best in 95 % of splits. Where several stretches are as likely, it spans them all.

    Args:
        log_probabilities_SNK: (draws, examples, classes), normalised.
        labels_N: (examples,), int64.

    Returns:
        Lower and upper end, from MIN_TEMPERATURE to MAX_TEMPERATURE; all of it where a label has probability 0.

    Raises:
        ValueError: The tensors are not log-probabilities and labels.
    """
    from scipy.optimize import brentq

    check_calibration_data(log_probabilities_SNK, labels_N)
    chunks = DrawChunks(log_probabilities_SNK, labels_N)
    minima = _minima(chunks)
    if not math.isfinite(min(minima)[0]):
        return MIN_TEMPERATURE, MAX_TEMPERATURE
    limit = min(minima)[0] + LIKELIHOOD_DROP / chunks.num_examples
    points = sorted(point for _, point in minima)
    inside = [index for index, point in enumerate(points) if chunks.tempered_nll(point) <= limit]

    def end(within: int, outside: int) -> float:
        if not 0 <= outside < len(points):
            return points[within]
        around = sorted((points[within], points[outside]))
        return float(brentq(lambda point: chunks.tempered_nll(point) - limit, *around, xtol=1e-4))

    ends = end(inside[0], inside[0] - 1), end(inside[-1], inside[-1] + 1)
    return _at(ends[0]).temperature, _at(ends[1]).temperature


def from_json(entry: JsonObject) -> Temperature:
    """Return the calibrator that `Temperature.to_json` wrote.

    Raises:
        CheckpointError: Other keys, or a temperature that is not a number in range.
    """
    if set(entry) != {"name", "temperature"}:
        raise CheckpointError("temperature calibrator has unexpected keys", where=", ".join(sorted(map(str, entry))))
    value = entry["temperature"]
    if not is_number(value, MIN_TEMPERATURE, MAX_TEMPERATURE):
        hint = f"expected a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}; run calibrate again"
        raise CheckpointError("temperature cannot be used", where=repr(value), hint=hint)
    return Temperature(value)


def _minima(chunks: DrawChunks) -> list[tuple[float, float]]:
    """Return (NLL, log T) at the points of a coarse grid and at the bottom of each of its dips, refined."""
    from scipy.optimize import minimize_scalar  # half a second to import, and predicting needs none of it

    grid = np.linspace(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE), _GRID_POINTS).tolist()
    losses = [chunks.tempered_nll(point) for point in grid]
    found = list(zip(losses, grid, strict=True))
    if math.isfinite(min(losses)):
        for index in _dips(losses):
            bounds = (grid[max(index - 1, 0)], grid[min(index + 1, _GRID_POINTS - 1)])
            bottom = minimize_scalar(
                chunks.tempered_nll, bounds=bounds, method="bounded", options={"xatol": _TOLERANCE}
            )
            found.append((float(bottom.fun), float(bottom.x)))
    return found


def _at(log_temperature: float) -> Temperature:
    """Return exp(log T), which can miss the bounds by a rounding error."""
    return Temperature(min(max(math.exp(log_temperature), MIN_TEMPERATURE), MAX_TEMPERATURE))


def _dips(losses: list[float]) -> list[int]:
    """Return the indices of the grid points that no neighbour is below."""
    padded = [math.inf, *losses, math.inf]
    return [index for index in range(len(losses)) if padded[index + 1] <= min(padded[index], padded[index + 2])]


FAMILY = CalibratorFamily(Temperature.name, fit, from_json)
