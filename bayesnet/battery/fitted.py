"""Families fitted to small problems: by Adam on all examples at once, its rate falling, then `finalize`; and faults.

The features are given, so what is fitted is the last layer alone. The prior is normal with variance 1: in the loss, or
for families without one (mc_dropout, swag, ensemble) as a weight decay of 1 / N, which has the same mode.

The faults change the loss, the prior or the predictions of every family that has a last layer.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import ExponentialLR

from bayesnet.battery.base import Fault
from bayesnet.battery.seeding import seeded
from bayesnet.inference import FAMILIES
from bayesnet.inference.base import HeadPosterior, Posterior
from bayesnet.inference.deterministic import Deterministic
from bayesnet.inference.ensemble import Ensemble
from bayesnet.inference.gaussian_weight import WeightGuide
from bayesnet.inference.laplace import LaplaceHead
from bayesnet.inference.mean_field import MeanFieldGuide
from bayesnet.inference.mean_field_all import MeanFieldAll
from bayesnet.inference.vbll import DenseGuide
from bayesnet.model import BayesianHead
from bayesnet.testing import ToyProblem
from bayesnet.types import LogitGaussian, Loss

FINAL_BATCH_SIZE = 20
"""Rows per batch in `finalize`: SGD on all of them at once would have no noise, and SWAG's spread is that noise."""


