"""Families fitted to many small softmax problems at once: one module, its parameters stacked, `torch.func.vmap`.

A thousand fits one by one would take hours. Each minimises the family's own `loss` on data of its own, and Adam acts on
every number by itself, so the fits do not know of each other; start and number of steps are the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import Adam
from torch.optim.lr_scheduler import ExponentialLR

from bayesnet import elbo
from bayesnet.inference import FAMILIES, full_rank, matrix_normal
from bayesnet.inference.base import Family, HeadPosterior, Parts
from bayesnet.model import linear_logits
from bayesnet.testing import FlattenBackbone

FIRST_RATE, LAST_RATE = 0.1, 0.001


class SoftmaxProblems(NamedTuple):
    """R data sets drawn from the model, and an image more of each, float32.

    Attributes:
        features_RND: Features, standard normal.
        y_RN: Labels.
        weight_RKD: The weights (K, D + 1) that they were drawn from, standard normal.
        new_R1D: Features of the new image.
        new_y_R: Its label.
    """

    features_RND: Tensor
    y_RN: Tensor
    weight_RKD: Tensor
    new_R1D: Tensor
    new_y_R: Tensor


def softmax_problems(
    num_sets: int, *, num_examples: int, num_features: int, num_classes: int, seed: int
) -> SoftmaxProblems:
    """Return problems drawn from the model of a head whose prior is standard normal."""
    generator = torch.Generator().manual_seed(seed)
    features_RND = torch.randn(num_sets, num_examples + 1, num_features, generator=generator)
    weight_RKD = torch.randn(num_sets, num_classes, num_features + 1, generator=generator)
    probability_RNK = linear_logits(features_RND, weight_RKD).softmax(-1)
    y_RN = torch.multinomial(probability_RNK.flatten(0, 1), 1, generator=generator).view(num_sets, -1)
    return SoftmaxProblems(features_RND[:, :-1], y_RN[:, :-1], weight_RKD, features_RND[:, -1:], y_RN[:, -1])


class _Objective(nn.Module):
    """The total loss as a module, so that `functional_call` can put other parameters into it."""

    def __init__(self, posterior: HeadPosterior) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(self, features_ND: Tensor, y_N: Tensor) -> Tensor:
        return self.posterior.loss(features_ND, y_N).total


def fit_each(
    family: str,
    problems: SoftmaxProblems,
    settings: Mapping[str, Any],
    *,
    num_steps: int = 500,
    repeats: int = 8,
    seed: int = 0,
) -> Iterator[HeadPosterior]:
    """Yield the posterior of each problem in turn, fitted and finalized: one module that changes with each step.

    Torch's random state goes on from ``seed``; fork it.

    Args:
        family: Its name.
        problems: The data.
        settings: Fields of its configuration.
        num_steps: Of Adam, on all examples, its rate falling from 0.1 to 0.001.
        repeats: Draws of the noise per example and step.
        seed: Of initial weights and noise.
    """
    table: Family = FAMILIES[family]
    num_sets, num_examples, num_features = problems.features_RND.shape
    parts = Parts(FlattenBackbone(num_features), problems.weight_RKD.shape[1], num_examples)
    torch.manual_seed(seed)
    posterior = table.build(parts, replace(table.config(), **settings))
    assert isinstance(posterior, HeadPosterior)
    stacked = _fit(_Objective(posterior), problems, num_steps, repeats)
    for index in range(num_sets):
        with torch.no_grad():
            for name, parameter in posterior.named_parameters():
                parameter.copy_(stacked[f"posterior.{name}"][index])
        table.finalize(posterior.eval(), [(problems.features_RND[index], problems.y_RN[index])])
        yield posterior


def _fit(objective: _Objective, problems: SoftmaxProblems, num_steps: int, repeats: int) -> dict[str, Tensor]:
    """Return the fitted parameters of all problems, stacked."""
    stacked = {
        name: parameter.detach().repeat(len(problems.y_RN), *[1] * parameter.dim()).requires_grad_()
        for name, parameter in objective.named_parameters()
    }

    def loss(parameters: dict[str, Tensor], features_ND: Tensor, y_N: Tensor) -> Tensor:
        total: Tensor = functional_call(objective, parameters, (features_ND, y_N))
        return total

    losses = vmap(loss, randomness="different")
    optimizer = Adam(stacked.values(), lr=FIRST_RATE)
    schedule = ExponentialLR(optimizer, (LAST_RATE / FIRST_RATE) ** (1 / num_steps))
    with differentiated_by_torch(), averaged(repeats):
        for _ in range(num_steps):
            optimizer.zero_grad()
            torch.autograd.backward(losses(stacked, problems.features_RND, problems.y_RN).sum())
            optimizer.step()
            schedule.step()
    return {name: parameter.detach() for name, parameter in stacked.items()}


@contextlib.contextmanager
def averaged(repeats: int) -> Iterator[None]:
    """Make the local estimator average its loss over several draws of the logits, their moments computed once."""
    noise, cross_entropy = elbo.standard_normal, elbo.cross_entropy

    def repeated(logits: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(logits.flatten(0, -2), y_B.repeat(logits.shape[:-1].numel() // len(y_B)))

    with (
        mock.patch.object(elbo, "standard_normal", lambda like: noise(like.expand(repeats, *like.shape))),
        mock.patch.object(elbo, "cross_entropy", repeated),
    ):
        yield


def covariance_factor(raw_nn: Tensor, scale_n: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `gaussian_weight.covariance_factor` does, from operations that `vmap` knows; slower."""
    unit = math.sqrt(raw_nn.shape[-1])
    row_nn = raw_nn.tril(-1) + unit * torch.eye(raw_nn.shape[-1], dtype=raw_nn.dtype)
    length_n1 = torch.linalg.vector_norm(row_nn, dim=-1, keepdim=True)
    return scale_n.unsqueeze(-1) * row_nn / length_n1, (length_n1 / unit).log().sum()


@contextlib.contextmanager
def differentiated_by_torch() -> Iterator[None]:
    """Make families use the `covariance_factor` of this module: `vmap` takes no gradients written by hand."""
    with (
        mock.patch.object(full_rank, "covariance_factor", covariance_factor),
        mock.patch.object(matrix_normal, "covariance_factor", covariance_factor),
    ):
        yield
