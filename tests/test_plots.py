"""The reliability diagram: a PNG, the same each time, whatever the names, and without pyplot's global state."""

from __future__ import annotations

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bayesnet.plots import MAX_NAME_LENGTH, drawable, reliability_diagram

Model = tuple[NDArray[np.float64], NDArray[np.int64]]


@pytest.fixture(scope="module")
def model() -> Model:
    rng = np.random.default_rng(0)
    p = rng.dirichlet([0.3] * 4, 120)
    return p, (rng.random((120, 1)) > p.cumsum(1)).sum(1).clip(max=3)


def num_colours(png: bytes) -> int:
    return len(Image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 24) or [])


def test_equal_input_equal_bytes_in_any_thread(model: Model) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: reliability_diagram({"a": model, "b": model}), range(2))
    assert first == second
    assert first.startswith(b"\x89PNG")


def test_panels_make_the_figure_grow(model: Model) -> None:
    sizes = [Image.open(io.BytesIO(reliability_diagram({str(i): model for i in range(n)}))).size for n in (1, 2, 3)]
    assert sizes[0][0] < sizes[1][0] == sizes[2][0]
    assert sizes[0][1] == sizes[1][1] < sizes[2][1]


def test_red_points_only_where_a_bin_is_outside_its_band() -> None:
    p = np.tile([[0.55, 0.45]], (200, 1))
    labels = np.arange(200) >= 110
    right, wrong = labels.astype(np.int64), np.ones(200, np.int64)
    legend_only = np.asarray(Image.open(io.BytesIO(reliability_diagram({"m": (p, right)}))).convert("RGB"))
    alarmed = np.asarray(Image.open(io.BytesIO(reliability_diagram({"m": (p, wrong)}))).convert("RGB"))
    red = (0xD1, 0x49, 0x5B)
    assert (alarmed == red).all(2).sum() > 2 * (legend_only == red).all(2).sum() > 0


@pytest.mark.parametrize(
    "name", ["$x^{", "$x^{$", r"\frac{$", "猫 and \u202e", "a\nb\x1b[31m", "x" * 500, "", "\udce9"]
)
def test_any_name_can_be_drawn(name: str, model: Model) -> None:
    assert reliability_diagram({name: model}).startswith(b"\x89PNG")  # a glyph warning would be an error here
    assert len(drawable(name)) <= MAX_NAME_LENGTH


@pytest.mark.parametrize(("p", "labels"), [([[1.0]], [0]), ([[0.5, 0.5]], [1]), (np.eye(3), [0, 1, 2])])
def test_edge_cases(p: list[list[float]], labels: list[int]) -> None:
    assert num_colours(reliability_diagram({"m": (p, labels)})) > 10


def test_no_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        reliability_diagram({})


def test_pyplot_is_never_imported() -> None:
    code = "import sys, bayesnet.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
