r"""T10: simulation-based calibration of softmax heads, whose posterior no family has: a report, and a gate on it.

    w ~ Normal(0, I), 3 classes, 2 features;  20 labels from softmax(W [f; 1]);  1,000 data sets, each fitted

Of the nine weights: the sd of z = (truth - mean) / sd over the posterior's 999 draws, 1 where calibrated; the coverage
of central 80 and 95 % intervals. Of one new image each: Spiegelhalter's z of its predicted probabilities,
sum (p_y - sum_k p_k^2) / sqrt(sum var p_y), negative where predictions are overconfident (simulated_predictions.py).

| head | sd of z | coverage of 80 % | of 95 % | z of predictions |
|---|---|---|---|---|
| mean_field | 1.284 ± 0.012 | 0.685 [.674 .696] | 0.873 [.865 .881] | +0.1 |
| matrix_normal | 1.018 ± 0.009 | 0.793 [.783 .802] | 0.946 [.941 .951] | -0.1 |
| low_rank | 1.094 ± 0.010 | 0.766 [.756 .775] | 0.929 [.922 .934] | -0.1 |
| full_rank | 1.000 ± 0.009 | 0.803 [.793 .812] | 0.949 [.943 .954] | +0.0 |
| vbll | 1.970 ± 0.019 | 0.519 [.508 .530] | 0.709 [.698 .719] | +0.3 |
| vbll, dense | 1.732 ± 0.017 | 0.569 [.558 .580] | 0.763 [.754 .773] | +0.2 |
| laplace | 1.044 ± 0.009 | 0.785 [.776 .795] | 0.941 [.935 .946] | +2.0 |
| laplace, diagonal | 1.373 ± 0.013 | 0.657 [.646 .668] | 0.852 [.843 .860] | +2.8 |
| laplace, full | 1.014 ± 0.009 | 0.797 [.788 .806] | 0.948 [.942 .953] | +2.6 |

Standard errors, and exact 95 % intervals. full_rank is calibrated within its errors; independent weights or rows, and
vbll's bound, make weights overconfident. Laplace's weights are calibrated, around a mode whose predictions are too
cautious.

The true class probabilities of the new image are known too, and how many of them lie inside the intervals that
`predict` would give (256 draws, `summarize`):

| head | 80 % intervals | 90 % | 95 % |
|---|---|---|---|
| mean_field | 0.860 [.844 .875] | 0.943 [.933 .953] | 0.970 [.962 .976] |
| matrix_normal | 0.783 [.764 .801] | 0.909 [.896 .921] | 0.953 [.943 .962] |
| low_rank | 0.806 [.788 .823] | 0.914 [.901 .926] | 0.952 [.942 .961] |
| full_rank | 0.788 [.770 .805] | 0.912 [.899 .924] | 0.955 [.945 .963] |
| vbll | 0.697 [.676 .718] | 0.818 [.799 .835] | 0.877 [.862 .891] |
| vbll, dense | 0.738 [.718 .758] | 0.855 [.839 .870] | 0.918 [.905 .930] |
| laplace | 0.760 [.740 .779] | 0.865 [.849 .879] | 0.919 [.906 .930] |
| laplace, diagonal | 0.834 [.817 .851] | 0.921 [.908 .932] | 0.955 [.945 .963] |
| laplace, full | 0.769 [.750 .788] | 0.888 [.873 .902] | 0.940 [.929 .950] |

They are within .06 of what they say for all but vbll. mean_field's are too wide although its weights are too sure: in
sums of weights it lacks the correlations that narrow them. Images that the model does not describe have no such table.

Gate, since none of this has a right answer: each figure against its frozen one, in standard errors. Those of z and
coverage treat a data set, not a weight, as the independent unit; coverage through the exact binomial interval
(Clopper-Pearson, with the effective number of trials of Korn and Graubard 1998) that just reaches the frozen figure. At
seed 0 the data are those of the frozen run, only code and rounding can move a figure, and the gate is 3 standard
errors; any other seed compares two independent runs: false alarm 1e-6 for all figures of a check together. Smallest
faults caught with power 0.99: an sd of z that changes by 5 % on fresh data at the gate of seed 0, by 11 % at the other,
by 17 % with the 200 data sets of the quick check. That one does not see a prior sd x 2 (T9, T11 and T15 do).

`nuts` is left out, since its fits cannot be stacked: T15 is its test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from bayesnet.battery.base import Check, Fault, Findings, Outcome
from bayesnet.battery.faults import LABELS_ROLLED, NOISE_TIMES_07
from bayesnet.battery.fitted import KL_TWICE
from bayesnet.battery.many_heads import SoftmaxProblems, fit_each, softmax_problems
from bayesnet.battery.seeding import seeded
from bayesnet.battery.simulated_predictions import spiegelhalter
from bayesnet.battery.simulated_ranks import ALPHA, NUM_DRAWS, Array, clopper_pearson, exact_score
from bayesnet.inference.mean_field import MeanFieldGuide
from bayesnet.model import linear_logits
from bayesnet.predictive import summarize
from bayesnet.types import Summary

NUM_SETS, NUM_SMOKE_SETS = 1000, 200
GATE = 3.0
LEVELS = (0.8, 0.95)
INTERVAL_LEVELS = (0.8, 0.9, 0.95)


class Frozen(NamedTuple):
    """The figures of the run at seed 0 with 1,000 data sets."""

    z_sd: float
    coverage80: float
    coverage95: float
    prediction_z: float
    interval80: float
    interval90: float
    interval95: float


class Case(NamedTuple):
    """A family to fit.

    Attributes:
        frozen: What was measured.
        settings: Fields of its configuration that are not the defaults.
        num_steps: Of Adam.
        repeats: Draws of the noise per example and step; families on a deterministic loss need one.
    """

    frozen: Frozen
    settings: Mapping[str, Any] = {}
    num_steps: int = 500
    repeats: int = 8


CASES: dict[str, Case] = {
    "mean_field": Case(Frozen(1.2844, 0.6850, 0.8732, 0.0778, 0.8600, 0.9433, 0.9697)),
    "matrix_normal": Case(Frozen(1.0175, 0.7928, 0.9463, -0.0692, 0.7830, 0.9093, 0.9530)),
    "low_rank": Case(Frozen(1.0940, 0.7656, 0.9286, -0.0951, 0.8060, 0.9140, 0.9520), {"rank": 2}, num_steps=1500),
    "full_rank": Case(Frozen(1.0004, 0.8029, 0.9487, 0.0029, 0.7880, 0.9123, 0.9547)),
    "vbll": Case(Frozen(1.9701, 0.5192, 0.7086, 0.2620, 0.6973, 0.8177, 0.8770), repeats=1),
    "vbll, dense": Case(
        Frozen(1.7322, 0.5693, 0.7633, 0.1730, 0.7383, 0.8553, 0.9180), {"covariance": "dense"}, repeats=1
    ),
    "laplace": Case(Frozen(1.0435, 0.7853, 0.9410, 1.9936, 0.7597, 0.8647, 0.9187), repeats=1),
    "laplace, diagonal": Case(
        Frozen(1.3733, 0.6568, 0.8516, 2.7914, 0.8343, 0.9210, 0.9547), {"structure": "diagonal"}, repeats=1
    ),
    "laplace, full": Case(
        Frozen(1.0136, 0.7972, 0.9478, 2.5648, 0.7690, 0.8880, 0.9400), {"structure": "full"}, repeats=1
    ),
}
"""By family; after a comma, a variant that is not the table's."""


