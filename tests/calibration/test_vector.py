"""Vector scaling: the gradient, the optimum against other solvers, recovery, and damage."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import approx_fprime, minimize
from torch import Tensor

from bayesnet.calibration import calibrator_from_json, nll_of_mean
from bayesnet.calibration.draw_chunks import DrawChunks
from bayesnet.calibration.vector import RIDGE, VectorScaling, fit
from bayesnet.errors import CheckpointError


def problem(num_draws: int, num_examples: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and labels drawn from their mean after each class was scaled and shifted."""
    generator = torch.Generator().manual_seed(seed)
    centre = 2 * torch.randn(1, num_examples, num_classes, generator=generator, dtype=torch.float64)
    spread = torch.randn(num_draws, num_examples, num_classes, generator=generator, dtype=torch.float64)
    log_p = torch.log_softmax(centre + 0.7 * spread, 2)
    mean = torch.softmax(log_p * true_scale(num_classes) + true_bias(num_classes), 2).mean(0)
    return log_p, torch.multinomial(mean, 1, generator=generator)[:, 0]


def true_scale(num_classes: int) -> Tensor:
    return torch.linspace(0.6, 1.2, num_classes, dtype=torch.float64)


def true_bias(num_classes: int) -> Tensor:
    return torch.linspace(-0.8, 0.8, num_classes, dtype=torch.float64)


def objective(log_p: Tensor, labels: Tensor, parameters: NDArray[np.float64]) -> float:
    """NLL of the mean of the mapped draws with the ridge, written the plain way."""
    scale, bias = torch.from_numpy(parameters).reshape(2, -1)
    mean = torch.softmax(log_p * scale + bias, 2).mean(0)
    nll = -float(mean[torch.arange(len(labels)), labels].log().mean())
    return nll + RIDGE / 2 / len(labels) * float(((scale - 1) ** 2).sum() + (bias**2).sum())


def at_optimum(found: VectorScaling) -> NDArray[np.float64]:
    return np.array([*found.scale, *found.bias])


