"""Backbones give (B, D) features, start alike for the same seed, and refuse what they cannot take."""

from __future__ import annotations

import pytest
import torch

from bayesnet.backbones import BACKBONES, BackboneConfig, build_backbone, num_features
from bayesnet.errors import ConfigError


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "size"), [("small_cnn", 8), ("small_cnn", 33), ("resnet18", 32), ("resnet18", 96)])
def test_features(name: str, size: int, channels: int) -> None:
    backbone = build_backbone(BackboneConfig(name=name), channels=channels, height=size, width=size).eval()
    with torch.no_grad():
        features = backbone(torch.randn(2, channels, size, size))
    assert features.shape == (2, num_features(backbone))
    assert features.isfinite().all()


@pytest.mark.parametrize("name", list(BACKBONES))
def test_same_seed_same_weights(name: str) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(build_backbone(BackboneConfig(name=name), channels=3, height=32, width=32).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_small_images_get_a_stem_that_keeps_their_pixels() -> None:
    small = build_backbone(BackboneConfig(name="resnet18"), channels=3, height=32, width=32)
    large = build_backbone(BackboneConfig(name="resnet18"), channels=3, height=224, width=224)
    assert small.get_submodule("network.conv1").stride == (1, 1)
    assert isinstance(small.get_submodule("network.maxpool"), torch.nn.Identity)
    assert large.get_submodule("network.conv1").stride == (2, 2)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_small_cnn_takes_any_size(size: int) -> None:
    backbone = build_backbone(BackboneConfig(width=4), channels=3, height=size, width=size)
    assert backbone(torch.randn(2, 3, size, size)).shape == (2, 16)


def test_width() -> None:
    assert num_features(build_backbone(BackboneConfig(width=8), channels=1, height=8, width=8)) == 32
    with pytest.raises(ConfigError, match="resnet18 has a fixed width"):
        build_backbone(BackboneConfig(name="resnet18", width=8), channels=3, height=32, width=32)
    with pytest.raises(ConfigError, match="width must be from 0 to 4096"):
        BackboneConfig(width=-1)


def test_unknown_and_impossible() -> None:
    with pytest.raises(ConfigError, match="unknown backbone \\(resnet81\\): did you mean 'resnet18'"):
        build_backbone(BackboneConfig(name="resnet81"), channels=3, height=32, width=32)
    with pytest.raises(ConfigError, match="images too small for resnet18"):
        build_backbone(BackboneConfig(name="resnet18"), channels=3, height=4, width=4)