class Calibration(NamedTuple):
    """What R fits say of the weights and labels that they were not told.

    Attributes:
        squares_R: Mean over the weights of z^2.
        covered: By level, the share of the weights inside their interval (R,).
        held: By level, the share of the new image's true class probabilities inside the intervals of `summarize` (R,).
        probability_RK: Predictions for the new images.
        y_R: Their labels.
    """

    squares_R: Array
    covered: dict[float, Array]
    held: dict[float, Array]
    probability_RK: Array
    y_R: NDArray[np.int64]

    def figures(self) -> Frozen:
        """Return what is frozen."""
        coverage80, coverage95 = (float(self.covered[level].mean()) for level in LEVELS)
        prediction_z = spiegelhalter(self.probability_RK, self.y_R)
        held = (float(self.held[level].mean()) for level in INTERVAL_LEVELS)
        return Frozen(math.sqrt(self.squares_R.mean()), coverage80, coverage95, prediction_z, *held)

    @staticmethod
    def effective_trials(share_R: Array) -> float:
        """Return how many independent trials estimate the mean of such shares as well: R times 1 to their number."""
        variance = share_R.var(ddof=1) / len(share_R)
        mean = share_R.mean()
        return float(mean * (1 - mean) / variance) if variance > 0 else float(len(share_R))

    @classmethod
    def coverage_interval(cls, share_R: Array) -> tuple[float, float]:
        """Return the exact 95 % interval of the coverage behind these shares."""
        trials = cls.effective_trials(share_R)
        return clopper_pearson(float(share_R.mean()) * trials, trials)

    def distances(self, frozen: Frozen) -> dict[str, float]:
        """Return how far each figure is from the frozen one, in standard errors."""
        found = self.figures()
        error = float(self.squares_R.std(ddof=1)) / math.sqrt(len(self.squares_R)) / (2 * found.z_sd)
        distances = {"sd of z": abs(found.z_sd - frozen.z_sd) / error}
        shares = {f"coverage of {level:.0%} intervals of weights": self.covered[level] for level in LEVELS}
        shares |= {f"coverage of {level:.0%} intervals of probabilities": self.held[level] for level in INTERVAL_LEVELS}
        expected = *frozen[1:3], *frozen[4:]
        for (name, share_R), value in zip(shares.items(), expected, strict=True):
            trials = self.effective_trials(share_R)
            distances[name] = exact_score(float(share_R.mean()) * trials, trials, value)
        return distances


