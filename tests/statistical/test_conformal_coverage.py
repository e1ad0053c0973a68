"""T21: coverage of the conformal sets over 400 splits, on given probabilities and through each calibrator.

A split has 500 calibration and 500 test images. Three statistics of the coverage, each a false alarm in a million:

- its mean over the splits is within 4.892 standard errors, .0046, of k / (n + 1). Caught with power .99: .0068, as of a
  threshold four order statistics off (one is .0020, which the exact tests of the order statistic find).
- its distribution: the randomised probability integral transform under the beta-binomial law in ten equal bins,
  chi-square at 9 degrees of freedom. Caught with power .99: a spread of coverage wider by 45 %.
- where scores tie, the mean is not below 1 - alpha by more than .0046.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import betabinom, chi2

from bayesnet.calibration import CALIBRATORS, CONFORMAL, ConformalThreshold, prediction_sets
from bayesnet.calibration.conformal import base, rank
from bayesnet.calibration.conformal.class_conditional import ClassConditionalThreshold

R = 400
N = 500
K = 4
ALPHA = 0.1
Z_BOUND = 4.892
CHI2_BOUND = float(chi2.isf(1e-6, 9))
RANDOMISED = ("aps", "raps")

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
Figures = dict[str, list[str]]


class Split(NamedTuple):
    """Probabilities, labels and uniforms of the images that set a threshold, and of test images."""

    fit: tuple[Array, Labels, Array]
    test: tuple[Array, Labels, Array]


class Coverage(NamedTuple):
    """What the splits say: the mean's distance to its expectation, its bound, and the chi-square of the transform."""

    excess: float
    bound: float
    chi2: float
    size: float

    @property
    def exact(self) -> bool:
        """Whether coverage follows its law."""
        return abs(self.excess) <= self.bound and self.chi2 <= CHI2_BOUND

    @property
    def valid(self) -> bool:
        """Whether coverage is not too low, whatever ties add to it."""
        return self.excess >= -self.bound


def measure(name: str, splits: list[Split]) -> Coverage:
    """Return how the coverage of a method's sets compares with its law, class by class where it covers classes."""
    outcomes = []
    for split in splits:
        threshold = CONFORMAL[name].fit(split.fit[0], split.fit[1], ALPHA, split.fit[2])
        p_NK, labels_N, u_N = split.test
        outcomes.append((threshold, prediction_sets(p_NK, threshold, u_N), labels_N))
    return compare(outcomes)


def compare(outcomes: Sequence[tuple[ConformalThreshold, NDArray[np.bool_], Labels]]) -> Coverage:
    """Return how coverage compares with its law, from the threshold, sets (N, K) and labels of each split."""
    rows: list[tuple[int, int, int, int]] = []  # of each group: split, covered, test and calibration images
    shares, sizes = [], []
    for index, (threshold, sets_NK, labels_N) in enumerate(outcomes):
        covered_N = sets_NK[np.arange(len(labels_N)), labels_N]
        if isinstance(threshold, ClassConditionalThreshold):
            for label, count in enumerate(threshold.class_counts):
                rows.append((index, int(covered_N[labels_N == label].sum()), int((labels_N == label).sum()), count))
        else:
            rows.append((index, int(covered_N.sum()), len(labels_N), threshold.num_calibration))
        shares.append(covered_N.mean())
        sizes.append(sets_NK.sum(1).mean())
    num_test = len(outcomes[0][2])
    split_G, covered_G, m_G, n_G = np.array(rows).T
    a_G = np.array([rank(int(n), ALPHA) for n in n_G])
    b_G = n_G + 1 - a_G
    expected_R = np.bincount(split_G, m_G * a_G / (n_G + 1) / num_test)
    variance_R = np.bincount(split_G, betabinom.var(m_G, a_G, b_G) / num_test**2)
    below_G, through_G = betabinom.cdf([covered_G - 1, covered_G], m_G, a_G, b_G)
    transform_G = below_G + np.random.default_rng(0).random(len(rows)) * (through_G - below_G)
    counts = np.histogram(transform_G, 10, (0.0, 1.0))[0]
    mean_count = len(rows) / 10
    return Coverage(
        float(np.mean(np.array(shares) - expected_R)),
        Z_BOUND * math.sqrt(float(variance_R.mean()) / len(outcomes)),
        float(((counts - mean_count) ** 2).sum() / mean_count),
        float(np.mean(sizes)),
    )


def softmax(logits_NK: Array) -> Array:
    weights_NK = np.exp(logits_NK - logits_NK.max(1, keepdims=True))
    return np.asarray(weights_NK / weights_NK.sum(1, keepdims=True))


def simulate(rng: np.random.Generator, num_images: int) -> tuple[Array, Labels]:
    """Return logits, and labels drawn from their softmax."""
    logits_NK = rng.normal(0, 2, (num_images, K))
    return logits_NK, (logits_NK + rng.gumbel(size=logits_NK.shape)).argmax(1)


def good(logits_NK: Array, rng: np.random.Generator) -> Array:
    return softmax(logits_NK)


def random(logits_NK: Array, rng: np.random.Generator) -> Array:
    return rng.dirichlet(np.ones(K), len(logits_NK))


