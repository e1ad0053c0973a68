"""APS, RAPS and class-conditional sets by hand and by brute force; the methods' common contract; image uniforms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bayesnet.calibration.conformal import (
    CONFORMAL,
    class_conditional,
    coverage_band,
    evaluate_sets,
    image_uniforms,
    prediction_sets,
    rank,
    raps,
    threshold_from_json,
)
from bayesnet.calibration.conformal.aps import cumulative
from bayesnet.calibration.conformal.class_conditional import ClassConditionalThreshold
from bayesnet.errors import CheckpointError, ConfigError

ALPHAS = ("0.01", "0.1", "0.3", "0.7")
NAMES = tuple(CONFORMAL)
RANDOMISED = ("aps", "raps")

Array = NDArray[np.float64]
Problem = tuple[Array, NDArray[np.int64], Array]


def problem(seed: int, n: int, k: int, *, coarse: bool = False) -> Problem:
    """Return probabilities (many ties if coarse), labels drawn from them, and uniforms."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 4, (n, k)).astype(float) if coarse else rng.random((n, k)) ** 3 + 1e-12
    p_NK = weights / weights.sum(1, keepdims=True)
    labels_N = (rng.random((n, 1)) > np.cumsum(p_NK, 1)).sum(1).clip(max=k - 1)
    return p_NK, labels_N, rng.random(n)


def brute_score(p_K: Array, u: float, label: int, name: str) -> float:
    more = [p for p in p_K if p > p_K[label]]
    tied = [p for p in p_K if p == p_K[label]]
    if name in ("lac", "class_conditional"):
        return float(1 - p_K[label])
    penalty = 0.1 * max(len(more) + 1 - 2, 0) if name == "raps" else 0.0
    return float(sum(more) + u * sum(tied)) + penalty


@pytest.mark.parametrize("name", RANDOMISED)
@pytest.mark.parametrize("coarse", [False, True])
def test_randomised_scores_are_those_of_the_definition(name: str, coarse: bool) -> None:
    p_NK, labels_N, u_N = problem(0, 200, 6, coarse=coarse)
    threshold = CONFORMAL[name].fit(p_NK, labels_N, 0.3, u_N)
    scores_NK = np.array([[brute_score(p, u, y, name) for y in range(6)] for p, u in zip(p_NK, u_N, strict=True)])
    expected = np.sort(scores_NK[np.arange(200), labels_N])[rank(200, 0.3) - 1]
    assert threshold.threshold == pytest.approx(expected, abs=1e-12)
    sure_NK = np.abs(scores_NK - expected) > 1e-9
    sets_NK = prediction_sets(p_NK, threshold, u_N)
    assert (sets_NK == (scores_NK <= expected))[sure_NK].all()
    assert sure_NK.mean() > 0.99


@pytest.mark.parametrize("name", RANDOMISED)
def test_order_statistic_is_exact_for_all_small_splits(name: str) -> None:
    """The threshold is the k-th score, k the least integer with k / (n + 1) >= 1 - alpha in exact arithmetic."""
    rng = np.random.default_rng(0)
    for n in range(1, 201):
        u_N, p_NK, labels_N = rng.random(n), np.tile([1.0, 0.0], (n, 1)), np.zeros(n, np.int64)  # the score is u
        for text in ALPHAS:
            k = next(k for k in range(n + 2) if k >= (n + 1) * (1 - Fraction(text)))
            found = CONFORMAL[name].fit(p_NK, labels_N, float(text), u_N)
            assert found.threshold == (np.sort(u_N)[k - 1] if k <= n else 1.0)
            assert (found.notice is None) == (k <= n)


def test_each_class_has_the_order_statistic_of_its_own_images() -> None:
    rng = np.random.default_rng(0)
    for n in range(1, 201, 3):
        p = rng.random(2 * n)
        labels_N = rng.integers(2, size=2 * n)
        found = class_conditional.fit(np.stack([p, 1 - p], 1), labels_N, 0.1)
        for label in range(2):
            own = np.sort(1.0 - np.stack([p, 1 - p], 1)[labels_N == label, label])
            k = rank(len(own), 0.1)
            assert found.class_thresholds[label] == (own[k - 1] if k <= len(own) else 1.0)
            assert found.class_counts[label] == len(own)


def kolmogorov(values: Array) -> float:
    """Return sqrt(n) times the distance of the empirical distribution from the uniform one."""
    ordered, n = np.sort(values), len(values)
    steps = np.arange(n + 1) / n
    return float(math.sqrt(n) * max((ordered - steps[:-1]).max(), (steps[1:] - ordered).max()))


