from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bayesnet.data import DataConfig, ImageData, Preprocessing, load_data
from bayesnet.data.unfamiliar import NO_CLASS, PHOTOGRAPHS, UnfamiliarSet, load_unfamiliar
from bayesnet.errors import ConfigError, DataError
from tests.data.conftest import MakeFolder

GREY = Preprocessing(1, 12, 9, mean=(0.25,), std=(0.5,))
COLOUR = Preprocessing(3, 10, 8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(DataConfig())


def write_images(folder: Path, count: int, low: int = 0, high: int = 256) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    for index in range(count):
        Image.fromarray(rng.integers(low, high, (20, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def pixels(found: UnfamiliarSet) -> Tensor:
    return found.examples.read(torch.arange(len(found.examples)))


@pytest.mark.parametrize("preprocessing", [GREY, COLOUR, dataclasses.replace(COLOUR, resize=16)])
def test_photographs_have_the_input_size(digits: ImageData, preprocessing: Preprocessing) -> None:
    found = load_unfamiliar(PHOTOGRAPHS, digits, preprocessing, max_images=7, seed=1)
    x_NCHW = pixels(found)
    assert x_NCHW.shape == (7, *preprocessing.shape)
    assert x_NCHW.dtype == torch.uint8
    assert found.name == "photographs"
    assert found.description.startswith("7 crops of scikit-learn's photographs")
    assert set(found.examples.labels_N.tolist()) == {NO_CLASS}
    assert len({image.numpy().tobytes() for image in x_NCHW}) == 7
    assert float(x_NCHW.double().std()) > 20


def test_photographs_are_a_function_of_the_seed(digits: ImageData) -> None:
    first, again, other = (pixels(load_unfamiliar(PHOTOGRAPHS, digits, GREY, max_images=4, seed=s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_photographs_larger_than_they_are(digits: ImageData) -> None:
    wide = Preprocessing(3, 30, 900, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert pixels(load_unfamiliar(PHOTOGRAPHS, digits, wide, max_images=2)).shape == (2, 3, 30, 900)


def test_a_registered_set_gets_the_size_of_the_training_images(make_folder: MakeFolder) -> None:
    data = load_data(DataConfig(spec=f"folder:{make_folder({'a': 8, 'b': 8})}"))
    found = load_unfamiliar("digits", data, COLOUR, max_images=5)
    assert pixels(found).shape == (5, 3, 10, 8)
    assert found.name == "digits"
    assert found.description == "5 test images of 1,797 handwritten digits, 8 x 8, 10 classes (built in)"


def test_a_registered_set_of_the_same_size_is_its_test_split_unchanged(
    make_folder: MakeFolder, digits: ImageData
) -> None:
    data = load_data(DataConfig(spec=f"folder:{make_folder({'a': 8, 'b': 8})}"))
    found = load_unfamiliar("digits", data, digits.preprocessing, max_images=1000)
    assert torch.equal(pixels(found), digits.test.read(torch.arange(360)))


@pytest.mark.parametrize("prefix", ["", "folder:"])
def test_a_folder_needs_no_classes(digits: ImageData, tmp_path: Path, prefix: str) -> None:
    write_images(tmp_path / "things", 3)
    write_images(tmp_path / "things" / "deep" / "er", 2)
    found = load_unfamiliar(f"{prefix}{tmp_path / 'things'}", digits, GREY)
    assert pixels(found).shape == (5, 1, 12, 9)
    assert found.name == "things"
    assert found.description == f"5 of 5 images below {tmp_path / 'things'}"


def test_some_images_of_a_folder_are_drawn_by_seed(digits: ImageData, tmp_path: Path) -> None:
    spec = str(write_images(tmp_path / "things", 12))
    chosen = [
        [found.examples.name(index) for index in range(4)]
        for found in (load_unfamiliar(spec, digits, GREY, max_images=4, seed=seed) for seed in (0, 0, 1))
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 4


def looks_bright(x_NCHW: Tensor, preprocessing: Preprocessing) -> bool:
    """Whether bright images are bright to the model: their own statistics would centre them at 0."""
    return float(preprocessing.normalize(x_NCHW).mean()) > 1


def test_images_are_normalised_as_the_training_images_and_a_planted_bug_is_caught(
    digits: ImageData, tmp_path: Path
) -> None:
    spec = str(write_images(tmp_path / "bright", 6, low=200))
    x_NCHW = pixels(load_unfamiliar(spec, digits, GREY))
    assert looks_bright(x_NCHW, GREY)
    # The bug: pixels moved to the training statistics by the set's own.
    own = x_NCHW.double() / 255
    standard = (own - own.mean()) / own.std() * GREY.std[0] + GREY.mean[0]
    planted = (standard.clamp(0, 1) * 255).round().to(torch.uint8)
    assert not looks_bright(planted, GREY)


def test_the_pixels_are_those_of_prediction(digits: ImageData, tmp_path: Path) -> None:
    from bayesnet.data.images import read_image

    folder = write_images(tmp_path / "things", 2)
    for preprocessing in (GREY, COLOUR):
        x_NCHW = pixels(load_unfamiliar(str(folder), digits, preprocessing))
        assert torch.equal(x_NCHW, torch.stack([read_image(folder / f"{i}.png", preprocessing) for i in range(2)]))


def test_the_training_set_is_refused(digits: ImageData) -> None:
    with pytest.raises(DataError) as caught:
        load_unfamiliar("digits", digits, digits.preprocessing)
    assert str(caught.value) == (
        "the unfamiliar set is the training data (digits): give images of other things, such as photographs"
    )


def test_the_training_set_under_another_name_is_refused(digits: ImageData) -> None:
    with pytest.raises(DataError, match="the unfamiliar set is the training data"):
        load_unfamiliar("digits", digits._replace(name="python"), digits.preprocessing)


@pytest.mark.parametrize("kind", ["itself", "inside", "above", "link", "copy"])
def test_the_training_folder_is_refused(make_folder: MakeFolder, tmp_path: Path, kind: str) -> None:
    root = make_folder({"a": 8, "b": 8})
    data = load_data(DataConfig(spec=f"folder:{root}"))
    if kind == "link":
        (tmp_path / "link").symlink_to(root)
    if kind == "copy":
        shutil.copytree(root, tmp_path / "elsewhere" / "copy")
    places = {
        "itself": root,
        "inside": root / "b",
        "above": tmp_path,
        "link": tmp_path / "link",
        "copy": tmp_path / "elsewhere" / "copy",
    }
    with pytest.raises(DataError, match="the unfamiliar set is the training data"):
        load_unfamiliar(str(places[kind]), data, data.preprocessing)


def test_another_folder_is_taken_beside_a_training_folder(make_folder: MakeFolder, tmp_path: Path) -> None:
    data = load_data(DataConfig(spec=f"folder:{make_folder({'a': 8, 'b': 8})}"))
    assert len(load_unfamiliar(str(write_images(tmp_path / "other", 3)), data, data.preprocessing).examples) == 3


def test_a_folder_without_images_is_refused(digits: ImageData, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match="folder has no image"):
        load_unfamiliar(str(tmp_path / "empty"), digits, GREY)
    with pytest.raises(DataError, match="file or folder does not exist"):
        load_unfamiliar(f"folder:{tmp_path / 'gone'}", digits, GREY)


def test_a_damaged_image_is_named(digits: ImageData, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "things", 2)
    (folder / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read the image \(.*bad\.png\)"):
        pixels(load_unfamiliar(str(folder), digits, GREY))


@pytest.mark.parametrize("spec", [PHOTOGRAPHS, "digits"])
def test_a_model_of_arrays_takes_no_images(spec: str, digits: ImageData) -> None:
    floats = Preprocessing(1, 8, 8, mean=(0.0,), std=(1.0,), pixel_scale=1.0)
    trained_on = digits._replace(name="python", fingerprint="")
    with pytest.raises(DataError, match="the model was trained on floating-point arrays"):
        load_unfamiliar(spec, trained_on, floats, max_images=2)


@pytest.mark.parametrize(
    ("spec", "max_images", "seed", "text"),
    [
        ("photograps", 1, 0, "unknown unfamiliar set (photograps): did you mean 'photographs'?"),
        ("folder", 1, 0, "unknown unfamiliar set (folder): did you mean 'folder'?"),
        (PHOTOGRAPHS, 0, 0, "must be at least 1 (max_images = 0)"),
        (PHOTOGRAPHS, 1, -1, "must not be negative (seed = -1)"),
    ],
)
def test_wrong_specs_are_refused(digits: ImageData, spec: str, max_images: int, seed: int, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_unfamiliar(spec, digits, GREY, max_images=max_images, seed=seed)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["corrupted", "photographs", "digits"])
def test_a_folder_called_like_another_set_keeps_a_name_of_its_own(digits: ImageData, tmp_path: Path, name: str) -> None:
    write_images(tmp_path / name, 2)
    assert load_unfamiliar(str(tmp_path / name), digits, GREY).name == f"folder:{name}"
