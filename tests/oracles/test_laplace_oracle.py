"""The Laplace family against laplace-torch (extra `oracles`): moments, evidence, and predictives without draws.

laplace-torch has one prior precision and no bias where factors are Kronecker, so it gets what our bias is: a feature.
In units of the prior's standard deviations a head on c * [f; 1] without bias, of precision 1, is ours. Equalities, 1e-4
relative; batches are ragged. The smallest fault caught is a scale wrong by 1e-4.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayesnet.inference import laplace
from bayesnet.inference.laplace import Laplace, LaplaceConfig
from bayesnet.inference.laplace_structures import StructureName
from bayesnet.testing import toy_problem

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PROBLEM = toy_problem()
SCALE = 0.7
THEIR_NAMES: dict[StructureName, str] = {"diagonal": "diag", "kronecker": "kron", "full": "full"}
NEW_IMAGES = torch.randn(20, 1, 1, 4, generator=torch.Generator().manual_seed(9))


def ours(structure: StructureName, bias_scale: float, **settings: Any) -> Laplace:  # noqa: ANN401 - LaplaceConfig's
    config = LaplaceConfig(structure=structure, prior_scale=SCALE, prior_bias_scale=bias_scale)
    posterior = Laplace(PROBLEM.parts(), dataclasses.replace(config, **settings)).double().eval()
    posterior.last_layer.loc.data.copy_(1.5 * PROBLEM.weight_KD)
    if bias_scale < 1e-3:
        posterior.last_layer.loc.data[:, -1] = 0
    laplace.finalize(posterior, batches())
    return posterior


def batches() -> list[tuple[Tensor, Tensor]]:
    images = PROBLEM.x_NCHW.double()
    return list(zip(images.split(17), PROBLEM.y_N.split(17), strict=True))


def columns(x_NCHW: Tensor, posterior: Laplace) -> Tensor:
    features_ND = x_NCHW.double().flatten(1)
    scaled_ND: Tensor = posterior.model.head.prior_scale[0] * nn.functional.pad(features_ND, (0, 1), value=1.0)
    return scaled_ND


def theirs(structure: StructureName, features_ND: Tensor, weight_KD: Tensor, precision: Any, bias: bool = False) -> Any:  # noqa: ANN401
    from laplace import Laplace as LaplaceTorch

    layer = nn.Linear(features_ND.shape[1], len(weight_KD), bias=bias).double()
    layer.weight.data.copy_(weight_KD[:, : features_ND.shape[1]])
    if bias:
        layer.bias.data.copy_(weight_KD[:, -1])
    network = nn.Sequential(nn.Identity(), layer)
    fitted = LaplaceTorch(
        network,
        "classification",
        subset_of_weights="last_layer",
        hessian_structure=THEIR_NAMES[structure],
        prior_precision=precision,
    )
    fitted.fit(DataLoader(TensorDataset(features_ND, PROBLEM.y_N), batch_size=17))
    return fitted


def agrees(posterior: Laplace, fitted: Any, inputs_ND: Tensor) -> None:  # noqa: ANN401
    moments = posterior.head.logit_moments(NEW_IMAGES.double().flatten(1))
    covariance_BKK = moments.factor_BKR @ moments.factor_BKR.mT + torch.diag_embed(moments.scale_BK.square())
    mean_BK, their_BKK = fitted._glm_predictive_distribution(inputs_ND)
    torch.testing.assert_close(moments.mean_BK, mean_BK, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(covariance_BKK, their_BKK, rtol=1e-4, atol=1e-6)
    fit = posterior.prior_fit()
    assert fit is not None
    assert fit.final_log_evidence == pytest.approx(float(fitted.log_marginal_likelihood()), rel=1e-4)


@pytest.mark.parametrize("structure", list(THEIR_NAMES))
def test_moments_and_evidence_of_a_head_without_bias(structure: StructureName) -> None:
    posterior = ours(structure, 1e-8)
    weight_KD = posterior.last_layer.loc.detach()[:, :-1]
    fitted = theirs(structure, PROBLEM.x_NCHW.double().flatten(1), weight_KD, SCALE**-2)
    agrees(posterior, fitted, NEW_IMAGES.double().flatten(1))


@pytest.mark.parametrize("structure", list(THEIR_NAMES))
def test_moments_and_evidence_where_the_bias_is_a_feature(structure: StructureName) -> None:
    posterior = ours(structure, 1.3)
    weight_KD = posterior.last_layer.loc.detach() / posterior.model.head.prior_scale
    fitted = theirs(structure, columns(PROBLEM.x_NCHW, posterior), weight_KD, 1.0)
    agrees(posterior, fitted, columns(NEW_IMAGES, posterior))


@pytest.mark.parametrize("structure", ["diagonal", "full"])
def test_moments_and_evidence_with_a_bias_of_its_own_prior(structure: StructureName) -> None:
    posterior = ours(structure, 1.3)
    prior_scale_KD = posterior.model.head.prior_scale
    precision_M = torch.cat([prior_scale_KD[:, :-1].flatten(), prior_scale_KD[:, -1]]) ** -2
    loc_KD = posterior.last_layer.loc.detach()
    fitted = theirs(structure, PROBLEM.x_NCHW.double().flatten(1), loc_KD, precision_M, bias=True)
    agrees(posterior, fitted, NEW_IMAGES.double().flatten(1))


@pytest.mark.parametrize("structure", list(THEIR_NAMES))
def test_marginal_likelihood_finds_no_better_prior_there(structure: StructureName) -> None:
    posterior = ours(structure, 1.3, prior="marginal_likelihood")
    fit = posterior.prior_fit()
    assert fit is not None
    assert abs(fit.final_scale / SCALE - 1) > 0.02, "the case is no test: the prior was the best already"
    weight_KD = posterior.last_layer.loc.detach() / posterior.model.head.prior_scale
    fitted = theirs(structure, columns(PROBLEM.x_NCHW, posterior), weight_KD, (SCALE / fit.final_scale) ** 2)
    agrees(posterior, fitted, columns(NEW_IMAGES, posterior))
    for factor in (0.97, 1.03):
        other = fitted.log_marginal_likelihood(torch.tensor(factor * (SCALE / fit.final_scale) ** 2))
        assert fit.final_log_evidence > float(other)


@pytest.mark.parametrize("predictive", ["probit", "bridge"])
@pytest.mark.parametrize("structure", list(THEIR_NAMES))
def test_predictives_without_draws(structure: StructureName, predictive: str) -> None:
    posterior = ours(structure, 1.3, predictive=predictive)
    weight_KD = posterior.last_layer.loc.detach() / posterior.model.head.prior_scale
    fitted = theirs(structure, columns(PROBLEM.x_NCHW, posterior), weight_KD, 1.0)
    expected_BK = fitted(columns(NEW_IMAGES, posterior), pred_type="glm", link_approx=predictive)
    found_SBK = posterior.predict_draws(NEW_IMAGES.double(), 256).exp()
    torch.testing.assert_close(found_SBK, expected_BK[None], rtol=1e-4, atol=1e-6)