def constant(logits_NK: Array, rng: np.random.Generator) -> Array:
    return np.tile([0.4, 0.3, 0.2, 0.1], (len(logits_NK), 1))


Classifier = Callable[[Array, np.random.Generator], Array]


@functools.cache
def splits_of(classifier: Classifier) -> list[Split]:
    rng = np.random.default_rng(21)
    splits = []
    for _ in range(R):
        logits_NK, labels_N = simulate(rng, 2 * N)
        p_NK, u_N = classifier(logits_NK, rng), rng.random(2 * N)
        splits.append(Split((p_NK[:N], labels_N[:N], u_N[:N]), (p_NK[N:], labels_N[N:], u_N[N:])))
    return splits


@pytest.mark.parametrize("name", CONFORMAL)
@pytest.mark.parametrize("classifier", [good, random, constant])
def test_coverage_follows_its_law(name: str, classifier: Classifier, figures: Figures) -> None:
    """Of scores that tie (of a constant classifier, but for a random number) only that coverage is not too low."""
    found = measure(name, splits_of(classifier))
    line = f"{name}, {classifier.__name__}: excess {found.excess:+.4f} (bound {found.bound:.4f}), "
    line += f"chi2 {found.chi2:.1f} (bound {CHI2_BOUND:.1f}), set size {found.size:.2f}"
    figures.setdefault("T21: coverage of conformal sets", []).append(line)
    assert found.bound == pytest.approx(0.0046, abs=1e-4)
    assert found.valid
    assert found.exact or (classifier is constant and name not in RANDOMISED)


@pytest.mark.parametrize("name", CONFORMAL)
def test_a_threshold_four_order_statistics_off_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is enough where each class has a threshold from about 125 images: the fault planted there."""
    steps = 1 if name == "class_conditional" else 4
    splits = splits_of(good)
    monkeypatch.setattr(base, "rank", lambda num, alpha: rank(num, alpha) - steps)
    low = measure(name, splits)
    assert not low.valid
    monkeypatch.setattr(base, "rank", lambda num, alpha: rank(num, alpha) + steps)
    high = measure(name, splits)
    assert not high.exact


def test_calibration_images_that_are_copies_are_caught() -> None:
    """Each image four times: right on average over splits, but as far off in one as with a quarter of the images."""
    splits = []
    for split in splits_of(good):
        p_NK, labels_N, u_N = split.fit
        copies_N = np.arange(N) // 4
        splits.append(split._replace(fit=(p_NK[copies_N], labels_N[copies_N], u_N[copies_N])))
    found = measure("lac", splits)
    assert found.chi2 > CHI2_BOUND


@pytest.mark.parametrize("name", RANDOMISED)
def test_a_random_number_that_is_left_out_of_the_sets_is_caught(name: str) -> None:
    splits = [split._replace(test=(*split.test[:2], 0.9 * split.test[2])) for split in splits_of(good)]
    assert not measure(name, splits).exact


def calibrated(family: str, logits_NK: Array, labels_N: Labels, rng: np.random.Generator) -> Array:
    """Return the mean probabilities of two overconfident draws after a calibrator fitted on the first images."""
    noise_SNK = rng.normal(0, 0.3, (2, *logits_NK.shape))
    log_p_SNK = torch.log_softmax(torch.from_numpy(1.7 * logits_NK + noise_SNK), 2)
    calibrator = CALIBRATORS[family].fit(log_p_SNK[:, :N], torch.from_numpy(labels_N[:N]))
    return np.asarray(calibrator(log_p_SNK).exp().mean(0).numpy(), np.float64)


def pipeline_splits(family: str, *, reuse_half_a: bool = False) -> list[Split]:
    """Return splits whose calibrator saw half A, and whose threshold is set on half B (or, the fault, on half A)."""
    rng = np.random.default_rng(22)
    splits = []
    for _ in range(R):
        logits_NK, labels_N = simulate(rng, 3 * N)
        p_NK = calibrated(family, logits_NK, labels_N, rng)
        u_N = rng.random(len(p_NK))
        half = slice(0, N) if reuse_half_a else slice(N, 2 * N)
        test = slice(2 * N, None)
        splits.append(Split((p_NK[half], labels_N[half], u_N[half]), (p_NK[test], labels_N[test], u_N[test])))
    return splits


@pytest.mark.slow
@pytest.mark.parametrize("family", CALIBRATORS)
def test_coverage_holds_after_every_calibrator(family: str, figures: Figures) -> None:
    """Data are simulated, half A fits the calibrator, half B sets the threshold, coverage is that of other images.

    The two draws of an image differ, so that means of calibrated draws do not tie, of isotonic regression neither.
    """
    splits = pipeline_splits(family)
    for name in CONFORMAL:
        found = measure(name, splits)
        line = f"{family}, {name}: excess {found.excess:+.4f} (bound {found.bound:.4f}), chi2 {found.chi2:.1f}"
        figures.setdefault("T21: coverage after each calibrator", []).append(line)
        assert found.exact, name


@pytest.mark.slow
def test_a_threshold_on_the_half_that_fitted_the_calibrator_is_caught() -> None:
    """Isotonic regression adapts to the labels of half A: a threshold set there covers .011 fewer of other images."""
    assert not measure("aps", pipeline_splits("isotonic", reuse_half_a=True)).valid
