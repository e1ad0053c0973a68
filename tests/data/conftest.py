"""Fixtures: folders of small images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeFolder = Callable[[Mapping[str, int]], Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Return a function that fills a folder: 'train/cat' -> 3 makes three 10 x 8 PNG files there."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    root.mkdir()

    def make(counts: Mapping[str, int]) -> Path:
        for name, count in counts.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (10, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / name / f"{index}.png")
        return root

    return make
