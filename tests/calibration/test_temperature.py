"""Temperature scaling: optimal, never worse, strict when read back; and the table of calibrators around it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from bayesnet.calibration import CALIBRATORS, base, calibrator_from_json, nll_of_mean
from bayesnet.calibration.temperature import MAX_TEMPERATURE, MIN_TEMPERATURE, Temperature, fit
from bayesnet.errors import CheckpointError, ConfigError


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


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 60), st.integers(2, 6), st.integers(0, 2**31), st.floats(0.3, 4))
def test_one_draw_is_as_good_as_brent_in_float64(n: int, k: int, seed: int, true: float) -> None:
    log_p, labels = problem(1, n, k, seed, true=true)

    def loss(log_t: float) -> float:
        scaled = torch.log_softmax(log_p[0] / math.exp(log_t), 1)
        return -float(scaled[torch.arange(n), labels].mean())

    bounds = (math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
    oracle = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-10}).fun
    assert nll_of_mean(log_p, labels, fit(log_p, labels)) <= oracle + 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**31), st.floats(0.1, 10))
def test_never_worse_on_its_own_split(s: int, n: int, k: int, seed: int, true: float) -> None:
    log_p, labels = problem(s, n, k, seed, true=true)
    assert nll_of_mean(log_p, labels, fit(log_p, labels)) <= nll_of_mean(log_p, labels)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(CALIBRATORS))
def test_every_calibrator_keeps_the_contract(name: str, dtype: torch.dtype) -> None:
    log_p, labels = problem(6, 200, 5, 2, true=2.0)
    log_p = log_p.to(dtype)
    calibrator = CALIBRATORS[name].fit(log_p, labels)
    mapped = calibrator(log_p)
    assert (mapped.shape, mapped.dtype) == (log_p.shape, dtype)
    assert torch.allclose(torch.logsumexp(mapped, 2), torch.zeros(6, 200, dtype=dtype), atol=1e-6)
    assert torch.equal(calibrator(log_p[2:3, 4:5]), mapped[2:3, 4:5])  # each draw and image on its own
    assert nll_of_mean(log_p, labels, calibrator) <= nll_of_mean(log_p, labels)
    again = calibrator_from_json(json.loads(json.dumps(calibrator.to_json())))
    assert type(again) is type(calibrator)
    assert torch.equal(again(log_p), mapped)


def test_temperature_one_and_identity_change_no_bit() -> None:
    log_p, labels = problem(2, 10, 3, 1)
    assert torch.equal(Temperature(1.0)(log_p), log_p)
    assert torch.equal(CALIBRATORS["identity"].fit(log_p, labels)(log_p), log_p)


def test_nll_of_mean_is_the_nll_of_the_mean_and_not_the_mean_nll(monkeypatch: pytest.MonkeyPatch) -> None:
    log_p, labels = problem(4, 30, 3, 5)
    expected = -float(log_p.exp().mean(0)[torch.arange(30), labels].log().mean())
    assert nll_of_mean(log_p, labels) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 4 * 3 * 7)  # a ragged last chunk
    assert nll_of_mean(log_p, labels) == pytest.approx(expected, abs=1e-12)
    extreme = torch.tensor([[[-2000.0, 0.0]], [[-2010.0, 0.0]]])
    assert nll_of_mean(extreme, torch.tensor([0])) == pytest.approx(2000 + math.log(2) - math.log1p(math.exp(-10)))


@pytest.mark.parametrize(
    ("log_p", "labels", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), "log-probabilities must be (draws, examples, classes)"),
        (
            torch.zeros(1, 0, 2),
            torch.zeros(0, dtype=torch.int64),
            "log-probabilities must be (draws, examples, classes)",
        ),
        (torch.zeros(1, 2, 1), torch.zeros(2), "labels must be int64 (2,); got torch.float32 (2,)"),
        (torch.zeros(1, 2, 1), torch.zeros(3, dtype=torch.int64), "labels must be int64 (2,); got torch.int64 (3,)"),
        (torch.zeros(1, 2, 1), torch.tensor([0, 1]), "row 1: label is not in 0..0"),
        (torch.tensor([[[0.0], [math.nan]]]), torch.tensor([0, 0]), "row 1: not normalised log-probabilities"),
        (torch.tensor([[[0.0], [2.0]]]), torch.tensor([0, 0]), "row 1: not normalised log-probabilities"),
    ],
)
def test_wrong_tensors_name_the_row(log_p: Tensor, labels: Tensor, message: str) -> None:
    for family in CALIBRATORS.values():
        with pytest.raises(ValueError) as caught:
            family.fit(log_p, labels)
        assert str(caught.value).startswith(message)


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


def test_an_unknown_name_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"unknown calibrator \(temperatur\): did you mean 'temperature'\?"):
        calibrator_from_json({"name": "temperatur"})