def calibration(name: str, problems: SoftmaxProblems, seed: int) -> Calibration:
    """Fit a family to all problems and compare with the truth.

    Args:
        name: A key of CASES.
        problems: The data.
        seed: Of fits and draws.
    """
    case, family = CASES[name], name.partition(",")[0]
    squares: list[float] = []
    covered: dict[float, list[float]] = {level: [] for level in LEVELS}
    held: dict[float, list[float]] = {level: [] for level in INTERVAL_LEVELS}
    probabilities: list[Array] = []
    with seeded(seed):
        posteriors = fit_each(
            family, problems, case.settings, num_steps=case.num_steps, repeats=case.repeats, seed=seed
        )
        for index, posterior in enumerate(posteriors):
            with torch.no_grad():
                draws_LP = posterior.head.sample(NUM_DRAWS).double().flatten(1)
                logits_SBK = posterior.predict_draws(problems.new_R1D[index], 256)
            truth_P = problems.weight_RKD[index].double().flatten()
            z_P = (truth_P - draws_LP.mean(0)) / draws_LP.std(0)
            squares.append(float(z_P.square().mean()))
            rank_P = (draws_LP < truth_P).sum(0)
            for level in LEVELS:
                covered[level].append(float(_central(rank_P, level).double().mean()))
            probability_1K = linear_logits(problems.new_R1D[index], problems.weight_RKD[index]).softmax(-1).numpy()
            for level in INTERVAL_LEVELS:
                parts = summarize(logits_SBK.double().log_softmax(-1), level)
                inside_1K = (parts.lower_BK <= probability_1K) & (probability_1K <= parts.upper_BK)
                held[level].append(float(inside_1K.mean()))
            probabilities.append(parts.probability_BK[0])
    return Calibration(
        np.array(squares),
        {level: np.array(values) for level, values in covered.items()},
        {level: np.array(values) for level, values in held.items()},
        np.stack(probabilities),
        problems.new_y_R.numpy().astype(np.int64),
    )


