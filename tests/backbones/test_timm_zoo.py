"""Networks of timm: built without their classifier, weights only as safetensors, one clear line where it is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bayesnet.backbones import (
    BackboneConfig,
    build_backbone,
    describe,
    expected_preprocessing,
    num_features,
    resolve,
    timm_zoo,
)
from bayesnet.backbones.base import Hollow
from bayesnet.errors import CheckpointError, ConfigError

SMALL = "timm:test_resnet"


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    timm_zoo.names.cache_clear()
    with pytest.raises(ConfigError) as caught:
        resolve("timm:resnet18")
    assert str(caught.value) == "timm is not installed (timm:NAME): pip install 'bayesnet[timm]'"
    timm_zoo.names.cache_clear()


@pytest.mark.extra
class TestWithTimm:
    """Needs the extra."""

    @pytest.fixture(autouse=True)
    def _timm(self) -> None:
        pytest.importorskip("timm")

    @pytest.mark.parametrize(("name", "channels"), [(SMALL, 3), (SMALL, 1), ("timm:mobilenetv3_small_050", 3)])
    def test_builds_and_trains(self, name: str, channels: int) -> None:
        torch.manual_seed(0)
        backbone = build_backbone(BackboneConfig(name=name), channels=channels, height=32, width=32)
        features = backbone(torch.randn(2, channels, 32, 32))
        assert features.shape == (2, num_features(backbone))
        features.square().sum().backward()
        assert all(parameter.grad is not None for parameter in backbone.parameters())

    def test_facts(self) -> None:
        facts = describe("timm:resnet18.a1_in1k")
        assert facts[2:] == (512, 11_176_512, 224, None)

    @pytest.mark.parametrize(
        ("name", "size", "resize", "mean"),
        [
            ("vit_base_patch16_224", 224, 248, 0.5),
            ("resnet18.a1_in1k", 224, 235, 0.485),
            ("vit_base_patch16_clip_224.openai", 224, 248, 0.48145466),
            ("volo_d5_512", 512, 512, 0.485),
            ("test_resnet", 160, 168, 0.5),
        ],
    )
    def test_what_weights_expect(self, name: str, size: int, resize: int, mean: float) -> None:
        timm = pytest.importorskip("timm")

        expected = expected_preprocessing(BackboneConfig(name=f"timm:{name}", weights="default"))
        assert expected is not None
        assert (expected.size, expected.resize, expected.mean[0]) == (size, resize, mean)
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        scale, crop, *_, normalize = timm.data.create_transform(**config).transforms
        if name != "volo_d5_512":  # timm puts a border around its images, to crop more than there is
            assert scale.size == resize
        assert tuple(crop.size) == (size, size)
        assert normalize.mean.tolist() == pytest.approx(expected.mean)
        assert normalize.std.tolist() == pytest.approx(expected.std)

    @pytest.mark.parametrize("name", ["test_resnet", "botnet50ts_256", "vit_base_patch16_sapiens2"])
    def test_where_nothing_is_expected(self, name: str) -> None:
        """Random weights, weights that nobody published, and those of images that are not square."""
        weights = "none" if name == "test_resnet" else "default"
        assert expected_preprocessing(BackboneConfig(name=f"timm:{name}", weights=weights)) is None

    @pytest.mark.parametrize(
        "name", ["resnet81", "hf-hub:timm/resnet18.a1_in1k", "local-dir:.", "resnet18.no_such_tag"]
    )
    def test_only_names_of_its_lists(self, name: str) -> None:
        with pytest.raises(ConfigError, match=r"unknown backbone \(timm:.*See `bayesnet list backbones 'timm:\*'`"):
            resolve(f"timm:{name}")

    def test_size_that_does_not_fit(self) -> None:
        config = BackboneConfig(name="timm:vit_tiny_patch16_224")
        with Hollow(), pytest.raises(ConfigError) as caught:
            build_backbone(config, channels=3, height=32, width=32)
        hint = "it takes 224x224 pixels, see data.image_size and data.preset"
        assert str(caught.value) == f"timm:vit_tiny_patch16_224 cannot take images of this size (32x32): {hint}"

    def test_default_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are a safetensors file of the name's own repository; the classifier in it is left out."""
        import huggingface_hub
        import timm

        state = timm.create_model("test_resnet", pretrained=False).state_dict()
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
        asked = []

        def download(repository: str, file_name: str) -> str:
            asked.append((repository, file_name))
            return str(tmp_path / file_name)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        config = BackboneConfig(name=SMALL, weights="default")
        backbone = build_backbone(config, channels=3, height=32, width=32)
        assert asked == [("timm/test_resnet.r160_in1k", "model.safetensors")]
        for name, value in backbone.get_submodule("network").state_dict().items():
            assert torch.equal(value, state[name])

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        def download(repository: str, file_name: str) -> str:
            raise OSError("no route\nto host")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        with pytest.raises(CheckpointError) as caught:
            build_backbone(BackboneConfig(name=SMALL, weights="default"), channels=3, height=32, width=32)
        where = "timm/test_resnet.r160_in1k/model.safetensors"
        assert str(caught.value) == f"cannot download the weights ({where}): no route"