@pytest.mark.parametrize("num_draws", [1, 7])
def test_gradient_is_that_of_the_nll(num_draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesnet.calibration.draw_chunks.CACHE_ELEMENTS", num_draws * 3 * 11)  # a ragged last chunk
    log_p, labels = problem(num_draws, 40, 3, 1)
    chunks = DrawChunks(log_p, labels)
    at = np.array([0.8, 1.3, 1.1, 0.2, -0.4, 0.1])
    nll, gradient = chunks.vector_nll(at[:3], at[3:])
    assert nll == pytest.approx(nll_of_mean(log_p, labels, VectorScaling(at[:3].tolist(), at[3:].tolist())), abs=1e-12)
    differences = approx_fprime(at, lambda x: chunks.vector_nll(x[:3], x[3:])[0], 1e-7)
    assert gradient.ravel() == pytest.approx(differences, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(5, 80), st.integers(2, 5), st.integers(0, 2**31))
def test_one_draw_reaches_the_optimum_of_another_solver(n: int, k: int, seed: int) -> None:
    """Convex: SLSQP from a far start, with differences for gradients, ends at the same value."""
    log_p, labels = problem(1, n, k, seed)
    start = np.r_[np.full(k, 2.0), np.linspace(-1, 1, k)]
    bounds = [(0.05, 20.0)] * k + [(-20.0, 20.0)] * k
    oracle = minimize(
        lambda x: objective(log_p, labels, x), start, method="SLSQP", bounds=bounds, options={"ftol": 1e-12}
    ).fun
    found = objective(log_p, labels, at_optimum(fit(log_p, labels)))
    assert found <= oracle + 1e-6
    assert found <= objective(log_p, labels, np.r_[np.ones(k), np.zeros(k)])


def test_many_draws_are_at_a_stationary_point_of_the_mean_and_not_of_the_draws() -> None:
    """The known mistake, fitting the mean of the draws' NLLs, is far from it."""
    log_p, labels = problem(80, 300, 3, 4)
    found = at_optimum(fit(log_p, labels))
    assert np.abs(approx_fprime(found, lambda x: objective(log_p, labels, x), 1e-6)).max() < 1e-4
    repeated = log_p.reshape(1, -1, 3), labels.repeat(80)
    wrong = at_optimum(fit(*repeated))
    assert objective(log_p, labels, found) < objective(log_p, labels, wrong) - 1e-3


def test_recovers_scales_and_biases() -> None:
    """4,000 labels: the parameters' errors in units of the observed information; false alarm 1e-6 a parameter."""
    log_p, labels = problem(1, 4000, 3, 2)
    found = at_optimum(fit(log_p, labels))
    truth = np.r_[true_scale(3).numpy(), true_bias(3).numpy()]
    chunks = DrawChunks(log_p, labels)
    step = 1e-4
    hessian = np.stack(
        [
            (
                chunks.vector_nll(*(found + e).reshape(2, 3))[1] - chunks.vector_nll(*(found - e).reshape(2, 3))[1]
            ).ravel()
            for e in step * np.eye(6)
        ]
    ) * (4000 / (2 * step))
    # The biases are known up to a constant, which the ridge sets so that they sum to 0, as the true ones do; and the
    # ridge draws everything towards the identity, by as much as it weighs beside the data.
    covariance = np.linalg.inv(hessian + RIDGE * np.eye(6))
    expected = truth + RIDGE * covariance @ (np.r_[np.ones(3), np.zeros(3)] - truth)
    errors = np.sqrt(np.diag(covariance))
    assert errors[:3].max() < 0.1  # the bound below means something
    assert (np.abs(found - expected) < 4.892 * errors).all()
    assert np.abs(found - np.r_[np.ones(3), np.zeros(3)]).max() > 0.3


def test_a_separable_split_does_not_diverge() -> None:
    log_p = torch.tensor([[[0.6, 0.4], [0.4, 0.6]]], dtype=torch.float64).log()
    found = fit(log_p, torch.tensor([0, 1]))
    assert max(found.scale) < 3
    assert max(map(abs, found.bias)) < 1


def test_an_impossible_label_leaves_the_identity_and_an_impossible_class_stays_so() -> None:
    log_p = torch.tensor([[[0.6, 0.4, 0.0], [0.7, 0.3, 0.0], [0.8, 0.2, 0.0]]], dtype=torch.float64).log()
    found = fit(log_p, torch.tensor([0, 1, 1]))
    assert found.bias[1] > found.bias[0]
    assert found(log_p)[..., 2].max() == -math.inf
    nothing = fit(log_p, torch.tensor([0, 1, 2]))
    assert (nothing.scale, nothing.bias) == ([1.0] * 3, [0.0] * 3)


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        VectorScaling([1.0, 1.0], [0.0, 0.0])(torch.zeros(1, 1, 3))
    assert str(caught.value) == "vector calibrator is for 2 classes, the model has 3: run calibrate again"


@pytest.mark.parametrize(
    "change",
    [
        {"scale": [1.0]},
        {"scale": [1.0, 0.0]},
        {"scale": [1.0, 20.5]},
        {"scale": [1.0, math.nan]},
        {"scale": [1.0, "1"]},
        {"scale": 1.0},
        {"scale": [], "bias": []},
        {"bias": [0.0, True]},
        {"bias": [0.0, 21.0]},
        {"bias": [0.0, math.inf]},
        {"bias": None},
        {"extra": 1},
    ],
)
def test_damage_is_refused(change: dict[str, object]) -> None:
    entry = {"name": "vector", "scale": [1.0, 2.0], "bias": [0.0, -1.0]}
    assert calibrator_from_json(json.loads(json.dumps(entry))).to_json() == entry
    with pytest.raises(CheckpointError, match=r"vector (scaling cannot be used|calibrator has unexpected keys)"):
        calibrator_from_json(entry | change)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="not a scale and a bias in range for each class"):
        VectorScaling([1.0], [0.0, 0.0])
