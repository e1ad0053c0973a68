"""T12: faults of the field, planted one by one; the checks of this folder and of the conformance suite reject them all.

Equalities have no false alarms. The stochastic checks name their own false alarm and smallest fault: 1e-6 each.
Every check passes where nothing is planted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from bayesnet import elbo, predictive
from bayesnet.data import DataConfig, Preprocessing, load_data
from bayesnet.data import folder as folder_module
from bayesnet.engine import Engine
from bayesnet.inference import base, draw_table, mean_field
from bayesnet.inference.base import Family, Parts
from bayesnet.inference.mean_field import MeanField, MeanFieldConfig, MeanFieldGuide
from bayesnet.predictive import Predictor
from bayesnet.testing import (
    FlattenBackbone,
    check_batches_add_up,
    check_draws_match_moments,
    check_particles_equal_a_loop,
    check_scale_is_fitted,
)
from bayesnet.types import LogitGaussian
from tests.conformance.test_families import KLPerBatch, ReusedParticle, ScaleInTheBackbonesOptimizer
from tests.statistical import test_elbo as t2
from tests.statistical import test_gradients as t5
from tests.statistical import test_predictive as t16
from tests.statistical import test_recovery as t6

Plant = Callable[[], contextlib.AbstractContextManager[object]]
Check = Callable[[], None]

ALPHA = 1e-6
NUM_WEIGHTS = 15
NUM_DRAWS = 200


# Checks that the other files do not have.


def weight_draws() -> Tensor:
    """Return (draw - mean) / sd of the head's weights, which must be standard normal: (S, K, D + 1)."""
    guide = MeanFieldGuide(torch.ones(3, NUM_WEIGHTS // 3).double(), 0.3).double()
    torch.manual_seed(0)
    with torch.no_grad():
        draws_SKD: Tensor = (guide.sample(NUM_DRAWS) - guide.loc) / guide.log_scale.exp()
    return draws_SKD


def dispersion_bounds() -> tuple[float, float]:
    """Return the ends of the sum of squares of 3,000 standard normal numbers, each crossed with probability 5e-7."""
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], NUM_DRAWS * NUM_WEIGHTS)
    return float(low), float(high)


def check_weight_draws() -> None:
    """The dispersion of joint draws of the weight, and of their mean over draws, which reused noise makes large.

    False alarm 1e-6 for each of the two. Smallest faults caught with power 0.99: an sd 9 % too small or 10 % too large;
    noise of which 5 % of the variance is shared by all draws.
    """
    draws_SKD = weight_draws()
    low, high = dispersion_bounds()
    assert low < float(draws_SKD.square().sum()) < high, "the draws have not the posterior's sd"
    shared = float(NUM_DRAWS * draws_SKD.mean(0).square().sum())
    assert shared < stats.chi2.ppf(1 - ALPHA, NUM_WEIGHTS), "the draws move together"