def label_scores(p_NK: Array, labels_N: NDArray[np.int64], u_N: Array) -> Array:
    return cumulative(p_NK, u_N)[0][np.arange(len(labels_N)), labels_N]


@pytest.mark.parametrize("coarse", [False, True])
def test_aps_scores_are_uniform_under_the_true_model(coarse: bool) -> None:
    """20,000 labels drawn from p: sqrt(n) KS below 2.693, which a uniform sample exceeds once in a million.

    Caught with power .99: a shift of .031 in the distribution function ((2.693 + 1.6) / sqrt(n)). Planted: no random
    number (u = 1) moves it by .5, the same number for all images by .2.
    """
    p_NK, labels_N, u_N = problem(1, 20_000, 5, coarse=coarse)
    assert kolmogorov(label_scores(p_NK, labels_N, u_N)) < 2.693
    for planted_N in (np.full_like(u_N, np.nextafter(1, 0)), np.full_like(u_N, 0.5)):
        assert kolmogorov(label_scores(p_NK, labels_N, planted_N)) > 2.693


def test_raps_scores_less_their_penalty_are_uniform_under_the_true_model() -> None:
    """As for APS: false alarm 1e-6, a shift of .031 is caught; planted, the penalty left in moves it by more."""
    p_NK, labels_N, u_N = problem(2, 20_000, 5)
    rows = np.arange(len(labels_N))
    raps_N = raps.penalised(0.1, 2)(p_NK, u_N)[rows, labels_N]
    more_probable_N = (p_NK > p_NK[rows, labels_N][:, None]).sum(1)
    assert kolmogorov(raps_N - 0.1 * np.maximum(more_probable_N - 1, 0)) < 2.693
    assert kolmogorov(raps_N) > 2.693


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(2, 60),
    st.integers(2, 5),
    st.integers(0, 2**31),
    st.sampled_from([0.05, 0.1, 0.3, 0.5]),
    st.booleans(),
)
def test_ties_are_never_dropped(name: str, n: int, k: int, seed: int, alpha: float, coarse: bool) -> None:
    """On the calibration split itself at least k of n labels are in their sets (of each class, where it says so)."""
    p_NK, labels_N, u_N = problem(seed, n, k, coarse=coarse)
    threshold = CONFORMAL[name].fit(p_NK, labels_N, alpha, np.round(u_N, 1) % 1)
    covered_N = prediction_sets(p_NK, threshold, np.round(u_N, 1) % 1)[np.arange(n), labels_N]
    groups = [labels_N == label for label in range(k)] if name == "class_conditional" else [labels_N >= 0]
    assert all(covered_N[group].sum() >= min(rank(int(group.sum()), alpha), group.sum()) for group in groups)


@pytest.mark.parametrize("name", NAMES)
def test_sets_do_not_depend_on_the_order_of_the_classes(name: str) -> None:
    p_NK, labels_N, u_N = problem(3, 300, 5, coarse=True)
    order = np.array([3, 0, 4, 1, 2])
    moved_N = np.argsort(order)[labels_N]
    sets_NK = prediction_sets(p_NK, CONFORMAL[name].fit(p_NK, labels_N, 0.2, u_N), u_N)
    moved_NK = prediction_sets(p_NK[:, order], CONFORMAL[name].fit(p_NK[:, order], moved_N, 0.2, u_N), u_N)
    # Sums in another order round differently: a class at the very border may change sides.
    assert (sets_NK[:, order] != moved_NK).sum() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_split_too_small_gives_full_sets_and_says_so(name: str) -> None:
    p_NK, labels_N, u_N = problem(4, 8, 12)
    found = CONFORMAL[name].fit(p_NK, labels_N, 0.1, u_N)
    hostile_NK = np.vstack([np.eye(12), np.full((1, 12), 1 / 12 + 5e-6), np.linspace(0, 1, 12)[None] / 6])
    assert prediction_sets(hostile_NK, found, np.full(14, np.nextafter(1, 0))).all()
    assert found.notice is not None
    assert "too few" in found.notice
    row = evaluate_sets(p_NK, labels_N, found, u_N)
    assert (row["coverage"], row["coverage_band"], row["mean_set_size"]) == (1.0, [1.0, 1.0], 12.0)


def test_the_notice_names_the_classes_with_too_few_images() -> None:
    p_NK = np.full((30, 3), 1 / 3)
    found = class_conditional.fit(p_NK, [0] * 20 + [1] * 8 + [2] * 2, 0.1)
    start = "too few calibration images for alpha 0.1 (at least 9 of each class): every set holds "
    assert found.notice == start + "class 1 (8), class 2 (2)"
    assert found.named_notice(["ant", "bee", "cat"]) == start + "bee (8), cat (2)"
    row = evaluate_sets(p_NK, [0] * 30, found, classes=["ant", "bee", "cat"])
    assert row["notice"] == start + "bee (8), cat (2)"
    many = class_conditional.fit(np.full((2, 15), 1 / 15), [0, 1], 0.1).notice
    assert many is not None
    assert many.endswith("class 9 (0) and 5 more")
    assert class_conditional.fit(np.full((18, 2), 0.5), [0] * 9 + [1] * 9, 0.1).notice is None


