"""What a fit knows of itself: settings in range, progress that survives JSON, and what it ends with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bayesnet.errors import CheckpointError, ConfigError, DivergedError
from bayesnet.progress import EpochReport, Progress, TrainingConfig
from bayesnet.strict_json import json_ready

REPORTS = [
    EpochReport(1, 10, 1.5, 30.0, 0.3, 1.25, 0.05, 0.06, 2.0),
    EpochReport(2, 20, 1.0, 31.0, 0.31, math.nan, 0.01, None, 4.0),
]


def progress() -> Progress:
    return Progress(
        epoch=2,
        batch=3,
        step=23,
        nll_sum=0.5,
        kl=31.0,
        seconds=4.5,
        best_epoch=1,
        best_step=10,
        best_nll=1.25,
        initial_scale=0.06,
        reports=list(REPORTS),
    )


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("epochs", 0, "must be at least 1 (training.epochs = 0)"),
        ("batch_size", 1, "must be at least 2 (training.batch_size = 1)"),
        ("seed", -1, "must be from 0 to 2^31 - 1 (training.seed = -1)"),
        ("seed", 2**31, "must be from 0 to 2^31 - 1 (training.seed = 2147483648)"),
        ("kl_warmup_epochs", -0.5, "must not be negative (training.kl_warmup_epochs = "),
        ("kl_warmup_epochs", math.nan, "must not be negative (training.kl_warmup_epochs = "),
        ("kl_warmup_epochs", math.inf, "must not be negative (training.kl_warmup_epochs = "),
    ],
)
def test_settings_out_of_range(key: str, value: float, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**{key: value})  # type: ignore[arg-type]
    assert str(caught.value).startswith(what)


def test_progress_survives_json() -> None:
    written = json_ready(progress().to_json())
    back = Progress.from_json(json.loads(json.dumps(written)))
    assert back.reports[0] == REPORTS[0]
    assert vars(back) | {"reports": []} == vars(progress()) | {"reports": []}
    assert json_ready(back.to_json()) == written  # NaN has become null on the way, and stays it


def test_a_fresh_progress_survives_json() -> None:
    text = json.dumps(Progress().to_json(), allow_nan=False)
    assert Progress.from_json(json.loads(text)) == Progress()


@pytest.mark.parametrize(
    "change",
    [{"epochs": 3}, {"reports": [[1, 2]]}, {"reports": 3}, {"best_nll": "low"}, {"best_nll": [1]}],
)
def test_malformed_progress_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="malformed progress in the checkpoint"):
        Progress.from_json({**progress().to_json(), **change})


def test_absent_progress_is_refused() -> None:
    with pytest.raises(CheckpointError, match="malformed progress in the checkpoint"):
        Progress.from_json({})


def test_the_result_names_the_best_checkpoint() -> None:
    result = progress().result(Path("checkpoints"), "best")
    assert result.chosen == Path("checkpoints") / "step-00000010"
    assert (result.epoch, result.report) == (1, REPORTS[0])
    assert result.initial_scale == 0.06
    assert result.reports == tuple(REPORTS)


def test_without_a_best_epoch_there_is_no_result() -> None:
    with pytest.raises(DivergedError) as caught:
        Progress().result(Path("checkpoints"), "last")
    assert str(caught.value) == "no epoch had a finite validation loss (checkpoints)"
