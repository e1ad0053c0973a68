"""Bayesian temperature: the posterior against brute force, its coverage over simulated splits, and its map on draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor

from bayesnet.calibration import calibrator_from_json, nll_of_mean
from bayesnet.calibration.bayesian_temperature import (
    MIN_DRAWS,
    NUM_QUANTILES,
    BayesianTemperature,
    TemperaturePosterior,
    fit,
    posterior_of_temperature,
)
from bayesnet.calibration.identity import Identity
from bayesnet.calibration.temperature import MAX_TEMPERATURE, MIN_TEMPERATURE, Temperature
from bayesnet.errors import CheckpointError

BOUNDS = (math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))


def split(num_draws: int, num_examples: int, seed: int, log_temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of 4 classes, and labels drawn from the mean of the draws at a temperature."""
    generator = torch.Generator().manual_seed(seed)
    centre = 2 * torch.randn(1, num_examples, 4, generator=generator, dtype=torch.float64)
    spread = torch.randn(num_draws, num_examples, 4, generator=generator, dtype=torch.float64)
    log_p = torch.log_softmax(centre + 0.7 * spread, 2)
    mean = torch.softmax(log_p / math.exp(log_temperature), 2).mean(0)
    return log_p, torch.multinomial(mean, 1, generator=generator)[:, 0]


