"""Every family passes the conformance suite, and the suite rejects families with planted faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn

from bayesnet.inference import FAMILIES, guide, mean_field
from bayesnet.inference.base import Family, GuideFactory, Parts, Posterior
from bayesnet.inference.guide import GuideConfig, GuidePosterior
from bayesnet.inference.mean_field import MeanField, MeanFieldConfig
from bayesnet.model import WEIGHT, BayesianHead, PriorName
from bayesnet.testing import (
    CHECKS,
    check_batches_add_up,
    check_draws_ignore_companions,
    check_draws_match_moments,
    check_loss_ignores_order_and_duplicates,
    check_no_shared_storage,
    check_particles_equal_a_loop,
    check_same_seed_same_logits,
    check_scale_is_fitted,
)
from bayesnet.types import LogitGaussian, Loss

Check = Callable[[Family], None]


SLOW_TRAINING = [
    pytest.param(check, marks=[pytest.mark.slow] if check is check_scale_is_fitted else [], id=check.__name__)
    for check in CHECKS
]
"""The contract of all but `mean_field`: training at two initial scales is left to the slow tests."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_mean_field_conforms(check: Check) -> None:
    check(mean_field.FAMILY)


@pytest.mark.parametrize("check", SLOW_TRAINING)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mean_field"])
def test_family_conforms(name: str, check: Check) -> None:
    check(FAMILIES[name])


@pytest.mark.parametrize("check", SLOW_TRAINING)
def test_the_weight_estimator_conforms(check: Check) -> None:
    check(_mean_field(lambda parts, config: MeanField(parts, _with_weight_estimator(config))))


@pytest.mark.parametrize("check", SLOW_TRAINING)
@pytest.mark.parametrize("prior", ["laplace", "student_t"])
def test_heavy_tailed_priors_conform(prior: PriorName, check: Check) -> None:
    check(_mean_field(lambda parts, config: MeanField(parts, dataclasses.replace(config, prior=prior))))


class ModuleGuide(PyroModule):
    """A guide written by hand as a module."""

    scale: torch.Tensor

    def __init__(self, head: BayesianHead, initial_scale: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros_like(head.prior_scale))
        self.scale = PyroParam(initial_scale * head.prior_scale, constraint=dist.constraints.positive)  # type: ignore[assignment]

    def forward(self, features_BD: torch.Tensor, y: torch.Tensor | None = None) -> None:
        pyro.sample(WEIGHT, dist.Normal(self.loc, self.scale).to_event(2))


def function_guide(shape: torch.Size, initial_scale: float) -> Callable[..., None]:
    """Return a guide written by hand as a function, its parameters in Pyro's store."""

    def run(features_BD: torch.Tensor, y: torch.Tensor | None = None) -> None:
        loc = pyro.param("loc", lambda: 0.1 * torch.randn(shape))
        scale = pyro.param("scale", torch.full(shape, initial_scale), constraint=dist.constraints.positive)
        pyro.sample(WEIGHT, dist.Normal(loc, scale).to_event(2))

    return run


def _own_guide(factory: Callable[[float], GuideFactory]) -> Callable[[Parts, GuideConfig], Posterior]:
    def build(parts: Parts, config: GuideConfig) -> Posterior:
        parts = parts._replace(guide=factory(config.initial_scale))
        return GuidePosterior(parts, dataclasses.replace(config, guide="custom"))

    return build


GUIDES: dict[str, Callable[[Parts, GuideConfig], Posterior]] = {
    "AutoMultivariateNormal": lambda parts, config: GuidePosterior(
        parts, dataclasses.replace(config, guide="AutoMultivariateNormal")
    ),
    "module": _own_guide(lambda scale: lambda head: ModuleGuide(head, scale)),
    "function": _own_guide(lambda scale: lambda head: function_guide(head.prior_scale.shape, scale)),
}


@pytest.mark.parametrize("check", SLOW_TRAINING)
@pytest.mark.parametrize("name", list(GUIDES))
def test_a_family_of_any_guide_conforms(name: str, check: Check) -> None:
    check(guide.FAMILY._replace(build=GUIDES[name]))


class OneDrawForAll(GuidePosterior):
    """Predicts with one draw of the weight."""

    def draws_from_features(self, features_BD: torch.Tensor, num_samples: int) -> torch.Tensor:
        return super().draws_from_features(features_BD, num_samples)[:1].expand(num_samples, -1, -1)


class NarrowDraws(GuidePosterior):
    """Predicts with 0.7 of the scale."""

    def draws_from_features(self, features_BD: torch.Tensor, num_samples: int) -> torch.Tensor:
        draws_SBK = super().draws_from_features(features_BD, num_samples)
        return draws_SBK.mean(0) + 0.7 * (draws_SBK - draws_SBK.mean(0))


@pytest.mark.parametrize("planted", [OneDrawForAll, NarrowDraws])
def test_planted_fault_of_a_head_without_moments_is_caught(planted: type[GuidePosterior]) -> None:
    with pytest.raises(AssertionError, match="differ"):
        check_draws_match_moments(guide.FAMILY._replace(build=planted))


