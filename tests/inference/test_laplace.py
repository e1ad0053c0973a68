"""The Laplace family against curvatures written out once more: moments, draws, refusals.

All are equalities, so none can be a false alarm, and the smallest fault caught is the tolerance. The planted faults at
the end change a moment by some percent or more and must be rejected by the check that the family passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from bayesnet.errors import ConfigError, DataError, DivergedError
from bayesnet.inference import laplace, laplace_structures
from bayesnet.inference.base import Family, Parts, Posterior
from bayesnet.inference.laplace import Laplace, LaplaceConfig, finalize
from bayesnet.inference.laplace_structures import STRUCTURES, Eigen, Full, Kronecker, StructureName, cost
from bayesnet.testing import (
    CHECKS,
    FlattenBackbone,
    build,
    check_draws_match_moments,
    check_particles_equal_a_loop,
    loss_value,
    toy_problem,
    train_toy,
)
from tests.inference.laplace_cases import (
    PRIOR_SCALE,
    PROBLEM,
    batches,
    doubled,
    fitted,
    prior_fit,
    trained,
)

Check = Callable[[Family], None]

NO_DRAWS = [check for check in CHECKS if check not in (check_particles_equal_a_loop, check_draws_match_moments)]
"""Without those that compare draws of the weight with predictions: "probit" and "bridge" predict without draws."""


def fitted_at_once(**settings: Any) -> Family:  # noqa: ANN401 - LaplaceConfig's
    """Return the family with `finalize` as a part of `build`: what the contract says must hold afterwards too."""

    def build_fitted(parts: Parts, config: LaplaceConfig) -> Posterior:
        posterior = laplace.build(parts, dataclasses.replace(config, **settings))
        finalize(posterior, batches(toy_problem(parts.num_examples)))
        return posterior

    return laplace.FAMILY._replace(build=build_fitted)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_the_finalized_family_conforms(structure: StructureName, check: Check) -> None:
    check(fitted_at_once(structure=structure, prior="marginal_likelihood"))


@pytest.mark.parametrize("check", NO_DRAWS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("predictive", ["probit", "bridge"])
def test_predictives_without_draws_conform(predictive: str, check: Check) -> None:
    check(fitted_at_once(predictive=predictive))


# The curvature, written out once more.


def curvature(posterior: Laplace, x_ND: Tensor) -> Tensor:
    """Return what the structure keeps of the Hessian (K, D + 1, K, D + 1) of the negative log-likelihood."""
    loc_KD = posterior.last_layer.loc.detach()
    columns_ND = torch.cat([x_ND, torch.ones(len(x_ND), 1).double()], 1)
    probability_NK = (columns_ND @ loc_KD.T).softmax(1)
    blocks_NKK = torch.stack([torch.diag(p) - torch.outer(p, p) for p in probability_NK])
    outer_NDD = torch.stack([torch.outer(g, g) for g in columns_ND])
    if posterior.config.structure == "kronecker":
        kronecker_KDKD: Tensor = torch.einsum("kl,de->kdle", blocks_NKK.sum(0), outer_NDD.mean(0))
        return kronecker_KDKD
    full_KDKD: Tensor = torch.einsum("nkl,nde->kdle", blocks_NKK, outer_NDD)
    if posterior.config.structure == "full":
        return full_KDKD
    size = loc_KD.numel()
    diagonal_MM: Tensor = torch.diag(full_KDKD.reshape(size, size).diagonal())
    return diagonal_MM.view_as(full_KDKD)


def covariance(posterior: Laplace, x_ND: Tensor, num_examples: int | None = None) -> Tensor:
    """Return the posterior covariance (M, M) by inverting the precision in units of the weights."""
    size = posterior.last_layer.loc.numel()
    hessian_MM = curvature(posterior, x_ND).reshape(size, size) * (num_examples or len(x_ND)) / len(x_ND)
    prior_scale_M = posterior.model.head.prior_scale.flatten() * prior_fit(posterior).final_scale / PRIOR_SCALE
    inverse_MM: Tensor = torch.linalg.inv(hessian_MM + torch.diag(prior_scale_M**-2))
    return inverse_MM


def check_moments(posterior: Laplace, num_examples: int | None = None) -> None:
    """The logits' covariance of new images, and the weights' standard deviations, are those of `covariance` (1e-6)."""
    x_ND = PROBLEM.x_NCHW.double().flatten(1)
    covariance_MM = covariance(posterior, x_ND, num_examples)
    new_BD = torch.randn(9, 4, generator=torch.Generator().manual_seed(3)).double()
    columns_BD = torch.cat([new_BD, torch.ones(9, 1).double()], 1)
    view = covariance_MM.view(*posterior.last_layer.loc.shape, *posterior.last_layer.loc.shape)
    expected_BKK = torch.einsum("bd,kdle,be->bkl", columns_BD, view, columns_BD)
    moments = posterior.head.logit_moments(new_BD)
    found_BKK = moments.factor_BKR @ moments.factor_BKR.mT + torch.diag_embed(moments.scale_BK.square())
    torch.testing.assert_close(found_BKK, expected_BKK, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(moments.mean_BK, columns_BD @ posterior.last_layer.loc.T)
    scale = posterior.posterior_scale()
    assert scale is not None
    torch.testing.assert_close(scale.flatten(), covariance_MM.diagonal().sqrt(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("prior", ["fixed", "marginal_likelihood"])
@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_moments_are_those_of_the_inverted_precision(structure: StructureName, prior: str) -> None:
    check_moments(fitted(structure, prior=prior))


def test_the_full_curvature_is_the_hessian() -> None:
    posterior = fitted("full")
    x, y = PROBLEM.x_NCHW.double(), PROBLEM.y_N

    def negative_log_joint(weight_M: Tensor) -> Tensor:
        weight_KD = weight_M.view_as(posterior.last_layer.loc)
        logits = x.flatten(1) @ weight_KD[:, :-1].T + weight_KD[:, -1]
        prior = Normal(torch.zeros(()).double(), posterior.model.head.prior_scale)
        fit = nn.functional.cross_entropy(logits, y, reduction="sum")
        return torch.sub(fit, prior.log_prob(weight_KD).sum())

    mode_M = posterior.last_layer.loc.detach().flatten()
    precision_MM = torch.autograd.functional.hessian(negative_log_joint, mode_M)
    torch.testing.assert_close(
        torch.linalg.inv(precision_MM), covariance(posterior, x.flatten(1)), rtol=1e-6, atol=1e-9
    )
    gradient_M = torch.autograd.functional.jacobian(negative_log_joint, mode_M)
    assert gradient_M.abs().max() < 1e-3, "the test's mode is none"


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_draws_of_the_weight_have_the_covariance(structure: StructureName, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = fitted(structure)
    size = posterior.last_layer.loc.numel()
    # One unit vector of noise after the other gives the root of the covariance, column by column.
    unit = lambda like, num: torch.eye(num).double().view(num, *like.shape)  # noqa: E731
    monkeypatch.setattr(laplace_structures, "_noise", unit)
    root_MM = (posterior.head.sample(size) - posterior.last_layer.loc).detach().flatten(1)
    expected_MM = covariance(posterior, PROBLEM.x_NCHW.double().flatten(1))
    torch.testing.assert_close(root_MM.T @ root_MM, expected_MM, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_batches_may_be_cut_anywhere(structure: StructureName) -> None:
    x, y = PROBLEM.x_NCHW, PROBLEM.y_N
    cuts = [[(x, y)], batches(), [(x.flip(0), y.flip(0))], batches(size=1)]
    states = []
    for pairs in cuts:
        posterior = trained(structure, prior="marginal_likelihood")
        finalize(posterior, doubled(pairs))
        states.append((posterior.head.logit_moments(x.double().flatten(1)), prior_fit(posterior)))
    for moments, fit in states[1:]:
        for part, first in zip(moments, states[0][0], strict=True):
            torch.testing.assert_close(part @ part.mT, first @ first.mT, rtol=1e-6, atol=1e-7)
        assert fit == pytest.approx(states[0][1], rel=1e-5)


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_the_curvature_is_that_of_all_examples(structure: StructureName) -> None:
    """Two augmented copies of each image count it once; N more than the images given scales up."""
    copies = trained(structure)
    finalize(copies, doubled(batches() + batches()))
    check_moments(copies)
    assert prior_fit(copies) == pytest.approx(prior_fit(fitted(structure)), rel=1e-6)
    larger = trained(structure)
    larger.num_examples *= 3
    finalize(larger, doubled(batches()))
    check_moments(larger, 3 * len(PROBLEM.y_N))


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_finalize_starts_over(structure: StructureName) -> None:
    early, late = (build(laplace.FAMILY, PROBLEM, structure=structure, prior="marginal_likelihood") for _ in range(2))
    finalize(early, batches())
    for posterior in (early, late):
        train_toy(posterior, PROBLEM, steps=20)
        finalize(posterior, batches())
    finalize(late, batches())
    for name, tensor in early.state_dict().items():
        assert torch.equal(late.state_dict()[name], tensor), name


def test_finalize_leaves_loss_mode_and_random_state_alone() -> None:
    posterior = build(laplace.FAMILY, PROBLEM, prior="marginal_likelihood").train()
    parameters = {name: value.clone() for name, value in posterior.named_parameters()}
    before, random_state = loss_value(posterior, PROBLEM.x_NCHW, PROBLEM.y_N), torch.get_rng_state()
    finalize(posterior, batches())
    assert posterior.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, parameters[name]) for name, value in posterior.named_parameters())
    assert loss_value(posterior, PROBLEM.x_NCHW, PROBLEM.y_N) == before


def test_a_saved_fit_is_complete() -> None:
    source, target = fitted("full").float(), build(laplace.FAMILY, PROBLEM, structure="full")
    assert isinstance(target, Laplace)
    assert target.prior_fit() is None
    assert target.posterior_scale() is None
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.predict_draws(PROBLEM.x_NCHW, 8), target.predict_draws(PROBLEM.x_NCHW, 8))
    scale = target.posterior_scale()
    assert scale is not None
    assert scale.shape == (3, 5)


def test_predictions_before_finalize_are_those_of_the_mode() -> None:
    for structure in STRUCTURES:
        posterior = build(laplace.FAMILY, PROBLEM, structure=structure)
        assert isinstance(posterior, Laplace)
        moments = posterior.head.logit_moments(PROBLEM.x_NCHW.flatten(1))
        columns = nn.functional.pad(PROBLEM.x_NCHW.flatten(1), (0, 1), value=1.0)
        scale_BK = (moments.scale_BK.square() + moments.factor_BKR.square().sum(-1)).sqrt()
        torch.testing.assert_close(scale_BK, 0.01 * columns.norm(dim=1, keepdim=True).expand_as(scale_BK))


def test_the_cholesky_factor_survives_any_conditioning() -> None:
    """Variances that differ by 1e10 in one image; every contrast is right to 1e-3 relative."""
    prior_scale_KD = torch.ones(4, 3)
    covariance = Full(prior_scale_KD, 0.01)
    values = torch.logspace(0, 10, 12, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double())
    covariance.store(Eigen(values, (basis,)), 1e-3, prior_scale_KD[0].double())
    _, factor_BKK = covariance.spread(torch.tensor([[1.0, 2.0, 1.0], [1e-3, 0.0, 1e-3]]))
    root_BKM = torch.einsum(
        "bd,kdm->bkm",
        torch.tensor([[1.0, 2.0, 1.0], [1e-3, 0.0, 1e-3]]).double(),
        (basis.view(4, 3, 12) * (values + 1e-3).rsqrt()),
    )
    expected = (root_BKM @ root_BKM.mT).diagonal(dim1=1, dim2=2).sqrt().float()
    torch.testing.assert_close(factor_BKK.norm(dim=2), expected, rtol=1e-3, atol=0.0)


# What is refused.


@pytest.mark.parametrize(
    ("structure", "num_classes", "num_features", "line"),
    [
        (
            "full", 20, 512,
            "the eigenvectors of a matrix of 10260 rows take 3.1 GiB, at most 8192 rows can be (inference.structure = "
            'full): use inference.structure = "kronecker"',
        ),
        (
            "full", 101, 4,
            "101 classes, at most 100 can be (inference.structure = full): use inference.structure = "
            '"kronecker"',
        ),
        (
            "kronecker", 10, 25_088,
            "the eigenvectors of a matrix of 25089 rows take 18.8 GiB, at most 8192 rows can be (inference.structure = "
            'kronecker): use inference.structure = "diagonal"',
        ),
        (
            "kronecker", 1001, 4,
            "1001 classes, at most 1000 can be (inference.structure = kronecker): use inference.structure = "
            '"diagonal"',
        ),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused(structure: StructureName, num_classes: int, num_features: int, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        laplace.build(Parts(FlattenBackbone(num_features), num_classes, 10), LaplaceConfig(structure=structure))
    assert str(caught.value) == line


def test_the_diagonal_fits_anywhere_and_costs_are_stated() -> None:
    posterior = laplace.build(Parts(FlattenBackbone(9000), 101, 10), LaplaceConfig(structure="diagonal"))
    assert isinstance(posterior, Laplace)
    assert posterior.cost == cost("diagonal", 101, 9000, 10)
    for structure in STRUCTURES:
        posterior = fitted(structure)
        stored = sum(4 * each.numel() for each in posterior.last_layer.covariance.buffers())
        assert posterior.cost.stored_bytes == stored, structure


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"prior_scale_floor": 0.0}, "must be positive and finite (inference.prior_scale_floor = 0.0)"),
        (
            {"prior_scale_floor": 2.0, "prior": "marginal_likelihood"},
            "exceeds inference.prior_scale = 1.0 (inference.prior_scale_floor = 2.0)",
        ),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LaplaceConfig(**settings)
    assert str(caught.value) == line


def test_a_curvature_that_is_not_finite_is_said_so() -> None:
    posterior = build(laplace.FAMILY, PROBLEM)
    before = {name: tensor.clone() for name, tensor in posterior.state_dict().items()}
    with pytest.raises(DivergedError, match="the curvature of the likelihood is not finite"):
        finalize(posterior, [(PROBLEM.x_NCHW / 0, PROBLEM.y_N)])
    with pytest.raises(DataError) as caught:
        finalize(posterior, [])
    assert str(caught.value) == "there are no training images (finalize of laplace): give at least one batch"
    assert all(torch.equal(before[name], tensor) for name, tensor in posterior.state_dict().items())


# Planted faults: each must be rejected by the check that the family passes.


class Uncentred(Full):
    """Leaves out p p': the curvature of independent Poisson counts."""

    def add(self, sums: tuple[Tensor, ...], probability_BK: Tensor, columns_BD: Tensor) -> None:
        super().add(sums, probability_BK, columns_BD)
        weighted_BM = (probability_BK.unsqueeze(-1) * columns_BD.unsqueeze(1)).flatten(1)
        sums[0].addmm_(weighted_BM.T, weighted_BM)


