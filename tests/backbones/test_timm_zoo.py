"""Networks of timm: built without their classifier, weights only as safetensors, one clear line where it is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bayesnet.backbones import BackboneConfig, build_backbone, describe, num_features, resolve, timm_zoo
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
