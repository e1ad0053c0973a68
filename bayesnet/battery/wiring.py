"""T12: what lies between a right posterior and its user: joint draws of weights, evaluation mode, names of classes.

The draws of each Gaussian family are compared with its density: squared Mahalanobis distances of 200 draws of 15
weights, whose sum is chi2 with 3,000 degrees of freedom, and 200 times that of their mean, chi2 with 15, which reused
noise makes large. False alarm 1e-6 each. Smallest faults caught with power 0.99: an sd 9 % too small or 10 % too large;
noise of which 5 % of the variance is shared by all draws. The other two checks are equalities without false alarms.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from scipy import stats
from torch import Tensor, nn

from bayesnet.battery import faults
from bayesnet.battery.base import Check, Fault, Findings, Outcome
from bayesnet.battery.seeding import seeded
from bayesnet.data import DataConfig, ImageData, Preprocessing, folder, load_data
from bayesnet.engine import Engine
from bayesnet.inference.base import Parts
from bayesnet.inference.full_rank import FullRankGuide, FullRankWeight
from bayesnet.inference.gaussian_weight import GaussianWeight, WeightGuide
from bayesnet.inference.low_rank import LowRankGuide
from bayesnet.inference.matrix_normal import MatrixNormalGuide
from bayesnet.inference.mean_field import MeanField, MeanFieldConfig, MeanFieldGuide
from bayesnet.predictive import Predictor
from bayesnet.testing import FlattenBackbone

NUM_CLASSES, NUM_COLUMNS, NUM_DRAWS = 3, 5, 200
NUM_WEIGHTS = NUM_CLASSES * NUM_COLUMNS
DIGITS = 6
"""Of the false alarm: 1e-6."""


def gaussian_guides(seed: int) -> dict[str, MeanFieldGuide | WeightGuide]:
    """Return a guide of each Gaussian family, its parameters moved from where they start."""
    prior_KD = torch.ones(NUM_CLASSES, NUM_COLUMNS)
    with seeded(seed), torch.no_grad():
        guides: dict[str, MeanFieldGuide | WeightGuide] = {
            "mean_field": MeanFieldGuide(prior_KD, 0.3),
            "matrix_normal": MatrixNormalGuide(prior_KD, 0.3),
            "low_rank": LowRankGuide(prior_KD, 0.3, 2),
            "full_rank": FullRankGuide(prior_KD, 0.3),
        }
        for guide in guides.values():
            for parameter in guide.double().parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return guides


def squared_distance(guide: MeanFieldGuide | WeightGuide, weight_SKD: Tensor) -> Tensor:
    """Return squared Mahalanobis distances (S,) from the guide's mean by its own density."""
    distribution = guide.distribution()
    if isinstance(distribution, GaussianWeight):
        return distribution.squared_distance(weight_SKD - distribution.loc)
    return ((weight_SKD - distribution.mean) / distribution.stddev).square().sum((-2, -1))


def weight_draws(seed: int) -> Findings:
    """T12: the dispersion of joint draws of the weight, and of their mean over draws."""
    outcomes = []
    for index, (name, guide) in enumerate(gaussian_guides(seed).items()):
        with seeded(4 * seed + index), torch.no_grad():
            weight_SKD = guide.sample(NUM_DRAWS)
            total = float(squared_distance(guide, weight_SKD).sum())
            shared = NUM_DRAWS * float(squared_distance(guide, weight_SKD.mean(0, keepdim=True)))
        whole = stats.chi2(NUM_DRAWS * NUM_WEIGHTS)
        tail = 2 * min(whole.cdf(total), whole.sf(total))
        surprise = _surprise(stats.chi2(NUM_WEIGHTS).sf(shared))
        outcomes.append(Outcome(f"{name}: draws of another sd, -log10 p", _surprise(tail), DIGITS))
        outcomes.append(Outcome(f"{name}: draws that move together, -log10 p", surprise, DIGITS))
    return Findings(outcomes)


def _surprise(probability: float) -> float:
    """Return -log10, infinite for 0."""
    return float(-torch.tensor(probability, dtype=torch.float64).log10())


