"""The table of data sets, its configuration, and the built-in digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bayesnet.config import build_section, to_mapping
from bayesnet.data import DATASETS, DataConfig, Preprocessing, load_data
from bayesnet.errors import ConfigError


def test_digits() -> None:
    data = load_data(DataConfig())
    parts = (data.train, data.validation, data.calibration, data.test)
    assert (data.name, data.spec, data.classes, data.notes) == ("digits", "digits", tuple("0123456789"), ())
    assert sum(map(len, parts)) == 1797
    for part, share in zip(parts, (0.6, 0.1, 0.1, 0.2), strict=True):
        assert abs(len(part) - share * 1797) < 5
        assert part.labels_N.unique().tolist() == list(range(10))
        assert part.read(range(len(part))).shape == (len(part), 1, 8, 8)
    pixels = torch.cat([part.read(range(len(part))) for part in parts])
    assert pixels.unique().tolist() == [round(value * 255 / 16) for value in range(17)]
    assert len(pixels.flatten(1).unique(dim=0)) == 1797  # no image is in two splits
    assert data.preprocessing.shape == (1, 8, 8)
    assert data.test.name(3) == "digit 16"
    normal = data.preprocessing.normalize(data.train.read(range(len(data.train))))
    assert abs(normal.mean().item()) < 1e-5
    assert normal.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_digits_fingerprint_is_frozen() -> None:
    assert load_data(DataConfig()).fingerprint[:16] == "7e7216f24494503e"
    assert load_data(DataConfig(crop_padding=1, flip=True, channels=3)).fingerprint[:16] == "7e7216f24494503e"
    assert load_data(DataConfig(seed=1)).fingerprint[:16] != "7e7216f24494503e"


def test_digits_in_colour_and_with_the_preprocessing_of_a_run() -> None:
    data = load_data(DataConfig(channels=3))
    x_BCHW = data.train.read([0])
    assert x_BCHW.shape == (1, 3, 8, 8)
    assert torch.equal(x_BCHW[:, 0], x_BCHW[:, 2])
    given = Preprocessing(3, 8, 8, (0.5,) * 3, (0.5,) * 3)
    again = load_data(DataConfig(), given)
    assert again.preprocessing is given
    assert again.test.read([0]).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spec": "digit"}, "unknown data set (digit): did you mean 'digits'? Known: digits, folder"),
        ({"spec": ""}, "unknown data set (): Known: digits, folder"),
        ({"spec": "folder"}, "the data set needs a path (folder): write folder:PATH"),
        ({"spec": "folder:"}, "the data set needs a path (folder:): write folder:PATH"),
        ({"spec": "digits:x"}, "the data set takes no path (digits:x): write digits"),
        ({"image_size": 16}, "digits are 8 x 8 pixels (data.image_size): leave it at 0"),
        ({"image_size": 7}, "must be 0 (automatic) or 8 to 1024 (data.image_size)"),
        ({"channels": 2}, "must be 0 (automatic), 1 or 3 (data.channels)"),
        ({"fractions": (0.5, 0.5)}, "must be four numbers of at least 0.001 that add up to 1 (data.fractions)"),
        ({"fractions": (0.7, 0.1, 0.1, 0.2)}, "must be four numbers"),
        ({"fractions": (0.8, 0.0, 0.1, 0.1)}, "must be four numbers"),
        ({"fractions": (float("nan"), 0.1, 0.1, 0.2)}, "must be four numbers"),
        ({"seed": -1}, "must not be negative (data.seed)"),
        ({"crop_padding": -1}, "must not be negative (data.crop_padding)"),
        ({"crop_padding": 8}, "must be below the image side, 8 (data.crop_padding)"),
        ({"cache_megabytes": -1}, "must not be negative (data.cache_megabytes)"),
        ({"max_pixels": 0}, "must be at least 1 (data.max_pixels)"),
    ],
)
def test_wrong_configuration_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_data(DataConfig(**values))
    assert str(caught.value).startswith(message)


def test_configuration_round_trip() -> None:
    config = DataConfig(spec="folder:/a:b", fractions=(0.4, 0.2, 0.2, 0.2), flip=True)
    assert build_section(DataConfig, to_mapping(config), section="data") == config


def test_every_data_set_is_described() -> None:
    assert list(DATASETS) == ["digits", "folder", "mnist5k", "cifar10", "cifar100", "mnist", "fashion_mnist", "svhn"]
    assert all(source.description for source in DATASETS.values())
