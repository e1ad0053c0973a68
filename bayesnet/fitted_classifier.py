"""A trained run behind scikit-learn's methods of prediction; `bayesnet.estimator` adds fitting and calibrating."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor

from bayesnet.calibration import AbstentionThreshold, ConformalThreshold, abstains, image_uniforms, prediction_sets
from bayesnet.config import require
from bayesnet.data import Preprocessing
from bayesnet.data.labels import label_list
from bayesnet.engine import Engine
from bayesnet.errors import DataError
from bayesnet.predictive import Predictor, interval_kind
from bayesnet.rundir import RunDirectory
from bayesnet.types import Interval, JsonObject, Summary
from bayesnet.workflows.calibrated import CalibratedModel
from bayesnet.workflows.python_side import images_of, read_labels
from bayesnet.workflows.trained import PYTHON_DATA


class FittedClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc] # scikit-learn has no types
    """What a classifier can do once it has taken up a run.

    Attributes:
        devices: Where it runs: "auto", "cpu", "cuda:0".
        run_: The run directory.
        summary_: Its summary.
        classes_: Labels in index order (K,).
    """

    devices: str
    run_: Path
    summary_: JsonObject
    classes_: NDArray[Any]
    _model_name: str
    _preprocessing: Preprocessing
    _python_data: bool
    _predictor: Predictor
    _threshold: ConformalThreshold | None
    _abstention: AbstentionThreshold | None

    def predict(self, X: object) -> NDArray[Any]:
        """Return the most probable label of each image (N,).

        Args:
            X: Images as for `fit`, or PIL images, or paths of image files.
        """
        top_N = self.predict_proba(X).argmax(1)
        labels: NDArray[Any] = self.classes_[top_N]
        return labels

    def predict_proba(self, X: object) -> NDArray[np.float64]:
        """Return the mean probability of each class (N, K) over the posterior, calibrated once `calibrate` has run."""
        self._check_fitted()
        return self._predictor.probabilities(images_of(X, self._preprocessing))

    def predict_interval(self, X: object, level: float = 0.9) -> Interval:
        """Return an interval on the probability of each class, which the mean always lies in.

        Args:
            X: As for `predict`.
            level: Mass under the posterior, such as 0.9.

        Raises:
            ConfigError: ``level`` is not between 0 and 1.
        """
        parts = self.predict_summary(X, level)
        kind = interval_kind(self._predictor.num_draws, level)
        return Interval(parts.lower_BK, parts.probability_BK, parts.upper_BK, level, kind)

    def predict_summary(self, X: object, level: float = 0.9) -> Summary:
        """Return probabilities, intervals, entropies and mutual information of all images at once; see `Summary`.

        Args:
            X: As for `predict`.
            level: Mass of the intervals.

        Raises:
            ConfigError: ``level`` is not between 0 and 1.
            NotFittedError: `fit` has not run.
        """
        self._check_fitted()
        valid = isinstance(level, int | float) and 0 < level < 1
        require(valid, "must lie between 0 and 1", where=f"level = {level!r}")
        examples = images_of(X, self._preprocessing)
        chunks = list(self._predictor.summaries(examples, level))
        return Summary(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))

    def predict_set(self, X: object) -> list[list[Any]]:
        """Return the conformal set of labels of each image: it holds the true label with the calibrated coverage.

        Args:
            X: As for `predict`.

        Raises:
            ConfigError: `calibrate` has not run.
        """
        self._check_fitted()
        require(
            self._threshold is not None, "there are no label sets yet", where=f"{self.run_}", hint="call calibrate()"
        )
        assert self._threshold is not None
        examples, predictor = images_of(X, self._preprocessing), self._predictor
        uniform_N = np.concatenate([image_uniforms(x_BCHW) for x_BCHW in predictor.chunks(examples)])
        members_NK = prediction_sets(predictor.probabilities(examples), self._threshold, uniform_N)
        labels = self.classes_.tolist()
        return [[label for label, inside in zip(labels, row, strict=True) if inside] for row in members_NK]

    def predict_abstain(self, X: object) -> NDArray[np.bool_]:
        """Return whether each image is left unanswered, so that the risk of the others stays below the limit (N,).

        Args:
            X: As for `predict`.

        Raises:
            ConfigError: `calibrate` has not been given ``max_risk``.
        """
        self._check_fitted()
        where, hint = f"{self.run_}", "call calibrate(max_risk=0.02)"
        require(self._abstention is not None, "there is no limit on the risk yet", where=where, hint=hint)
        assert self._abstention is not None
        return abstains(self.predict_proba(X), self._abstention)

    def score(
        self, X: object, y: Sequence[Any] | NDArray[Any] | Tensor, sample_weight: NDArray[np.float64] | None = None
    ) -> float:
        """Return the accuracy on images and their labels; a label that the classifier does not know counts as wrong.

        Args:
            X: As for `predict`.
            y: Labels (N,).
            sample_weight: Weights (N,) of the images; equal where None.

        Raises:
            DataError: There is not one label per image, or the classifier knows none of them.
        """
        self._check_fitted()
        labels, known = label_list(y, "y"), set(self.classes_.tolist())
        predicted = self.predict(X).tolist()
        if len(labels) != len(predicted):
            raise DataError("expected one label per image", where=f"{len(predicted)} images, {len(labels)} labels")
        if not known & set(labels):
            hint = f"it has {', '.join(map(repr, list(known)[:5]))}"
            raise DataError("the classifier knows none of these labels", where=f"y[0] = {labels[0]!r}", hint=hint)
        right = np.array([guess == label for guess, label in zip(predicted, labels, strict=True)])
        return float(np.average(right, weights=sample_weight))

    def _take(self, run: RunDirectory, summary: JsonObject, model: CalibratedModel) -> None:
        """Take up the trained model of a run."""
        trained, calibrator, self._threshold, self._abstention = model
        self.run_, self.summary_, self._model_name = run.path, summary, trained.name
        self.classes_ = read_labels(run, trained.classes)
        self._preprocessing = trained.preprocessing
        self._python_data = trained.settings.data.spec == PYTHON_DATA
        self._predictor = trained.predictor(Engine.for_one(self.devices), calibrator=calibrator)

    def _check_fitted(self) -> None:
        if not hasattr(self, "_predictor"):
            raise NotFittedError("this BayesNetClassifier is not fitted yet: call fit, or use bayesnet.load")
