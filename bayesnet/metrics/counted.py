"""The metrics of examples with counts.

Each metric is written once, here: counts of one give the metric, bootstrap counts its interval, and labels drawn from
the model's own probabilities its distribution under calibration. Examples are in order of rising confidence, so bins
and ties are runs of neighbours. Where confidences tie, the tied examples share their mean correctness: the expectation
over the orders of the tie, so that no metric depends on the order of the data set.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayesnet.metrics.checks import Array, Labels, checked

NUM_BINS = 15
_EDGES = np.linspace(0.0, 1.0, NUM_BINS + 1)[1:-1]


class Scores(NamedTuple):
    """What the metrics are computed from, in order of rising confidence.

    Attributes:
        confidence_N: Probability of the predicted class.
        correct_N: 1 where it is the label, else 0; (R, N) for R sets of drawn labels.
        nll_N: -log p(label), nats.
        brier_N: Squared distance to the one-hot label.
        bin_starts: First example of each non-empty equal-width bin.
        tie_starts: First example of each group of equal confidences.
    """

    confidence_N: Array
    correct_N: Array
    nll_N: Array
    brier_N: Array
    bin_starts: NDArray[np.intp]
    tie_starts: NDArray[np.intp]

    @classmethod
    def of(cls, probabilities: ArrayLike, labels: ArrayLike) -> Scores:
        """Return the checked values of each example, sorted by confidence."""
        p_NK, labels_N = checked(probabilities, labels)
        confidence_N = p_NK.max(1)
        order = np.argsort(confidence_N, kind="stable")
        confidence_N = confidence_N[order]
        return cls(
            confidence_N,
            correct_each(p_NK, labels_N)[order],
            nll_each(p_NK, labels_N)[order],
            brier_each(p_NK, labels_N)[order],
            bin_starts=np.flatnonzero(np.diff(bin_index(confidence_N), prepend=-1)),
            tie_starts=np.flatnonzero(np.diff(confidence_N, prepend=-1.0)),
        )


class Counted:
    """Scores and counts_RN of the examples, a row a resample. What several metrics need is computed once."""

    def __init__(self, scores: Scores, counts_RN: Array) -> None:
        self.scores = scores
        self.counts_RN = counts_RN
        self.num_examples = counts_RN.shape[1]

    @cached_property
    def gap_RN(self) -> Array:
        """Confidence - correct of each example, times its count."""
        return self.counts_RN * (self.scores.confidence_N - self.scores.correct_N)

    @cached_property
    def gap_RB(self) -> Array:
        """Its sum in each non-empty equal-width bin."""
        return np.add.reduceat(self.gap_RN, self.scores.bin_starts, axis=1)

    @cached_property
    def size_RM(self) -> Array:
        """Number of examples of each group of equal confidences, rising."""
        return self.by_tie(self.counts_RN)

    @cached_property
    def errors_RM(self) -> Array:
        """Number of errors of each group."""
        return self.by_tie(self.counts_RN * (1 - self.scores.correct_N))

    def by_tie(self, values_RN: Array) -> Array:
        """Return the sums over each group of equal confidences."""
        starts = self.scores.tie_starts
        return values_RN if len(starts) == self.num_examples else np.add.reduceat(values_RN, starts, axis=1)


def correct_each(p_NK: Array, labels_N: Labels) -> Array:
    """Return 1 where the most probable class is the label, else 0."""
    return np.asarray(p_NK.argmax(1) == labels_N, np.float64)


def nll_each(p_NK: Array, labels_N: Labels) -> Array:
    """Return -log p(label) of each example."""
    with np.errstate(divide="ignore"):
        return np.asarray(-np.log(p_NK[np.arange(len(labels_N)), labels_N]))


def brier_each(p_NK: Array, labels_N: Labels) -> Array:
    """Return the squared distance to the one-hot label of each example, without a second (N, K) array."""
    label_N = p_NK[np.arange(len(labels_N)), labels_N]
    others_N = np.maximum(np.einsum("nk,nk->n", p_NK, p_NK) - label_N**2, 0)
    return np.asarray(others_N + (1 - label_N) ** 2)


def bin_index(confidence_N: Array) -> NDArray[np.intp]:
    """Return the equal-width bin of each confidence, closed on the right: an edge belongs to the bin below it."""
    return np.searchsorted(_EDGES, confidence_N, side="left")


def ones(scores: Scores, num_rows: int = 1) -> Array:
    """Return the counts of the data set itself, (num_rows, N)."""
    return np.ones((num_rows, len(scores.confidence_N)))


def value(name: str, scores: Scores) -> float:
    """Return the metric of that name on the data set itself."""
    return float(COUNTED[name](Counted(scores, ones(scores)))[0])


def _mean(counts_RN: Array, values_N: Array) -> Array:
    """Return means weighted by counts, infinite where a counted value is (0 times infinity would be NaN)."""
    infinite_N = np.isinf(values_N)
    means_R = counts_RN @ np.where(infinite_N, 0, values_N) / len(values_N)
    return np.where(counts_RN @ infinite_N > 0, np.inf, means_R)


def _ece(drawn: Counted) -> Array:
    return np.asarray(np.abs(drawn.gap_RB).sum(1) / drawn.num_examples)


def _mce(drawn: Counted) -> Array:
    size_RB = np.add.reduceat(drawn.counts_RN, drawn.scores.bin_starts, axis=1)
    return np.asarray((np.abs(drawn.gap_RB) / np.maximum(size_RB, 1)).max(1))


def _ace(drawn: Counted) -> Array:
    """Equal-mass bins cut the running sum of the gaps, which is linear within a tie: its examples share their mean."""
    num_bins = min(NUM_BINS, drawn.num_examples)
    cuts = np.arange(num_bins + 1) * drawn.num_examples // num_bins
    ranks, sums = np.cumsum(drawn.size_RM, axis=1), np.cumsum(drawn.by_tie(drawn.gap_RN), axis=1)
    # Below the first rank the sum rises from 0 at rank 0.
    starts = np.zeros(1)
    at_cuts = np.stack(
        [
            np.interp(cuts, np.concatenate((starts, rank_M)), np.concatenate((starts, sum_M)))
            for rank_M, sum_M in zip(ranks, sums, strict=True)
        ]
    )
    return np.asarray(np.abs(np.diff(at_cuts, axis=1)).sum(1) / drawn.num_examples)


def _aurc(drawn: Counted) -> Array:
    """Sum the expected risks in closed form, tie by tie.

    In a tie of c examples, e of them errors, after A examples with E errors, the expected risk at A + j is
    (E + j e / c) / (A + j) = (E - A e / c) / (A + j) + e / c, whose sum over j has a difference of harmonic numbers.
    """
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, drawn.num_examples + 1))])
    size, errors = drawn.size_RM[:, ::-1], drawn.errors_RM[:, ::-1]
    after = np.cumsum(size, axis=1)
    at_after = harmonic[after.astype(np.intp)]
    steps = np.diff(at_after, axis=1, prepend=0.0)
    errors_before = np.cumsum(errors, axis=1) - errors
    weight = errors_before - (after - size) * errors / np.maximum(size, 1)
    return np.asarray((np.einsum("rm,rm->r", weight, steps) + errors.sum(1)) / drawn.num_examples)


def _auroc_error(drawn: Counted) -> Array:
    errors, hits = drawn.errors_RM, drawn.size_RM - drawn.errors_RM
    num_errors, num_hits = errors.sum(1), hits.sum(1)
    # The hits above a group and half of its own are all of them less those up to it, less half of its own back.
    up_to = np.cumsum(hits, axis=1) - hits / 2
    pairs = num_errors * num_hits
    wins = pairs - np.einsum("rm,rm->r", errors, up_to)
    return np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan)


COUNTED: dict[str, Callable[[Counted], Array]] = {
    "accuracy": lambda drawn: _mean(drawn.counts_RN, drawn.scores.correct_N),
    "nll": lambda drawn: _mean(drawn.counts_RN, drawn.scores.nll_N),
    "brier": lambda drawn: _mean(drawn.counts_RN, drawn.scores.brier_N),
    "ece": _ece,
    "ace": _ace,
    "mce": _mce,
    "aurc": _aurc,
    "auroc_error": _auroc_error,
}
"""Name to the function that returns the metric of each row of counts, (R,)."""
