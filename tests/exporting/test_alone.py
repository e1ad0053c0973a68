"""What the workflow writes runs where bayesnet and Pyro are not, by the card's own code, and says what `predict` says.

The other interpreters refuse to import what the programs must not need, so that they would notice a need.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import nn

import bayesnet
from bayesnet import BayesNetClassifier, workflows
from bayesnet.errors import BayesnetError, BusyError, CheckpointError, ConfigError
from bayesnet.exporting import JSON_NAME, OUTPUTS, Program
from bayesnet.rundir import RunDirectory
from bayesnet.types import JsonObject
from bayesnet.workflows import exporting
from bayesnet.workflows.trained import UserCode

Snapshot = Callable[[Path], dict[str, str]]

BLOCK = """\
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is not to be had here")

sys.meta_path.insert(0, Blocked())
"""
DUMP = "\nnp.savez('answer.npz', **answer)\n"
LEVEL = 0.8


@pytest.fixture(scope="module")
def exported(noisy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, JsonObject]:
    """Give a calibrated run, and what exporting it as a torch program said. Do not write to it."""
    run = Path(shutil.copytree(noisy_run, tmp_path_factory.mktemp("exports") / "noisy"))
    workflows.calibrate(run, devices="cpu", num_corrupted=0, ood="none", max_risk=0.3)
    return run, workflows.export(run, format="torch", interval=LEVEL)


def photo(path: Path) -> Path:
    """Write a colour JPEG that lies on its side and is far from the model's size; return its path."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (12, 9, 3), dtype=np.uint8)).resize((400, 300))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(path, exif=exif)
    return path


def run_card(folder: Path, form: str, image: Path, *, without: tuple[str, ...]) -> tuple[dict[str, NDArray[Any]], str]:
    """Run the blocks of a card for one program in an interpreter without some packages; return answer and output."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    own = {"torch": "torch.export.load", "onnx": "onnxruntime.InferenceSession"}
    others = [text for name, text in own.items() if name != form]
    code = "\n".join(block for block in blocks if not any(text in block for text in others))
    assert own[form] in code
    code = code.replace('"photo.png"', repr(str(image)))
    done = subprocess.run(
        [sys.executable, "-I", "-c", BLOCK.format(names=without) + code + DUMP],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "answer.npz") as answer:
        return dict(answer), done.stdout


def check_answer(answer: dict[str, NDArray[Any]], printed: str, run: Path, image: Path) -> None:
    """Assert that a program's answer on a file is that of `predict`."""
    [row] = bayesnet.predict([image], run=run, interval=LEVEL, devices="cpu")["predictions"]
    expected = {
        "mean": [[entry["probability"] for entry in row["classes"]]],
        "lower": [[entry["lower"] for entry in row["classes"]]],
        "upper": [[entry["upper"] for entry in row["classes"]]],
        "entropy": [row["entropy"]],
        "mutual_information": [row["mutual_information"]],
    }
    for name in OUTPUTS:
        np.testing.assert_allclose(answer[name], expected[name], rtol=0, atol=1e-5)
    first, second = printed.splitlines()
    assert first.split()[0] == row["label"]
    assert float(second.split()[0]) == pytest.approx(row["entropy"], abs=1e-5)


def test_the_torch_program_runs_alone(exported: tuple[Path, JsonObject], tmp_path: Path) -> None:
    run, _ = exported
    folder, image = Path(shutil.copytree(run / "export", tmp_path / "given")), photo(tmp_path / "a.jpg")
    answer, printed = run_card(folder, "torch", image, without=("bayesnet", "pyro"))
    check_answer(answer, printed, run, image)
    with pytest.raises(AssertionError, match="torch is not to be had here"):
        run_card(folder, "torch", image, without=("torch",))  # the block does block


