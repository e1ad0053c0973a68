"""No calibration: the probabilities as the model gives them."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from bayesnet.calibration.base import Calibrator, CalibratorFamily, check_calibration_data
from bayesnet.errors import CheckpointError
from bayesnet.types import JsonObject


class Identity(Calibrator):
    """Return every draw as it is, bit for bit."""

    name: ClassVar[str] = "identity"

    def __call__(self, log_probabilities_SBK: Tensor) -> Tensor:
        """Return the argument."""
        return log_probabilities_SBK

    def to_json(self) -> JsonObject:
        """Return the name alone."""
        return {"name": self.name}


def fit(log_probabilities_SNK: Tensor, labels_N: Tensor) -> Identity:
    """Return the identity; nothing is fitted.

    Raises:
        ValueError: The tensors are not log-probabilities and labels.
    """
    check_calibration_data(log_probabilities_SNK, labels_N)
    return Identity()


def from_json(entry: JsonObject) -> Identity:
    """Return the identity.

    Raises:
        CheckpointError: The entry has more than a name.
    """
    if set(entry) != {"name"}:
        raise CheckpointError("identity calibrator has unexpected keys", where=", ".join(sorted(map(str, entry))))
    return Identity()


FAMILY = CalibratorFamily(Identity.name, fit, from_json)
