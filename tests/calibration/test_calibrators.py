"""The contract that every calibrator keeps, and fitting one to a split that may be too small to tell it."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesnet.calibration import CALIBRATORS, base, calibrator_from_json, fit_calibrator, nll_of_mean
from bayesnet.calibration.bayesian_temperature import BayesianTemperature
from bayesnet.calibration.identity import Identity
from bayesnet.calibration.temperature import MIN_TEMPERATURE, Temperature, likelihood_interval
from bayesnet.errors import CheckpointError, ConfigError

NAMES = list(CALIBRATORS)
FITTED = [name for name in NAMES if name != "identity"]


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


def test_the_table() -> None:
    assert NAMES == ["identity", "temperature", "vector", "isotonic", "bayesian_temperature"]
    assert all(family.name == name for name, family in CALIBRATORS.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_draws", [1, 6, 70])
@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str, num_draws: int, dtype: torch.dtype) -> None:
    log_p, labels = problem(num_draws, 200, 5, 2, true=2.0)
    log_p = log_p.to(dtype)
    given_p, given_labels = log_p.clone(), labels.clone()
    calibrator = CALIBRATORS[name].fit(log_p, labels)
    assert calibrator.name == name  # labels at twice the temperature: each has something to mend
    mapped = calibrator(log_p)
    assert (mapped.shape, mapped.dtype) == ((calibrator.num_draws(num_draws), 200, 5), dtype)
    assert torch.equal(log_p, given_p)
    assert torch.equal(labels, given_labels)
    assert torch.allclose(torch.logsumexp(mapped, 2), torch.zeros(mapped.shape[:2], dtype=dtype), atol=1e-6)
    assert torch.equal(calibrator(log_p[:, 4:5]), mapped[:, 4:5])  # each image on its own
    assert nll_of_mean(log_p, labels, calibrator) <= nll_of_mean(log_p, labels)
    again = calibrator_from_json(json.loads(json.dumps(calibrator.to_json(), allow_nan=False)))
    assert type(again) is type(calibrator)
    assert torch.equal(again(log_p), mapped)
    assert again.to_json() == calibrator.to_json()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bayesian_temperature"])
def test_the_map_is_the_same_for_every_draw(name: str) -> None:
    log_p, labels = problem(6, 200, 5, 2, true=2.0)
    calibrator = CALIBRATORS[name].fit(log_p, labels)
    assert torch.equal(calibrator(log_p[2:3]), calibrator(log_p)[2:3])
    assert torch.equal(calibrator(log_p.flip(0)), calibrator(log_p).flip(0))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**31), st.floats(0.1, 10))
@pytest.mark.parametrize("name", NAMES)
def test_never_worse_on_its_own_split(name: str, s: int, n: int, k: int, seed: int, true: float) -> None:
    log_p, labels = problem(s, n, k, seed, true=true)
    before = nll_of_mean(log_p, labels)
    assert nll_of_mean(log_p, labels, CALIBRATORS[name].fit(log_p, labels)) <= before + 1e-14


@pytest.mark.parametrize("name", NAMES)
def test_order_of_images_does_not_matter(name: str) -> None:
    log_p, labels = problem(5, 150, 4, 6, true=2.0)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    one, other = (CALIBRATORS[name].fit(log_p[:, rows], labels[rows]) for rows in (torch.arange(150), order))
    assert torch.allclose(one(log_p), other(log_p), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_an_impossible_label_leaves_the_model_as_it_is(name: str) -> None:
    log_p = torch.tensor([[[0.0, -math.inf], [math.log(0.6), math.log(0.4)]]], dtype=torch.float64)
    calibrator = CALIBRATORS[name].fit(log_p, torch.tensor([1, 0]))
    if name == "isotonic":  # its lowest block holds the label, and says that the impossible happens
        assert math.isfinite(nll_of_mean(log_p, torch.tensor([1, 0]), calibrator))
    else:
        assert torch.allclose(calibrator(log_p), log_p)


@pytest.mark.parametrize("name", FITTED)
def test_large_splits_take_seconds(name: str) -> None:
    """2,560,000 log-probabilities take under a second where nothing else runs; 10 s is the bound for a jam."""
    log_p, labels = problem(256, 1000, 10, 1, true=1.8)
    start = time.perf_counter()
    CALIBRATORS[name].fit(log_p.float(), labels)
    assert time.perf_counter() - start < 10


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
@pytest.mark.parametrize("name", NAMES)
def test_wrong_tensors_name_the_row(name: str, log_p: Tensor, labels: Tensor, message: str) -> None:
    for fit in (CALIBRATORS[name].fit, lambda *tensors: fit_calibrator(name, *tensors)):
        with pytest.raises(ValueError) as caught:
            fit(log_p, labels)
        assert message in str(caught.value)


def test_nll_of_mean_is_the_nll_of_the_mean_and_not_the_mean_nll(monkeypatch: pytest.MonkeyPatch) -> None:
    log_p, labels = problem(4, 30, 3, 5)
    expected = -float(log_p.exp().mean(0)[torch.arange(30), labels].log().mean())
    assert nll_of_mean(log_p, labels) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 4 * 3 * 7)  # a ragged last chunk
    assert nll_of_mean(log_p, labels) == pytest.approx(expected, abs=1e-12)
    extreme = torch.tensor([[[-2000.0, 0.0]], [[-2010.0, 0.0]]])
    assert nll_of_mean(extreme, torch.tensor([0])) == pytest.approx(2000 + math.log(2) - math.log1p(math.exp(-10)))


@pytest.mark.parametrize("name", NAMES)
def test_more_keys_than_expected_are_refused(name: str) -> None:
    log_p, labels = problem(6, 200, 5, 2, true=2.0)
    entry = CALIBRATORS[name].fit(log_p, labels).to_json()
    with pytest.raises(CheckpointError, match=rf"{name} calibrator has unexpected keys \(.*extra"):
        calibrator_from_json(entry | {"extra": 1})


@pytest.mark.parametrize("entry", [{}, {"name": 3}, [], None])
def test_other_entries_are_refused(entry: object) -> None:
    with pytest.raises(CheckpointError, match="calibrator is not an object with a name"):
        calibrator_from_json(entry)


def test_an_unknown_name_is_suggested() -> None:
    for call in (lambda: calibrator_from_json({"name": "temperatur"}), lambda: fit_calibrator("temperatur", *one(0))):
        with pytest.raises(ConfigError, match=r"unknown calibrator \(temperatur\): did you mean 'temperature'\?"):
            call()


def one(errors: int, *, num_images: int = 40) -> tuple[Tensor, Tensor]:
    """One draw of two classes that says 0.9 each time, and is wrong so many times."""
    log_p = torch.tensor([0.9, 0.1], dtype=torch.float64).log().repeat(1, num_images, 1)
    labels = torch.zeros(num_images, dtype=torch.int64)
    labels[:errors] = 1
    return log_p, labels


@pytest.mark.parametrize("name", FITTED)
def test_without_errors_nothing_is_fitted(name: str) -> None:
    calibrator, notice = fit_calibrator(name, *one(0))
    assert isinstance(calibrator, Identity)
    assert notice == f"no {name} is applied: half A has 0 errors in 40 images, which cannot tell one"
    assert fit_calibrator("identity", *one(0)).notice is None


@pytest.mark.parametrize("name", FITTED)
def test_with_ten_errors_nothing_is_said_and_with_nine_how_little_is_known(name: str) -> None:
    log_p, labels = one(10)
    assert fit_calibrator(name, log_p, labels).notice is None
    labels[0] = 0
    calibrator, notice = fit_calibrator(name, log_p, labels)
    assert calibrator.name == name
    assert notice is not None
    assert notice.startswith("half A has 9 errors in 40 images, too few to fit well: ")
    if isinstance(calibrator, BayesianTemperature):
        low, high = calibrator.interval(0.95)
        assert f"between {low:.2f} and {high:.2f} (95 % posterior interval)" in notice
    else:
        low, high = likelihood_interval(log_p, labels)
        assert f"only known to lie between {low:.2f} and {high:.2f} (95 % likelihood interval)" in notice
        assert ("even a single temperature" in notice) == (name != "temperature")


def test_at_the_lower_bound_the_optimum_is_kept_and_the_notice_says_what_is_known() -> None:
    """Draws whose vote is right more often than their mean says; one error."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (90,), generator=generator)
    centre = 1.5 * torch.nn.functional.one_hot(labels, 3)
    log_p = torch.log_softmax(centre + torch.randn(64, 90, 3, generator=generator, dtype=torch.float64), 2)
    labels[0] = (labels[0] + 1) % 3
    calibrator, notice = fit_calibrator("temperature", log_p, labels)
    assert isinstance(calibrator, Temperature)
    assert calibrator.temperature == pytest.approx(MIN_TEMPERATURE, rel=1e-6)
    assert notice is not None
    start = "the temperature is at the bound of its range, 0.05: half A has 1 error in 90 images; the temperature is "
    assert notice.startswith(f"{start}only known to lie between 0.05 and ")


def test_a_calibrator_that_helps_nothing_is_not_applied() -> None:
    """A model that is as good as can be: averaged over the posterior of T it does worse on its own split."""
    log_p, labels = one(20, num_images=200)
    calibrator, notice = fit_calibrator("bayesian_temperature", log_p, labels)
    assert isinstance(calibrator, Identity)
    assert notice == "no bayesian_temperature is applied: on half A the NLL is no lower with it than without"


@pytest.mark.parametrize("name", ["temperature", "vector", "bayesian_temperature"])
def test_a_label_of_probability_0_is_told(name: str) -> None:
    """No such map makes it likelier, so there is no NLL to lower."""
    log_SNK = torch.tensor([[0.7, 0.3], [0.6, 0.4], [1.0, 0.0]]).log()[None].repeat(2, 1, 1)
    fitted = fit_calibrator(name, log_SNK, torch.tensor([0, 1, 1]))
    assert isinstance(fitted.calibrator, Identity)
    what = "1 label of half A has probability 0, and so the NLL is infinite with any"
    assert fitted.notice == f"no {name} is applied: {what}"
