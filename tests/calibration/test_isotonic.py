"""Isotonic calibration: the least squares fit by brute force, its map on draws, the floor, and damage."""

from __future__ import annotations

import json
import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesnet.calibration import calibrator_from_json, nll_of_mean
from bayesnet.calibration.identity import Identity
from bayesnet.calibration.isotonic import Isotonic, fit
from bayesnet.errors import CheckpointError


def two_classes(p: list[float]) -> torch.Tensor:
    """Log-probabilities (1, N, 2) whose first class has these probabilities."""
    first = torch.tensor(p, dtype=torch.float64)
    return torch.stack([first, 1 - first], 1)[None].log()


def least_squares(p: list[float], right: list[int]) -> list[float]:
    """Return the rising fit by trying every way to cut the distinct values into blocks."""
    values = sorted(set(p))
    groups = [[r for each, r in zip(p, right, strict=True) if each == value] for value in values]
    best, found = math.inf, [0.0]
    for cuts in product([False, True], repeat=len(values) - 1):
        blocks = [[groups[0]]]
        for group, cut in zip(groups[1:], cuts, strict=True):
            blocks = [*blocks, [group]] if cut else [*blocks[:-1], [*blocks[-1], group]]
        fitted = [float(np.mean([r for group in block for r in group])) for block in blocks]
        if any(left > right for left, right in pairwise(fitted)):
            continue
        rows = [(mean, group) for mean, block in zip(fitted, blocks, strict=True) for group in block]
        error = sum((r - mean) ** 2 for mean, group in rows for r in group)
        if error < best - 1e-12:
            best, found = error, [mean for mean, _ in rows]
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 1)), min_size=2, max_size=14))
def test_functions_are_the_least_squares_ones(points: list[tuple[int, int]]) -> None:
    p, right = [each / 10 for each, _ in points], [r for _, r in points]
    found = fit(two_classes(p), torch.tensor([1 - r for r in right]))
    if isinstance(found, Isotonic):
        fitted = np.interp(sorted(set(p)), found.probabilities[0], found.values[0])
        assert fitted.tolist() == pytest.approx(least_squares(p, right), abs=1e-12)
        assert found.floor == 1 / (len(points) + 2)


def test_map_by_hand() -> None:
    """Each draw on its own: (1 - floor) g(p) + floor p, normalised; linear between knots, constant beyond them."""
    calibrator = Isotonic([[0.2, 0.6], [0.5]], [[0.1, 0.5], [0.4]], floor=0.1)
    log_p = torch.tensor([[[0.4, 0.6]], [[0.9, 0.1]], [[0.1, 0.9]]], dtype=torch.float64).log()
    raw = np.array([[0.9 * 0.3 + 0.04, 0.9 * 0.4 + 0.06], [0.9 * 0.5 + 0.09, 0.37], [0.9 * 0.1 + 0.01, 0.45]])
    assert calibrator(log_p).exp()[:, 0].numpy() == pytest.approx(raw / raw.sum(1, keepdims=True), abs=1e-12)


def test_a_block_without_labels_keeps_the_nll_finite() -> None:
    """Planted: without the floor the label of the new image has probability 0."""
    log_p, labels = two_classes([0.1, 0.2, 0.3, 0.7, 0.8, 0.9]), torch.tensor([1, 1, 1, 0, 0, 0])
    found = fit(log_p, labels)
    assert isinstance(found, Isotonic)
    new = two_classes([0.1]), torch.tensor([0])
    assert found.values[0][0] == 0
    assert nll_of_mean(*new, found) == pytest.approx(-math.log(0.1 / 8), abs=0.1)
    found.floor = 1e-300
    assert nll_of_mean(*new, found) > 600


def test_a_class_that_is_impossible_and_never_the_label_stays_so() -> None:
    log_p = torch.tensor([[[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.2, 0.8, 0.0]]], dtype=torch.float64).log()
    found = fit(log_p, torch.tensor([0, 1, 1]))
    assert isinstance(found, Isotonic)
    assert found(log_p)[..., 2].max() == -math.inf
    assert found(log_p)[..., :2].isfinite().all()


def test_mends_what_no_temperature_can() -> None:
    """Probabilities that say 0.5 where they should say 0.8, and 0.9 where they should: the NLL falls to the truth's."""
    rng = np.random.default_rng(0)
    said = np.repeat([0.3, 0.5, 0.9], 2000)
    labels = torch.from_numpy((rng.random(6000) > np.repeat([0.1, 0.8, 0.9], 2000)).astype(np.int64))
    log_p = two_classes(said.tolist())
    found = fit(log_p, labels)
    mapped = found(log_p)[0, [0, 2000, 4000], 0].exp().numpy()
    # Four standard errors and more of 2,000 labels: 4.892 * sqrt(.16 / 2000) = .044, false alarm 1e-6 each.
    assert mapped == pytest.approx([0.1, 0.8, 0.9], abs=0.044)
    assert np.interp(0.5, [0.3, 0.9], mapped[[0, 2]]) < 0.5  # far from what it was mapped to


def test_identity_where_the_nll_would_not_fall() -> None:
    log_p = two_classes([0.5, 0.5])
    assert isinstance(fit(log_p, torch.tensor([0, 1])), Identity)
    falling = fit(two_classes([0.9, 0.9, 0.9, 0.9]), torch.tensor([1, 0, 1, 0]))
    assert isinstance(falling, Isotonic)


def test_close_knots_do_not_overshoot_in_float32() -> None:
    calibrator = Isotonic([[0.3, 0.3 + 1e-12], [0.5]], [[0.0, 1.0], [0.5]], floor=1e-6)
    mapped = calibrator(torch.tensor([[[0.3, 0.7], [0.31, 0.69]]]).log())
    assert mapped.isfinite().all()
    assert torch.logsumexp(mapped, 2) == pytest.approx(0, abs=1e-6)


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        Isotonic([[0.5]], [[0.5]], 0.1)(torch.zeros(1, 1, 3))
    assert str(caught.value) == "isotonic calibrator is for 1 classes, the model has 3: run calibrate again"


@pytest.mark.parametrize(
    "change",
    [
        {"probabilities": [[0.1, 0.9]]},
        {"probabilities": [[0.9, 0.1], [0.5]]},
        {"probabilities": [[0.1, 0.1], [0.5]]},
        {"probabilities": [[0.1, 1.1], [0.5]]},
        {"probabilities": [[0.1], [0.5]]},
        {"probabilities": [0.1, 0.5]},
        {"probabilities": [[0.1, True], [0.5]]},
        {"values": [[0.8, 0.2], [0.5]]},
        {"values": [[0.2, math.nan], [0.5]]},
        {"values": [[0.2, 0.8], []]},
        {"values": None},
        {"probabilities": [], "values": []},
        {"floor": 0.0},
        {"floor": 0.6},
        {"floor": None},
        {"extra": 1},
    ],
)
def test_damage_is_refused(change: dict[str, object]) -> None:
    entry = {"name": "isotonic", "probabilities": [[0.1, 0.9], [0.5]], "values": [[0.2, 0.8], [0.5]], "floor": 0.1}
    assert calibrator_from_json(json.loads(json.dumps(entry))).to_json() == entry
    with pytest.raises(CheckpointError, match=r"isotonic (function cannot be used|calibrator has unexpected keys)"):
        calibrator_from_json(entry | change)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="not a rising function for each class"):
        Isotonic([[0.5]], [[2.0]], 0.1)