@pytest.mark.extra
def test_the_onnx_program_runs_without_torch(exported: tuple[Path, JsonObject], tmp_path: Path) -> None:
    run, _ = exported
    record = workflows.export(run, interval=LEVEL, out=tmp_path / "given")
    image = photo(tmp_path / "a.jpg")
    answer, printed = run_card(tmp_path / "given", "onnx", image, without=("bayesnet", "pyro", "torch"))
    check_answer(answer, printed, run, image)
    assert record["files"] == {form: str(tmp_path / "given" / f"model.{end}") for form, end in ENDS.items()}
    assert 0 < max(record["max_differences"].values()) == record["max_difference"] <= 1e-4
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "given" / "model.onnx")
    assert [(each.name, each.shape, each.type) for each in session.get_inputs()] == [
        ("images", ["N", 1, 8, 8], "tensor(uint8)")
    ]
    assert [each.name for each in session.get_outputs()] == list(OUTPUTS)
    assert json.loads(session.get_modelmeta().custom_metadata_map["bayesnet"])["classes"] == list("0123456789")


ENDS = {"torch": "pt2", "onnx": "onnx"}


def test_what_is_said_and_kept(exported: tuple[Path, JsonObject]) -> None:
    run, record = exported
    assert record["verified"] == {"num_images": 64, "source": "of the test split", "batch_sizes": [1, 2, 64]}
    assert record["input"] == {"name": "images", "shape": ["N", 1, 8, 8], "dtype": "uint8"}
    assert record["interval"] == {"level": LEVEL, "kind": "equal-tailed, contains mean", "samples": 256}
    assert record["files"] == {"torch": str(run / "export" / "model.pt2"), "onnx": None}
    kept = json.loads((run / "export" / JSON_NAME).read_text())
    calibration = json.loads((run / "calibration.json").read_text())["models"]["bayesian"]
    for key in ("calibrator", "threshold", "abstention_threshold", "digest"):
        assert kept[key] == calibration[key]
    assert kept["calibrator"]["name"] == "temperature"
    assert kept["abstention_threshold"]["max_risk"] == 0.3
    assert kept["metrics"]["after"]["nll"] == calibration["after"]["nll"]
    assert kept["preprocessing"]["height"] == 8
    extra = {"bayesnet.json": ""}
    torch.export.load(run / "export" / "model.pt2", extra_files=extra)
    assert json.loads(extra["bayesnet.json"])["classes"] == kept["classes"] == list("0123456789")


@pytest.mark.parametrize("form", ["torch", pytest.param("onnx", marks=pytest.mark.extra)])
def test_no_file_says_where_it_was_made(exported: tuple[Path, JsonObject], tmp_path: Path, form: str) -> None:
    """Neither the place of the library, nor of the run or its data, nor lines of source code."""
    run, _ = exported
    folder = tmp_path / "given"
    workflows.export(run, format="both" if form == "onnx" else form, out=folder)
    assert (folder / f"model.{ENDS[form]}").exists()
    texts = {path.name: path.read_bytes() for path in folder.iterdir()}
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        texts |= {name: archive.read(name) for name in archive.namelist()}
    secrets = [
        str(Path(bayesnet.__file__).parent),
        str(run.parent),
        str(Path(torch.__file__).parent),
        "def forward(self",
    ]
    assert [(name, text) for name, data in texts.items() for text in secrets if text.encode() in data] == []


def test_the_twin_is_exported_too_and_replaces_what_was_there(noisy_copy: Path) -> None:
    first = workflows.export(noisy_copy, format="torch", samples=16)
    second = workflows.export(noisy_copy, format="torch", model="deterministic")
    assert (first["family"], first["interval"]["samples"], first["calibrated"]) == ("mean_field", 16, False)
    assert (second["family"], second["interval"]["kind"]) == ("deterministic", "range of 1 draw")
    assert json.loads((noisy_copy / "export" / JSON_NAME).read_text())["model"] == "deterministic"
    assert "none: the run was not calibrated" in (noisy_copy / "export" / "README.md").read_text()


