"""Backbones give (B, D) features, start alike for the same seed, and refuse what they cannot take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bayesnet.backbones import BACKBONES, BackboneConfig, build_backbone, describe, num_features, resolve
from bayesnet.errors import ConfigError


def train_one_step(backbone: nn.Module, images: Tensor) -> None:
    """Train a backbone and a linear head by one step of gradient descent."""
    head = nn.Linear(num_features(backbone), 3)
    loss = nn.functional.cross_entropy(head(backbone.train()(images)), torch.arange(len(images)) % 3)
    loss.backward()
    torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1).step()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("small_cnn", 8),
        ("small_cnn", 33),
        ("inception", 8),
        ("inception", 33),
        ("resnet18", 32),
        ("resnet18", 96),
        ("resnet34", 8),
        ("resnet50", 8),
    ],
)
def test_features(name: str, size: int, channels: int) -> None:
    backbone = build_backbone(BackboneConfig(name=name), channels=channels, height=size, width=size).eval()
    with torch.no_grad():
        features = backbone(torch.randn(2, channels, size, size))
    assert features.shape == (2, num_features(backbone))
    assert features.isfinite().all()


@pytest.mark.parametrize("name", list(BACKBONES))
def test_a_step_of_training_moves_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name), channels=3, height=16, width=16)
    train_one_step(backbone, torch.randn(4, 3, 16, 16))
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in backbone.parameters())


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
    assert num_features(build_backbone(BackboneConfig(name="inception", width=8), channels=1, height=8, width=8)) == 60
    with pytest.raises(ConfigError, match=r"inception is too narrow \(backbone.width = 3\): use 4 or more"):
        build_backbone(BackboneConfig(name="inception", width=3), channels=3, height=32, width=32)
    with pytest.raises(ConfigError, match="width must be from 0 to 4096"):
        BackboneConfig(width=-1)


def test_facts() -> None:
    assert describe("small_cnn")[2:] == (128, 241_184, None, None)
    facts = describe("resnet50")
    assert facts[:5] == ("resnet50", BACKBONES["resnet50"].description, 2048, 23_508_032, 224)
    assert facts.accuracy is not None
    assert 0.75 < facts.accuracy < 0.85
    built = build_backbone(BackboneConfig(name="inception"), channels=3, height=32, width=32)
    assert describe("inception").parameters == sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_weights_of_others_keep_the_published_stem(name: str) -> None:
    """Their architecture does not depend on whether they are read now or come from a checkpoint."""
    config = BackboneConfig(name=name, weights="nowhere.safetensors")
    backbone = build_backbone(config, channels=3, height=32, width=32, load_weights=False)
    assert backbone.get_submodule("network.conv1").kernel_size == (7, 7)
    assert isinstance(backbone.get_submodule("network.maxpool"), torch.nn.MaxPool2d)
    with pytest.raises(ConfigError) as caught:
        build_backbone(config, channels=1, height=32, width=32)
    hint = "set data.channels to 3, or backbone.weights to none"
    assert str(caught.value) == f"weights for {name} need images of 3 channels (1 channels): {hint}"


def test_unknown_and_impossible() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown backbone \(vgg\): Known: small_cnn, .*custom, torchvision:NAME, timm"
    ):
        build_backbone(BackboneConfig(name="vgg"), channels=3, height=32, width=32)
    with pytest.raises(ConfigError, match="unknown backbone \\(timmy:resnet18\\)"):
        resolve("timmy:resnet18")
    with pytest.raises(ConfigError, match="unknown backbone \\(resnet81\\): did you mean 'resnet18'"):
        build_backbone(BackboneConfig(name="resnet81"), channels=3, height=32, width=32)
    with pytest.raises(ConfigError, match="images too small for resnet18"):
        build_backbone(BackboneConfig(name="resnet18"), channels=3, height=4, width=4)
