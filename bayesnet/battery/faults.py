"""Faults of the field that several checks must reject (T12), planted by replacing functions of the library.

Faults that only one check is about stand beside it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from bayesnet import elbo, model, predictive
from bayesnet.battery.base import Fault
from bayesnet.battery.linear_gaussian import Regressions
from bayesnet.inference.mean_field import MeanFieldGuide
from bayesnet.model import BayesianHead
from bayesnet.types import LogitGaussian

Planted = AbstractContextManager[object]


def kl_times(factor: float) -> Planted:
    """Return a context in which closed-form divergences in weight space are multiplied by a factor."""
    original = elbo._closed_form_kl

    def scaled(guide_site: Any, model_site: Any) -> Tensor | None:  # noqa: ANN401 - sites of a Pyro trace
        divergence = original(guide_site, model_site)
        return None if divergence is None else factor * divergence

    return mock.patch.object(elbo, "_closed_form_kl", scaled)


def own_kl_times(factor: float) -> Planted:
    """Return a context in which the divergence of the local estimator is multiplied by a factor."""
    original = MeanFieldGuide.kl
    return mock.patch.object(MeanFieldGuide, "kl", lambda self, prior: factor * original(self, prior))


def _sampled_kl() -> Planted:
    return mock.patch.object(elbo, "_closed_form_kl", return_value=None)


def _broadcasting_product() -> Planted:
    def wrong(features_BD: Tensor, weight_KD: Tensor) -> Tensor:
        return features_BD @ weight_KD[..., :-1].mT + weight_KD[..., -1].unsqueeze(-2)

    return mock.patch.object(model, "linear_logits", wrong)


def _without_bias() -> Planted:
    return mock.patch.object(model, "linear_logits", lambda features_BD, weight: features_BD @ weight[..., :-1].mT)


def _missing_plate_scale() -> Planted:
    """The plate takes the batch for the whole data set."""
    original = pyro.plate

    def unscaled(name: str, size: int, *, subsample: Tensor) -> object:
        return original(name, len(subsample), subsample=subsample)

    return mock.patch.object(pyro, "plate", unscaled)


def _without_replay() -> Planted:
    """The model draws a weight of its own instead of taking the guide's."""
    return mock.patch.object(poutine, "replay", lambda program, trace: program)


def _without_auxiliary_sites() -> Planted:
    """As if a guide's Delta were all of it: its entropy is left out."""
    original = elbo.sample_sites

    def kept(trace: poutine.Trace) -> dict[str, Any]:
        return {name: site for name, site in original(trace).items() if not site["infer"].get("is_auxiliary")}

    return mock.patch.object(elbo, "sample_sites", kept)


def _noise_times(factor: float) -> Planted:
    return mock.patch.object(elbo, "standard_normal", lambda like: factor * torch.randn_like(like))


def _prior_scale_times(factor: float) -> Planted:
    """The program's prior is not the one that the closed form is told of."""
    return mock.patch.object(
        BayesianHead, "prior", lambda self: dist.Normal(self.prior_loc, factor * self.prior_scale).to_event(2)
    )


def _exact_scale_times(factor: float) -> Planted:
    original = Regressions.posterior

    def narrow(self: Regressions) -> dist.MultivariateNormal:
        exact = original(self)
        return dist.MultivariateNormal(exact.mean, covariance_matrix=factor**2 * exact.covariance_matrix)

    return mock.patch.object(Regressions, "posterior", narrow)


def _labels_rolled() -> Planted:
    """Every image gets its neighbour's label, in the loss itself."""
    original = elbo.cross_entropy
    return mock.patch.object(elbo, "cross_entropy", lambda logits_BK, y: original(logits_BK, y.roll(1, 0)))


def _scale_detached() -> Planted:
    """The right value with a wrong gradient: the likelihood does not move the posterior's scale."""
    original = MeanFieldGuide.logit_moments

    def detached(self: MeanFieldGuide, features_BD: Tensor) -> LogitGaussian:
        moments = original(self, features_BD)
        return moments._replace(scale_BK=moments.scale_BK.detach())

    return mock.patch.object(MeanFieldGuide, "logit_moments", detached)


def _features_detached() -> Planted:
    """The backbone gets no gradient."""
    original = model.linear_logits
    return mock.patch.object(model, "linear_logits", lambda features_BD, weight: original(features_BD.detach(), weight))


def _mean_of_logits() -> Planted:
    return mock.patch.object(predictive, "log_mean_exp", lambda values, dim: values.mean(dim).log_softmax(-1))


KL_TIMES_0 = Fault("KL x 0", lambda: kl_times(0.0))
KL_TIMES_2 = Fault("KL x 2", lambda: kl_times(2.0))
KL_TIMES_09 = Fault("KL x 0.9", lambda: kl_times(0.9))
LOCAL_KL_TIMES_0 = Fault("KL x 0 in the local estimator", lambda: own_kl_times(0.0))
LOCAL_KL_TIMES_2 = Fault("KL x 2 in the local estimator", lambda: own_kl_times(2.0))
LOCAL_KL_TIMES_BATCH = Fault("KL x batch", lambda: own_kl_times(20.0))
SAMPLED_KL = Fault("KL sampled in silence", _sampled_kl)
BROADCASTING_PRODUCT = Fault("X @ w.mT broadcasts", _broadcasting_product)
WITHOUT_BIAS = Fault("bias left out of the logits", _without_bias)
MISSING_PLATE_SCALE = Fault("no plate scale", _missing_plate_scale)
WITHOUT_REPLAY = Fault("model not run at the guide's draw", _without_replay)
WITHOUT_AUXILIARY_SITES = Fault("entropy of an automatic guide left out", _without_auxiliary_sites)
NOISE_TIMES_07 = Fault("posterior sd x 0.7 in training", lambda: _noise_times(0.7))
EXACT_SCALE_TIMES_07 = Fault("posterior sd x 0.7 in q", lambda: _exact_scale_times(0.7))
PRIOR_SCALE_TIMES_2 = Fault("prior sd x 2", lambda: _prior_scale_times(2.0))
LABELS_ROLLED = Fault("labels permuted", _labels_rolled)
SCALE_DETACHED = Fault("gradient of the sd cut", _scale_detached)
FEATURES_DETACHED = Fault("gradient of the features cut", _features_detached)
MEAN_OF_LOGITS = Fault("mean of logits", _mean_of_logits)
