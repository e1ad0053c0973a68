"""How well models tell images of no known class: each unfamiliar set against the test split, by every score."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from bayesnet.data import ArrayExamples, Examples, ImageData, Preprocessing
from bayesnet.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from bayesnet.data.unfamiliar import UnfamiliarSet, load_unfamiliar
from bayesnet.ood import FeatureDensity, image_scores, unfamiliarity
from bayesnet.types import JsonObject
from bayesnet.workflows.answering import Answering, Answers, Array, answer

MAX_TRAINING_IMAGES = 5000
"""Training images that the feature density is fitted on, spread evenly over the split."""

ROUNDING = 1e-9
"""Nats below which a score is nothing but rounding."""


def unfamiliar_sets(
    spec: str, data: ImageData, preprocessing: Preprocessing, worst: ArrayExamples | None
) -> list[UnfamiliarSet]:
    """Return the sets that a spec names, and test images made unrecognisable, where there are some.

    Args:
        spec: As for `load_unfamiliar`.
        data: What the models were trained on.
        preprocessing: Of the models.
        worst: Clean test images to corrupt at the highest severity, one corruption each in turn.

    Raises:
        BayesnetError: See `load_unfamiliar`.
    """
    sets = [load_unfamiliar(spec, data, preprocessing)]
    if worst is not None:
        description = f"test images, each under one of the {len(CORRUPTIONS)} corruptions at the highest severity"
        sets.append(UnfamiliarSet("corrupted", description, _each_corrupted(worst)))
    return sets


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
                "scores": unfamiliarity(known_scores[name], _scores(answers, densities[name])),
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


def _each_corrupted(images: ArrayExamples) -> ArrayExamples:
    """Return every image under one corruption at the highest severity."""
    names = list(CORRUPTIONS)
    parts = [
        corrupt(images.read([index]), names[index % len(names)], SEVERITIES[-1], 0, [index])
        for index in range(len(images))
    ]
    return ArrayExamples(torch.cat(parts), images.labels_N)
