"""The model card: strangers' words stay words, code reads images as `predict` does, numbers are those of the record."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from bayesnet.data import Preprocessing
from bayesnet.data.images import read_image
from bayesnet.exporting import model_card, snippets
from bayesnet.exporting.card import METRICS, markdown

MODES = ("L", "RGB", "RGBA", "P", "LA", "1", "CMYK")
FORMATS = {"L": ("PNG", "JPEG"), "RGB": ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"), "CMYK": ("JPEG",)}
SIZES = [((8, 8), 0), ((24, 20), 0), ((32, 32), 36), ((64, 48), 80)]


def reader_of(preprocessing: Preprocessing, folder: Path) -> Callable[[Path], Any]:
    """Return the card's function, imported from a file as its reader would."""
    path = folder / "reader.py"
    path.write_text(snippets.reader(preprocessing))
    spec = importlib.util.spec_from_file_location("reader", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[Path], Any] = module.read
    return found


def preprocessing(channels: int, size: tuple[int, int], resize: int = 0, scale: float = 255.0) -> Preprocessing:
    return Preprocessing(channels, *size, (0.4,) * channels, (0.3,) * channels, resize=resize, pixel_scale=scale)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "resize"), SIZES)
def test_the_reader_of_the_card_gives_the_pixels_of_predict(
    tmp_path: Path, channels: int, size: tuple[int, int], resize: int
) -> None:
    """42 files: every mode, six formats, eight orientations, from one pixel wide to large enough to be drafted."""
    random = np.random.default_rng(0)
    expected = preprocessing(channels, size, resize)
    read = reader_of(expected, tmp_path)
    for index in range(42):
        mode = MODES[index % len(MODES)]
        height, width = random.integers(1, 600 if index % 3 == 0 else 90, 2)
        pixels = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
        image = pixels.convert("RGB").quantize(17) if mode == "P" else pixels.convert(mode)
        formats = FORMATS.get(mode, ("PNG",))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 1 + index % 8
        path = tmp_path / "image"
        image.save(path, format=formats[index // len(MODES) % len(formats)], exif=exif)
        assert torch.equal(torch.from_numpy(read(path)), read_image(path, expected)), (index, mode, height, width)


def test_the_reader_refuses_what_it_would_read_otherwise(tmp_path: Path) -> None:
    Image.frombytes("I;16", (8, 8), bytes(range(128))).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="convert it to 8 bits per channel first"):
        reader_of(preprocessing(1, (8, 8)), tmp_path)(tmp_path / "a.png")


def test_a_reader_without_its_crop_would_be_noticed(tmp_path: Path) -> None:
    """Control: scaling the whole image to the size, as is easily written, gives other pixels."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    plain = np.array(Image.open(tmp_path / "a.png").resize((20, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert not torch.equal(torch.from_numpy(plain.copy()), read_image(tmp_path / "a.png", preprocessing(3, (24, 20))))


def record(**changed: Any) -> dict[str, Any]:  # noqa: ANN401 - any entry of the record
    metrics = dict.fromkeys(METRICS, 0.25) | {"num_test": 7, "ci95": {name: [0.125, None] for name in METRICS}}
    return {
        "run": "2026-digits",
        "model": "bayesian",
        "family": "mean_field",
        "backbone": "small_cnn",
        "weights": [],
        "digest": "ab" * 32,
        "versions": {"bayesnet": "0.1.0"},
        "data": {"name": "photos", **{f"num_{split}": 7 for split in ("train", "validation", "calibration", "test")}},
        "classes": ["cat", "dog"],
        "calibrated": True,
        "calibrator": {"name": "temperature", "temperature": 1.5},
        "threshold": {"method": "lac", "alpha": 0.1, "threshold": 0.0625, "num_calibration": 7},
        "abstention_threshold": None,
        "input": {"name": "images", "shape": ["N", 1, 8, 8], "dtype": "uint8"},
        "interval": {"level": 0.9, "kind": "equal-tailed, contains mean", "samples": 256},
        "metrics": {"before": metrics, "after": metrics | {"nll": 0.0625}},
        "files": {"torch": "model.pt2", "onnx": None},
        "max_differences": {"torch": 2e-7, "onnx": None},
        "verified": {"num_images": 64, "source": "of the test split", "batch_sizes": [1, 2, 64]},
        **changed,
    }


def test_the_card_says_what_the_record_says() -> None:
    card = model_card(record(), preprocessing(1, (8, 8)))
    assert "| NLL, nats | 0.2500 [0.1250, n/a] | 0.0625 [0.1250, n/a] |" in card
    assert "2 classes, in this order: cat, dog." in card
    assert "the interval at level 0.9 (equal-tailed, contains mean)" in card
    assert "`1 - mean` at most that (about 0.0625)" in card
    assert "on a CPU): torch 2.0e-07." in card
    assert "torch.export.load" in card
    assert "onnxruntime" not in card
    assert "the licence of those weights" not in card


def test_what_there_is_not_is_not_on_the_card() -> None:
    bare = {"calibrated": False, "threshold": None, "metrics": {**record()["metrics"], "after": None}}
    card = model_card(record(**bare), preprocessing(5, (8, 8)))
    assert "none: the run was not calibrated" in card
    assert "## Decisions" not in card
    assert "after calibration" not in card
    assert "Pillow" not in card
    assert "images = np.zeros((1, *(5, 8, 8)), np.uint8)" in card
    assert "np.float32" in model_card(record(), preprocessing(1, (8, 8), scale=1.0))


def test_abstention_and_the_origin_of_weights_are_told() -> None:
    limit = {"max_risk": 0.02, "threshold": 0.75}
    card = model_card(record(abstention_threshold=limit, weights=["the published weights of resnet18"]), PLAIN)
    assert "risk of at most 0.02: rely on no answer whose largest `mean` is below" in card
    assert "(about 0.75)" in card
    assert "began from the published weights of resnet18: the licence of those weights holds too" in card
    never = model_card(record(abstention_threshold=limit | {"threshold": None}), PLAIN)
    assert "the limit could not be shown to hold" in never


PLAIN = preprocessing(1, (8, 8))
HOSTILE = ["<img src=x onerror=a()>", "[click](http://x)", "a|b\n# heading", "`code`", "**x**", "\x1b[31m", "www.x.org"]


def test_names_of_strangers_stay_words() -> None:
    card = model_card(record(classes=HOSTILE, data=record()["data"] | {"name": HOSTILE[2]}), PLAIN)
    for name in HOSTILE:
        assert name not in card
        assert markdown(name) in card
    assert card.count("\n# ") == 0
    assert "\x1b" not in card


def test_a_thousand_names_are_not_listed() -> None:
    card = model_card(record(classes=[f"class{index}" for index in range(1000)]), PLAIN)
    assert "class49 and 950 more, in model.json." in card