def prediction_has_no_dropout(seed: int) -> Findings:
    """T12: predictions of a network with dropout equal those of its layers without it."""
    backbone = nn.Sequential(FlattenBackbone(4), nn.Dropout(0.5))
    backbone.num_features = 4  # type: ignore[assignment]
    with seeded(seed):
        posterior = MeanField(Parts(backbone, 3, 10), MeanFieldConfig())
        plain = MeanField(Parts(FlattenBackbone(4), 3, 10), MeanFieldConfig())
    plain.load_state_dict(posterior.state_dict())
    pixels = torch.randint(256, (6, 1, 1, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    preprocessing = Preprocessing(1, 1, 4, (0.5,), (0.25,), 100)
    posterior.train()
    predictor = Predictor(posterior, preprocessing, engine=Engine(torch.device("cpu")), num_samples=8, chunk_size=8)
    with seeded(seed), torch.no_grad():
        expected_SBK = plain.eval().predict_draws(preprocessing.normalize(pixels), 8).double().log_softmax(-1)
        error = (predictor.raw_log_probabilities(pixels) - expected_SBK).abs().max()
    return Findings([Outcome("largest difference of a log-probability, nats", float(error), 1e-5)])


def classes_match_by_name(seed: int) -> Findings:
    """T12: each split's labels name the folder that a file lies in, where splits lack classes."""
    with tempfile.TemporaryDirectory() as root:
        for place in ("train/2", "train/10", "train/a", "val/10", "calibration/a", "test/10", "test/a"):
            path = Path(root) / place
            path.mkdir(parents=True)
            for index in range(2):
                (path / f"{index}.bmp").write_bytes(_grey_image(10 * index))
        with seeded(seed):
            data = load_data(DataConfig(spec=f"folder:{root}"))
    return Findings([Outcome("images with the label of another class", _mislabelled(data), 0)])


def _mislabelled(data: ImageData) -> int:
    """Return how many images of all splits have a label that is not their folder's name."""
    return sum(
        Path(part.name(index)).parent.name != data.classes[label]
        for part in (data.train, data.validation, data.calibration, data.test)
        for index, label in enumerate(part.labels_N.tolist())
    )


def _grey_image(level: int, side: int = 8) -> bytes:
    """Return a square image in the BMP format, 24 bits per pixel; ``side`` is a multiple of 4."""
    pixels = bytes([level]) * (3 * side * side)
    header = struct.pack("<2sIHHI", b"BM", 54 + len(pixels), 0, 0, 54)
    return header + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, len(pixels), 2835, 2835, 0, 0) + pixels


def _sampled_scale_times(factor: float) -> faults.Planted:
    original = MeanFieldGuide.sample
    return mock.patch.object(
        MeanFieldGuide, "sample", lambda self, size: self.loc + factor * (original(self, size) - self.loc)
    )


def _one_weight_for_all() -> faults.Planted:
    original = MeanFieldGuide.sample
    return mock.patch.object(MeanFieldGuide, "sample", lambda self, size: original(self, 1).expand(size, -1, -1))


def _independent_weights() -> faults.Planted:
    """Draws have the posterior's variances and none of its covariances."""
    return mock.patch.object(FullRankWeight, "deviations", lambda self, shape: self.scale * torch.randn(shape).double())


def _dropout_left_on() -> faults.Planted:
    return mock.patch.object(nn.Module, "eval", lambda self: self)


def _classes_numbered_by_each_split() -> faults.Planted:
    """As when each split is a data set of its own: a missing class shifts the numbers of those after it."""
    original = folder._four_splits

    def renumbered(*arguments: Any) -> tuple[dict[str, list[folder.Labelled]], list[str]]:  # noqa: ANN401
        found, notes = original(*arguments)
        for split, labelled in found.items():
            ranks = {label: rank for rank, label in enumerate(sorted({label for _, label in labelled}))}
            found[split] = [(file, ranks[label]) for file, label in labelled]
        return found, notes

    return mock.patch.object(folder, "_four_splits", renumbered)


CHECKS: tuple[Check, ...] = (
    Check(
        "T12",
        "joint draws of the weight against their density",
        weight_draws,
        (
            Fault("posterior sd x 0.7 in draws", lambda: _sampled_scale_times(0.7)),
            Fault("particle reused", _one_weight_for_all),
            Fault("correlations left out of draws", _independent_weights),
        ),
    ),
    Check(
        "T12",
        "predictions without dropout",
        prediction_has_no_dropout,
        (Fault("dropout left on", _dropout_left_on),),
    ),
    Check(
        "T12",
        "labels against the names of folders",
        classes_match_by_name,
        (Fault("classes numbered by each split", _classes_numbered_by_each_split),),
    ),
)
