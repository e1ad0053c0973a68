"""T21 through `calibrate` itself: images in, halves, calibrator, thresholds and label sets as a user gets them.

Of 400 simulated calibration splits of 500 images and test splits of 500, `calibrate`'s own steps freeze a model whose
true class probabilities are known and which is overconfident; then coverage is held against its law as in
test_conformal_coverage.py, with thresholds from the 250 images of half B: false alarm 1e-6 for each statistic; caught
with power .99: a mean off by .0082.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bayesnet.calibration import CONFORMAL, prediction_sets
from bayesnet.data import ArrayExamples, DataConfig, ImageData, Preprocessing, load_data
from bayesnet.data.splits import halves
from bayesnet.engine import Engine
from bayesnet.predictive import Predictor
from bayesnet.workflows import calibrating
from bayesnet.workflows.answering import answer
from bayesnet.workflows.calibrating import CalibrationPlan
from tests.statistical.test_conformal_coverage import Coverage, compare

R, N, K = 400, 500, 4
SIDE = 4
PREPROCESSING = Preprocessing(1, SIDE, SIDE, mean=(0.5,), std=(0.29,))
ENGINE = Engine(torch.device("cpu"))
Outcomes = dict[str, list[Any]]


class Overconfident(nn.Module):
    """Three draws of the logits: the true ones of each image times 1.7, with weights that differ a little."""

    max_draws = 3

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight_KD = 0.6 * torch.randn(K, SIDE * SIDE, generator=generator)
        self.weight_SKD = 1.7 * self.weight_KD + 0.1 * torch.randn(3, K, SIDE * SIDE, generator=generator)

    def draws_and_features(self, x_NCHW: Tensor, num_samples: int) -> tuple[Tensor, None]:
        """Return the draws (S, N, K)."""
        return torch.einsum("nd,skd->snk", x_NCHW.flatten(1), self.weight_SKD), None

    def true_logits(self, images_NCHW: Tensor) -> Tensor:
        """Return the logits that labels are drawn from (N, K)."""
        return PREPROCESSING.normalize(images_NCHW).flatten(1) @ self.weight_KD.T


def images_and_labels(generator: torch.Generator, posterior: Overconfident, num: int) -> ArrayExamples:
    images_NCHW = torch.randint(0, 256, (num, 1, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    uniform_NK = torch.rand(num, K, generator=generator, dtype=torch.float64)
    labels_N = (posterior.true_logits(images_NCHW) - uniform_NK.log().neg().log()).argmax(1)
    return ArrayExamples(images_NCHW, labels_N)


@functools.cache
def digits() -> ImageData:
    return load_data(DataConfig())


def outcomes(calibrator: str) -> Outcomes:
    """Return threshold, sets and labels of each split by method, all from `calibrate`'s own steps."""
    posterior, generator = Overconfident(), torch.Generator().manual_seed(7)
    predictor = Predictor(posterior, PREPROCESSING, engine=ENGINE, chunk_size=250)  # type: ignore[arg-type]
    model: Any = SimpleNamespace(predictor=lambda engine: predictor)
    plan = CalibrationPlan(calibrator=calibrator)
    found: Outcomes = {name: [] for name in CONFORMAL}
    for index in range(R):
        data = digits()._replace(
            calibration=images_and_labels(generator, posterior, N), test=images_and_labels(generator, posterior, N)
        )
        _, frozen = calibrating._freeze({"bayesian": model}, data, ENGINE, plan, index)
        each = frozen["bayesian"]
        tested = answer({"bayesian": each.answering}, data.test)["bayesian"]
        for name, threshold in each.thresholds.items():
            sets_NK = prediction_sets(tested.after_NK, threshold, tested.uniform_N)
            found[name].append((threshold, sets_NK, data.test.labels_N.numpy()))
    return found


@pytest.mark.parametrize("calibrator", ["temperature", "isotonic"])
def test_coverage_follows_its_law_through_calibrate(calibrator: str) -> None:
    """All four kinds of sets. Isotonic maps tie, so that of them only that coverage is not too low."""
    for name, each in outcomes(calibrator).items():
        found: Coverage = compare(each)
        assert found.bound == pytest.approx(0.0055, abs=2e-4)
        assert found.valid, (name, found)
        assert found.exact or calibrator == "isotonic", (name, found)


def test_thresholds_on_the_half_that_fitted_the_calibrator_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: half B is half A."""
    monkeypatch.setattr(calibrating, "halves", lambda labels_N, seed: (halves(labels_N, seed)[0],) * 2)
    assert not compare(outcomes("isotonic")["aps"]).valid


def test_the_model_is_as_described() -> None:
    posterior = Overconfident()
    split = images_and_labels(torch.Generator().manual_seed(1), posterior, 20_000)
    true_NK = posterior.true_logits(split.read(range(len(split)))).double().softmax(1).numpy()
    share_K = np.bincount(split.labels_N.numpy(), minlength=K) / len(split)
    assert np.abs(share_K - true_NK.mean(0)).max() < 4.892 * 0.5 / np.sqrt(len(split))
