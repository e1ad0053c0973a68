from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import logsumexp, ndtr
from scipy.stats import multivariate_normal
from sklearn.covariance import oas

from bayesnet.errors import DataError
from bayesnet.ood import SCORES, FeatureDensity, image_scores, shrunk_covariance, unfamiliarity

Floats = NDArray[np.float64]


def mixture(num: int, num_features: int, seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
    """Return features (N, D) of three unequal classes whose covariances differ, and their labels."""
    rng = np.random.default_rng(seed)
    labels_N = rng.choice(3, num, p=[0.5, 0.3, 0.2])
    scales_KD = rng.uniform(0.3, 2, (3, num_features))
    means_KD = 3 * rng.normal(size=(3, num_features))
    return means_KD[labels_N] + scales_KD[labels_N] * rng.normal(size=(num, num_features)), labels_N


def reference(features_ND: Floats, labels_N: NDArray[np.int64], points_MD: Floats) -> Floats:
    """Return the log density by SciPy and scikit-learn, from the formula of the documentation."""
    num_features = features_ND.shape[1]
    centred = features_ND - np.stack([features_ND[labels_N == label].mean(0) for label in labels_N])
    shared = oas(centred, assume_centered=True)[0]
    terms = []
    for label in np.unique(labels_N):
        own = features_ND[labels_N == label]
        weight = num_features + 2
        covariance = (len(own) * np.cov(own.T, bias=True) + weight * shared) / (len(own) + weight)
        gaussian = multivariate_normal(own.mean(0), covariance)
        terms.append(np.log(len(own) / len(features_ND)) + gaussian.logpdf(points_MD))
    total: Floats = logsumexp(terms, axis=0)
    return total


@pytest.mark.parametrize(("num", "num_features"), [(300, 4), (60, 12), (40, 30)])
def test_the_density_is_that_of_scipy(num: int, num_features: int) -> None:
    features_ND, labels_N = mixture(num, num_features)
    points_MD = 4 * np.random.default_rng(1).normal(size=(20, num_features))
    found = FeatureDensity.fit(features_ND, labels_N).log_density(points_MD)
    assert found == pytest.approx(reference(features_ND, labels_N, points_MD), rel=1e-9)


def test_the_shrinkage_is_that_of_scikit_learn() -> None:
    for num, num_features in ((500, 3), (20, 30), (5, 60)):
        residuals = np.random.default_rng(num).normal(size=(num, num_features)) * np.arange(1, num_features + 1)
        expected = oas(residuals, assume_centered=True)[0]
        assert shrunk_covariance(residuals) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_more_features_than_images_and_classes_of_one_image_or_none() -> None:
    rng = np.random.default_rng(0)
    features_ND = rng.normal(size=(9, 50)).astype(np.float32)
    density = FeatureDensity.fit(features_ND, np.array([0, 0, 0, 0, 4, 4, 4, 4, 7]))
    assert density.means_KD.shape == (3, 50)
    near, far = density.log_density(features_ND), density.log_density(features_ND + 10)
    assert np.isfinite(near).all()
    assert near.min() > far.max()


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_constant_features_make_others_unfamiliar(value: float) -> None:
    density = FeatureDensity.fit(np.full((20, 3), value), np.arange(20) % 2)
    same, other = density.log_density(np.array([[value] * 3, [value + 1] * 3]))
    assert np.isfinite([same, other]).all()
    assert same > other


def test_many_classes_share_one_covariance() -> None:
    features_ND, labels_N = mixture(200, 5)
    density = FeatureDensity.fit(features_ND, labels_N, max_covariance_numbers=74)
    assert density.factors.shape == (1, 5, 5)
    assert FeatureDensity.fit(features_ND, labels_N, max_covariance_numbers=75).factors.shape == (3, 5, 5)
    centred = features_ND - np.stack([features_ND[labels_N == label].mean(0) for label in labels_N])
    shared = oas(centred, assume_centered=True)[0]
    terms = [
        np.log((labels_N == k).mean())
        + multivariate_normal(features_ND[labels_N == k].mean(0), shared).logpdf(features_ND)
        for k in range(3)
    ]
    assert density.log_density(features_ND) == pytest.approx(logsumexp(terms, axis=0), rel=1e-9)


@pytest.mark.parametrize(
    ("features_ND", "labels_N", "text"),
    [
        (np.zeros((3, 2)), np.zeros(2, dtype=np.int64), "expected features (N, D) and one label for each ((3, 2))"),
        (np.zeros(3), np.zeros(3, dtype=np.int64), "expected features (N, D) and one label for each ((3,))"),
        (np.zeros((0, 2)), np.zeros(0, dtype=np.int64), "expected features (N, D) and one label for each ((0, 2))"),
        (np.full((3, 2), np.nan), np.zeros(3, dtype=np.int64), "some features are not finite (feature density)"),
    ],
)
def test_wrong_features_are_refused(features_ND: Floats, labels_N: NDArray[np.int64], text: str) -> None:
    with pytest.raises(DataError) as caught:
        FeatureDensity.fit(features_ND, labels_N)
    assert str(caught.value) == text


def test_every_score_is_higher_for_the_unfamiliar() -> None:
    features_ND, labels_N = mixture(100, 4)
    density = FeatureDensity.fit(features_ND, labels_N)
    scores = image_scores(
        np.array([[0.98, 0.01, 0.01], [0.4, 0.3, 0.3]]),
        np.array([0.1, 1.08]),
        np.array([0.01, 0.3]),
        np.array([-9.0, -1.0]),
        features_ND=np.stack([density.means_KD[0], np.full(4, 30.0)]),
        density=density,
    )
    assert tuple(scores) == SCORES
    assert all(known < unfamiliar for known, unfamiliar in scores.values())


def test_no_density_gives_no_score_of_it() -> None:
    scores = image_scores(np.array([[1.0]]), np.zeros(1), np.zeros(1), np.zeros(1), features_ND=np.zeros((1, 2)))
    assert "feature_density" not in scores


def test_known_gaussians_give_the_analytic_area() -> None:
    rng = np.random.default_rng(0)
    num, shift = 4000, 1.0
    known, unfamiliar = {"entropy": rng.normal(size=num)}, {"entropy": shift + rng.normal(size=num)}
    found = unfamiliarity(known, unfamiliar)["entropy"]
    expected = float(ndtr(shift / np.sqrt(2)))
    # The standard error is about 0.0049 (Hanley and McNeil); five of them give a false alarm once in a million seeds.
    assert found["auroc"] == pytest.approx(expected, abs=0.025)
    assert found["auroc_ci95"][0] < found["auroc"] < found["auroc_ci95"][1]
    # 95 % of the unfamiliar lie above shift - 1.645: that share of the known are alarms there.
    assert found["fpr95"] == pytest.approx(float(ndtr(1.6449 - shift)), abs=0.05)


def test_a_small_case_by_hand() -> None:
    known, unfamiliar = np.array([0.1, 0.2, 0.4, 0.4]), np.array([0.3, 0.4, 0.9])
    found = unfamiliarity({"energy": known}, {"energy": unfamiliar})["energy"]
    pairs = [(u > k) + 0.5 * (u == k) for u in unfamiliar for k in known]
    assert found["auroc"] == pytest.approx(np.mean(pairs))
    # Thresholds 0.9, 0.4 and 0.3 find 1, 2 and 3 of the unfamiliar among 1, 4 and 5 images.
    assert found["aupr_out"] == pytest.approx((1 / 1 + 2 / 4 + 3 / 5) / 3)
    # From the other side: 0.1, 0.2 and 0.4 find 1, 2 and 4 of the known among 1, 2 and 6 images.
    assert found["aupr_in"] == pytest.approx((1 * 1 + 1 * 1 + 2 * 4 / 6) / 4)
    assert found["fpr95"] == pytest.approx(2 / 4)


def test_the_direction_is_not_confused() -> None:
    low, high = np.linspace(0, 1, 50), np.linspace(2, 3, 20)
    right = unfamiliarity({"entropy": low}, {"entropy": high})["entropy"]
    wrong = unfamiliarity({"entropy": high}, {"entropy": low})["entropy"]
    assert (right["auroc"], right["aupr_in"], right["aupr_out"], right["fpr95"]) == (1, 1, 1, 0)
    assert (wrong["auroc"], wrong["fpr95"]) == (0, 1)


NOTHING = {"auroc": None, "auroc_ci95": [None, None], "aupr_in": None, "aupr_out": None, "fpr95": None}


def test_what_is_not_defined_is_null() -> None:
    one = np.ones(3)
    found = unfamiliarity(
        {"entropy": one, "energy": np.array([1.0, np.nan]), "max_probability": np.ones(0)},
        {"entropy": one, "energy": one, "max_probability": one, "feature_density": one},
    )
    assert tuple(found) == SCORES
    assert found["entropy"]["auroc"] == 0.5
    for name in ("energy", "max_probability", "mutual_information", "feature_density"):
        assert found[name] == NOTHING
