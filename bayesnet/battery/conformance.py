"""T12: every family keeps the contract of a posterior, as `bayesnet.testing.CHECKS` states it.

Each family's number is how many of those checks it fails, with the first complaint in its name. They have fixed seeds
and are equalities but for two with bounds of their own, so that the numbers depend on no seed: no false alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from unittest import mock

from torch import Tensor

from bayesnet.battery import faults
from bayesnet.battery.base import Check, Fault, Findings, Outcome
from bayesnet.battery.seeding import seeded
from bayesnet.inference import FAMILIES, base, draw_table
from bayesnet.inference.base import Family, GaussianHeadPosterior, HeadPosterior, Parts, Posterior
from bayesnet.inference.mean_field import MeanField
from bayesnet.testing import CHECKS as CONTRACT
from bayesnet.testing import check_scale_is_fitted, has_initial_scale
from bayesnet.types import Loss


def violations(family: Family, seed: int, contract: Sequence[Callable[[Family], None]] = CONTRACT) -> Outcome:
    """Return how many checks of the contract a family fails, and what the first complains of."""
    complaints = []
    for check in contract:
        try:
            with seeded(seed):
                check(family)
        except AssertionError as error:
            complaints.append(f"{check.__name__}: {error}".partition("\n")[0])
    words = f"{family.name}: checks of the contract that fail"
    return Outcome(f"{words} ({complaints[0]})" if complaints else words, len(complaints), 0)


def conformance(names: Sequence[str], seed: int) -> Findings:
    """Check families by name."""
    return Findings([violations(FAMILIES[name], seed) for name in names])


def conformance_of_mean_field(seed: int) -> Findings:
    """Check the family that faults are planted in."""
    return conformance(["mean_field"], seed)


def conformance_of_the_others(seed: int) -> Findings:
    """Check all other families but `guide`, which is whatever Pyro guide its user names."""
    return conformance([name for name in FAMILIES if name not in ("mean_field", "guide")], seed)


def _kl_per_batch() -> faults.Planted:
    original = MeanField.loss_from_features

    def wrong(self: MeanField, features_BD: Tensor, y: Tensor) -> Loss:
        loss = original(self, features_BD, y)
        return loss._replace(total=loss.fit + loss.kl / len(y))

    return mock.patch.object(MeanField, "loss_from_features", wrong)


def _one_weight_for_all_logits() -> faults.Planted:
    original = HeadPosterior.logits

    def reused(self: HeadPosterior, x_BCHW: Tensor, num_samples: int) -> Tensor:
        return original(self, x_BCHW, num_samples)[:1].expand(num_samples, -1, -1)

    return mock.patch.object(HeadPosterior, "logits", reused)


def _one_row_for_all() -> faults.Planted:
    """Every row of the table of draws is the first."""
    original = draw_table.table_prefix
    return mock.patch.object(base, "table_prefix", lambda table_SE, size: original(table_SE, size)[:1].expand(size, -1))


def _predicted_scale_times(factor: float) -> faults.Planted:
    """Predictions, which use the table of draws, spread too little."""
    original = GaussianHeadPosterior.draws_from_features

    def narrow(self: GaussianHeadPosterior, features_BD: Tensor, num_samples: int) -> Tensor:
        mean_BK = self.head.logit_moments(features_BD).mean_BK
        return mean_BK + factor * (original(self, features_BD, num_samples) - mean_BK)

    return mock.patch.object(GaussianHeadPosterior, "draws_from_features", narrow)


def initial_scale_of(name: str, seed: int) -> Findings:
    """Check only that a variational family forgets its initial scale: the one check that its optimizer can fail."""
    return Findings([violations(FAMILIES[name], seed, [check_scale_is_fitted])])


def _trained_by_the_backbones_optimizer(name: str) -> faults.Planted:
    """Posteriors of a family own no variational parameters, so that all they have goes to the backbone's SGD."""
    family = FAMILIES[name]

    def build(parts: Parts, config: object) -> Posterior:
        posterior = family.build(parts, config)
        vars(posterior)["variational_parameters"] = tuple
        return posterior

    return mock.patch(f"{__name__}.FAMILIES", {**FAMILIES, name: family._replace(build=build)})


REUSED_PARTICLE = Fault("particle reused in logits", _one_weight_for_all_logits)
BACKBONES_SGD = "head trained by the backbone's SGD"
VARIATIONAL = tuple(name for name, family in FAMILIES.items() if has_initial_scale(family))

CHECKS: tuple[Check, ...] = (
    Check(
        "T12",
        "conformance of mean_field",
        conformance_of_mean_field,
        (
            Fault("KL / batch instead of / N", _kl_per_batch),
            REUSED_PARTICLE,
            Fault("particle reused in predictions", _one_row_for_all),
            Fault("posterior sd x 0.7 in predictions", lambda: _predicted_scale_times(0.7)),
            Fault(BACKBONES_SGD, partial(_trained_by_the_backbones_optimizer, "mean_field")),
        ),
    ),
    Check("T12", "conformance of the other families", conformance_of_the_others, (REUSED_PARTICLE,), full=True),
    *(
        Check(
            "T12",
            f"initial scale of {name}",
            partial(initial_scale_of, name),
            (Fault(f"{BACKBONES_SGD}: {name}", partial(_trained_by_the_backbones_optimizer, name)),),
            full=True,
        )
        for name in VARIATIONAL
        if name != "mean_field"
    ),
)
