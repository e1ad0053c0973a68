"""Temperature scaling: optimal, recovering the truth, strict when read back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from bayesnet.calibration import CALIBRATORS, calibrator_from_json, nll_of_mean
from bayesnet.calibration.draw_chunks import DrawChunks
from bayesnet.calibration.temperature import MAX_TEMPERATURE, MIN_TEMPERATURE, Temperature, fit, likelihood_interval
from bayesnet.errors import CheckpointError


def problem(
    num_draws: int, num_examples: int, num_classes: int, seed: int, *, true: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and labels drawn from their mean after scaling by the true temperature."""
    generator = torch.Generator().manual_seed(seed)
    centre = 2 * torch.randn(1, num_examples, num_classes, generator=generator, dtype=torch.float64)
    spread = torch.randn(num_draws, num_examples, num_classes, generator=generator, dtype=torch.float64)
    log_p = torch.log_softmax(centre + 0.7 * spread, 2)
    mean = torch.softmax(log_p / true, 2).mean(0)
    return log_p, torch.multinomial(mean, 1, generator=generator)[:, 0]


def plain_nll(log_p: Tensor, labels: Tensor, log_t: float) -> float:
    """NLL of the mean of the mapped draws, written the plain way, in the dtype of the draws."""
    scaled = torch.softmax(log_p / math.exp(log_t), 2).mean(0)
    return -float(scaled[torch.arange(len(labels)), labels].log().mean())


