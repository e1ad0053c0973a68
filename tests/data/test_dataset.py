"""The section `data`: size and statistics that are given, what they go before, and what they cannot be."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from bayesnet.config import build_section, to_mapping
from bayesnet.data import DataConfig, ImageData, Preprocessing, load_data
from bayesnet.data import examples as examples_module
from bayesnet.errors import ConfigError

MakeFolder = Callable[[Mapping[str, int]], Path]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def load(root: Path, config: DataConfig) -> ImageData:
    return load_data(dataclasses.replace(config, spec=f"folder:{root}"))


def test_statistics_that_are_given_go_before_the_preset(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder({"a": 8, "b": 8})
    monkeypatch.setattr(examples_module, "read_image", None)  # nothing is decoded: the statistics are given
    config = DataConfig(image_size=380, resize=384, mean=MEAN, std=STD)
    data = load(root, config)
    assert data.preprocessing == Preprocessing(3, 380, 380, MEAN, STD, resize=384)
    assert data.notes[-1] == (
        "Images are scaled to a short side of 384 and cropped to 380 x 380 pixels, with statistics that were given "
        "(data.resize)."
    )
    grey = load(root, DataConfig(mean=(0.5,), std=(0.25,)))
    assert grey.preprocessing == Preprocessing(1, 10, 8, (0.5,), (0.25,))
    preset = load(root, DataConfig(preset="imagenet", resize=232)).preprocessing
    assert preset == Preprocessing(3, 224, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=232)
    both = load(root, DataConfig(preset="imagenet", mean=MEAN, std=STD))
    assert both.preprocessing == Preprocessing(3, 224, 224, mean=MEAN, std=STD, resize=256)
    assert both.notes[-1].endswith("pixels, with statistics that were given (data.preset).")


def test_a_size_and_a_resize_without_statistics(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 8, "b": 8})
    data = load(root, DataConfig(image_size=8, resize=10))
    assert (data.preprocessing.shape, data.preprocessing.resize) == ((3, 8, 8), 10)
    assert data.preprocessing.std != (1.0, 1.0, 1.0)  # measured
    assert data.notes[-1] == "Images are scaled to a short side of 10 and cropped to 8 x 8 pixels (data.resize)."


DIFFER = "mean and std must both be absent, or both have 1 or 3 numbers"
TOO_SMALL = "must be 0 or at least the image size, {}, and at most 4096 (data.resize = {})"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": (0.5,)}, f"{DIFFER} (data.mean has 1, data.std 0)"),
        ({"std": (0.5,)}, f"{DIFFER} (data.mean has 0, data.std 1)"),
        ({"mean": (0.5,), "std": STD}, f"{DIFFER} (data.mean has 1, data.std 3)"),
        ({"mean": (0.5,) * 2, "std": (0.5,) * 2}, f"{DIFFER} (data.mean has 2, data.std 2)"),
        ({"mean": (0.5,), "std": (0.0,)}, "must be above 0 and finite (data.std)"),
        ({"mean": (0.5,), "std": (float("nan"),)}, "must be above 0 and finite (data.std)"),
        ({"mean": (float("inf"),), "std": (1.0,)}, "must be finite (data.mean)"),
        ({"mean": MEAN, "std": STD, "channels": 1}, "must have a number for each of 1 channels (data.mean)"),
        (
            {"mean": (0.5,), "std": (0.5,), "preset": "imagenet"},
            "must have a number for each of 3 channels (data.mean)",
        ),
        ({"resize": 256}, "needs an image size (data.resize): set data.image_size"),
        ({"resize": 223, "image_size": 224}, TOO_SMALL.format(224, 223)),
        ({"resize": 223, "preset": "imagenet"}, TOO_SMALL.format(224, 223)),
        ({"resize": 5000, "image_size": 8}, TOO_SMALL.format(8, 5000)),
        ({"resize": -1, "image_size": 8}, TOO_SMALL.format(8, -1)),
    ],
)
def test_what_cannot_be_given(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(**values)
    assert str(caught.value) == message


def test_a_configuration_file_gives_them_back() -> None:
    for config in (DataConfig(), DataConfig(image_size=8, resize=9, mean=MEAN, std=STD)):
        assert build_section(DataConfig, tomllib.loads(tomli_w.dumps(to_mapping(config))), section="data") == config