class MeanCurvature(Full):
    """Averages over the images instead of summing."""

    def eigen(self, sums: tuple[Tensor, ...], num_images: int) -> Eigen:
        values, bases = super().eigen(sums, num_images)
        return Eigen(values / num_images, bases)


class DampedFactors(Kronecker):
    """Adds the root of the precision to each factor."""

    def store(self, eigen: Eigen, precision: float, prior_scale_D: Tensor) -> None:
        values_K = eigen.values[:, -1] / eigen.values[-1, -1] ** 0.5
        values_D = eigen.values[-1] / eigen.values[-1, -1] ** 0.5
        damped = (values_K[:, None] + precision**0.5) * (values_D + precision**0.5)
        super().store(Eigen(damped - precision, eigen.bases), precision, prior_scale_D)


class TwiceTheImages(Kronecker):
    """Sums both factors over the images."""

    def eigen(self, sums: tuple[Tensor, ...], num_images: int) -> Eigen:
        return super().eigen(sums, 1)


class OnePriorForAll(Full):
    """Gives the bias the prior of the weights."""

    def store(self, eigen: Eigen, precision: float, prior_scale_D: Tensor) -> None:
        super().store(eigen, precision, prior_scale_D[0].expand_as(prior_scale_D))


@pytest.mark.parametrize(
    ("structure", "planted"),
    [
        ("full", Uncentred),
        ("full", MeanCurvature),
        ("kronecker", DampedFactors),
        ("kronecker", TwiceTheImages),
        ("full", OnePriorForAll),
    ],
)
def test_planted_fault_of_the_curvature_is_caught(structure: StructureName, planted: type[Full | Kronecker]) -> None:
    with mock.patch.dict(STRUCTURES, {structure: planted}), pytest.raises(AssertionError):
        check_moments(fitted(structure))


class NarrowDraws(Laplace):
    """Predicts with 0.9 of the scale."""

    def draws_from_features(self, features_BD: Tensor, num_samples: int) -> Tensor:
        draws_SBK = super().draws_from_features(features_BD, num_samples)
        return draws_SBK.mean(0) + 0.9 * (draws_SBK - draws_SBK.mean(0))


def test_planted_fault_of_the_predictions_is_caught() -> None:
    with pytest.raises(AssertionError, match="scales differ"):
        check_draws_match_moments(laplace.FAMILY._replace(build=NarrowDraws))
