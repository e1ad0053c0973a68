"""Weights that load but would not be what they say: whole numbers, complex ones, NaN; and a pickled program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bayesnet.backbones import BackboneConfig, build_backbone
from bayesnet.errors import CheckpointError


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.to(torch.int32), "the weights are not floating-point numbers"),
        (lambda w: w.to(torch.complex64), "the weights are not floating-point numbers"),
        (lambda w: w * float("nan"), "the weights are not finite"),
    ],
    ids=["int32", "complex64", "NaN"],
)
def test_odd_weights_are_refused(tmp_path: Path, change: Callable[[Tensor], Tensor], text: str) -> None:
    state = build_backbone(BackboneConfig(width=4), channels=3, height=16, width=16).state_dict()
    torch.save({**state, "layers.0.weight": change(state["layers.0.weight"])}, tmp_path / "weights.pt")
    config = BackboneConfig(width=4, weights=str(tmp_path / "weights.pt"))
    with pytest.raises(CheckpointError) as caught:
        build_backbone(config, channels=3, height=16, width=16)
    assert str(caught.value).startswith(f"{text} ({tmp_path}/weights.pt): layers.0.weight")


def test_a_plain_pickle_is_refused_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.")
    config = BackboneConfig(width=4, weights=str(path))
    with pytest.raises(CheckpointError, match="not a file of weights"):  # warnings are errors in tests
        build_backbone(config, channels=3, height=16, width=16)
