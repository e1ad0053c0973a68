"""The Gaussian of SGD's path, against iterates computed again by hand and against the theory of SGD on a quadratic.

Everything is deterministic but the two tests that name their false alarm and their smallest fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor

from bayesnet.inference.sgd_path import SgdPlan, Snapshots, Spread, follow_sgd, shuffled

NUM_DRAWS = 20_000
Z_CUT = 5.612  # 1e-6 for at most 50 quantities together
PLAN = SgdPlan(epochs=7, rank=4, learning_rate=0.1, momentum=0.8, weight_decay=0.05)
CURVATURE = torch.tensor([[2.0, 0.4], [0.4, 0.5]], dtype=torch.float64)


def noisy_quadratic(num_batches: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Return batches of one target each: loss = 1/2 (w - target)' A (w - target)."""
    generator = torch.Generator().manual_seed(0)
    targets_N2 = torch.randn(num_batches, 2, generator=generator, dtype=torch.float64)
    return [(target[None], torch.zeros(1, dtype=torch.int64)) for target in targets_N2]


def quadratic(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(targets_B2: Tensor, y_B: Tensor) -> Tensor:
        deviation_2 = weight.flatten() - targets_B2.mean(0)
        return 0.5 * deviation_2 @ CURVATURE @ deviation_2

    return loss


def path_on_the_quadratic(plan: SgdPlan, *, num_batches: int = 5) -> Spread:
    weight = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(3)
    return follow_sgd([weight], quadratic(weight), noisy_quadratic(num_batches), plan, generator)


def snapshots_by_hand(plan: SgdPlan) -> NDArray[np.float64]:
    """Return the weights at the ends of the epochs (T, 2), by NumPy, in the same order."""
    generator = torch.Generator().manual_seed(3)
    weight, velocity, ends = np.zeros(2), np.zeros(2), []
    for _ in range(plan.epochs):
        for targets_B2, _ in shuffled(noisy_quadratic(), generator):
            gradient = CURVATURE.numpy() @ (weight - targets_B2.numpy()[0]) + plan.weight_decay * weight
            velocity = plan.momentum * velocity + gradient
            weight = weight - plan.learning_rate * velocity
        ends.append(weight)
    return np.array(ends)


def test_the_gaussian_is_that_of_the_iterates_computed_again() -> None:
    ends_T2 = snapshots_by_hand(PLAN)
    spread = path_on_the_quadratic(PLAN)
    np.testing.assert_allclose(spread.mean_P, ends_T2.mean(0), rtol=1e-12)
    np.testing.assert_allclose(spread.scale_P**2, ends_T2.var(0, ddof=1) / 2, rtol=1e-12)
    deviations_R2 = ends_T2[-4:] - ends_T2.mean(0)
    np.testing.assert_allclose(spread.factor_PR @ spread.factor_PR.T, deviations_R2.T @ deviations_R2 / 6, rtol=1e-12)


def test_with_every_snapshot_kept_the_covariance_is_the_empirical_one() -> None:
    """Its diagonal in full; off it half, since the diagonal part has none: the paper's own compromise."""
    plan = PLAN._replace(rank=PLAN.epochs)
    spread = path_on_the_quadratic(plan)
    covariance_PP = spread.scale_P.square().diag() + spread.factor_PR @ spread.factor_PR.T
    empirical_PP = np.cov(snapshots_by_hand(plan).T)
    np.testing.assert_allclose(covariance_PP.diag(), np.diag(empirical_PP), rtol=1e-12)
    assert float(covariance_PP[0, 1]) == pytest.approx(empirical_PP[0, 1] / 2, rel=1e-12)


def test_the_spread_is_the_stationary_one_of_sgd() -> None:
    """Fresh noise in each step, no momentum: the covariance solves S = (I - eA) S (I - eA)' + e^2 A A.

    400 snapshots, 10 steps apart. False alarm 1e-6; with power 0.99 it catches a variance of 0.5 or 1.75 times the
    right one: a forgotten 1/2 or a squared learning rate.
    """
    generator = torch.Generator().manual_seed(5)
    weight = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)

    class Fresh:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for target in torch.randn(10, 1, 2, generator=generator, dtype=torch.float64):
                yield target, torch.zeros(1, dtype=torch.int64)

    plan = SgdPlan(epochs=400, rank=2, learning_rate=0.3, momentum=0.0, weight_decay=0.0)
    spread = follow_sgd([weight], quadratic(weight), Fresh(), plan, generator)
    contraction = np.eye(2) - 0.3 * CURVATURE.numpy()
    expected_PP = solve_discrete_lyapunov(contraction, 0.09 * CURVATURE.numpy() @ CURVATURE.numpy())
    # A snapshot remembers this share of the one before, which leaves so many independent ones.
    rho = float(np.abs(np.linalg.eigvals(np.linalg.matrix_power(contraction, 10))).max())
    num = (plan.epochs - 1) * (1 - rho**2) / (1 + rho**2)
    low, high = stats.chi2.ppf([2.5e-7, 1 - 2.5e-7], num) / num
    weakest, strongest = stats.chi2.ppf([0.01, 0.99], num) / num
    assert 0.5 * strongest < low
    assert high < 1.75 * weakest
    ratio_P = 2 * spread.scale_P.square().numpy() / np.diag(expected_PP)
    assert (low < ratio_P).all()
    assert (ratio_P < high).all()


