"""A trained model that gives no numbers: every command that asks it says so, and leaves the run as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesnet.errors import DivergedError
from bayesnet.predictive import Predictor, RawPass
from bayesnet.types import JsonObject
from bayesnet.workflows import calibrating
from bayesnet.workflows.predicting import predict

Snapshot = Callable[[Path], dict[str, str]]


@pytest.mark.parametrize("when", ["from the start", "on the test split"])
def test_nan_from_a_model_is_told_and_nothing_is_stored(
    calibrated_copy: Path, snapshot: Snapshot, folder_data: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    before, raw_pass, publish = snapshot(calibrated_copy), Predictor.raw_pass, calibrating._publish
    broken = when == "from the start"

    def passing(self: Predictor, x_BCHW: Tensor) -> RawPass:
        raw = raw_pass(self, x_BCHW)
        first_B = torch.arange(len(x_BCHW)) == 0
        return raw._replace(logits_SBK=raw.logits_SBK.masked_fill(first_B[:, None], torch.nan)) if broken else raw

    def publishing(*args: Any) -> JsonObject:  # noqa: ANN401
        nonlocal broken
        broken = True
        return publish(*args)

    monkeypatch.setattr(Predictor, "raw_pass", passing)
    monkeypatch.setattr(calibrating, "_publish", publishing)
    with pytest.raises(DivergedError, match=r"the model gives NaN for \d+ of \d+ images: look at these images"):
        calibrating.calibrate(calibrated_copy, devices="cpu", ood="none", num_corrupted=0)
    broken = True
    with pytest.raises(DivergedError, match="the model gives NaN for"):
        predict([folder_data], run=calibrated_copy, devices="cpu")
    assert snapshot(calibrated_copy) == before
