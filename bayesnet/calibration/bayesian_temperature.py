"""Bayesian temperature scaling: the temperature has a posterior, and every draw its own temperature from it.

    log posterior(T) = -N nll(T) + log Normal(log T; 0, 1) + constant,    0.05 <= T <= 20

with nll(T) the NLL that a temperature is fitted on: of the mean of the draws softmax(log p / T). The prior is weak: it
puts T between 1/7 and 7 with probability 0.95. The posterior is one-dimensional and found by quadrature on a grid, with
no approximation but its spacing. On a small split a temperature is hardly known, and intervals become as much wider;
a deterministic model, of one draw, gets intervals at all: with fewer than 64 draws each is repeated, so that at least
64 come out.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesnet.calibration.base import Calibrator, CalibratorFamily, check_calibration_data, is_number, nll_of_mean
from bayesnet.calibration.draw_chunks import DrawChunks
from bayesnet.calibration.identity import Identity
from bayesnet.calibration.temperature import MAX_TEMPERATURE, MIN_TEMPERATURE
from bayesnet.errors import CheckpointError
from bayesnet.types import JsonObject

NUM_QUANTILES = 256
MIN_DRAWS = 64
_BOUNDS = (math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
_GRID_POINTS, _FINE_POINTS = 33, 4001
_NEGLIGIBLE = 20.0  # nats below the mode, where no mass is left
_FEW_DRAWS = 32


class TemperaturePosterior(NamedTuple):
    """The posterior of log T on a grid.

    Attributes:
        log_temperature_M: Grid of log T, evenly spaced.
        density_M: Its density, of integral 1 by the trapezoidal rule.
    """

    log_temperature_M: NDArray[np.float64]
    density_M: NDArray[np.float64]

    def quantiles(self, levels: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the temperatures below which the posterior has these masses, each from 0 to 1."""
        mass_M = _cumulative(self.density_M, self.log_temperature_M)
        temperatures: NDArray[np.float64] = np.exp(np.interp(levels * mass_M[-1], mass_M, self.log_temperature_M))
        return temperatures.clip(MIN_TEMPERATURE, MAX_TEMPERATURE)


