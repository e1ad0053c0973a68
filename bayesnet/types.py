"""The shape legend and the tuples that every part of the library shares.

Tensor names end in their dimensions where that helps::

    B  batch              S  posterior draws      K  classes
    C  channels           D  features             R  rank of a low-rank factor
    H  W  pixels          N  examples in a data set

``logits_SBK`` has shape (draws, batch, classes). Head weights are (K, D + 1): the last column is the bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

JsonObject = dict[str, Any]
"""What `json.dumps` takes: string keys; values None, bool, int, float, str, lists and objects of these."""


class Loss(NamedTuple):
    """The training objective and its parts, four 0-dimensional tensors.

    Attributes:
        total: ``fit`` plus KL / N, nats per example: what training minimises.
        nll: Mean negative log-likelihood of the labels over the batch, nats per example: what is reported.
        kl: Kullback-Leibler divergence from the prior, nats, for the whole posterior (0 for a point estimate).
        fit: The likelihood part of ``total``: the mean cross-entropy to the labels that training aims at. It is ``nll``
            itself, but where those are soft (label smoothing, mixup).
    """

    total: Tensor
    nll: Tensor
    kl: Tensor
    fit: Tensor

    def tempered(self, kl_weight: Tensor | float) -> Tensor:
        """Return fit + kl_weight * KL / N, nats per example: the objective of a KL that is warmed up or tempered."""
        return self.fit + kl_weight * (self.total - self.fit)


class LogitGaussian(NamedTuple):
    """The Gaussian of each image's logits: mean + scale * e_K + factor @ e_R, with e standard normal.

    Attributes:
        mean_BK: Means.
        scale_BK: Standard deviations of the independent part.
        factor_BKR: Low-rank factor of the part shared between classes; R = 0 where there is none.
    """

    mean_BK: Tensor
    scale_BK: Tensor
    factor_BKR: Tensor


class Summary(NamedTuple):
    """What the posterior predictive says of each image. Entropies in nats; float64 NumPy arrays on the host.

    Attributes:
        probability_BK: Mean probability over the draws, after calibration.
        lower_BK: Lower ends of the intervals on the class probabilities.
        upper_BK: Upper ends; lower <= probability <= upper always.
        entropy_B: Predictive entropy, the entropy of the mean probability.
        expected_entropy_B: Mean entropy of the draws (aleatoric part).
        mutual_information_B: Entropy minus expected entropy (epistemic part), at least 0.
        widened_BK: Whether the equal-tailed interval had to be widened to contain the mean.
    """

    probability_BK: NDArray[np.float64]
    lower_BK: NDArray[np.float64]
    upper_BK: NDArray[np.float64]
    entropy_B: NDArray[np.float64]
    expected_entropy_B: NDArray[np.float64]
    mutual_information_B: NDArray[np.float64]
    widened_BK: NDArray[np.bool_]


class Interval(NamedTuple):
    """Intervals on the class probabilities of N images.

    Attributes:
        lower_NK: Lower ends.
        probability_NK: Mean probabilities, always inside.
        upper_NK: Upper ends.
        level: Mass under the posterior.
        kind: What the intervals are, in words.
    """

    lower_NK: NDArray[np.float64]
    probability_NK: NDArray[np.float64]
    upper_NK: NDArray[np.float64]
    level: float
    kind: str
