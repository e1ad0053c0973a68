"""The preprocessing of a run: strict JSON, normalisation, channel statistics."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from bayesnet.data.examples import ArrayExamples
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.data.statistics import channel_statistics
from bayesnet.errors import ConfigError

RGB = Preprocessing(3, 4, 5, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), max_pixels=1000)


def test_json_round_trip() -> None:
    assert Preprocessing.from_json(json.loads(json.dumps(RGB.to_json()))) == RGB


def test_json_of_a_run_without_the_newer_keys_loads() -> None:
    mapping = RGB.to_json()
    assert (mapping.pop("resize"), mapping.pop("pixel_scale")) == (0, 255.0)
    assert Preprocessing.from_json(mapping) == RGB
    newer = dataclasses.replace(RGB, resize=6, pixel_scale=1.0)
    assert Preprocessing.from_json(json.loads(json.dumps(newer.to_json()))) == newer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 2}, "expected 2 finite numbers (preprocessing.mean)"),
        ({"channels": 0}, "must be 1 to 1024 (preprocessing.channels)"),
        ({"channels": True}, "expected int (preprocessing.channels): got True"),
        ({"height": 0}, "must be between 1 and 4096 (preprocessing.height)"),
        ({"width": 5000}, "must be between 1 and 4096 (preprocessing.width)"),
        ({"mean": [0.1]}, "expected 3 finite numbers (preprocessing.mean)"),
        ({"mean": [0.1, 0.2, math.nan]}, "expected 3 finite numbers (preprocessing.mean)"),
        ({"mean": [0.1, 0.2, 10**400]}, "number is too large (preprocessing)"),
        ({"std": [0.1, 0.2, 0.0]}, "must be above 0 (preprocessing.std)"),
        ({"std": "abc"}, "expected a list (preprocessing.std): got 'abc'"),
        ({"resize": 4}, "must be 0 or at least the height and width (preprocessing.resize)"),
        ({"resize": 4097}, "must be 0 or at least the height and width (preprocessing.resize)"),
        ({"pixel_scale": 2}, "must be 1 or 255 (preprocessing.pixel_scale)"),
        ({"max_pixels": 0}, "must be at least 1 (preprocessing.max_pixels)"),
        ({"heigth": 1}, "unknown configuration key (preprocessing.heigth): did you mean 'preprocessing.height'?"),
    ],
)
def test_wrong_json_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Preprocessing.from_json(RGB.to_json() | change)
    assert str(caught.value).startswith(message)


def test_missing_key_is_named() -> None:
    mapping = RGB.to_json()
    del mapping["std"]
    with pytest.raises(ConfigError, match=r"key is missing \(preprocessing.std\)"):
        Preprocessing.from_json(mapping)
    with pytest.raises(ConfigError, match="expected a table"):
        Preprocessing.from_json([1])


def test_normalize_is_the_formula_and_leaves_its_input() -> None:
    x_BCHW = torch.randint(256, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    before = x_BCHW.clone()
    result = RGB.normalize(x_BCHW)
    for channel in range(3):
        expected = (x_BCHW[:, channel].double() / 255 - RGB.mean[channel]) / RGB.std[channel]
        torch.testing.assert_close(result[:, channel], expected.float())
    assert result.dtype == torch.float32
    assert torch.equal(x_BCHW, before)
    # A tensor on the meta device has no values: any look at one would raise.
    assert RGB.normalize(x_BCHW.to("meta")).shape == (2, 3, 4, 5)


def test_normalize_leaves_the_scale_of_floating_point_data() -> None:
    x_BCHW = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    result = dataclasses.replace(RGB, pixel_scale=1.0).normalize(x_BCHW)
    for channel in range(3):
        torch.testing.assert_close(result[:, channel], (x_BCHW[:, channel] - RGB.mean[channel]) / RGB.std[channel])


def test_channel_statistics_match_torch() -> None:
    x_NCHW = torch.randint(256, (150, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x_NCHW[:, 2] = 7  # a constant channel
    mean, std = channel_statistics(ArrayExamples(x_NCHW, torch.zeros(150, dtype=torch.int64)))
    scaled_CP = x_NCHW.double().transpose(0, 1).flatten(1) / 255
    assert mean == pytest.approx(scaled_CP.mean(1).tolist())
    assert std == pytest.approx([*scaled_CP.std(1, correction=0).tolist()[:2], 1e-3])


def test_channel_statistics_sample_is_spread_over_the_data() -> None:
    # 100 black images, then 100 white ones: the first 10 alone would give mean 0.
    x_NCHW = torch.zeros(200, 1, 2, 2, dtype=torch.uint8)
    x_NCHW[100:] = 255
    mean, std = channel_statistics(ArrayExamples(x_NCHW, torch.zeros(200, dtype=torch.int64)), sample=10)
    assert (mean, std) == ((0.5,), (0.5,))