class KLPerBatch(MeanField):
    """Divides the KL by the batch instead of N."""

    def loss_from_features(self, features_BD: torch.Tensor, y_B: torch.Tensor) -> Loss:
        loss = super().loss_from_features(features_BD, y_B)
        return Loss(loss.nll + loss.kl / len(y_B), loss.nll, loss.kl, loss.nll)


class SummedNLL(MeanField):
    """Sums the batch's NLL instead of averaging it."""

    def loss_from_features(self, features_BD: torch.Tensor, y_B: torch.Tensor) -> Loss:
        loss = super().loss_from_features(features_BD, y_B)
        nll = loss.nll * len(y_B)
        return Loss(nll + loss.kl / self.num_examples, nll, loss.kl, nll)


class ScaleInTheBackbonesOptimizer(MeanField):
    """Leaves the variational parameters to the backbone's SGD."""

    def variational_parameters(self) -> tuple[()]:
        return ()


class FreshNoise(MeanField):
    """Predicts with new random numbers each time."""

    def draws_from_features(self, features_BD: torch.Tensor, num_samples: int) -> torch.Tensor:
        moments = self.head.logit_moments(features_BD)
        return moments.mean_BK + moments.scale_BK * torch.randn(num_samples, *moments.mean_BK.shape)


class BatchCentred(MeanField):
    """Standardises features by the batch's own mean."""

    def features(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        features_BD = super().features(x_BCHW)
        return features_BD - features_BD.mean(0)


class SharedTensor(MeanField):
    """Registers one tensor twice."""

    def __init__(self, parts: Parts, config: MeanFieldConfig) -> None:
        super().__init__(parts, config)
        self.register_buffer("again", self.model.head.prior_scale)


class ReusedParticle(MeanField):
    """Uses the first weight draw for all."""

    def logits(self, x_BCHW: torch.Tensor, num_samples: int) -> torch.Tensor:
        return super().logits(x_BCHW, num_samples)[:1].expand(num_samples, -1, -1)


class ScaleTooSmall(MeanField):
    """Predicts with 0.9 of the scale."""

    def draws_from_features(self, features_BD: torch.Tensor, num_samples: int) -> torch.Tensor:
        mean_BK = self.head.logit_moments(features_BD).mean_BK
        return mean_BK + 0.9 * (super().draws_from_features(features_BD, num_samples) - mean_BK)


class PointMass(MeanField):
    """A Gaussian head that has no spread yet, as one has before a pass that fits it; moments and draws agree."""

    def __init__(self, parts: Parts, config: MeanFieldConfig) -> None:
        super().__init__(parts, config)
        torch.nn.init.constant_(self.guide.log_scale, -float("inf"))


class SpreadFromNowhere(PointMass):
    """The same, with draws that spread."""

    def draws_from_features(self, features_BD: torch.Tensor, num_samples: int) -> torch.Tensor:
        draws_SBK = super().draws_from_features(features_BD, num_samples)
        return draws_SBK + 1e-3 * torch.linspace(-1, 1, num_samples)[:, None, None]


def test_a_posterior_without_spread_has_draws_without_spread() -> None:
    check_draws_match_moments(_mean_field(PointMass))


PLANTED: list[tuple[type[MeanField], Check]] = [
    (KLPerBatch, check_batches_add_up),
    (SummedNLL, check_loss_ignores_order_and_duplicates),
    (ScaleInTheBackbonesOptimizer, check_scale_is_fitted),
    (FreshNoise, check_same_seed_same_logits),
    (BatchCentred, check_draws_ignore_companions),
    (SharedTensor, check_no_shared_storage),
    (ReusedParticle, check_particles_equal_a_loop),
    (ScaleTooSmall, check_draws_match_moments),
    (SpreadFromNowhere, check_draws_match_moments),
]


@pytest.mark.parametrize(("planted", "check"), PLANTED, ids=lambda value: value.__name__)
def test_planted_fault_is_caught(planted: type[MeanField], check: Check) -> None:
    with pytest.raises(AssertionError):
        check(_mean_field(planted))


def test_moments_have_the_shapes_of_the_contract() -> None:
    moments = _moments()
    assert moments.mean_BK.shape == moments.scale_BK.shape == (5, 3)
    assert moments.factor_BKR.shape == (5, 3, 0)
    assert (moments.scale_BK > 0).all()


def _moments() -> LogitGaussian:
    parts = Parts(_Features(), 3, 10)
    posterior = MeanField(parts, MeanFieldConfig())
    return posterior.head.logit_moments(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))


class _Features(torch.nn.Module):
    num_features = 4

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW.flatten(1)


def _mean_field(build: Callable[[Parts, MeanFieldConfig], Posterior]) -> Family:
    return mean_field.FAMILY._replace(build=build)


def _with_weight_estimator(config: MeanFieldConfig) -> MeanFieldConfig:
    return MeanFieldConfig(initial_scale=config.initial_scale, estimator="weight")
