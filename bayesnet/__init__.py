"""Image classifiers that know what they do not know: a CNN with a Bayesian head, beside its deterministic twin.

Importing the package loads no torch: public names are resolved when they are first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bayesnet.estimator import BayesNetClassifier as BayesNetClassifier
    from bayesnet.estimator import load as load
    from bayesnet.inference import FAMILIES as FAMILIES
    from bayesnet.model import BayesianClassifier as BayesianClassifier
    from bayesnet.workflows import ImageClassifier as ImageClassifier
    from bayesnet.workflows import bench as bench
    from bayesnet.workflows import calibrate as calibrate
    from bayesnet.workflows import compare as compare
    from bayesnet.workflows import doctor as doctor
    from bayesnet.workflows import export as export
    from bayesnet.workflows import predict as predict
    from bayesnet.workflows import selftest as selftest
    from bayesnet.workflows import train as train

__version__ = "0.1.0"

_HOMES = {
    "FAMILIES": "bayesnet.inference",
    "BayesNetClassifier": "bayesnet.estimator",
    "BayesianClassifier": "bayesnet.model",
    "ImageClassifier": "bayesnet.workflows",
    "bench": "bayesnet.workflows",
    "calibrate": "bayesnet.workflows",
    "compare": "bayesnet.workflows",
    "doctor": "bayesnet.workflows",
    "export": "bayesnet.workflows",
    "load": "bayesnet.estimator",
    "predict": "bayesnet.workflows",
    "selftest": "bayesnet.workflows",
    "train": "bayesnet.workflows",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    """Return a public name, importing its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
