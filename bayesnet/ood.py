r"""Unfamiliar (out-of-distribution) images: scores that should be higher for them, and how well these tell them apart.

    max_probability      1 - max_k p_k
    entropy              H[p], nats
    mutual_information   H[p] - 1/S sum_s H[p_s], nats: what the draws disagree about
    energy               -1/S sum_s log sum_k exp(logit_sk), nats: of the raw logits
    feature_density      -log sum_k pi_k N(f; mu_k, Sigma_k), nats: f the backbone's features

The first three are of the calibrated probabilities, the last two know nothing of a calibrator. The energy needs raw
logits: log-probabilities have lost the constant that it is.

References: Hendrycks and Gimpel 2017, arXiv:1610.02136 (maximum probability); Liu et al. 2020, arXiv:2010.03759
(energy); Lee et al. 2018, arXiv:1807.03888, and Mukhoti et al. 2023, arXiv:2102.11582 (Gaussians of the features).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bayesnet.errors import DataError
from bayesnet.metrics import detection
from bayesnet.types import JsonObject

Floats = NDArray[np.float64]

SCORES = ("max_probability", "entropy", "mutual_information", "energy", "feature_density")
"""Names of the scores; for all, higher is more unfamiliar."""

MAX_COVARIANCE_NUMBERS = 2**27
"""K x D x D above which all classes share one covariance: 1 GiB."""

_MIN_SHRINKAGE = 1e-6
_MIN_VARIANCE = 1e-12
_TRUE_POSITIVE_RATE = 0.95


@dataclass(frozen=True)
class FeatureDensity:
    """Gaussians of the features of each class, in float64.

        W  = shrunk pooled covariance within classes = (1 - rho) S + rho tr(S) / D I,   rho by OAS
        Sigma_k = (n_k S_k + (D + 2) W) / (n_k + D + 2)

    The covariance of a class is its own, shrunk towards the one that all share with the weight of D + 2 images (the
    posterior mean under an inverse Wishart prior of 2 D + 3 degrees of freedom and mean W), so that it is positive
    definite for any number of images. Where K covariances would not fit into memory, all are W, which is what Lee et
    al. use. The weights pi_k are the classes' shares of the images.

    Attributes:
        means_KD: Of the classes that have images.
        factors: Cholesky factors of the covariances, (K, D, D), or (1, D, D) where they are shared.
        log_weights_K: Logarithms of the shares.

    Reference: Chen, Wiesel, Eldar and Hero 2010, "Shrinkage algorithms for MMSE covariance estimation" (OAS).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> features = rng.normal(size=(60, 2)) + np.repeat([[0, 0], [9, 9]], 30, 0)
        >>> density = FeatureDensity.fit(features, np.repeat([0, 1], 30))
        >>> log_density = density.log_density(np.array([[9.0, 9.0], [4.5, 4.5], [40.0, 40.0]]))
        >>> bool(log_density[0] > log_density[1] > log_density[2])
        True
    """

    means_KD: Floats
    factors: Floats
    log_weights_K: Floats

    @classmethod
    def fit(
        cls,
        features_ND: NDArray[np.floating],
        labels_N: NDArray[np.integer],
        max_covariance_numbers: int = MAX_COVARIANCE_NUMBERS,
    ) -> FeatureDensity:
        """Return the Gaussians of training features.

        Args:
            features_ND: Features (N, D).
            labels_N: Classes (N,); one without images gets no Gaussian.
            max_covariance_numbers: K x D x D above which all classes share one covariance.

        Raises:
            DataError: There are no features, not one label for each, or some are not finite.
        """
        x_ND = _float64(features_ND)
        if x_ND.ndim != 2 or 0 in x_ND.shape or np.shape(labels_N) != x_ND.shape[:1]:
            raise DataError("expected features (N, D) and one label for each", where=x_ND.shape)
        if not np.isfinite(x_ND).all():
            raise DataError("some features are not finite", where="feature density")
        num, num_features = x_ND.shape
        labels, index_N, counts_K = np.unique(labels_N, return_inverse=True, return_counts=True)
        means_KD = np.stack([x_ND[index_N == k].mean(0) for k in range(len(labels))])
        residuals_ND = x_ND - means_KD[index_N]
        shared_DD = shrunk_covariance(residuals_ND)
        if len(labels) * num_features**2 > max_covariance_numbers:
            factors = np.linalg.cholesky(shared_DD)[None].astype(np.float64, copy=False)
            return cls(means_KD, factors, np.log(counts_K / num))
        weight = num_features + 2
        factors = np.empty((len(labels), num_features, num_features))  # class by class: all is held once
        for k in range(len(labels)):
            own_ND = residuals_ND[index_N == k]
            factors[k] = np.linalg.cholesky((own_ND.T @ own_ND + weight * shared_DD) / (len(own_ND) + weight))
        return cls(means_KD, factors, np.log(counts_K / num))

    def log_density(self, features_ND: NDArray[np.floating]) -> Floats:
        """Return the log density (N,) of features (N, D), nats."""
        from scipy.special import logsumexp

        x_ND = _float64(features_ND)
        half_K = np.log(np.diagonal(self.factors, axis1=1, axis2=2)).sum(1)  # of the log determinants
        constant_K = self.log_weights_K - half_K - 0.5 * self.means_KD.shape[1] * math.log(2 * math.pi)
        log_density: Floats = logsumexp(constant_K[:, None] - 0.5 * self._squared_distances(x_ND), axis=0)
        return log_density

    def _squared_distances(self, x_ND: Floats) -> Floats:
        """Return the squared Mahalanobis distances (K, N) from the means."""
        from scipy.linalg import solve_triangular

        distances_KN = np.empty((len(self.means_KD), len(x_ND)))
        if len(self.factors) == len(self.means_KD):
            for k, (mean_D, factor_DD) in enumerate(zip(self.means_KD, self.factors, strict=True)):
                white_DN = solve_triangular(factor_DD, (x_ND - mean_D).T, lower=True)
                distances_KN[k] = np.square(white_DN).sum(0)
            return distances_KN
        # With one covariance for all, features and means are whitened once, which K classes would take K times.
        centre_D = self.means_KD.mean(0)
        white_DN, white_DK = (
            solve_triangular(self.factors[0], (each - centre_D).T, lower=True) for each in (x_ND, self.means_KD)
        )
        for k in range(len(self.means_KD)):
            distances_KN[k] = np.square(white_DN - white_DK[:, k : k + 1]).sum(0)
        return distances_KN


def shrunk_covariance(residuals_ND: Floats) -> Floats:
    """Return the covariance (D, D) of centred rows, shrunk to a multiple of the identity by as much as OAS says.

    Args:
        residuals_ND: Rows of mean 0.

    Returns:
        A positive definite matrix, whatever N and D.
    """
    num, num_features = residuals_ND.shape
    covariance_DD = residuals_ND.T @ residuals_ND / num
    mean = np.trace(covariance_DD) / num_features
    squares = np.square(covariance_DD).mean()
    denominator = (num + 1) * (squares - mean**2 / num_features)
    shrinkage = 1.0 if denominator <= 0 else min(1.0, (squares + mean**2) / denominator)
    shrinkage = max(shrinkage, _MIN_SHRINKAGE)
    # Features that are all the same within every class have no scale: any small one makes others unfamiliar.
    target = max(mean, _MIN_VARIANCE)
    shrunk: Floats = (1 - shrinkage) * covariance_DD + shrinkage * target * np.eye(num_features)
    return shrunk


def image_scores(
    probability_NK: Floats,
    entropy_N: Floats,
    mutual_information_N: Floats,
    energy_N: Floats,
    *,
    features_ND: NDArray[np.floating] | None = None,
    density: FeatureDensity | None = None,
) -> dict[str, Floats]:
    """Return the scores (N,) of images by name, from what a model has said of them.

    Args:
        probability_NK: Mean calibrated probabilities.
        entropy_N: Of these, nats.
        mutual_information_N: Nats.
        energy_N: Mean over the draws of - log sum exp of the raw logits, nats.
        features_ND: Of the backbone.
        density: Of the training features; without it or features there is no score "feature_density".

    Example:
        >>> scores = image_scores(np.array([[0.75, 0.25]]), np.array([0.56]), np.array([0.1]), np.array([-3.0]))
        >>> {name: float(values[0]) for name, values in scores.items()}
        {'max_probability': 0.25, 'entropy': 0.56, 'mutual_information': 0.1, 'energy': -3.0}
    """
    columns = (1 - probability_NK.max(1), entropy_N, mutual_information_N, energy_N)
    scores = dict(zip(SCORES[:4], columns, strict=True))
    if density is not None and features_ND is not None:
        scores["feature_density"] = -density.log_density(features_ND)
    return scores


def unfamiliarity(
    known: Mapping[str, Floats], unfamiliar: Mapping[str, Floats], *, with_interval: bool = True
) -> JsonObject:
    """Return how well each score tells unfamiliar images from known ones.

    Args:
        known: Score name to values of test images, (N,).
        unfamiliar: The same names, values of unfamiliar images, (M,).
        with_interval: Whether to give ``auroc_ci95``, which takes all images for independent ones; else it is null.

    Returns:
        For each of SCORES an object with ``auroc`` (share of pairs in which the unfamiliar image has the higher score),
        ``auroc_ci95``, ``aupr_out`` (unfamiliar is the positive class), ``aupr_in`` (known is) and ``fpr95``: the share
        of known images that are alarms at the threshold that finds 95 % of the unfamiliar ones. All are null for a
        score that is not there, has values that are not finite, or has no images on one side.
    """
    return {name: _detection(known.get(name), unfamiliar.get(name), with_interval=with_interval) for name in SCORES}


def _detection(known_N: Floats | None, unfamiliar_M: Floats | None, *, with_interval: bool) -> JsonObject:
    """Return how well one score does."""
    sides = [values for values in (known_N, unfamiliar_M) if values is not None and len(values)]
    if len(sides) < 2 or not all(np.isfinite(values).all() for values in sides):
        return {"auroc": None, "auroc_ci95": [None, None], "aupr_in": None, "aupr_out": None, "fpr95": None}
    known_N, unfamiliar_M = sides
    ends = list(detection.auroc_interval(unfamiliar_M, known_N)) if with_interval else [None, None]
    # Where known images are the positive class, low scores speak for it.
    return {
        "auroc": float(detection.auroc(unfamiliar_M, known_N)),
        "auroc_ci95": ends,
        "aupr_in": float(detection.aupr(-known_N, -unfamiliar_M)),
        "aupr_out": float(detection.aupr(unfamiliar_M, known_N)),
        "fpr95": float(detection.fpr_at_tpr(unfamiliar_M, known_N, _TRUE_POSITIVE_RATE)),
    }


def _float64(features_ND: NDArray[np.floating]) -> Floats:
    return np.asarray(features_ND, dtype=np.float64)