def test_a_variance_far_smaller_than_the_mean_survives() -> None:
    """Differences of large squares would lose it: mean 1,000, sd 1e-5."""
    snapshots = Snapshots(rank=2)
    values_T = 1000 + 1e-5 * torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64)
    for value in values_T:
        snapshots.add(value[None])
    assert (2 * snapshots.spread().scale_P ** 2).item() == pytest.approx(float(values_T.var()), rel=1e-9)


def test_draws_of_the_gaussian_have_its_moments() -> None:
    """20,000 draws: false alarm 1e-6; catches a mean off by 0.06 sd and a covariance off by 8 %."""
    spread = path_on_the_quadratic(PLAN)
    draws_S2 = torch.stack(list(spread.sample(NUM_DRAWS, torch.Generator().manual_seed(0))))
    covariance_22 = spread.scale_P.square().diag() + spread.factor_PR @ spread.factor_PR.T
    white_S2 = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance_22), (draws_S2 - spread.mean_P).T, upper=False
    ).T
    assert (white_S2.mean(0) * math.sqrt(NUM_DRAWS)).abs().max() < Z_CUT
    error_22 = white_S2.T @ white_S2 / NUM_DRAWS - torch.eye(2)
    assert (error_22 * math.sqrt(NUM_DRAWS / 2)).abs().max() < Z_CUT


def test_batches_are_shuffled_whole_and_none_is_of_one_image() -> None:
    y_N = torch.arange(33)
    batches = [(y_B.double(), y_B) for y_B in y_N.split(8)]
    generator = torch.Generator().manual_seed(0)
    epochs = [list(shuffled(batches, generator)) for _ in range(2)]
    for epoch in epochs:
        assert all(torch.equal(inputs, y_B.double()) for inputs, y_B in epoch)
        assert sorted(torch.cat([y_B for _, y_B in epoch]).tolist()) == y_N.tolist()
        assert {len(y_B) for _, y_B in epoch} == {8, 9}
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])


def test_a_large_data_set_is_shuffled_pool_by_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesnet.inference.sgd_path.POOL_BYTES", 16 * 8)
    batches = [(y_B.double(), y_B) for y_B in torch.arange(40).split(8)]
    order = torch.cat([y_B for _, y_B in shuffled(batches, torch.Generator().manual_seed(0))])
    assert [sorted(part.tolist()) for part in order.split(16)] == [part.tolist() for part in torch.arange(40).split(16)]
