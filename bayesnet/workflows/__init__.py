"""One function per command: each composes the library and returns the object that the command prints as JSON."""

from __future__ import annotations

from bayesnet.workflows.benching import bench
from bayesnet.workflows.calibrating import calibrate
from bayesnet.workflows.comparing import compare
from bayesnet.workflows.environment import doctor
from bayesnet.workflows.fitting import TrainListener
from bayesnet.workflows.listing import list_backbones, list_datasets, list_families
from bayesnet.workflows.predicting import ImageClassifier, predict
from bayesnet.workflows.selftesting import SelftestListener, selftest
from bayesnet.workflows.training_run import train

__all__ = [
    "ImageClassifier",
    "SelftestListener",
    "TrainListener",
    "bench",
    "calibrate",
    "compare",
    "doctor",
    "list_backbones",
    "list_datasets",
    "list_families",
    "predict",
    "selftest",
    "train",
]
