"""Fixtures that many tests share: finished runs and a folder of images, made once, and copies to damage."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from PIL import Image

SMALL = ("backbone.width=8", "training.batch_size=128")
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
IMAGES_PER_CLASS = 24
SIDE = 16

Snapshot = Callable[[Path], dict[str, str]]
Serve = Callable[[dict[str, bytes]], list[str]]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)


def _snapshot(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(root.rglob("*"))
    }


@pytest.fixture(scope="session")
def snapshot() -> Snapshot:
    """Give a function from a folder to what it holds: relative path to SHA-256, or "folder"."""
    return _snapshot


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a finished Bayesian run on the digits, three epochs of a narrow small_cnn. Do not write to it."""
    from bayesnet import workflows

    path = tmp_path_factory.mktemp("runs") / "digits"
    workflows.train(bayesian=True, epochs=3, devices="cpu", overrides=SMALL, out=path)
    before = _snapshot(path)
    yield path
    assert _snapshot(path) == before, "a test wrote to the run that all share"


@pytest.fixture(scope="session")
def calibrated_run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a calibrated copy of ``trained_run``. Do not write to it."""
    from bayesnet import workflows

    path = tmp_path_factory.mktemp("runs") / "calibrated"
    shutil.copytree(trained_run, path)
    workflows.calibrate(path, devices="cpu", num_corrupted=20)
    before = _snapshot(path)
    yield path
    assert _snapshot(path) == before, "a test wrote to the run that all share"


@pytest.fixture(scope="session")
def noisy_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a finished Bayesian run on digits under noise, which has errors enough to calibrate. Do not write to it."""
    from sklearn.datasets import load_digits

    from bayesnet import workflows

    digits, generator = load_digits(), np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("noisy")
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        pixels = np.clip(image * (255 / 16) + generator.normal(0, 60, image.shape), 0, 255).astype(np.uint8)
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / str(label) / f"{index:04d}.png")
    path = tmp_path_factory.mktemp("runs") / "noisy"
    overrides = (*SMALL, "data.channels=1", "data.image_size=8", "data.fractions=[0.4, 0.1, 0.25, 0.25]")
    workflows.train(
        config="digits/mean_field",
        data=f"folder:{folder}",
        bayesian=True,
        epochs=25,
        devices="cpu",
        overrides=overrides,
        out=path,
    )
    before = _snapshot(path)
    yield path
    assert _snapshot(path) == before, "a test wrote to the run that all share"


@pytest.fixture
def noisy_copy(noisy_run: Path, tmp_path: Path) -> Path:
    """Give a copy of ``noisy_run`` to write to."""
    return Path(shutil.copytree(noisy_run, tmp_path / "noisy"))


@pytest.fixture
def trained_copy(trained_run: Path, tmp_path: Path) -> Path:
    """Give a copy of ``trained_run`` to write to."""
    return Path(shutil.copytree(trained_run, tmp_path / "trained"))


@pytest.fixture
def calibrated_copy(calibrated_run: Path, tmp_path: Path) -> Path:
    """Give a copy of ``calibrated_run`` to damage."""
    return Path(shutil.copytree(calibrated_run, tmp_path / "calibrated"))


@pytest.fixture(scope="session")
def folder_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with 24 images of 16 x 16 pixels for each of three colours, PNG and JPEG. Do not write to it."""
    root = tmp_path_factory.mktemp("data") / "colours"
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for index in range(IMAGES_PER_CLASS):
            noise = rng.normal(0, 30, (SIDE, SIDE, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:02d}.{'jpg' if index % 2 else 'png'}")
    return root


@pytest.fixture
def folder_copy(folder_data: Path, tmp_path: Path) -> Path:
    """Give a copy of ``folder_data`` to change."""
    return Path(shutil.copytree(folder_data, tmp_path / "photos"))


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Give a function that puts files on a pretended network and returns the list of what is then asked for."""

    def start(files: dict[str, bytes]) -> list[str]:
        asked: list[str] = []

        def open_url(url: str) -> IO[bytes]:
            asked.append(url)
            if url not in files:
                raise urllib.error.URLError("Name or service not known")
            return io.BytesIO(files[url])

        from bayesnet import download

        monkeypatch.setattr(download, "_open_url", open_url)
        return asked

    return start
