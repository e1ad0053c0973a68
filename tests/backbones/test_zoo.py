"""Networks of torchvision: each one builds, says how many features it gives, trains, or says which size it takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

from bayesnet import weights
from bayesnet.backbones import (
    BackboneConfig,
    build_backbone,
    describe,
    expected_preprocessing,
    num_features,
    resolve,
)
from bayesnet.backbones.base import Hollow, features_shape, replace_stem
from bayesnet.backbones.zoo import classification_network, names
from bayesnet.data import DataConfig, Preprocessing
from bayesnet.data.images import read_image
from bayesnet.errors import ConfigError

SOME = {
    "resnet18": (8, 512),
    "mobilenet_v3_small": (32, 1024),
    "squeezenet1_1": (17, 512),
    "vgg11": (32, 4096),
    "densenet121": (64, 1024),
    "shufflenet_v2_x0_5": (32, 1024),
    "vit_b_16": (224, 768),
}
LARGE = {"vgg11", "vit_b_16", "densenet121"}


@pytest.mark.parametrize("name", SOME)
def test_features_and_size(name: str) -> None:
    """What the network says of itself at this size, without its arithmetic."""
    size, expected = SOME[name]
    with Hollow():
        backbone = build_backbone(BackboneConfig(name=f"torchvision:{name}"), channels=3, height=size, width=size)
    assert num_features(backbone) == expected
    assert describe(f"torchvision:{name}").num_features == expected


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly if name in LARGE else ()) for name in SOME]
)
def test_builds_and_trains(name: str) -> None:
    size, expected = SOME[name]
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=f"torchvision:{name}"), channels=3, height=size, width=size)
    assert num_features(backbone) == expected
    features = backbone(torch.randn(2, 3, size, size))
    assert features.shape == (2, expected)
    nn.functional.cross_entropy(features[:, :2], torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    assert describe(f"torchvision:{name}").parameters == sum(parameter.numel() for parameter in backbone.parameters())


def test_grey_images() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="torchvision:squeezenet1_1"), channels=1, height=32, width=32)
    assert backbone(torch.randn(2, 1, 32, 32)).shape == (2, 512)


def test_another_stem_keeps_the_scale_of_its_output() -> None:
    torch.manual_seed(0)
    colour = nn.Sequential(nn.Conv2d(3, 256, 7, bias=False))
    grey = nn.Sequential(nn.Conv2d(3, 256, 7, bias=False))
    replace_stem(grey, 1)
    spread = [net(torch.randn(8, channels, 16, 16)).std() for net, channels in ((colour, 3), (grey, 1))]
    torch.testing.assert_close(*spread, rtol=0.1, atol=0)  # one factor of sqrt(3) would be 70 % off


@pytest.mark.parametrize(
    ("name", "size", "takes"),
    [
        ("alexnet", 62, "at least 63x63 pixels"),
        ("inception_v3", 64, "at least 75x75 pixels"),
        ("vit_b_32", 32, "224x224 pixels"),
        ("vit_b_32", 256, "224x224 pixels"),
        ("maxvit_t", 64, "224x224 pixels"),
    ],
)
def test_sizes_that_do_not_fit(name: str, size: int, takes: str) -> None:
    with Hollow(), pytest.raises(ConfigError) as caught:
        build_backbone(BackboneConfig(name=f"torchvision:{name}"), channels=3, height=size, width=size)
    hint = f"it takes {takes}, see data.image_size and data.preset"
    assert str(caught.value) == f"torchvision:{name} cannot take images of this size ({size}x{size}): {hint}"


def test_the_smallest_size_is_found_without_arithmetic() -> None:
    """What the meta device accepts, the CPU accepts, and the other way round."""
    network = classification_network("squeezenet1_1", original=True)

    def runs(size: int, *, really: bool) -> bool:
        try:
            if really:
                network.eval()(torch.zeros(2, 3, size, size))
            else:
                features_shape(network, 3, size, size)
        except RuntimeError:
            return False
        return True

    found = [(runs(size, really=False), runs(size, really=True)) for size in range(14, 20)]
    assert all(meta == cpu for meta, cpu in found)
    assert {meta for meta, _ in found} == {True, False}


def test_looking_for_the_size_changes_nothing() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert features_shape(network, 3, 8, 8) == (2, 4)
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(isinstance(parameter, nn.Parameter) for parameter in network.parameters())


def test_wrong_names_and_widths() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("torchvision:resnet81")
    listing = "See `bayesnet list backbones 'torchvision:*'`"
    assert (
        str(caught.value) == f"unknown backbone (torchvision:resnet81): did you mean 'torchvision:resnet18'? {listing}"
    )
    with pytest.raises(ConfigError, match=r"torchvision:alexnet has a fixed width \(backbone.width = 8\): leave it"):
        build_backbone(BackboneConfig(name="torchvision:alexnet", width=8), channels=3, height=64, width=64)


def test_default_weights_are_asked_for_by_torchvisions_own_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pretrained(url: str, *, sha256: str, name: str) -> dict[str, torch.Tensor]:
        asked.append((url, sha256, name))
        return classification_network("squeezenet1_1", original=True).state_dict()

    monkeypatch.setattr(weights, "pretrained", pretrained)
    config = BackboneConfig(name="torchvision:squeezenet1_1", weights="default")
    build_backbone(config, channels=3, height=32, width=32)
    url = "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"
    assert asked == [(url, "b8a52dc0", "torchvision-squeezenet1_1-b8a52dc0")]


@pytest.mark.parametrize("prefix", ["", "torchvision:"])
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_the_named_networks_are_asked_for_by_all_of_the_hash(
    name: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def pretrained(url: str, *, sha256: str, name: str) -> dict[str, torch.Tensor]:
        asked.append((url, sha256))
        return {}

    monkeypatch.setattr(weights, "pretrained", pretrained)
    published = resolve(f"{prefix}{name}").published()
    assert published is not None
    assert published.read is not None
    published.read()
    [(url, sha256)] = asked
    assert len(sha256) == 64
    assert url == f"https://download.pytorch.org/models/{name}-{sha256[:8]}.pth"  # torchvision says the same of it


@pytest.mark.parametrize(
    ("name", "size", "resize"),
    [
        ("resnet18", 224, 256),
        ("resnet50", 224, 232),
        ("torchvision:resnet18", 224, 256),
        ("torchvision:mobilenet_v3_large", 224, 232),
        ("torchvision:inception_v3", 299, 342),
    ],
)
def test_images_are_prepared_as_torchvision_prepares_them(name: str, size: int, resize: int, tmp_path: Path) -> None:
    expected = expected_preprocessing(BackboneConfig(name=name, weights="default"))
    assert expected is not None
    assert (expected.size, expected.resize) == (size, resize)
    pixels = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((450, 620), Image.Resampling.BICUBIC)
    image.save(tmp_path / "image.png")
    preprocessing = Preprocessing(3, size, size, expected.mean, expected.std, resize=expected.resize)
    found = preprocessing.normalize(read_image(tmp_path / "image.png", preprocessing)[None])
    transforms = models.get_model_weights(name.removeprefix("torchvision:")).DEFAULT.transforms()
    torch.testing.assert_close(found, transforms(image)[None], rtol=0, atol=0.02)  # one step of 255 is 0.0175
    assert found.std() > 0.5  # it is no blank


@pytest.mark.parametrize(
    ("name", "size", "resize", "mean"),
    [
        ("efficientnet_b4", 380, 384, 0.485),
        ("efficientnet_v2_l", 480, 480, 0.5),
        ("vit_b_16", 224, 256, 0.485),
        ("regnet_y_400mf", 224, 232, 0.485),
    ],
)
def test_what_weights_expect(name: str, size: int, resize: int, mean: float) -> None:
    expected = expected_preprocessing(BackboneConfig(name=f"torchvision:{name}", weights="default"))
    assert expected is not None
    assert (expected.size, expected.resize, expected.mean[0], len(expected.std)) == (size, resize, mean, 3)
    assert describe(f"torchvision:{name}").input_size == size


def test_where_nothing_is_expected(tmp_path: Path) -> None:
    for name, source in [
        ("resnet18", "none"),
        ("resnet18", str(tmp_path / "w.pth")),
        ("small_cnn", "default"),
        ("custom", "default"),
    ]:
        assert expected_preprocessing(BackboneConfig(name=name, weights=source)) is None
    with pytest.raises(ConfigError, match=r"^unknown backbone \(resnet81\)"):
        expected_preprocessing(BackboneConfig(name="resnet81", weights="default"))


def test_weights_of_another_librarys_networks_come_with_its_normalisation() -> None:
    found = [classification_network("googlenet", original=original).transform_input for original in (True, False)]
    assert found == [True, False]


@pytest.mark.nightly
@pytest.mark.parametrize("name", names())
def test_every_network(name: str) -> None:
    """Its features are what its own classifier was given, and its weights have a hash and a size."""
    facts = describe(f"torchvision:{name}")
    with Hollow():
        network = classification_network(name, original=True)
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    classifier = linear[-1] if linear else convolutions[-1]
    assert classifier.weight.shape[:2] == (1000, facts.num_features)
    whole, head = (sum(parameter.numel() for parameter in part.parameters()) for part in (network, classifier))
    assert facts.parameters == whole - head
    assert facts.accuracy is not None
    assert 0.5 < facts.accuracy < 0.9
    assert facts.input_size in range(224, 601)
    expected = expected_preprocessing(BackboneConfig(name=f"torchvision:{name}", weights="default"))
    assert expected is not None
    assert (expected.size, len(expected.mean), len(expected.std)) == (facts.input_size, 3, 3)
    config = DataConfig(image_size=expected.size, resize=expected.resize, mean=expected.mean, std=expected.std)
    assert config.statistics == (expected.mean, expected.std)
