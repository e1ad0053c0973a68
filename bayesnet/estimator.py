"""BayesNetClassifier: the library with scikit-learn's habits, for arrays, data sets and image files.

Everything it does goes through the workflows and a run directory, so what is fitted here can be calibrated, compared
and resumed like any other run; `load` brings it back.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from bayesnet.config import require
from bayesnet.data import ImageData
from bayesnet.data.python_data import from_python, loader_batch_size
from bayesnet.errors import DataError, InterruptedRunError, StorageError
from bayesnet.fitted_classifier import FittedClassifier
from bayesnet.inference.base import GuideFactory
from bayesnet.optim import OptimizerFactory
from bayesnet.rundir import RunDirectory, find_run
from bayesnet.settings import Settings
from bayesnet.types import JsonObject
from bayesnet.workflows import TrainListener, calibrate
from bayesnet.workflows.python_side import (
    checked_path,
    fit_settings,
    held_out_digest,
    is_new,
    loaded_arguments,
    model_of,
)
from bayesnet.workflows.trained import (
    UserCode,
)
from bayesnet.workflows.training_run import resume_run, start_run


class BayesNetClassifier(FittedClassifier):
    """An image classifier whose probabilities come with intervals, with scikit-learn's habits.

    Args:
        family: Posterior family; "deterministic" trains the twin alone. It does not matter where ``guide`` is given.
        backbone: Name of a feature extractor, or any module from images (N, C, H, W) to features (N, D); it is copied.
        guide: A function from the head's Pyro program to a guide over its site "weight": an autoguide class such as
            ``AutoLowRankMultivariateNormal``, or ``lambda head: my_guide``.
        optimizer: A function from parameter groups to a torch optimizer, for all that is not variational.
        epochs: Passes over the training split; None takes the recipe's.
        batch_size: Images per step; None takes the recipe's, or that of a DataLoader.
        seed: Of weights, order, augmentation and posterior noise.
        devices: "auto", "cpu", "cuda:0".
        twin: Train the deterministic twin too, so that `calibrate` can compare the two.
        out: The run directory, new or empty; None keeps the run in a temporary folder until `save`.
        settings: Sections of settings that have no argument here, such as ``{"data": {"flip": True}}``.

    Attributes:
        classes_: The labels, in the order of the columns of `predict_proba`.
        run_: The run directory.
        summary_: Its summary: splits, metrics on the test split with 95 % intervals.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> digits = load_digits()
        >>> classifier = BayesNetClassifier(epochs=1, settings={"backbone": {"width": 4}}, devices="cpu")
        >>> classifier = classifier.fit((digits.images * 15).astype("uint8"), digits.target)
        >>> classifier.predict_proba((digits.images[:3] * 15).astype("uint8")).shape
        (3, 10)
    """

    def __init__(
        self,
        *,
        family: str = "mean_field",
        backbone: str | nn.Module = "small_cnn",
        guide: GuideFactory | None = None,
        optimizer: OptimizerFactory | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        devices: str = "auto",
        twin: bool = False,
        out: str | Path | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.family = family
        self.backbone = backbone
        self.guide = guide
        self.optimizer = optimizer
        self.epochs = epochs
        self.batch_size = batch_size
        self.seed = seed
        self.devices = devices
        self.twin = twin
        self.out = out
        self.settings = settings

    def fit(
        self,
        X: object,
        y: Sequence[Any] | NDArray[Any] | Tensor | None = None,
        *,
        validation: object = None,
        calibration: object = None,
        test: object = None,
        resume: bool = False,
        listener: TrainListener | None = None,
        stop_signal: Callable[[], int | None] = lambda: None,
    ) -> BayesNetClassifier:
        """Train on images and labels.

        Args:
            X: Images (N, C, H, W) or (N, H, W), uint8 or floating-point; or a map-style Dataset of (image, label), or a
                DataLoader over one; or a text such as "folder:PATH" or "digits", as the command line takes it.
            y: Labels (N,), numbers or texts; a Dataset brings its own.
            validation: A pair (X, y), Dataset or DataLoader that selects the epoch; carved from X where None.
            calibration: The same for `calibrate`.
            test: The same for the metrics in ``summary_``.
            resume: Go on with the interrupted run in ``out``; the data must be the same.
            listener: Hears of progress.
            stop_signal: Asked after each step; a number ends the fit with a committed checkpoint.

        Raises:
            BayesnetError: One of its children, for anything the caller can fix.
        """
        if y is not None and not hasattr(y, "__len__"):
            y = list(y)  # a generator can be read once only
        batch_size = loader_batch_size(X) if self.batch_size is None else self.batch_size
        settings = fit_settings(
            X,
            family=self.family,
            backbone=self.backbone,
            guide=self.guide,
            optimizer=self.optimizer,
            training={"epochs": self.epochs, "batch_size": batch_size, "seed": self.seed, "twin": self.twin},
            devices=self.devices,
            settings=self.settings,
        )
        user = self._user_code()
        data = None
        if not isinstance(X, str):
            data = from_python(X, y, validation=validation, calibration=calibration, test=test, config=settings.data)
        if resume:
            require(self.out is not None, "resume needs the run directory", where="out", hint="give out=... again")
            summary = resume_run(
                checked_path(self.out, "out"),
                data=data,
                user=user,
                settings=settings,
                devices=self.devices,
                workers=settings.data.workers,
                listener=listener,
                stop_signal=stop_signal,
            )
        else:
            out = self._temporary_folder() / "run" if self.out is None else checked_path(self.out, "out")
            summary = self._start(settings, data, user, out, listener, stop_signal)
        run = RunDirectory.open(Path(summary["run"]))
        self._take(run, *model_of(run, None, user))
        self._data, self._digest = data, held_out_digest(data)
        return self

    def _start(
        self,
        settings: Settings,
        data: ImageData | None,
        user: UserCode,
        out: Path,
        listener: TrainListener | None,
        stop_signal: Callable[[], int | None],
    ) -> JsonObject:
        """Start a run; its summary."""
        hint = "give another one, or fit(..., resume=True)"
        require(is_new(out), "the run directory is not empty", where=f"{out}", hint=hint)
        try:
            return start_run(settings, data=data, user=user, out=out, listener=listener, stop_signal=stop_signal)
        except InterruptedRunError as error:
            if self.out is not None:
                raise
            hint = "the run is gone: give out=... to keep an interrupted fit and to resume it"
            raise InterruptedRunError(error.exit_code - 128, hint=hint) from None

    def calibrate(
        self,
        alpha: float = 0.1,
        *,
        calibrator: str = "temperature",
        sets: str = "lac",
        max_risk: float | None = None,
        ood: str = "photographs",
        num_corrupted: int = 200,
    ) -> JsonObject:
        """Fit calibrator, label sets and abstention on the calibration split, and use them from now on.

        Args:
            alpha: 1 - alpha is the nominal coverage of `predict_set`.
            calibrator: See `bayesnet.workflows.calibrate`; so for all that follow.
            sets: Which label sets `predict_set` gives.
            max_risk: Largest share of wrong answers that `predict_abstain` allows.
            ood: Unfamiliar images, "none" for none.
            num_corrupted: Test images that are corrupted, 0 for none.

        Returns:
            What `bayesnet calibrate` prints as JSON.

        Raises:
            ConfigError: The classifier was loaded, so its data are not at hand.
        """
        self._check_fitted()
        data: ImageData | None = getattr(self, "_data", None)
        gone = data is None and self._python_data
        require(not gone, "the data were given to fit and are gone", where=f"{self.run_}", hint="fit again")
        if data is not None and held_out_digest(data) != self._digest:
            raise DataError("the data have changed since fit", where="calibration or test", hint="give fit a copy")
        user = self._user_code()
        record = calibrate(
            self.run_,
            alpha=alpha,
            calibrator=calibrator,
            sets=sets,
            max_risk=max_risk,
            ood=ood,
            num_corrupted=num_corrupted,
            devices=self.devices,
            data=data,
            user=user,
        )
        run = RunDirectory.open(self.run_)
        self._take(run, *model_of(run, self._model_name, user))
        return record

    def save(self, path: str | Path) -> Path:
        """Copy the run directory, for `load` and for the command line.

        Args:
            path: New or empty.

        Raises:
            StorageError: It cannot be written, or is not empty.
        """
        self._check_fitted()
        target = checked_path(path, "path")
        if not self.run_.is_dir():
            raise StorageError("the run directory is gone", where=self.run_, hint="fit again, with out=...")
        if not is_new(target):
            raise StorageError("not an empty directory", where=target, hint="choose another path")
        try:
            shutil.copytree(self.run_, target, dirs_exist_ok=True)
        except (OSError, shutil.Error) as error:
            raise StorageError("cannot copy the run", where=target, hint=str(error)) from error
        return target

    def _user_code(self) -> UserCode:
        module = self.backbone if isinstance(self.backbone, nn.Module) else None
        return UserCode(backbone=module, guide=self.guide, optimizer=self.optimizer)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickling keeps: a fitted classifier predicts again elsewhere; its training data stay behind."""
        state = dict(super().__getstate__())
        return {key: value for key, value in state.items() if key not in ("_data", "_digest")}

    def _temporary_folder(self) -> Path:
        """Return a new folder that is removed with this object."""
        folder = tempfile.mkdtemp(prefix="bayesnet-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)


def load(
    run: str | Path | None = None,
    *,
    model: str | None = None,
    backbone: nn.Module | None = None,
    guide: GuideFactory | None = None,
    devices: str = "auto",
) -> BayesNetClassifier:
    """Return the classifier of a run, ready to predict; whoever trained it, on the command line or in Python.

    Args:
        run: A run directory; the newest finished one under ./runs by default.
        model: "deterministic" or "bayesian"; the Bayesian one by default where there is one.
        backbone: The module that it was trained with, where that was the caller's own.
        guide: The guide that it was trained with, where that was the caller's own.
        devices: "auto", "cpu", "cuda:0".

    Raises:
        CheckpointError: The run is missing, damaged, or needs code that was not given.
        DeviceError: The device does not exist.
    """
    directory = find_run(None if run is None else checked_path(run, "run"))
    summary, found = model_of(directory, model, UserCode(backbone, guide))
    arguments = loaded_arguments(found.trained.settings)
    if backbone is not None:
        arguments["backbone"] = backbone
    classifier = BayesNetClassifier(**arguments, guide=guide, devices=devices)
    classifier._take(directory, summary, found)
    return classifier
