r"""T11: posterior predictive probabilities are frequencies: calibrated over data sets drawn from the model itself.

    w ~ Normal(0, 4 I), 2 classes, 1 feature;  6 labels and one more from softmax(W [f; 1]);  p_k = P(y = k | 6 labels)

The posterior sees the differences between classes alone, so that a grid over these two gives it exactly. Its density is
that of `nuts`; 512 draws of it are stored as those of `nuts` are, and go through the head, the mean over draws and the
summary as a user's do. With y the label that is predicted, over R independent data sets:

    class       sum (1{y = 1} - p_1)         / sqrt(sum p_1 (1 - p_1))              a bias
    confidence  sum (1{y = best} - max_k p)  / sqrt(sum max p (1 - max p))          negative: overconfident
    Brier       sum (p_y - sum_k p_k^2)      / sqrt(sum [sum p^3 - (sum p^2)^2])    Spiegelhalter 1986, K classes

False alarm 1e-6 for each of the three z-scores. Smallest faults caught with power 0.99: predicted logits multiplied by
0.6 or 1.5; predictive probabilities hardly feel a posterior's sd, and one of 0.8 is not seen, one of 0.7 just is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from bayesnet.battery.base import Z_BOUND, Check, Fault, Findings, Outcome
from bayesnet.battery.faults import MEAN_OF_LOGITS
from bayesnet.battery.fitted import PRIOR_TWICE_AS_WIDE
from bayesnet.battery.seeding import seeded
from bayesnet.inference import nuts
from bayesnet.inference.base import Parts
from bayesnet.inference.nuts import Nuts, NutsConfig, StoredDraws
from bayesnet.inference.nuts_sampler import HeadTarget
from bayesnet.model import linear_logits
from bayesnet.predictive import summarize
from bayesnet.testing import FlattenBackbone

Array = NDArray[np.float64]

NUM_SETS, NUM_EXAMPLES, NUM_DRAWS = 1000, 6, 512
PRIOR_SCALE = 2.0
GRID = torch.linspace(-16, 16, 81, dtype=torch.float64)
DIFFERENCES_G2 = torch.cartesian_prod(GRID, GRID)
WEIGHTS_GKD = torch.stack([-DIFFERENCES_G2 / 2, DIFFERENCES_G2 / 2], 1)
"""The likeliest weights, a priori, of each difference between the classes' slopes and biases."""


class Predictions(NamedTuple):
    """Probabilities (R, K) and the labels (R,) that came."""

    probability_RK: Array
    y_R: NDArray[np.int64]


def spiegelhalter(probability_RK: Array, y_R: NDArray[np.int64]) -> float:
    """Return the z-score of the Brier score under the predictions: negative where they are overconfident.

    Example:
        >>> round(spiegelhalter(np.tile([0.9, 0.1], (100, 1)), np.arange(100) % 2), 1)  # 50 of 100, not 90
        -13.3
    """
    squares_R, cubes_R = (probability_RK**2).sum(1), (probability_RK**3).sum(1)
    excess = np.take_along_axis(probability_RK, y_R[:, None], 1)[:, 0] - squares_R
    return float(excess.sum() / np.sqrt((cubes_R - squares_R**2).sum()))


def z_scores(predictions: Predictions) -> dict[str, float]:
    """Return the three z-scores by name."""
    probability_RK, y_R = predictions
    return {
        "class": _bernoulli(y_R == 1, probability_RK[:, 1]),
        "confidence": _bernoulli(probability_RK.argmax(1) == y_R, probability_RK.max(1)),
        "Brier": spiegelhalter(probability_RK, y_R),
    }


def _bernoulli(happened_R: NDArray[np.bool_], probability_R: Array) -> float:
    return float((happened_R - probability_R).sum() / np.sqrt((probability_R * (1 - probability_R)).sum()))


def predictions(seed: int, num_sets: int = NUM_SETS) -> Predictions:
    """Return the exact predictions for one image of each of R data sets, and its label."""
    config = NutsConfig(prior_scale=PRIOR_SCALE, prior_bias_scale=PRIOR_SCALE, max_draws=NUM_DRAWS)
    rows, labels = [], []
    with seeded(seed), torch.no_grad():
        posterior = nuts.FAMILY.build(Parts(FlattenBackbone(1), 2, NUM_EXAMPLES), config).eval()
        assert isinstance(posterior, Nuts)
        for _ in range(num_sets):
            features_ND = torch.randn(NUM_EXAMPLES + 1, 1)
            weight_KD = PRIOR_SCALE * torch.randn(2, 2)
            y_N = torch.multinomial(linear_logits(features_ND, weight_KD).softmax(1), 1)[:, 0]
            posterior.stored.store(exact_draws(HeadTarget(posterior.model.head, features_ND[:-1], y_N[:-1])))
            logits_SBK = posterior.predict_draws(features_ND[-1:], NUM_DRAWS)
            rows.append(summarize(logits_SBK.double().log_softmax(-1), 0.9).probability_BK)
            labels.append(int(y_N[-1]))
    return Predictions(np.concatenate(rows), np.array(labels))


def exact_draws(target: HeadTarget, num_draws: int = NUM_DRAWS) -> Tensor:
    """Return draws (S, K, D + 1) from the posterior on the grid, with torch's random state."""
    potential_G, _ = vmap(target.potential_and_gradient)(WEIGHTS_GKD)
    chosen_S = torch.multinomial((-potential_G).softmax(0), num_draws, replacement=True)
    return WEIGHTS_GKD[chosen_S]


def check_predictions(seed: int) -> Findings:
    """Compare predictions with the labels that came."""
    return Findings([Outcome(f"|z| of {name}", abs(z), Z_BOUND) for name, z in z_scores(predictions(seed)).items()])


def _first(change: Any) -> AbstractContextManager[object]:  # noqa: ANN401 - from draws to draws
    original = StoredDraws.first
    return mock.patch.object(StoredDraws, "first", lambda self, size: change(original(self, size)))


def _narrowed(weight_SKD: Tensor) -> Tensor:
    return weight_SKD.mean(0) + 0.7 * (weight_SKD - weight_SKD.mean(0))


def _labels_rolled() -> AbstractContextManager[object]:
    original = HeadTarget.__init__
    return mock.patch.object(
        HeadTarget, "__init__", lambda self, head, features_ND, y_N: original(self, head, features_ND, y_N.roll(1))
    )


CHECKS: tuple[Check, ...] = (
    Check(
        "T11",
        "calibration of exact predictions under the model",
        check_predictions,
        (
            Fault("posterior sd x 0.7 in predictions", lambda: _first(_narrowed)),
            Fault("particle reused in predictions", lambda: _first(lambda draws: draws[:1].expand_as(draws))),
            Fault("labels permuted for the posterior", _labels_rolled),
            MEAN_OF_LOGITS,
            PRIOR_TWICE_AS_WIDE,
        ),
    ),
)
