"""The pages of docs/ run: their Python blocks, in order, in one namespace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bayesnet
from bayesnet.errors import CheckpointError, DataError

DOCS = Path(__file__).parents[1] / "docs"


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text("utf-8"), flags=re.DOTALL)


def run_page(name: str) -> dict[str, Any]:
    """Run the page and return its namespace."""
    names: dict[str, Any] = {}
    for block in python_blocks(name):
        exec(compile(block, name, "exec"), names)
    return names


def test_the_page_on_own_code_runs_and_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for line in python_blocks("python.md")[0].splitlines() if line.strip()]
    assert len(lines) < 30
    torch.manual_seed(0)
    names = run_page("python.md")
    interval = names["interval"]
    assert interval.probability_NK.shape == (200, 2)
    assert (interval.lower_NK <= interval.probability_NK).all()
    assert (interval.probability_NK <= interval.upper_NK).all()
    original = names["classifier"].predict_proba(names["Stripes"]())
    assert np.array_equal(original, interval.probability_NK), "the loaded classifier is not the saved one"
    assert capsys.readouterr().out.startswith("accuracy ")
    left_out = json.loads((tmp_path / "stripes" / "calibration.json").read_text())["left_out"]
    whats = ["no corruptions: pixels are float32", "no unfamiliar images", "no images on the page"]
    assert [line.startswith(what) for line, what in zip(left_out, whats, strict=True)] == [True] * 3
    with pytest.raises(DataError, match="no images can be set beside the training data"):
        names["classifier"].calibrate(ood=str(DOCS))
    with pytest.raises(CheckpointError, match="backbone is its author's own module"):
        bayesnet.load("stripes", guide=names["make_guide"])
    with pytest.raises(CheckpointError, match="guide is its author's own"):
        bayesnet.load("stripes", backbone=names["network"])
    with pytest.raises(CheckpointError, match="backbone is its author's own module"):
        bayesnet.predict(["x.png"], run="stripes")
