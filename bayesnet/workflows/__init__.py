"""One function per command: each composes the library and returns the object that the command prints as JSON."""

from __future__ import annotations

from bayesnet.workflows.benching import bench
from bayesnet.workflows.calibrating import calibrate
from bayesnet.workflows.checking import check_data
from bayesnet.workflows.comparing import compare
from bayesnet.workflows.environment import doctor
from bayesnet.workflows.exporting import export
from bayesnet.workflows.fitting import TrainListener
from bayesnet.workflows.listing import list_backbones, list_datasets, list_families
from bayesnet.workflows.predicting import ImageClassifier, check_any_read, predict, predict_images
from bayesnet.workflows.prediction_file import continue_predictions, predict_to_file
from bayesnet.workflows.prediction_pages import check_new, write_grid, write_page
from bayesnet.workflows.prediction_rows import row_format
from bayesnet.workflows.selftesting import SelftestListener, selftest
from bayesnet.workflows.training_run import train

__all__ = [
    "ImageClassifier",
    "SelftestListener",
    "TrainListener",
    "bench",
    "calibrate",
    "check_any_read",
    "check_data",
    "check_new",
    "compare",
    "continue_predictions",
    "doctor",
    "export",
    "list_backbones",
    "list_datasets",
    "list_families",
    "predict",
    "predict_images",
    "predict_to_file",
    "row_format",
    "selftest",
    "train",
    "write_grid",
    "write_page",
]
