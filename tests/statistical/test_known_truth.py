"""T28's Bayes posterior against densities, and its score against entropies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bayesnet.battery import known_truth


def test_the_bayes_posterior_is_that_of_the_densities() -> None:
    """Rounding to whole pixel values and clipping at four sd aside, p(k | x) is proportional to N(x; m_k, I)."""
    images = known_truth.world(50, seed=0)
    x_ND = (images.pixels_NCHW.flatten(1).double().numpy() - known_truth.CENTRE) / known_truth.CONTRAST
    density_NK = np.stack([stats.multivariate_normal(mean).pdf(x_ND) for mean in images.prototypes_KD.numpy()], 1)
    assert np.allclose(images.bayes(), density_NK / density_NK.sum(1, keepdims=True), rtol=1e-9)


def test_the_bayes_posterior_scores_best() -> None:
    """Its divergence is 0 and its NLL, over many images, its mean entropy: within five standard errors (1e-6)."""
    images = known_truth.world(20_000, seed=0)
    bayes_NK = images.bayes()
    found = known_truth.score(bayes_NK, images)
    entropy_N = -(bayes_NK * np.log(bayes_NK)).sum(1)
    nll_N = -np.log(bayes_NK[np.arange(len(bayes_NK)), images.y_N.numpy()])
    assert found.divergence == pytest.approx(0, abs=1e-12)
    assert abs(found.nll - entropy_N.mean()) < 5 * (nll_N - entropy_N).std() / math.sqrt(len(nll_N))
    flat = known_truth.score(np.full_like(bayes_NK, 1 / 3), images)
    assert flat.divergence == pytest.approx(math.log(3) - entropy_N.mean())
