"""Orders of an epoch, balanced samples and their effective size, mixup's shares, soft labels."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bayesnet.data.sampling import balanced_order, effective_size, epoch_order, mix, mixup_shares, soft_labels

UNEVEN = torch.tensor([0] * 50 + [1] * 7 + [2] * 3)


@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(0, 5))
def test_a_balanced_epoch_shows_each_class_equally_often(counts: list[int], epoch: int) -> None:
    labels_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order_N = balanced_order(labels_N, seed=0, epoch=epoch)
    shown_K = labels_N[order_N].bincount(minlength=len(counts))
    assert len(order_N) == len(labels_N)
    assert int(shown_K.max() - shown_K.min()) <= 1
    # Within a class no image comes again before all others came.
    times_N = order_N.bincount(minlength=len(labels_N))
    for label in range(len(counts)):
        of_class = times_N[labels_N == label]
        assert int(of_class.max() - of_class.min()) <= 1


def test_every_image_of_a_large_class_comes_in_some_epoch() -> None:
    """50 images, 20 places an epoch: the chance that 30 epochs miss one is 50 x .6^30 = 1e-5, and seeds are fixed."""
    seen = {int(i) for epoch in range(30) for i in balanced_order(UNEVEN, seed=0, epoch=epoch)}
    assert seen == set(range(len(UNEVEN)))


def test_orders_are_functions_of_seed_and_epoch() -> None:
    makers: tuple[Callable[[int, int], torch.Tensor], ...] = (
        lambda seed, epoch: epoch_order(40, seed=seed, epoch=epoch),
        lambda seed, epoch: balanced_order(UNEVEN, seed=seed, epoch=epoch),
        lambda seed, epoch: mixup_shares(40, 0.4, seed=seed, epoch=epoch),
    )
    for make in makers:
        assert torch.equal(make(1, 2), make(1, 2))
        assert not torch.equal(make(1, 2), make(1, 3))
        assert not torch.equal(make(1, 2), make(2, 2))


def test_effective_size_is_kishs() -> None:
    """(sum v)^2 / sum v^2 with each image's weight under balanced sampling."""
    counts_K = UNEVEN.bincount().double()
    weight_N = (len(UNEVEN) / (len(counts_K) * counts_K))[UNEVEN]
    assert float(weight_N.sum()) == pytest.approx(len(UNEVEN))
    assert effective_size(UNEVEN, balanced=True) == round(float(weight_N.sum() ** 2 / weight_N.square().sum()))
    assert effective_size(UNEVEN, balanced=False) == len(UNEVEN)
    even = torch.arange(60) % 3
    assert effective_size(even, balanced=True) == 60


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_shares_follow_the_beta_distribution(alpha: float) -> None:
    """Kolmogorov-Smirnov at 1e-6, n = 20,000: false alarm 3e-6 for the three; catches a shift of .02 in probability."""
    share_N = mixup_shares(20_000, alpha, seed=0, epoch=0).double().numpy()
    assert share_N.min() >= 0
    assert share_N.max() <= 1
    assert stats.kstest(share_N, stats.beta(alpha, alpha).cdf).pvalue > 1e-6
    assert stats.kstest(share_N, stats.beta(alpha * 1.3, alpha * 1.3).cdf).pvalue < 1e-6  # the planted fault


def test_mixing_is_with_the_neighbour_in_the_batch() -> None:
    values = torch.tensor([[1.0], [2.0], [4.0]])
    mixed = mix(values, torch.tensor([1.0, 0.5, 0.0]))
    assert mixed.tolist() == [[1.0], [1.5], [2.0]]
    labels = mix(soft_labels(torch.tensor([0, 1, 2]), 3, 0.0), torch.tensor([1.0, 0.5, 0.25]))
    assert labels.tolist() == [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.75, 0.25]]


def test_smoothed_labels_add_up_to_one_and_cost_what_the_formula_says() -> None:
    """Cross-entropy to smoothed labels = (1 - e) NLL + e mean over classes, as torch's own label smoothing."""
    logits_BK = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    y_B = torch.tensor([0, 3, 1, 1, 2])
    soft_BK = soft_labels(y_B, 4, 0.3)
    assert torch.allclose(soft_BK.sum(1), torch.ones(5))
    ours = torch.nn.functional.cross_entropy(logits_BK, soft_BK)
    assert float(ours) == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits_BK, y_B, label_smoothing=0.3)), rel=1e-6
    )


def test_order_is_uniform_over_positions() -> None:
    """Chi-square of where image 0 stands in 4,000 epochs, 8 places: false alarm 1e-6 (43.3 at 7 degrees of freedom)."""
    places = [int((epoch_order(8, seed=0, epoch=epoch) == 0).nonzero()) for epoch in range(4000)]
    counts = np.bincount(places, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < stats.chi2(7).isf(1e-6)
    assert math.isclose(stats.chi2(7).isf(1e-6), 40.5, abs_tol=3)