class BayesianTemperature(Calibrator):
    """Divide the log-probabilities of each draw by its own temperature and normalise.

    With R repeats of S draws the temperatures are the R S quantiles of the posterior in the middle of R S equal parts
    of its mass. Repeat r takes part r of R, and its S temperatures go to the draws by a permutation that is fixed: it
    does not follow their order, which is that of a low-discrepancy sequence. So each draw meets every part.

    Args:
        temperatures: NUM_QUANTILES quantiles of the posterior, never falling, from MIN_TEMPERATURE to MAX_TEMPERATURE.

    Example:
        >>> calibrator = BayesianTemperature([1.0] * 128 + [2.0] * 128)
        >>> calibrator.num_draws(1), calibrator.num_draws(48), calibrator.num_draws(256)
        (64, 96, 256)
        >>> calibrator.interval(0.9)
        (1.0, 2.0)
    """

    name: ClassVar[str] = "bayesian_temperature"

    def __init__(self, temperatures: Sequence[float]) -> None:
        if not _right(list(temperatures)):
            raise ValueError(f"not {NUM_QUANTILES} rising temperatures; got {str(temperatures)[:80]}")
        self.temperatures = [float(each) for each in temperatures]

    def __call__(self, log_probabilities_SBK: Tensor) -> Tensor:
        """Return log softmax(log p / T) of every draw, each with its own T."""
        num_draws = len(log_probabilities_SBK)
        repeats = self.num_draws(num_draws) // num_draws
        levels = (np.array(_places(num_draws, repeats)) + 0.5) / (num_draws * repeats)
        temperature_S = log_probabilities_SBK.new_tensor(self.quantiles(levels))
        return torch.log_softmax(log_probabilities_SBK.repeat(repeats, 1, 1) / temperature_S[:, None, None], 2)

    def num_draws(self, num_draws: int) -> int:
        """Return the least multiple of the draws that is at least MIN_DRAWS."""
        return num_draws * math.ceil(MIN_DRAWS / num_draws)

    def quantiles(self, levels: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return posterior quantiles of T, interpolated in log T; beyond the stored ones, the outermost."""
        stored = (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
        return np.exp(np.interp(levels, stored, np.log(self.temperatures))).clip(MIN_TEMPERATURE, MAX_TEMPERATURE)

    def interval(self, level: float) -> tuple[float, float]:
        """Return the equal-tailed posterior interval of T with mass ``level``, such as 0.95."""
        low, high = self.quantiles(np.array([(1 - level) / 2, (1 + level) / 2]))
        return float(low), float(high)

    def to_json(self) -> JsonObject:
        """Return the name and the quantiles."""
        return {"name": self.name, "temperatures": self.temperatures}


def posterior_of_temperature(log_probabilities_SNK: Tensor, labels_N: Tensor) -> TemperaturePosterior:
    """Return the posterior of log T given a calibration split, by quadrature in float64.

    The stretch that holds all but exp(-20) of the mode's density is found on thinned draws, and checked on all; there
    the log-likelihood is computed at 33 points and interpolated by a cubic spline.

    Args:
        log_probabilities_SNK: (draws, examples, classes), normalised.
        labels_N: (examples,), int64; each with a probability above 0 in some draw.

    Raises:
        ValueError: The tensors are not log-probabilities and labels, or a label has probability 0 in every draw.
    """
    from scipy.interpolate import CubicSpline

    check_calibration_data(log_probabilities_SNK, labels_N)
    if not math.isfinite(nll_of_mean(log_probabilities_SNK, labels_N)):
        raise ValueError("a label has probability 0 in every draw")
    full = DrawChunks(log_probabilities_SNK, labels_N)
    every = len(log_probabilities_SNK) // _FEW_DRAWS
    bounds = _BOUNDS if every <= 1 else _support(DrawChunks(log_probabilities_SNK, labels_N, every=every), _BOUNDS)
    grid_M, values_M = _grid(full, bounds)
    if not _holds_all(grid_M, values_M):
        grid_M, values_M = _grid(full, _support(full, _BOUNDS))
    fine_M = np.linspace(grid_M[0], grid_M[-1], _FINE_POINTS)
    log_density_M = CubicSpline(grid_M, values_M)(fine_M)
    density_M = np.exp(log_density_M - log_density_M.max())
    return TemperaturePosterior(fine_M, density_M / _cumulative(density_M, fine_M)[-1])


def fit(log_probabilities_SNK: Tensor, labels_N: Tensor) -> Calibrator:
    """Return the posterior's quantiles, or the identity where the NLL with them is above that without.

    An average over the posterior can do worse on the split than a temperature of 1, where that is close to the best:
    the uncalibrated model is then as good as any, and is kept. So it is where a label has probability 0 in every draw.

    Args:
        log_probabilities_SNK: (draws, examples, classes), normalised, of the calibration split.
        labels_N: (examples,), int64.

    Raises:
        ValueError: The tensors are not log-probabilities and labels.
    """
    check_calibration_data(log_probabilities_SNK, labels_N)
    before = nll_of_mean(log_probabilities_SNK, labels_N)
    if not math.isfinite(before):
        return Identity()
    posterior = posterior_of_temperature(log_probabilities_SNK, labels_N)
    found = BayesianTemperature(posterior.quantiles((np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES).tolist())
    return found if nll_of_mean(log_probabilities_SNK, labels_N, found) <= before else Identity()


def from_json(entry: JsonObject) -> BayesianTemperature:
    """Return the calibrator that `BayesianTemperature.to_json` wrote.

    Raises:
        CheckpointError: Other keys, or temperatures that are not as many as stored, falling or out of range.
    """
    if set(entry) != {"name", "temperatures"}:
        where = ", ".join(sorted(map(str, entry)))
        raise CheckpointError("bayesian_temperature calibrator has unexpected keys", where=where)
    if not _right(entry["temperatures"]):
        hint = f"expected {NUM_QUANTILES} rising numbers; run calibrate again"
        raise CheckpointError("quantiles of the temperature cannot be used", where=repr(entry)[:160], hint=hint)
    return BayesianTemperature(entry["temperatures"])


def _right(temperatures: object) -> bool:
    return (
        isinstance(temperatures, list)
        and len(temperatures) == NUM_QUANTILES
        and all(is_number(each, MIN_TEMPERATURE, MAX_TEMPERATURE) for each in temperatures)
        and all(left <= right for left, right in pairwise(temperatures))
    )


def _cumulative(density_M: NDArray[np.float64], grid_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the integral up to each point of the grid, by the trapezoidal rule."""
    return np.concatenate([[0.0], np.cumsum(np.diff(grid_M) * (density_M[1:] + density_M[:-1]) / 2)])


def _grid(chunks: DrawChunks, bounds: tuple[float, float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a grid of log T between the bounds and the log posterior on it, up to a constant."""
    grid_M = np.linspace(*bounds, _GRID_POINTS)
    values = [-chunks.num_examples * chunks.tempered_nll(point) - point**2 / 2 for point in grid_M.tolist()]
    return grid_M, np.array(values)


def _support(chunks: DrawChunks, bounds: tuple[float, float]) -> tuple[float, float]:
    """Return where the posterior is not negligible, closing in on it grid by grid."""
    while True:
        grid_M, values_M = _grid(chunks, bounds)
        near = np.flatnonzero(values_M >= values_M.max() - _NEGLIGIBLE)
        inner = float(grid_M[max(near[0] - 1, 0)]), float(grid_M[min(near[-1] + 1, _GRID_POINTS - 1)])
        if inner[1] - inner[0] > 0.5 * (bounds[1] - bounds[0]):
            return inner
        bounds = inner


def _holds_all(grid_M: NDArray[np.float64], values_M: NDArray[np.float64]) -> bool:
    """Return whether each end is at the end of the range or negligible, and the mode is not between two points."""
    ends = [(grid_M[0], values_M[0], _BOUNDS[0]), (grid_M[-1], values_M[-1], _BOUNDS[1])]
    closed = all(value < values_M.max() - 0.6 * _NEGLIGIBLE or math.isclose(at, end) for at, value, end in ends)
    return closed and int((values_M >= values_M.max() - _NEGLIGIBLE).sum()) > _GRID_POINTS // 3


@functools.lru_cache(maxsize=64)
def _places(num_draws: int, repeats: int) -> tuple[int, ...]:
    """Return which quantile each draw of each repeat takes, by a hash: the same on every machine and version."""

    def hashed(repeat: int, draw: int) -> bytes:
        return hashlib.sha256(f"{repeat} {draw}".encode()).digest()

    orders = [sorted(range(num_draws), key=functools.partial(hashed, repeat)) for repeat in range(repeats)]
    return tuple(repeat * num_draws + place for repeat, order in enumerate(orders) for place in order)


FAMILY = CalibratorFamily(BayesianTemperature.name, fit, from_json)
