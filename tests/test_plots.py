"""The figures: PNGs, the same each time, whatever the names, from the record alone, without pyplot's global state."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bayesnet.plots import (
    MAX_NAME_LENGTH,
    default_model,
    draw_figures,
    draw_grids,
    drawable,
    grids,
    image_grid,
    reliability_diagram,
    style,
)
from bayesnet.plots.confusion import MAX_CLASSES, confusion_matrices
from bayesnet.plots.curves import risk_coverage_curves, training_curves
from bayesnet.types import JsonObject
from tests.report_record import bare_record, report_record

FIGURES = ["reliability", "risk_coverage", "uncertainty", "severity", "training", "confusion"]
NAMES = ["<script>", "$x^{", "$x^{$", r"\frac{$", "猫 and \u202e", "a\nb\x1b[31m", "x" * 500, "", "\udce9"]
RED = (0xD1, 0x49, 0x5B)


@pytest.fixture(scope="module")
def record() -> JsonObject:
    return report_record()


@pytest.fixture(autouse=True)
def low_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "DPI", 60)  # what is drawn does not change, only the time that it takes


def opened(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def pixels(indices: Sequence[int]) -> NDArray[np.uint8]:
    return np.stack([np.full((3, 16, 16), 5 * index % 256, np.uint8) for index in indices])


def test_equal_input_equal_bytes_in_any_thread(record: JsonObject) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: draw_figures(record) | draw_grids(record, pixels), range(2))
    assert first == second
    assert [*first] == [*FIGURES, "most_uncertain", "most_epistemic", "confidently_wrong"]
    assert all(png.startswith(b"\x89PNG") for png in first.values())


def test_each_number_changes_its_own_figure_alone() -> None:
    paths = {
        ("reliability", "after", "accuracy"): "reliability",
        ("risk_coverage", "risk"): "risk_coverage",
        ("uncertainty", "epistemic", "histogram", "right"): "uncertainty",
    }
    record = report_record(models=("bayesian",), num_test=60)
    before = draw_figures(record)
    for path, figure in paths.items():
        changed = copy.deepcopy(record)
        place: Any = changed["models"]["bayesian"]
        for key in path:
            place = place[key]
        place[-1] = (place[-1] or 0) + 1
        after = draw_figures(changed)
        assert [name for name in FIGURES if before[name] != after[name]] == [figure]


@pytest.mark.parametrize("model", ["deterministic", "bayesian"])
def test_one_model_alone(model: str) -> None:
    figures = draw_figures(report_record(models=(model,), num_test=60))
    assert [*figures] == FIGURES
    assert opened(figures["reliability"]).shape[0] < 1000


def test_a_second_model_makes_the_diagram_grow(record: JsonObject) -> None:
    models = record["models"]
    one, two = (opened(reliability_diagram(each)) for each in ({"bayesian": models["bayesian"]}, models))
    assert one.shape[1] == two.shape[1]
    assert one.shape[0] < two.shape[0]


def test_missing_parts_are_left_out() -> None:
    record = bare_record()
    assert [*draw_figures(record)] == ["reliability", "risk_coverage", "uncertainty", "confusion"]
    assert grids(record) == {}
    assert draw_grids(record, pixels) == {}


def test_a_hundred_classes_have_no_heat_map() -> None:
    record = report_record(classes=[f"class {k}" for k in range(100)], models=("bayesian",))
    assert "confusion" not in draw_figures(record)
    with pytest.raises(ValueError, match="at most 30 classes; got 100"):
        confusion_matrices(record["models"], record["data"]["classes"])


@pytest.mark.parametrize("num_classes", [2, 13, MAX_CLASSES])
def test_heat_maps_of_any_size(num_classes: int) -> None:
    names = [f"{k} " + "long name" * (k % 5) for k in range(num_classes)]
    models = {name: {"confusion": [[k, k, 1] for k in range(num_classes)]} for name in ("a", "b")}
    assert opened(confusion_matrices(models, names)).shape[1] < 2000


def test_red_points_only_where_a_bin_is_outside_its_band() -> None:
    bins = {"count": [0, 200], "confidence": [None, 0.55], "low": [None, 0.5], "high": [None, 0.6]}
    shown = {}
    for accuracy in (0.55, 0.9):
        both = dict.fromkeys(("before", "after"), bins | {"accuracy": [None, accuracy]})
        metrics = {"ece": 0.05, "ece_null95": [0.01, 0.06]}
        shown[accuracy] = opened(reliability_diagram({"m": {"reliability": both, "before": metrics, "after": metrics}}))
    assert (shown[0.9] == RED).all(2).sum() > 2 * (shown[0.55] == RED).all(2).sum() > 0


def test_any_name_can_be_drawn() -> None:
    # A glyph or formula warning would be an error here.
    record = report_record(models=NAMES[:2], classes=NAMES, num_test=60)
    assert len(draw_figures(record) | draw_grids(record, pixels)) == len(FIGURES) + 3


@pytest.mark.parametrize("name", NAMES)
def test_any_model_can_be_named(name: str, record: JsonObject) -> None:
    models = {name: record["models"]["bayesian"]}
    assert training_curves(models).startswith(b"\x89PNG")
    assert risk_coverage_curves(models).startswith(b"\x89PNG")
    assert len(drawable(name)) <= MAX_NAME_LENGTH


def test_no_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        reliability_diagram({})


def test_null_numbers_are_not_drawn(record: JsonObject) -> None:
    trace = [{"epoch": 1, "loss": 1.0, "nll": None, "kl": None}]
    assert training_curves({"m": {"training": trace}}).startswith(b"\x89PNG")  # a single point has no line


def test_grids_say_what_each_image_is_and_what_it_was_taken_for(record: JsonObject) -> None:
    item = record["models"]["bayesian"]["uncertainty"]["most_epistemic"][0]
    found = grids(record)["most_epistemic"]
    assert found.indices[0] == item["index"]
    assert found.captions[0] == [
        f"is {item['label']}",
        f"said {item['predicted']}",
        f"{item['probability']:.1%}, {item['value']:.3f} nats",
    ]
    assert len(found.indices) == 12


def test_a_point_estimate_has_no_epistemic_images() -> None:
    record = report_record(models=("deterministic",))
    assert [*grids(record)] == ["most_uncertain", "confidently_wrong"]
    assert default_model(record["models"]) == "deterministic"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 100])
def test_images_of_any_size_show_their_own_colours(channels: int, side: int) -> None:
    images = np.full((7, channels, side, side), 200, np.uint8)
    images[:, 0] = 17
    png = image_grid(images, [["caption"]] * 7)
    colour = (17, 17, 17) if channels == 1 else (17, 200, 200)
    assert (opened(png) == colour).all(2).sum() > 7 * 100 * 100
    assert opened(png).shape[0] > opened(image_grid(images[:6], [["caption"]] * 6)).shape[0]


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (np.zeros((1, 3, 4, 4), np.float32), [[]], "images must be uint8 of shape (N, 1 or 3, H, W); got float32"),
        (np.zeros((1, 2, 4, 4), np.uint8), [[]], "got uint8 (1, 2, 4, 4)"),
        (np.zeros((0, 3, 4, 4), np.uint8), [], "got uint8 (0, 3, 4, 4)"),
        (np.zeros((1, 3, 4, 4), np.uint8), [], "1 images need as many captions; got 0"),
    ],
)
def test_images_that_cannot_be_shown(images: NDArray[np.uint8], captions: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        image_grid(images, captions)
    assert message in str(caught.value)


def test_pyplot_is_never_imported() -> None:
    code = "import sys, bayesnet.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