def test_a_program_that_differs_is_given_to_nobody(
    noisy_copy: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(Program):
        """A program whose mutual information is off by 0.001 for the third image and those after it."""

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            found = super().forward(images)
            late_B = torch.cumsum(torch.ones_like(found["entropy"]), 0) > 2
            return found | {"mutual_information": found["mutual_information"] + 0.001 * late_B}

    workflows.export(noisy_copy, format="torch")
    before = snapshot(noisy_copy)
    monkeypatch.setattr(exporting, "Program", Wrong)
    with pytest.raises(
        BayesnetError, match=r"differs from predict by 0.001, more than 0.0001 \(model.pt2, family"
    ) as it:
        workflows.export(noisy_copy, format="torch")
    assert it.value.exit_code == 1
    assert "a steep calibrator (isotonic) makes rounding that large: calibrate with another one" in str(it.value)
    assert snapshot(noisy_copy) == before


def test_without_its_data_a_run_is_verified_on_random_pixels(noisy_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: object) -> None:
        raise bayesnet.errors.DataError("file or folder does not exist", where="/gone")

    monkeypatch.setattr(exporting, "read_data", gone)
    record = workflows.export(noisy_copy, format="torch")
    assert record["verified"]["source"] == "random pixels"
    assert record["notes"] == [
        "verified on random pixels, the test split cannot be read: file or folder does not exist (/gone)"
    ]


def test_without_the_packages_of_onnx(noisy_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError) as caught:
        workflows.export(noisy_copy, format="onnx")
    packages = "onnx, onnxscript, onnxruntime"
    expected = f"the format onnx needs what is not installed ({packages}): pip install 'bayesnet[export]'"
    assert str(caught.value) == expected
    record = workflows.export(noisy_copy)
    assert record["notes"] == [f"no onnx program: {packages} not installed; pip install 'bayesnet[export]'"]
    assert record["files"]["onnx"] is record["max_differences"]["onnx"] is None
    assert "onnxruntime" not in (noisy_copy / "export" / "README.md").read_text()


@pytest.mark.slow
def test_a_network_and_a_guide_of_ones_own(tmp_path: Path) -> None:
    """They are given again, as to `load`; the data from Python too, or random pixels stand for them."""
    import pyro.distributions as dist
    from pyro.nn import PyroModule, PyroParam

    class Guide(PyroModule):
        scale: torch.Tensor

        def __init__(self, head: Any) -> None:  # noqa: ANN401 - bayesnet.model.BayesianHead
            super().__init__()
            self.loc = nn.Parameter(torch.zeros_like(head.prior_scale))
            self.scale = PyroParam(0.2 * head.prior_scale, constraint=dist.constraints.positive)  # type: ignore[assignment]

        def forward(self, features_BD: torch.Tensor, y: torch.Tensor | None = None) -> None:
            pyro.sample("weight", dist.Normal(self.loc, self.scale).to_event(2))

    generator = torch.Generator().manual_seed(0)
    x_NCHW, y_N = torch.rand(120, 1, 8, 8, generator=generator), torch.arange(120) % 2
    x_NCHW[:, :, ::2] += y_N[:, None, None, None]
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    classifier = BayesNetClassifier(backbone=network, guide=Guide, epochs=2, devices="cpu")
    classifier.fit(x_NCHW.numpy(), y_N.numpy()).save(str(tmp_path / "own"))
    with pytest.raises(CheckpointError, match="the run's backbone is its author's own module"):
        workflows.export(tmp_path / "own", format="torch")
    record = workflows.export(tmp_path / "own", format="torch", user=UserCode(network, Guide))
    assert (record["family"], record["input"]["dtype"]) == ("guide", "float32")
    assert record["verified"]["source"] == "random pixels"
    assert "the run's data were given from Python" in record["notes"][0]
    assert "np.float32)  # your own pixels" in (tmp_path / "own" / "export" / "README.md").read_text()


def test_a_busy_run_and_a_link_out_of_it_are_refused(noisy_copy: Path, tmp_path: Path) -> None:
    with RunDirectory.open(noisy_copy).lock(), pytest.raises(BusyError):
        workflows.export(noisy_copy, format="torch")
    (noisy_copy / "export").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a link leads out of the run directory"):
        workflows.export(noisy_copy, format="torch")
