"""What frozen models say of a set of images: every model sees each chunk, so that the images are read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bayesnet.calibration import Calibrator, image_uniforms
from bayesnet.data import Examples
from bayesnet.predictive import Predictor, decompose, log_mean_exp, on_host, probabilities_on_host

Array = NDArray[np.float64]


class Answers(NamedTuple):
    """What a model says of N images, in order; float64 on the host, entropies in nats.

    Attributes:
        before_NK: Mean probabilities before calibration.
        after_NK: Mean probabilities after it; all that follows but for the energy is after it too.
        entropy_N: Of the mean probabilities: the total uncertainty.
        expected_entropy_N: Mean over the draws: the aleatoric part.
        mutual_information_N: The difference, at least 0: the epistemic part.
        energy_N: - log sum exp of the logits, mean over the draws: high where no class has a large logit.
        features_ND: Of the backbone, float32; None where the draws share none, or where they were not asked for.
        uniform_N: A number in [0, 1) that each image fixes by itself, for randomised label sets.
    """

    before_NK: Array
    after_NK: Array
    entropy_N: Array
    expected_entropy_N: Array
    mutual_information_N: Array
    energy_N: Array
    features_ND: NDArray[np.float32] | None
    uniform_N: Array


class Answering(NamedTuple):
    """A model that answers: its predictor, and the calibrator of its draws."""

    predictor: Predictor
    calibrator: Calibrator


def answer(
    models: Mapping[str, Answering],
    examples: Examples,
    indices_N: Tensor | None = None,
    *,
    keep_features: bool = False,
) -> dict[str, Answers]:
    """Return what each model says of the examples, or of some.

    Args:
        models: At least one; all of one run, so that they share the size of their chunks.
        examples: Images; their labels are not looked at.
        indices_N: Which of them; all where None.
        keep_features: Whether to keep the features, D float32 values an image.

    Raises:
        DivergedError: A model gives NaN for some image.
    """
    rows: dict[str, list[Answers]] = {name: [] for name in models}
    first = next(iter(models.values())).predictor
    for x_BCHW in first.chunks(examples, indices_N):
        uniform_B = image_uniforms(x_BCHW)
        for name, model in models.items():
            rows[name].append(_answer(model, x_BCHW, uniform_B, keep_features=keep_features))
    return {name: _joined(parts) for name, parts in rows.items()}


def mean_probabilities(models: Mapping[str, Answering], examples: Examples) -> dict[str, Array]:
    """Return the calibrated mean probabilities (N, K) of each model: `answer` without what else it says."""
    rows: dict[str, list[Array]] = {name: [] for name in models}
    first = next(iter(models.values())).predictor
    for x_BCHW in first.chunks(examples):
        for name, model in models.items():
            log_SBK = model.calibrator(model.predictor.raw_log_probabilities(x_BCHW))
            rows[name].append(probabilities_on_host(log_mean_exp(log_SBK, 0).exp()))
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def _answer(model: Answering, x_BCHW: Tensor, uniform_B: Array, *, keep_features: bool) -> Answers:
    """Return what one model says of one chunk."""
    raw = model.predictor.raw_pass(x_BCHW)
    before_SBK = raw.logits_SBK.log_softmax(-1)
    after_SBK = model.calibrator(before_SBK)
    log_mean_BK, entropy_B, expected_B = decompose(after_SBK)
    features_BD = raw.features_BD.float().cpu().numpy() if keep_features and raw.features_BD is not None else None
    return Answers(
        probabilities_on_host(log_mean_exp(before_SBK, 0).exp()),
        probabilities_on_host(log_mean_BK.exp()),
        on_host(entropy_B),
        on_host(expected_B),
        on_host(entropy_B - expected_B),
        on_host(-raw.logits_SBK.logsumexp(-1).mean(0)),
        features_BD,
        uniform_B,
    )


def _joined(parts: list[Answers]) -> Answers:
    """Return the answers of all chunks as one."""
    features = [part.features_ND for part in parts if part.features_ND is not None]
    arrays = [(*part[:6], part.uniform_N) for part in parts]
    *answers, uniform_N = (np.concatenate(column) for column in zip(*arrays, strict=True))
    before_NK, after_NK, entropy_N, expected_N, information_N, energy_N = answers
    features_ND = np.concatenate(features) if features else None
    return Answers(before_NK, after_NK, entropy_N, expected_N, information_N, energy_N, features_ND, uniform_N)
