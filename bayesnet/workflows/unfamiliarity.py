"""How well models tell images of no known class: each unfamiliar set against the test split, by every score."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from bayesnet.data import Examples, ImageData, Preprocessing
from bayesnet.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from bayesnet.data.unfamiliar import CORRUPTED, UnfamiliarSet, load_unfamiliar, unfamiliar_examples
from bayesnet.ood import FeatureDensity, image_scores, unfamiliarity
from bayesnet.types import JsonObject
from bayesnet.workflows.answering import Answering, Answers, Array, answer
from bayesnet.workflows.robustness import SomeImages

MAX_TRAINING_IMAGES = 5000
"""Training images that the feature density is fitted on, spread evenly over the split."""

ROUNDING = 1e-9
"""Nats below which a score is nothing but rounding."""


def read_unfamiliar(spec: str, data: ImageData, preprocessing: Preprocessing) -> UnfamiliarSet:
    """Return the set that a spec names, every image of it read: what is wrong with one is told now.

    Args:
        spec: As for `load_unfamiliar`.
        data: What the models were trained on.
        preprocessing: Of the models.

    Raises:
        BayesnetError: See `load_unfamiliar`; or an image cannot be read.
    """
    found = load_unfamiliar(spec, data, preprocessing)
    found.examples.verify()
    return found


def corrupted_set(images: SomeImages) -> UnfamiliarSet:
    """Return test images that are hardly the ones they were: each under one corruption at the highest severity in turn.

    They show known classes, and some of the images that they are set beside: a model that is as sure of them as before
    takes no notice of what it looks at.

    Args:
        images: Clean.
    """
    description = f"test images, each under one of the {len(CORRUPTIONS)} corruptions at the highest severity"
    dependent = "they are images of the test split itself"
    return UnfamiliarSet(CORRUPTED, description, unfamiliar_examples(_each_corrupted(images), "corrupted"), dependent)


def unfamiliar_records(
    models: Mapping[str, Answering], known: Mapping[str, Answers], train: Examples, sets: list[UnfamiliarSet]
) -> dict[str, JsonObject]:
    """Return for each model and set how well each score tells its images from the test split.

    Args:
        models: Calibrated.
        known: Their answers on the test split, with features.
        train: Training images, for the density of features.
        sets: Unfamiliar images.
    """
    indices_N = torch.linspace(0, len(train) - 1, min(len(train), MAX_TRAINING_IMAGES)).long()
    trained = answer(models, train, indices_N, keep_features=True)
    labels_N = train.labels_N[indices_N].numpy()
    densities = {
        name: None if answers.features_ND is None else FeatureDensity.fit(answers.features_ND, labels_N)
        for name, answers in trained.items()
    }
    known_scores = {name: _scores(known[name], densities[name]) for name in models}
    records: dict[str, JsonObject] = {name: {} for name in models}
    for each in sets:
        for name, answers in answer(models, each.examples, keep_features=True).items():
            records[name][each.name] = {
                "description": each.description,
                "num_images": len(each.examples),
                "no_interval": each.dependent,
                "scores": unfamiliarity(
                    known_scores[name], _scores(answers, densities[name]), with_interval=each.dependent is None
                ),
            }
    return records


def _scores(answers: Answers, density: FeatureDensity | None) -> dict[str, Array]:
    """Return the scores that these answers give: one draw has no mutual information, log-probabilities no energy."""
    scores = image_scores(
        answers.after_NK,
        answers.entropy_N,
        answers.mutual_information_N,
        answers.energy_N,
        features_ND=answers.features_ND,
        density=density,
    )
    empty = {name for name in ("mutual_information", "energy") if not np.abs(scores[name]).max() > ROUNDING}
    return {name: values for name, values in scores.items() if name not in empty}


def _each_corrupted(images: SomeImages) -> Tensor:
    """Return every image under one corruption at the highest severity, uint8 (N, C, H, W)."""
    names = list(CORRUPTIONS)
    parts = [
        corrupt(images.examples.read([index]), names[position % len(names)], SEVERITIES[-1], 0, [position])
        for index, position in enumerate(images.positions_N.tolist())
    ]
    return torch.cat(parts)
