"""Every backbone of the table trains an epoch through the whole workflow; so do a zoo's networks and a frozen one.

Every data set of the table does so in tests/data/test_public.py and test_mnist5k.py, on archives made there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bayesnet import workflows
from bayesnet.backbones import BACKBONES, BackboneConfig, build_backbone
from bayesnet.checkpoint import newest_checkpoint
from bayesnet.rundir import RunDirectory

WIDE = ("inception", "small_cnn")  # those with a width of their own


def train(backbone: str, folder: Path, out: Path, *overrides: str, weights: str | None = None) -> RunDirectory:
    width = ("backbone.width=8",) if backbone in WIDE else ()
    summary = workflows.train(
        bayesian=True,
        data=f"folder:{folder}",
        backbone=backbone,
        weights=weights,
        epochs=1,
        devices="cpu",
        overrides=("training.batch_size=16", "optimizer.learning_rate=0.01", *width, *overrides),
        out=out,
    )
    assert set(summary["models"]) == {"deterministic", "bayesian"}
    return RunDirectory.open(out)


LARGE = ("resnet34", "resnet50")


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in BACKBONES),
        "torchvision:squeezenet1_1",
    ],
)
def test_every_backbone_trains_an_epoch_and_predicts(name: str, folder_data: Path, tmp_path: Path) -> None:
    size = "data.image_size=32" if name.startswith("torchvision:") else "data.image_size=8"
    run = train(name, folder_data, tmp_path / "run", size)
    rows = workflows.predict([folder_data / "red"], run=run.path, devices="cpu")["predictions"]
    assert len(rows) == 24


def test_a_frozen_backbone_keeps_the_weights_of_its_file(folder_data: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    source = build_backbone(BackboneConfig(width=8), channels=3, height=16, width=16).state_dict()
    save_file(source, tmp_path / "weights.safetensors")
    options = ("backbone.freeze=true", "data.image_size=16")
    run = train("small_cnn", folder_data, tmp_path / "run", *options, weights=str(tmp_path / "weights.safetensors"))
    for name in ("deterministic", "bayesian"):
        checkpoint = newest_checkpoint(run.model_checkpoints(name))[0]
        assert checkpoint is not None
        for name_in_file, weights in source.items():
            [kept] = [t for key, t in checkpoint.tensors.items() if key.endswith(f"backbone.{name_in_file}")]
            assert torch.equal(kept, weights), name_in_file
    # The file may go: the checkpoint holds the weights.
    (tmp_path / "weights.safetensors").unlink()
    assert workflows.predict([folder_data / "red"], run=run.path, devices="cpu")["predictions"]