def test_class_conditional_rows_by_hand() -> None:
    p_NK = np.array([[0.6, 0.4, 0.0], [0.3, 0.7, 0.0], [0.1, 0.9, 0.0]])
    found = ClassConditionalThreshold("class_conditional", 0.2, 1.0, 30, (0.5, 0.2, 1.0), (10, 18, 2))
    assert prediction_sets(p_NK, found).tolist() == [
        [True, False, True],
        [False, False, True],
        [False, True, True],
    ]
    row = evaluate_sets(p_NK, [0, 1, 1], found)
    assert row["coverage"] == pytest.approx(2 / 3)
    assert row["by_class"] == [
        {"coverage": 1.0, "band": list(coverage_band(10, 1, 0.2)), "num_test": 1, "num_calibration": 10},
        {"coverage": 0.5, "band": list(coverage_band(18, 2, 0.2)), "num_test": 2, "num_calibration": 18},
        {"coverage": None, "band": [None, None], "num_test": 0, "num_calibration": 2},
    ]
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_the_band_over_all_classes_is_that_of_the_sum() -> None:
    """One class: the band of LAC. Two: against 100,000 simulated sums, to two images of 350."""
    one = ClassConditionalThreshold("class_conditional", 0.1, 0.5, 99, (0.5,), (99,))
    assert one.coverage_band(np.zeros(50, np.int64)) == pytest.approx(coverage_band(99, 50, 0.1))
    two = ClassConditionalThreshold("class_conditional", 0.1, 1.0, 153, (0.5, 0.4, 1.0), (99, 49, 5))
    labels_N = np.repeat([0, 1, 2], [200, 100, 50])
    rng = np.random.default_rng(0)
    sums = 50 + rng.binomial(200, rng.beta(90, 10, 100_000)) + rng.binomial(100, rng.beta(45, 5, 100_000))
    for found, level in zip(two.coverage_band(labels_N), (0.005, 0.995), strict=True):
        assert abs(found * 350 - np.quantile(sums, level)) <= 2


def test_raps_says_its_constants_and_has_smaller_tails() -> None:
    p_NK, labels_N, u_N = problem(5, 4000, 20)
    rows = {}
    for name in RANDOMISED:
        threshold = CONFORMAL[name].fit(p_NK[:2000], labels_N[:2000], 0.1, u_N[:2000])
        rows[name] = evaluate_sets(p_NK[2000:], labels_N[2000:], threshold, u_N[2000:])
        sizes_N = prediction_sets(p_NK[2000:], threshold, u_N[2000:]).sum(1)
        rows[name]["largest"] = int(sizes_N.max())
    assert (rows["raps"]["penalty"], rows["raps"]["num_unpenalised"]) == (raps.PENALTY, raps.NUM_UNPENALISED)
    assert rows["raps"]["largest"] < rows["aps"]["largest"]


@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip_gives_the_same_sets(name: str) -> None:
    p_NK, labels_N, u_N = problem(6, 90, 4)
    found = CONFORMAL[name].fit(p_NK, labels_N, 0.2, u_N)
    again = threshold_from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert (prediction_sets(p_NK, again, u_N) == prediction_sets(p_NK, found, u_N)).all()


ENTRIES: dict[str, dict[str, Any]] = {
    "aps": {"method": "aps", "alpha": 0.1, "threshold": 0.5, "num_calibration": 9},
    "raps": {
        "method": "raps",
        "alpha": 0.1,
        "threshold": 1.5,
        "num_calibration": 9,
        "penalty": 0.1,
        "num_unpenalised": 2,
    },
    "class_conditional": {
        "method": "class_conditional",
        "alpha": 0.1,
        "threshold": 1.0,
        "num_calibration": 9,
        "class_thresholds": [0.5, 1],
        "class_counts": [9, 0],
    },
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("aps", {"threshold": 1.1}),
        ("aps", {"penalty": 0.1}),
        ("raps", {"threshold": math.inf}),
        ("raps", {"threshold": math.nan}),
        ("raps", {"penalty": -0.1}),
        ("raps", {"penalty": math.inf}),
        ("raps", {"num_unpenalised": 2.0}),
        ("raps", {"num_unpenalised": -1}),
        ("class_conditional", {"class_thresholds": [0.5, 1.0, 1.0]}),
        ("class_conditional", {"class_thresholds": [0.5, 1.5]}),
        ("class_conditional", {"class_thresholds": [0.5, 0.6]}),
        ("class_conditional", {"class_thresholds": [], "class_counts": []}),
        ("class_conditional", {"class_thresholds": 1.0}),
        ("class_conditional", {"class_counts": [8, 0]}),
        ("class_conditional", {"class_counts": [10, -1]}),
        ("class_conditional", {"class_counts": [9, False]}),
        ("class_conditional", {"num_calibration": 10}),
    ],
)
def test_bad_json_is_refused(name: str, change: dict[str, object]) -> None:
    assert threshold_from_json(ENTRIES[name]).to_json() == ENTRIES[name]
    with pytest.raises(CheckpointError, match=r"conformal threshold (cannot be used|has other keys than expected)"):
        threshold_from_json(ENTRIES[name] | change)


