"""Features as examples: what a backbone made of images, read like images of one row: one loop trains on both."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from bayesnet.data.examples import ArrayExamples, Examples
from bayesnet.data.preprocessing import Preprocessing


class FeatureExamples(Examples):
    """Features in memory, with other versions of them for training: those of augmented images.

    Args:
        features_ND: Features of the images as they are, float32.
        labels_N: int64 class indices.
        passes: Features (N, D) of augmented images, one tensor per pass; an epoch trains on one, in turn.

    Example:
        >>> import torch
        >>> labels = torch.tensor([0, 1])
        >>> examples = FeatureExamples(torch.zeros(2, 3), labels, [torch.ones(2, 3), torch.full((2, 3), 2.0)])
        >>> [float(examples.for_epoch(0, epoch).read([0]).mean()) for epoch in range(3)]
        [1.0, 2.0, 1.0]
        >>> examples.read([0, 1]).shape, float(examples.read([0]).mean())
        (torch.Size([2, 1, 1, 3]), 0.0)
    """

    def __init__(self, features_ND: Tensor, labels_N: Tensor, passes: Sequence[Tensor] = ()) -> None:
        self._plain = _examples(features_ND, labels_N)
        self._passes = [_examples(each_ND, labels_N) for each_ND in passes]
        self.labels_N = labels_N

    def digest(self) -> str:
        """Return the SHA-256 of all features, plain and of each pass: which backbone made them, and from what."""
        digest = hashlib.sha256()
        for examples in (self._plain, *self._passes):
            digest.update(examples.read(torch.arange(len(self))).numpy().tobytes())
        return digest.hexdigest()

    def read(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return features (B, 1, 1, D) of the images as they are."""
        return self._plain.read(indices)

    def for_epoch(self, seed: int, epoch: int) -> Examples:
        """Return the features that an epoch trains on: the passes take turns; without any, these."""
        return self._passes[epoch % len(self._passes)] if self._passes else self

    @property
    def in_memory(self) -> bool:
        """True."""
        return True

    def name(self, index: int) -> str:
        """Return "features of image" and the index."""
        return self._plain.name(index)

    def verify(self) -> None:
        """Do nothing: features in memory are readable."""


def feature_preprocessing(num_features: int) -> Preprocessing:
    """Return the preprocessing of features that are standardised already: none.

    Args:
        num_features: D.
    """
    return Preprocessing(1, 1, num_features, mean=(0.0,), std=(1.0,), pixel_scale=1.0)


def _examples(features_ND: Tensor, labels_N: Tensor) -> ArrayExamples:
    return ArrayExamples(features_ND[:, None, None, :].contiguous(), labels_N, prefix="features of image")