def check_prediction_has_no_dropout() -> None:
    """Predictions of a network with dropout equal those of its layers without it (equality, no false alarm)."""
    backbone = nn.Sequential(FlattenBackbone(4), nn.Dropout(0.5))
    backbone.num_features = 4  # type: ignore[assignment]
    torch.manual_seed(0)
    posterior = MeanField(Parts(backbone, 3, 10), MeanFieldConfig())
    plain = MeanField(Parts(FlattenBackbone(4), 3, 10), MeanFieldConfig())
    plain.load_state_dict(posterior.state_dict())
    pixels = torch.randint(256, (6, 1, 1, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    preprocessing = Preprocessing(1, 1, 4, (0.5,), (0.25,), 100)
    posterior.train()
    predictor = Predictor(posterior, preprocessing, engine=Engine(torch.device("cpu")), num_samples=8, chunk_size=8)
    expected = plain.eval().predict_draws(preprocessing.normalize(pixels), 8).double().log_softmax(-1)
    assert torch.allclose(predictor.raw_log_probabilities(pixels), expected, atol=1e-6)


def check_classes_match_by_name(root: Path) -> None:
    """Each split's labels name the folder that a file lies in, where splits lack classes (equality)."""
    for place in ("train/2", "train/10", "train/a", "val/10", "calibration/a", "test/10", "test/a"):
        folder = root / place
        if not folder.exists():
            folder.mkdir(parents=True)
            for index in range(2):
                Image.fromarray(np.full((8, 8, 3), 10 * index, np.uint8)).save(folder / f"{index}.png")
    data = load_data(DataConfig(spec=f"folder:{root}"))
    for part in (data.train, data.validation, data.calibration, data.test):
        for index, label in enumerate(part.labels_N.tolist()):
            assert Path(part.name(index)).parent.name == data.classes[label], "labels of another class"


# What is planted, beyond what the files of the checks plant.


def faulty_family(faulty: type[MeanField]) -> Plant:
    """Return a plant that builds the mean-field family as this class of the conformance suite's."""
    return lambda: mock.patch.object(mean_field, "MeanField", faulty)


def conforms(check: Callable[[Family], None]) -> Check:
    return lambda: check(mean_field.FAMILY)


def labels_rolled() -> contextlib.AbstractContextManager[object]:
    """Every image gets its neighbour's label, in the loss itself."""
    original = elbo.cross_entropy
    return mock.patch.object(elbo, "cross_entropy", lambda logits_BK, y: original(logits_BK, y.roll(1, 0)))


def scale_detached() -> contextlib.AbstractContextManager[object]:
    """The right value with a wrong gradient: the likelihood does not move the posterior's scale."""
    original = MeanFieldGuide.logit_moments

    def detached(self: MeanFieldGuide, features_BD: Tensor) -> LogitGaussian:
        moments = original(self, features_BD)
        return moments._replace(scale_BK=moments.scale_BK.detach())

    return mock.patch.object(MeanFieldGuide, "logit_moments", detached)


def sampled_scale_times(factor: float) -> contextlib.AbstractContextManager[object]:
    original = MeanFieldGuide.sample
    return mock.patch.object(
        MeanFieldGuide, "sample", lambda self, size: self.loc + factor * (original(self, size) - self.loc)
    )


def one_weight_for_all() -> contextlib.AbstractContextManager[object]:
    original = MeanFieldGuide.sample
    return mock.patch.object(MeanFieldGuide, "sample", lambda self, size: original(self, 1).expand(size, -1, -1))


def table_scale_times(factor: float) -> contextlib.AbstractContextManager[object]:
    """Predictions, which use the table of draws, spread too little."""
    original = MeanField.draws_from_features

    def narrow(self: MeanField, features_BD: Tensor, num_samples: int) -> Tensor:
        mean_BK = self.head.logit_moments(features_BD).mean_BK
        return mean_BK + factor * (original(self, features_BD, num_samples) - mean_BK)

    return mock.patch.object(MeanField, "draws_from_features", narrow)


def one_row_for_all() -> contextlib.AbstractContextManager[object]:
    """Every row of the table of draws is the first."""
    original = draw_table.table_prefix
    return mock.patch.object(base, "table_prefix", lambda table_SE, size: original(table_SE, size)[:1].expand(size, -1))


def dropout_left_on() -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(nn.Module, "eval", lambda self: self)


def mean_of_logits() -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(predictive, "log_mean_exp", t16.mean_of_logits)


def classes_numbered_by_each_split() -> contextlib.AbstractContextManager[object]:
    """As when each split is a data set of its own: a missing class shifts the numbers of those after it."""
    original = folder_module._four_splits

    def renumbered(*arguments: Any) -> tuple[dict[str, list[folder_module.Labelled]], list[str]]:  # noqa: ANN401
        found, notes = original(*arguments)
        for split, labelled in found.items():
            ranks = {label: rank for rank, label in enumerate(sorted({label for _, label in labelled}))}
            found[split] = [(file, ranks[label]) for file, label in labelled]
        return found, notes

    return mock.patch.object(folder_module, "_four_splits", renumbered)


def checks(root: Path) -> dict[str, Check]:
    """Return the checks by name.

    Args:
        root: An empty folder, for the one that needs files.
    """
    return {
        "T1 evidence identity": t2.check_evidence_identity,
        "T2 linear ELBO": t2.check_linear_elbo,
        "T2 softmax ELBO": t2.check_softmax_elbo,
        "T3 vectorised = loop": t2.check_vectorised_equals_loop,
        "T4 batches": t2.check_minibatch_scaling,
        "T4 batches of the head": t2.check_minibatch_scaling_of_the_head,
        "T5 local draw": t5.check_local_gradient_of_a_draw,
        "T5 weight draw": t5.check_weight_gradient_of_a_draw,
        "T5 linear draw": t5.check_linear_gradient_of_a_draw,
        "T5 local mean": lambda: t5.check_mean_softmax_gradient("local"),
        "T5 weight mean": lambda: t5.check_mean_softmax_gradient("weight"),
        "T5 linear mean": t5.check_mean_linear_gradient,
        "T6 recovery": t6.check_mean_field_recovery,
        "T16 mean of probabilities": t16.check_log_mean_exp,
        "conformance: batches": conforms(check_batches_add_up),
        "conformance: moments": conforms(check_draws_match_moments),
        "conformance: particles": conforms(check_particles_equal_a_loop),
        "conformance: scale fitted": conforms(check_scale_is_fitted),
        "weight draws": check_weight_draws,
        "no dropout": check_prediction_has_no_dropout,
        "classes by name": lambda: check_classes_match_by_name(root),
    }


class Mutant(NamedTuple):
    """A fault and the checks that must each reject it."""

    plant: Plant
    rejected_by: tuple[str, ...]


MUTANTS: dict[str, Mutant] = {
    "KL x 0": Mutant(lambda: t2.kl_times(0.0), ("T2 linear ELBO", "T2 softmax ELBO", "T5 weight draw")),
    "KL x 0 in the local estimator": Mutant(lambda: t2.own_kl_times(0.0), ("T5 local draw", "T5 local mean")),
    "KL x 2": Mutant(
        lambda: t2.kl_times(2.0), ("T2 linear ELBO", "T5 weight mean", "T5 linear mean", "T5 linear draw")
    ),
    "KL x 2 in the local estimator": Mutant(lambda: t2.own_kl_times(2.0), ("T2 softmax ELBO", "T5 local draw")),
    "KL x 0.9": Mutant(lambda: t2.kl_times(0.9), ("T6 recovery",)),
    "KL x batch": Mutant(lambda: t2.own_kl_times(20.0), ("T2 softmax ELBO", "T5 local mean")),
    "KL / batch instead of / N": Mutant(faulty_family(KLPerBatch), ("conformance: batches",)),
    "no plate scale": Mutant(t2.missing_plate_scale, ("T4 batches", "T4 batches of the head", "T5 weight draw")),
    "X @ w.mT broadcasts": Mutant(t2.broadcasting_product, ("T3 vectorised = loop",)),
    "posterior sd x 0.7 in q": Mutant(lambda: t2.posterior_scale_times(0.7), ("T1 evidence identity",)),
    "posterior sd x 0.7 in training": Mutant(
        lambda: t2.noise_times(0.7), ("T2 softmax ELBO", "T5 local mean", "T5 local draw")
    ),
    "posterior sd x 0.7 in draws": Mutant(lambda: sampled_scale_times(0.7), ("weight draws",)),
    "posterior sd x 0.7 in predictions": Mutant(lambda: table_scale_times(0.7), ("conformance: moments",)),
    "gradient of the sd cut": Mutant(scale_detached, ("T5 local draw", "T5 local mean")),
    "prior sd x 2": Mutant(lambda: t2.prior_scale_times(2.0), ("T2 softmax ELBO", "T5 weight draw", "T5 weight mean")),
    "labels permuted": Mutant(labels_rolled, ("T2 softmax ELBO", "T5 local draw")),
    "dropout left on": Mutant(dropout_left_on, ("no dropout",)),
    "mean of logits": Mutant(mean_of_logits, ("T16 mean of probabilities",)),
    "particle reused": Mutant(one_weight_for_all, ("weight draws",)),
    "particle reused in logits": Mutant(faulty_family(ReusedParticle), ("conformance: particles",)),
    "particle reused in predictions": Mutant(one_row_for_all, ("conformance: moments",)),
    "classes numbered by each split": Mutant(classes_numbered_by_each_split, ("classes by name",)),
    "head trained by the backbone's SGD": Mutant(
        faulty_family(ScaleInTheBackbonesOptimizer), ("conformance: scale fitted",)
    ),
}


def rejects(check: Check) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", ["weight draws", "no dropout", "classes by name"])
def test_a_check_passes_without_a_fault(name: str, tmp_path: Path) -> None:
    """The checks of this file; the files of the others run those."""
    checks(tmp_path)[name]()


def test_every_check_has_a_fault_to_reject(tmp_path: Path) -> None:
    assert set(checks(tmp_path)) == {name for mutant in MUTANTS.values() for name in mutant.rejected_by}


def test_t12_every_fault_is_rejected(tmp_path: Path, figures: dict[str, list[str]]) -> None:
    table, missed = [], []
    available = checks(tmp_path)
    for name, mutant in MUTANTS.items():
        for check in mutant.rejected_by:
            with mutant.plant():
                caught = rejects(available[check])
            table.append(f"{name:36} {check:26} {'rejected' if caught else 'ACCEPTED'}")
            missed += [] if caught else [(name, check)]
    caught_names = MUTANTS.keys() - {name for name, _ in missed}
    table.append(f"faults rejected: {len(caught_names)} of {len(MUTANTS)}")
    figures["T12 planted faults"] = table
    assert missed == [], "\n".join(table)


# The powers that the docstrings state.


def test_the_power_against_a_wrong_sd() -> None:
    """Draws with sd r have r^2 chi2 as their sum of squares: power in closed form."""
    low, high = dispersion_bounds()
    degrees = NUM_DRAWS * NUM_WEIGHTS
    small = math.sqrt(low / stats.chi2.ppf(0.99, degrees))
    large = math.sqrt(high / stats.chi2.ppf(0.01, degrees))
    assert (small, large) == pytest.approx((0.91, 1.10), abs=0.005)


def test_the_power_against_shared_noise() -> None:
    """With a share c of the variance in common, S x mean^2 is (1 + c (S - 1)) chi2 with 15 degrees of freedom."""
    cut, low = stats.chi2.ppf([1 - ALPHA, 0.01], [NUM_WEIGHTS, NUM_WEIGHTS])
    assert (cut / low - 1) / (NUM_DRAWS - 1) == pytest.approx(0.05, abs=0.005)