@pytest.mark.parametrize("name", NAMES)
def test_alpha_out_of_range(name: str) -> None:
    with pytest.raises(ConfigError, match=r"alpha must be between 0 and 1 \(1.5\): 0.1 asks for sets that hold 90 %"):
        CONFORMAL[name].fit([[1.0]], [0], 1.5, [0.5])


@pytest.mark.parametrize(
    ("uniforms", "message"),
    [
        (None, "a randomised method needs a uniform number for each image: see image_uniforms"),
        ([0.5], r"uniforms must have shape \(2,\), one for each image; got \(1,\)"),
        ([0.5, 1.0], r"row 1: uniform number 1 is not in \[0, 1\)"),
        ([math.nan, 0.5], r"row 0: uniform number nan is not in \[0, 1\)"),
    ],
)
@pytest.mark.parametrize("name", RANDOMISED)
def test_randomised_methods_need_uniforms(name: str, uniforms: list[float] | None, message: str) -> None:
    p_NK, good = [[0.7, 0.3], [0.2, 0.8]], [0.5, 0.5]
    threshold = CONFORMAL[name].fit(p_NK, [0, 1], 0.5, good)
    calls: list[Callable[[], object]] = [
        lambda: CONFORMAL[name].fit(p_NK, [0, 1], 0.5, uniforms),
        lambda: prediction_sets(p_NK, threshold, uniforms),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_another_number_of_classes_is_refused() -> None:
    found = class_conditional.fit([[0.5, 0.5]] * 4, [0, 0, 1, 1], 0.5)
    with pytest.raises(ValueError, match="expected 2 classes, as calibrated; got 3"):
        prediction_sets([[0.2, 0.3, 0.5]], found)


def test_an_image_always_has_the_same_uniform() -> None:
    """Whatever its batch, place or memory layout; another shape with the same bytes is another image."""
    x_BCHW = torch.randint(256, (6, 3, 4, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    u_B = image_uniforms(x_BCHW)
    assert (image_uniforms(x_BCHW.flip(0)) == u_B[::-1]).all()
    assert (image_uniforms(x_BCHW.contiguous(memory_format=torch.channels_last)) == u_B).all()
    assert image_uniforms(x_BCHW[2:3])[0] == u_B[2]
    assert not np.isin(image_uniforms(x_BCHW.reshape(6, 3, 8, 4)), u_B).any()
    assert len(set(u_B.tolist())) == 6
    # Frozen: another value would change the sets of every calibrated run.
    assert image_uniforms(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))[0] == pytest.approx(0.078757, abs=1e-6)
    zeros = torch.zeros(1, 1, 8, 8)
    assert image_uniforms(zeros)[0] == image_uniforms(-zeros)[0] != image_uniforms(zeros.view(1, 2, 4, 8))[0]
    assert image_uniforms(zeros)[0] != image_uniforms(torch.zeros(1, 1, 8, 32, dtype=torch.uint8))[0]


def test_image_uniforms_are_uniform_even_for_images_that_hardly_differ() -> None:
    """20,000 images that count: sqrt(n) KS below 2.693 (false alarm 1e-6); a shift of .031 is caught."""
    counter_N = torch.arange(20_000)
    pixels = torch.stack([counter_N % 256, counter_N // 256, torch.zeros(20_000, dtype=torch.int64), counter_N * 0], 1)
    u_N = image_uniforms(pixels.to(torch.uint8).reshape(-1, 1, 2, 2))
    assert kolmogorov(u_N) < 2.693
    assert kolmogorov(u_N**1.2) > 2.693
    assert ((u_N >= 0) & (u_N < 1)).all()


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 4, 4).double(), torch.zeros(1, 4, 4)])
def test_other_tensors_are_no_images(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 or float32 \(B, C, H, W\); got"):
        image_uniforms(images)