def brent(log_p: Tensor, labels: Tensor) -> float:
    bounds = (math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
    options = {"xatol": 1e-10}
    found = minimize_scalar(lambda at: plain_nll(log_p, labels, at), bounds=bounds, method="bounded", options=options)
    return float(found.fun)


def test_200_problems_are_solved_as_well_as_by_brent_in_float64() -> None:
    """One draw, so unimodal; the NLL is within 1e-6 of the oracle's, and never above that at T = 1."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(200):
        n, k = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((5, 80), (2, 7)))
        true = math.exp(float(torch.empty(1).uniform_(-1.2, 1.4, generator=generator)))
        log_p, labels = problem(1, n, k, seed, true=true)
        log_p, oracle = log_p.float(), brent(log_p, labels)
        after = nll_of_mean(log_p, labels, fit(log_p, labels))
        assert after <= oracle + 1e-6
        assert after <= nll_of_mean(log_p, labels)


def test_draws_are_scaled_and_not_their_mean() -> None:
    """Planted: the temperature that is best for the mean is not for the draws."""
    log_p, labels = problem(20, 400, 4, 0, true=2.0)
    mean = log_p.exp().mean(0, keepdim=True).log()
    right, wrong = (nll_of_mean(log_p, labels, fit(each, labels)) for each in (log_p, mean))
    assert right < wrong - 1e-4
    assert right <= min(plain_nll(log_p, labels, at / 20) for at in range(-40, 41)) + 1e-6


def test_float32_draws_are_computed_in_float64() -> None:
    """Planted: the same in float32 is wrong by more than a search with tolerance 1e-7 of log T can see."""
    log_p, labels = problem(5, 500, 4, 0)
    stored = log_p.float()
    exact = plain_nll(stored.double(), labels, 0.3)
    assert DrawChunks(stored, labels).tempered_nll(0.3) == pytest.approx(exact, abs=1e-12)
    assert abs(plain_nll(stored, labels, 0.3) - exact) > 1e-10


@pytest.mark.parametrize(("num_draws", "num_examples"), [(1, 10), (1, 300), (6, 40)])
def test_likelihood_interval_ends_where_the_likelihood_has_fallen_by_1_92(num_draws: int, num_examples: int) -> None:
    log_p, labels = problem(num_draws, num_examples, 3, 8, true=1.5)
    ends = likelihood_interval(log_p, labels)
    best = nll_of_mean(log_p, labels, fit(log_p, labels))
    falls = [num_examples * (nll_of_mean(log_p, labels, Temperature(end)) - best) for end in ends]
    assert ends[0] < fit(log_p, labels).temperature < ends[1]
    for end, fall, bound in zip(ends, falls, (MIN_TEMPERATURE, MAX_TEMPERATURE), strict=True):
        assert fall == pytest.approx(1.92, abs=0.01) or (end == pytest.approx(bound) and fall < 1.92)


def test_likelihood_interval_of_labels_that_say_nothing() -> None:
    log_p = torch.tensor([[[1.0, 0.0], [0.6, 0.4]]], dtype=torch.float64).log()
    assert likelihood_interval(log_p, torch.tensor([1, 0])) == (MIN_TEMPERATURE, MAX_TEMPERATURE)
    low, high = likelihood_interval(log_p, torch.tensor([0, 0]))
    assert (low, high) == pytest.approx((MIN_TEMPERATURE, MAX_TEMPERATURE))


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 6), st.integers(3, 20), st.integers(0, 2**31))
def test_many_draws_are_as_good_as_a_fine_grid(s: int, n: int, seed: int) -> None:
    log_p, labels = problem(s, n, 3, seed)
    log_p = torch.log_softmax(5 * log_p, 2)  # draws that disagree: the NLL has more than one dip in places
    grid = torch.logspace(math.log10(MIN_TEMPERATURE), math.log10(MAX_TEMPERATURE), 400, dtype=torch.float64).tolist()
    best = min(nll_of_mean(log_p, labels, Temperature(min(max(t, MIN_TEMPERATURE), MAX_TEMPERATURE))) for t in grid)
    assert nll_of_mean(log_p, labels, fit(log_p, labels)) <= best + 1e-6


@pytest.mark.parametrize("num_draws", [1, 8])
@pytest.mark.parametrize("true", [0.6, 1.0, 2.5])
def test_recovers_the_true_temperature(num_draws: int, true: float) -> None:
    """The error of log T is the inverse square root of the observed information; false alarm 1e-6 a case."""
    log_p, labels = problem(num_draws, 4000, 5, 7, true=true)
    found = math.log(fit(log_p, labels).temperature)
    step = 0.02
    around = [nll_of_mean(log_p, labels, Temperature(math.exp(found + shift))) for shift in (-step, 0, step)]
    information = 4000 * (around[0] - 2 * around[1] + around[2]) / step**2
    assert 1 / math.sqrt(information) < 0.05  # the bound below means something
    assert abs(found - math.log(true)) < 4.892 / math.sqrt(information)


def test_labels_all_right_end_at_the_lower_bound() -> None:
    log_p, _ = problem(1, 50, 4, 3)
    labels = log_p[0].argmax(1)
    found = fit(log_p, labels)
    assert found.temperature == pytest.approx(MIN_TEMPERATURE, rel=1e-6)
    assert found.at_bound
    assert math.isfinite(nll_of_mean(log_p, labels, found))
    assert found(log_p).exp().sum(2) == pytest.approx(1)


def test_a_label_of_probability_zero_leaves_the_temperature_at_one() -> None:
    log_p = torch.tensor([[[0.0, -math.inf], [math.log(0.6), math.log(0.4)]]], dtype=torch.float64)
    labels = torch.tensor([1, 0])
    assert nll_of_mean(log_p, labels) == math.inf
    assert fit(log_p, labels).temperature == 1


def test_an_impossible_class_that_is_no_label_is_no_problem() -> None:
    log_p = torch.tensor([[[0.6, 0.4, 0.0], [0.7, 0.3, 0.0], [0.8, 0.2, 0.0]]], dtype=torch.float64).log()
    found = fit(log_p, torch.tensor([0, 1, 0]))
    assert found(log_p)[..., 2].exp().abs().max() == 0
    assert math.isfinite(nll_of_mean(log_p, torch.tensor([0, 1, 0]), found))


def test_temperature_one_and_identity_change_no_bit() -> None:
    log_p, labels = problem(2, 10, 3, 1)
    assert torch.equal(Temperature(1.0)(log_p), log_p)
    assert torch.equal(CALIBRATORS["identity"].fit(log_p, labels)(log_p), log_p)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 0.049, 20.1, True, "1", None, [1.0]])
def test_a_bad_temperature_is_refused(value: object) -> None:
    with pytest.raises(
        CheckpointError, match=r"temperature cannot be used \(.*\): expected a number from 0.05 to 20.0"
    ):
        calibrator_from_json({"name": "temperature", "temperature": value})


@pytest.mark.parametrize("value", [0.0, math.nan, 21.0])
def test_the_class_itself_refuses_too(value: float) -> None:
    with pytest.raises(ValueError, match="temperature must be from"):
        Temperature(value)


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "temperature"},
        {"name": "temperature", "temperature": 1.0, "extra": 1},
        {"name": "identity", "temperature": 1.0},
        {},
        {"name": 3},
        [],
        None,
    ],
)
def test_other_entries_are_refused(entry: object) -> None:
    with pytest.raises(CheckpointError, match=r"calibrator (has unexpected keys|is not an object with a name)"):
        calibrator_from_json(entry)
