"""T7 beside its checks: the grid is fine enough, ELBOs are exact, regions are narrow enough for their powers."""

from __future__ import annotations

import functools

import pytest
import torch

from bayesnet.battery.logistic import elbo, of_weights, truth
from bayesnet.battery.quadrature import CHECKS, MEAN_BOUND, Region


def test_the_grid_is_fine_and_wide_enough() -> None:
    for other in (truth(num_points=401), truth(num_points=501, half_width=10)):
        assert other.evidence == pytest.approx(truth().evidence, abs=1e-7)
        assert torch.allclose(other.covariance_dd, truth().covariance_dd, rtol=1e-6)


def test_no_gaussian_exceeds_the_evidence() -> None:
    """The ELBO of the Gaussian with the exact moments is within 0.02 nat; it falls when mean or spread are changed."""
    exact = truth()
    covariance_44 = torch.block_diag(exact.covariance_dd, torch.eye(2) * 2).double()
    mean_4 = torch.cat([exact.mean_d, torch.zeros(2)])
    to_weights_44 = 0.5 * torch.cat([torch.cat([-torch.eye(2), torch.eye(2)], 1), torch.eye(2).repeat(1, 2)]).double()
    found = of_weights(to_weights_44.T @ mean_4, to_weights_44.T @ covariance_44 @ to_weights_44)
    assert torch.allclose(found.mean_d, exact.mean_d)
    assert torch.allclose(found.covariance_dd, exact.covariance_dd)
    assert 0 < exact.evidence - found.evidence < 0.02
    assert elbo(found.mean_d + 0.1, found.covariance_dd, 0.0) < elbo(found.mean_d, found.covariance_dd, 0.0)


def regions() -> list[Region]:
    found = [check.run.args[2] for check in CHECKS if isinstance(check.run, functools.partial)]
    assert len(found) == len(CHECKS) - 1
    return found


@pytest.mark.parametrize("region", regions(), ids=str)
def test_an_sd_wrong_by_a_fifth_is_outside_every_region(region: Region) -> None:
    lowest, highest = region.ratio - region.width, region.ratio + region.width
    assert 0.8 * highest < lowest
    assert 1.2 * lowest > highest


def test_a_mean_moved_by_what_the_docstring_says_is_outside() -> None:
    largest_error_measured = 0.108
    assert 0.26 - largest_error_measured > MEAN_BOUND