def _central(rank: Tensor, level: float) -> Tensor:
    """Return whether ranks 0 ... 999 are among the central ones: exactly a share ``level`` of them are."""
    tail = round((NUM_DRAWS + 1) * (1 - level) / 2)
    return (rank >= tail) & (rank <= NUM_DRAWS - tail)


def problems_of(num_sets: int, seed: int) -> SoftmaxProblems:
    """Return the problems; the first of more are not those of fewer."""
    return softmax_problems(num_sets, num_examples=20, num_features=2, num_classes=3, seed=seed)


def check_families(seed: int, names: tuple[str, ...] = tuple(CASES), num_sets: int = NUM_SETS) -> Findings:
    """Calibrate families and compare with what is frozen."""
    problems = problems_of(num_sets, seed)
    outcomes, rows = [], {}
    num_figures = len(Frozen._fields) * len(names)
    # Two independent runs differ by the root of the sum of their variances.
    same_data = seed == 0 and num_sets == NUM_SETS
    share = 1 + num_sets / NUM_SETS
    bound = GATE if same_data else float(stats.norm.isf(ALPHA / num_figures / 2)) * math.sqrt(share)
    for name in names:
        found, frozen = calibration(name, problems, seed), CASES[name].frozen
        distances = found.distances(frozen)
        moved = abs(found.figures().prediction_z - math.sqrt(num_sets / NUM_SETS) * frozen.prediction_z)
        distances["z of predictions"] = moved
        worst = max(distances, key=lambda key: math.inf if math.isnan(distances[key]) else distances[key])
        what = f"{name}: distance from frozen figures in standard errors, worst of {len(distances)} ({worst})"
        outcomes.append(Outcome(what, distances[worst], bound))
        if "," not in name:
            figures = found.figures()._asdict()
            rows[name] = {"sbc_z_sd": figures.pop("z_sd"), **figures}
            del rows[name]["prediction_z"]
    return Findings(outcomes, rows)


def check_smoke(seed: int) -> Findings:
    """Calibrate the mean-field head on fewer data sets; its row of the table is that of the full check."""
    return check_families(seed, ("mean_field",), NUM_SMOKE_SETS)._replace(families={})


def _draws(change: Callable[[Tensor], Tensor]) -> AbstractContextManager[object]:
    """Put the draws of the mean-field head through a function."""
    original = MeanFieldGuide.sample
    return mock.patch.object(MeanFieldGuide, "sample", lambda self, size: change(original(self, size)))


def _narrowed(weight_SKD: Tensor) -> Tensor:
    return weight_SKD.mean(0) + 0.8 * (weight_SKD - weight_SKD.mean(0))


def _halved() -> AbstractContextManager[object]:
    """Make the intervals of `summarize` half as wide, here."""
    original = summarize

    def halved(log_probabilities_SBK: Tensor, level: float) -> Summary:
        found = original(log_probabilities_SBK, level)
        lower_BK, upper_BK = ((found.probability_BK + end_BK) / 2 for end_BK in (found.lower_BK, found.upper_BK))
        return found._replace(lower_BK=lower_BK, upper_BK=upper_BK)

    return mock.patch(f"{__name__}.summarize", halved)


HALVED = Fault("intervals of probabilities x 0.5", _halved)
NARROW = Fault("posterior sd x 0.8 in draws of mean_field", lambda: _draws(_narrowed))
REUSED = Fault("particle reused", lambda: _draws(lambda draws: draws[:1].expand_as(draws)))

CHECKS: tuple[Check, ...] = (
    Check(
        "T10",
        "calibration of a mean-field softmax head, 200 data sets",
        check_smoke,
        (NARROW, HALVED, REUSED, NOISE_TIMES_07, KL_TWICE, LABELS_ROLLED),
    ),
    Check("T10", "calibration of softmax heads, by family", check_families, (NARROW,), full=True),
)
