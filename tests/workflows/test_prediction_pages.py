"""`predict --grid` and `--html`: they show what the record says, of any name, and say what they leave out."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bayesnet.errors import ConfigError, DataError
from bayesnet.plots import predictions as grid_plot
from bayesnet.plots.predictions import prediction_grid
from bayesnet.report import predictions as pages
from bayesnet.report.predictions import predictions_page
from bayesnet.types import JsonObject
from bayesnet.workflows import ImageClassifier, check_new, predict_images, write_grid, write_page
from tests.test_report import HOSTILE, parse


@pytest.fixture(scope="module")
def photos(calibrated_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Give image files and one that is none."""
    folder = tmp_path_factory.mktemp("pages")
    found = [Path(shutil.copy(path, folder)) for path in sorted((calibrated_run / "examples").rglob("*.png"))[:5]]
    broken = folder / "broken.png"
    broken.write_bytes(b"no image")
    return [*found, broken]


@pytest.fixture(scope="module")
def classifier(calibrated_run: Path) -> ImageClassifier:
    return ImageClassifier(calibrated_run, devices="cpu")


@pytest.fixture
def record(calibrated_run: Path, photos: list[Path]) -> JsonObject:
    return predict_images(photos, ImageClassifier(calibrated_run, devices="cpu"))


def test_the_page_says_what_the_record_says(record: JsonObject, classifier: ImageClassifier, tmp_path: Path) -> None:
    assert write_page(record, classifier, tmp_path / "page.html") == 5
    page = (tmp_path / "page.html").read_text("utf-8")
    found = parse(page)
    for row in record["predictions"]:
        assert row["path"] in found.text
        assert f"{row['entropy']:.3f}" in found.text
    assert found.text.count("broken.png") >= 1
    assert "it is no promise about the label" in found.text
    assert page.count("<img class=thumbnail") == 5
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[^\"]*", "", page).replace(str(tmp_path), ""))
    assert "default-src 'none'; img-src data:" in page


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_add_no_element(record: JsonObject, name: str) -> None:
    def named(words: str) -> str:
        copied = copy.deepcopy(record)
        copied |= {"run": words, "model": words, "skipped": [{"path": words, "reason": words}]}
        for row in copied["predictions"]:
            row |= {"path": words, "label": words, "set": [words]}
            row["classes"] = [entry | {"name": words} for entry in row["classes"]]
        return predictions_page(copied, {0: b"png"}, title=words)

    page = named(name)
    assert parse(page).seen == parse(named("benign")).seen
    page.encode("utf-8")


def test_the_grid_shows_every_image(record: JsonObject, classifier: ImageClassifier, tmp_path: Path) -> None:
    assert write_grid(record, classifier, tmp_path / "grid.png") == 5
    five = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    record["predictions"] = record["predictions"][:2]
    assert write_grid(record, classifier, tmp_path / "two.png") == 2
    two = np.asarray(Image.open(tmp_path / "two.png").convert("RGB"))
    assert five.shape[0] > two.shape[0]  # two lines of three
    assert five.shape[1] > two.shape[1]
    assert (five != 255).any(2).mean() > 0.02


def test_bars_and_intervals_are_those_of_the_record(record: JsonObject) -> None:
    """Another interval, probability or abstention changes the picture; the order of the classes does not."""
    images = np.zeros((1, 1, 8, 8), np.uint8)
    entries = [("a", 0.6, 0.4, 0.8), ("b", 0.3, 0.1, 0.5), ("c", 0.1, 0.0, 0.2)]
    classes = [dict(zip(("name", "probability", "lower", "upper"), entry, strict=True)) for entry in entries]
    row = record["predictions"][0] | {"classes": classes}
    drawn = prediction_grid(images, [row], 0.9)
    assert prediction_grid(images, [row | {"classes": row["classes"][::-1]}], 0.9) == drawn
    for change in ({"lower": 0.3}, {"upper": 0.9}, {"probability": 0.7}):
        others = [classes[0] | change, *classes[1:]]
        assert prediction_grid(images, [row | {"classes": others}], 0.9) != drawn, change
    assert prediction_grid(images, [row | {"abstain": True}], 0.9) != drawn


def test_many_images_are_cut_and_it_is_said(
    record: JsonObject, classifier: ImageClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_plot, "MAX_IMAGES", 3)
    monkeypatch.setattr(pages, "MAX_IMAGES", 3)
    assert write_grid(record, classifier, tmp_path / "grid.png") == 3
    assert write_page(record, classifier, tmp_path / "page.html") == 3
    text = parse((tmp_path / "page.html").read_text("utf-8")).text
    assert "3 of 5 images" in text
    assert "2 more images are left out here." in text


def test_what_is_refused(record: JsonObject, classifier: ImageClassifier, tmp_path: Path) -> None:
    (tmp_path / "there.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"the file exists \(.*there.png\): choose another name"):
        check_new(tmp_path / "there.png", ".png")
    with pytest.raises(ConfigError, match=r"must end in \.html \(page.txt\)"):
        check_new(Path("page.txt"), ".html")
    with pytest.raises(ConfigError, match=r"its folder does not exist \(.*no/grid.png\): make it first"):
        check_new(tmp_path / "no" / "grid.png", ".png")
    check_new(Path("grid.png"), ".png")
    for row in record["predictions"]:
        row["path"] = str(tmp_path / "gone.png")
    with pytest.raises(DataError, match="no image to draw can be read any more"):
        write_grid(record, classifier, tmp_path / "grid.png")
    assert write_page(record, classifier, tmp_path / "page.html") == 5
    with pytest.raises(ValueError, match="expected a row for each"):
        prediction_grid(np.zeros((2, 1, 8, 8), np.uint8), record["predictions"][:1], 0.9)
    with pytest.raises(ValueError, match="must be uint8"):
        prediction_grid(np.zeros((1, 2, 8, 8), np.uint8), record["predictions"][:1], 0.9)