def fit(
    family: str,
    problem: ToyProblem,
    *,
    num_steps: int = 1000,
    repeats: int = 16,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Posterior:
    """Return a family's posterior, fitted, in evaluation mode; torch's random state is left as it was.

    Args:
        family: Its name.
        problem: The data.
        num_steps: Of Adam, from a rate of 0.05 to 0.00005.
        repeats: How often each example is shown per step: with noise per image, as many draws in one.
        seed: Of initial weights and noise.
        settings: Fields of the family's configuration that are not its defaults.
    """
    table = FAMILIES[family]
    decay = 1 / len(problem.y_N)
    known = {"weight_decay": decay} if "weight_decay" in {field.name for field in fields(table.config)} else {}
    with seeded(seed):
        posterior = table.build(problem.parts(), table.config(**known, **(settings or {})))
        for member in posterior.members():
            _train(member, problem, num_steps=num_steps, repeats=repeats, decay=decay)
        posterior.eval()
        batches = zip(problem.x_NCHW.split(FINAL_BATCH_SIZE), problem.y_N.split(FINAL_BATCH_SIZE), strict=True)
        table.finalize(posterior, list(batches))
    return posterior


def _train(posterior: Posterior, problem: ToyProblem, *, num_steps: int, repeats: int, decay: float) -> None:
    """Minimise the loss; parameters whose prior is not in it are decayed."""
    x_BCHW, y_B = problem.x_NCHW.repeat(repeats, 1, 1, 1), problem.y_N.repeat(repeats)
    own = posterior.variational_parameters()
    optimizer = Adam(own or posterior.parameters(), lr=0.05, weight_decay=0.0 if own else decay)
    schedule = ExponentialLR(optimizer, 1e-3 ** (1 / num_steps))
    posterior.train()
    for _ in range(num_steps):
        optimizer.zero_grad()
        torch.autograd.backward(posterior.loss(x_BCHW, y_B).total)
        optimizer.step()
        schedule.step()


Change = Callable[[Tensor], Tensor]
"""From draws of the logits (S, B, K) to others."""


@contextlib.contextmanager
def _predictions(change: Change) -> Iterator[None]:
    """Put all draws of the logits through a function."""

    def changed(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda posterior, x_BCHW, num_samples: change(original(posterior, x_BCHW, num_samples))

    original = HeadPosterior.draws_and_features

    def with_features(posterior: HeadPosterior, x_BCHW: Tensor, num_samples: int) -> tuple[Tensor, Tensor | None]:
        draws_SBK, features_BD = original(posterior, x_BCHW, num_samples)
        return change(draws_SBK), features_BD

    # Of a head both kinds of prediction ask `draws_and_features`, of the others both ask `predict_draws`.
    predicted = ((HeadPosterior, "logits"), *itertools.product((MeanFieldAll, Ensemble), ("logits", "predict_draws")))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(HeadPosterior, "draws_and_features", with_features))
        for owner, name in predicted:
            stack.enter_context(mock.patch.object(owner, name, changed(getattr(owner, name))))
        yield


@contextlib.contextmanager
def _losses(change: Callable[[Callable[[Tensor, Tensor], Loss], Tensor, Tensor], Loss]) -> Iterator[None]:
    """Replace every loss by a function of the right one and of images and labels."""

    def changed(original: Callable[..., Loss]) -> Callable[..., Loss]:
        return lambda posterior, x_BCHW, y: change(functools.partial(original, posterior), x_BCHW, y)

    with contextlib.ExitStack() as stack:
        for owner in (HeadPosterior, MeanFieldAll, Deterministic):
            stack.enter_context(mock.patch.object(owner, "loss", changed(owner.loss)))
        yield


@contextlib.contextmanager
def _moments(factor: float) -> Iterator[None]:
    """Multiply the sd of Gaussian logits by a factor, but for training."""

    def changed(original: Callable[..., LogitGaussian]) -> Callable[..., LogitGaussian]:
        def moments(head: torch.nn.Module, features_BD: Tensor) -> LogitGaussian:
            mean_BK, scale_BK, factor_BKR = original(head, features_BD)
            by = 1.0 if head.training else factor
            return LogitGaussian(mean_BK, by * scale_BK, by * factor_BKR)

        return moments

    with contextlib.ExitStack() as stack:
        for owner in (MeanFieldGuide, WeightGuide, DenseGuide, LaplaceHead):
            stack.enter_context(mock.patch.object(owner, "logit_moments", changed(owner.logit_moments)))
        yield


def _wide_prior() -> AbstractContextManager[object]:
    """Make the prior of the last layer twice as wide as its settings say."""
    original = BayesianHead.__init__

    @functools.wraps(original)
    def wide(head: BayesianHead, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - whatever the original takes
        original(head, *args, **kwargs)
        head.prior_scale *= 2
        head._cached_prior = None

    return mock.patch.object(BayesianHead, "__init__", wide)


def _narrowed(draws_SBK: Tensor, factor: float = 0.7) -> Tensor:
    return draws_SBK.mean(0) + factor * (draws_SBK - draws_SBK.mean(0))


def _doubled_kl(loss: Callable[[Tensor, Tensor], Loss], x_BCHW: Tensor, y_B: Tensor) -> Loss:
    found = loss(x_BCHW, y_B)
    return found._replace(total=found.tempered(2))


def _other_labels(loss: Callable[[Tensor, Tensor], Loss], x_BCHW: Tensor, y_B: Tensor) -> Loss:
    """Return the loss of labels whose classes changed places."""
    return loss(x_BCHW, (y_B + 1) % (int(y_B.max()) + 1))


PRIOR_TWICE_AS_WIDE = Fault("prior sd x 2 wherever it is read", _wide_prior)
KL_TWICE = Fault("KL x 2 in the loss", lambda: _losses(_doubled_kl))
OTHER_LABELS = Fault("labels permuted in training", lambda: _losses(_other_labels))
NARROW_MOMENTS = Fault("sd of the fitted logits x 0.7", lambda: _moments(0.7))
NARROW_DRAWS = Fault("sd of the predicted draws x 0.7", lambda: _predictions(_narrowed))
OTHER_CLASSES = Fault("classes of predictions permuted", lambda: _predictions(lambda draws_SBK: draws_SBK.roll(1, -1)))
MEAN_LOGITS = Fault("mean of logits instead of probabilities", lambda: _predictions(lambda draws: draws.mean(0, True)))
