"""The bounds of batches, and the ranges of what training is told."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bayesnet.batches import batch_bounds
from bayesnet.errors import ConfigError
from bayesnet.progress import TrainingConfig


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"patience": -1}, "must not be negative (training.patience = -1)"),
        ({"label_smoothing": 1.0}, "must be in [0, 1) (training.label_smoothing = 1.0)"),
        ({"mixup": -0.1}, "must not be negative (training.mixup = -0.1)"),
        (
            {"accumulation": 5, "batch_size": 8},
            "must be from 1 to half of training.batch_size (training.accumulation = 5)",
        ),
        ({"clip_norm": math.inf}, "must not be negative (training.clip_norm = inf)"),
        ({"sam_rho": math.nan}, "must not be negative (training.sam_rho = nan)"),
    ],
    ids=str,
)
def test_values_out_of_range(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**values)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("num_images", "batch_size", "sizes"),
    [(1, 4, [1]), (4, 4, [4]), (5, 4, [5]), (6, 4, [4, 2]), (8, 4, [4, 4]), (3, 2, [3])],
)
def test_batch_bounds(num_images: int, batch_size: int, sizes: list[int]) -> None:
    bounds = batch_bounds(num_images, batch_size)
    assert [stop - start for start, stop in bounds] == sizes
    assert [bounds[0][0], bounds[-1][1]] == [0, num_images]