def brute_force(log_p: Tensor, labels: Tensor, points: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return log T over its whole range and the posterior's mass below it, by Simpson's rule and the plain NLL."""
    grid = np.linspace(*BOUNDS, points)
    temperatures = np.exp(grid).clip(MIN_TEMPERATURE, MAX_TEMPERATURE)
    log_values = np.array([-len(labels) * nll_of_mean(log_p, labels, Temperature(t)) for t in temperatures])
    log_values += -(grid**2) / 2
    values = np.exp(log_values - log_values.max())
    panels = (values[:-2:2] + 4 * values[1:-1:2] + values[2::2]) / 3
    mass = np.r_[0, np.cumsum(panels)]
    return grid[::2], mass / mass[-1]


@pytest.mark.parametrize(("num_draws", "num_examples"), [(1, 3), (1, 60), (5, 30), (80, 40), (80, 150)])
def test_posterior_is_that_of_brute_force(num_draws: int, num_examples: int) -> None:
    """Also where draws are thinned to look for it (80 draws)."""
    log_p, labels = split(num_draws, num_examples, 3, 0.4)
    grid, mass = brute_force(log_p, labels, 1201)
    temperatures = posterior_of_temperature(log_p, labels).quantiles(np.array([0.01, 0.1, 0.5, 0.9, 0.99]))
    assert np.interp(np.log(temperatures), grid, mass) == pytest.approx([0.01, 0.1, 0.5, 0.9, 0.99], abs=5e-4)


def test_two_modes_far_apart_are_both_kept() -> None:
    """Draws of which some are sure and right and the others sure and wrong: cold or hot, but not in between."""
    generator = torch.Generator().manual_seed(0)
    log_p = torch.log_softmax(6 * torch.randn(3, 40, 3, generator=generator, dtype=torch.float64), 2)
    labels = torch.randint(3, (40,), generator=generator)
    labels[:24] = log_p[0].argmax(1)[:24]
    grid, mass = brute_force(log_p, labels, 1201)
    temperatures = posterior_of_temperature(log_p, labels).quantiles(np.array([0.05, 0.5, 0.95]))
    assert np.interp(np.log(temperatures), grid, mass) == pytest.approx([0.05, 0.5, 0.95], abs=5e-4)


Posterior = Callable[[Tensor, Tensor], TemperaturePosterior]


def covered(posterior: Posterior, level: float, repeats: int = 300) -> int:
    """Return in how many of the splits, each of a T from the prior, the central interval holds that T."""
    rng = np.random.default_rng(5)
    hits = 0
    for repeat in range(repeats):
        log_temperature = math.inf
        while not BOUNDS[0] <= log_temperature <= BOUNDS[1]:
            log_temperature = rng.standard_normal()
        found = posterior(*split(4, 30, 1000 + repeat, log_temperature))
        low, high = found.quantiles(np.array([(1 - level) / 2, (1 + level) / 2]))
        hits += low <= math.exp(log_temperature) <= high
    return hits


def narrowed(log_p: Tensor, labels: Tensor) -> TemperaturePosterior:
    """The planted fault: every distance from the posterior's mean 0.7 times as long."""
    grid, density = posterior_of_temperature(log_p, labels)
    centre = float((grid * density).sum() / density.sum())
    return TemperaturePosterior(centre + 0.7 * (grid - centre), density / 0.7)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_hold_the_temperature_as_often_as_they_say(level: float) -> None:
    """300 splits from the prior; binomial bounds, false alarm 1e-6 a level; the smallest scale caught is about 0.75."""
    low, high = binom.ppf([5e-7, 1 - 5e-7], 300, level)
    assert low <= covered(posterior_of_temperature, level) <= high


def test_an_overconfident_posterior_is_caught() -> None:
    """The control: intervals 0.7 times as wide leave the bounds at 80 %."""
    assert covered(narrowed, 0.8) < binom.ppf(5e-7, 300, 0.8)


def test_a_large_split_knows_the_temperature() -> None:
    """False alarm 1e-6."""
    log_p, labels = split(8, 3000, 2, 0.6)
    found = fit(log_p, labels)
    assert isinstance(found, BayesianTemperature)
    low, high = posterior_of_temperature(log_p, labels).quantiles(np.array([5e-7, 1 - 5e-7]))
    assert low < math.exp(0.6) < high
    assert high / low < 1.6
    assert low < found.interval(0.95)[0] < found.interval(0.95)[1] < high
    assert nll_of_mean(log_p, labels, found) < nll_of_mean(log_p, labels) - 0.05


def test_every_draw_meets_every_part_of_the_posterior() -> None:
    quantiles = np.linspace(0.5, 2.0, NUM_QUANTILES)
    calibrator = BayesianTemperature(quantiles.tolist())
    log_p = torch.tensor([0.8, 0.2], dtype=torch.float64).log()
    for num_draws in (1, 3, 48, 64, 100, 256, 300):
        out = calibrator.num_draws(num_draws)
        mapped = calibrator(log_p.repeat(num_draws, 1, 1))
        assert len(mapped) == out >= MIN_DRAWS
        # log p_1 - log p_2 is log 4 / T: what each draw met, repeats by draws.
        met = (math.log(4) / (mapped[:, 0, 0] - mapped[:, 0, 1])).numpy()
        expected = calibrator.quantiles((np.arange(out) + 0.5) / out)
        assert np.sort(met) == pytest.approx(expected, abs=1e-9)
        parts = met.reshape(-1, num_draws)
        assert (parts[1:].min(1) >= parts[:-1].max(1) - 1e-12).all()
    # Repeated draws stay themselves: each image's draws are those given, one after the other.
    two = torch.tensor([[[0.8, 0.2]], [[0.3, 0.7]]], dtype=torch.float64).log()
    assert (calibrator(two)[:, 0].argmax(1).reshape(-1, 2) == torch.tensor([0, 1])).all()


def test_temperatures_do_not_follow_the_order_of_the_draws() -> None:
    calibrator = BayesianTemperature(np.linspace(0.5, 2.0, NUM_QUANTILES).tolist())
    mapped = calibrator(torch.tensor([0.8, 0.2], dtype=torch.float64).log().repeat(256, 1, 1))
    met = (math.log(4) / (mapped[:, 0, 0] - mapped[:, 0, 1])).numpy()
    # 1 / sqrt(256) is the standard deviation of each under independence; a fixed table, so no false alarm.
    position = np.arange(256)
    for order in (position, position % 2, position % 4 >= 2, position % 16, position // 64 % 2):
        assert abs(np.corrcoef(met, order)[0, 1]) < 3 / 16
    # The table is part of the format: a run predicts the same tomorrow.
    assert met[:3] == pytest.approx(calibrator.quantiles((np.array([61, 111, 126]) + 0.5) / 256), abs=1e-9)


def test_the_twin_gets_intervals() -> None:
    log_p, labels = split(1, 60, 4, 0.7)
    found = fit(log_p, labels)
    p = found(log_p).exp()
    assert p.shape == (MIN_DRAWS, 60, 4)
    assert float((p.amax(0) - p.amin(0)).amax(1).min()) > 1e-3


def test_an_impossible_label() -> None:
    log_p, labels = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]], dtype=torch.float64).log(), torch.tensor([1, 0])
    assert isinstance(fit(log_p, labels), Identity)
    with pytest.raises(ValueError, match="a label has probability 0 in every draw"):
        posterior_of_temperature(log_p, labels)


@pytest.mark.parametrize(
    "temperatures",
    [
        [1.0] * 255,
        [1.0] * 255 + [0.9],
        [0.04] + [1.0] * 255,
        [1.0] * 255 + [20.1],
        [1.0] * 255 + [math.nan],
        [True] * 256,
        ["1"] * 256,
        None,
        1.0,
    ],
)
def test_damage_is_refused(temperatures: object) -> None:
    assert calibrator_from_json({"name": "bayesian_temperature", "temperatures": [1] * 256})
    with pytest.raises(CheckpointError, match=r"quantiles of the temperature cannot be used .*: expected 256 rising"):
        calibrator_from_json({"name": "bayesian_temperature", "temperatures": temperatures})


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="not 256 rising temperatures"):
        BayesianTemperature([1.0])
