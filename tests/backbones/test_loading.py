"""Weights of others: bit for bit where they fit, refused with the first difference where they do not."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from bayesnet import weights
from bayesnet.backbones import BackboneConfig, BackboneEntry, build_backbone
from bayesnet.backbones.base import Features, Published
from bayesnet.backbones.loading import fill, fill_from_state
from bayesnet.backbones.zoo import classification_network
from bayesnet.errors import CheckpointError, ConfigError

State = dict[str, Tensor]


def save_as_torch(state: State, path: Path) -> None:
    torch.save(state, path)


def save_as_safetensors(state: State, path: Path) -> None:
    safetensors.torch.save_file(state, path)


def squeezenet() -> State:
    torch.manual_seed(1)
    state: State = classification_network("squeezenet1_1", original=True).state_dict()
    return state


def built(name: str, path: Path | str) -> nn.Module:
    config = BackboneConfig(name=name, weights=str(path))
    return build_backbone(config, channels=3, height=32, width=32)


@pytest.mark.parametrize("save", [save_as_torch, save_as_safetensors])
@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet18", "torchvision:mobilenet_v3_small"])
def test_bit_equal(name: str, save: Callable[[State, Path], None], tmp_path: Path) -> None:
    """The classifier in the file is left out; counts of batches, which old files lack, are not asked for."""
    torch.manual_seed(1)
    state = classification_network(name.removeprefix("torchvision:"), original=True).state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    save(state, tmp_path / "file")
    loaded = built(name, tmp_path / "file").get_submodule("network").state_dict()
    assert {key for key in state if key not in loaded} >= {key for key in state if key.startswith("fc.")}
    compared = [key for key in loaded if key in state]
    assert len(compared) >= 100
    assert all(torch.equal(loaded[key], state[key]) for key in compared)
    assert all(key in state or key.endswith("num_batches_tracked") for key in loaded)


def test_own_networks(tmp_path: Path) -> None:
    state = build_backbone(BackboneConfig(width=4), channels=1, height=8, width=8).state_dict()
    save_as_torch(state, tmp_path / "own.pt")
    config = BackboneConfig(width=4, weights=str(tmp_path / "own.pt"))
    loaded = build_backbone(config, channels=1, height=8, width=8).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    network: nn.Module = VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=12)
    return network


def densenet() -> nn.Module:
    from torchvision.models import DenseNet

    network: nn.Module = DenseNet(growth_rate=4, block_config=(2, 1), num_init_features=4)
    return network


@pytest.mark.parametrize(
    ("build", "renamed"),
    [
        (densenet, {r"(layer\d)\.norm1": r"\1.norm.1", r"(layer\d)\.conv2": r"\1.conv.2"}),
        (transformer, {r"mlp\.0": "mlp.linear_1", r"mlp\.3": "mlp.linear_2"}),
    ],
)
def test_names_of_older_files(build: Callable[[], nn.Module], renamed: dict[str, str]) -> None:
    """DenseNet's files have dots in the names of modules, vision transformers had other names for their layers."""
    state = build().state_dict()
    older = dict(state)
    for new, old in renamed.items():
        older = {re.sub(new, old, key): value for key, value in older.items()}
    assert len(older.keys() - state.keys()) >= 4
    network = build()
    fill_from_state(network, older, where="file")
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_mnasnet_knows_its_version() -> None:
    state = classification_network("mnasnet0_5", original=True).state_dict()
    network = classification_network("mnasnet0_5", original=True)
    fill_from_state(network, dict(state), where="file")
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_wrong_shapes(tmp_path: Path) -> None:
    state = squeezenet()
    state["features.0.weight"] = torch.zeros(64, 1, 3, 3)
    save_as_safetensors(state, tmp_path / "file")
    with pytest.raises(CheckpointError) as caught:
        built("torchvision:squeezenet1_1", tmp_path / "file")
    hint = "features.0.weight has shape (64, 1, 3, 3), the backbone's has (64, 3, 3, 3)"
    assert str(caught.value) == f"the weights do not fit the backbone ({tmp_path / 'file'}): {hint}"


def test_wrong_names(tmp_path: Path) -> None:
    state = squeezenet()
    state["extra.weight"] = state.pop("features.0.weight")
    state["extra.bias"] = state.pop("features.0.bias")
    save_as_safetensors(state, tmp_path / "file")
    with pytest.raises(CheckpointError) as caught:
        built("torchvision:squeezenet1_1", tmp_path / "file")
    hint = "2 missing, first features.0.weight; 2 unexpected, first extra.bias"
    assert str(caught.value) == f"the weights do not fit the backbone ({tmp_path / 'file'}): {hint}"


def test_shapes_under_older_names() -> None:
    """A shape that shows only once the network has renamed its entries."""
    older = {re.sub(r"mlp\.0", "mlp.linear_1", key): value for key, value in transformer().state_dict().items()}
    older["encoder.layers.encoder_layer_0.mlp.linear_1.bias"] = torch.zeros(7)
    with pytest.raises(
        CheckpointError, match=r"the weights do not fit the backbone \(file\): size mismatch for .*mlp\.0"
    ):
        fill_from_state(transformer(), older, where="file")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        built("small_cnn", tmp_path / "absent.pt")


def test_wrong_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the cache with another hash than torchvision's is refused, before it is read."""
    monkeypatch.setenv("BAYESNET_CACHE", str(tmp_path))
    folder = tmp_path / "weights"
    folder.mkdir()
    file = folder / "squeezenet1_1-b8a52dc0.pth"
    save_as_torch(squeezenet(), file)
    with pytest.raises(CheckpointError) as caught:
        built("torchvision:squeezenet1_1", "default")
    assert "b8a52dc0" in str(caught.value)
    assert hashlib.sha256(file.read_bytes()).hexdigest()[:8] in str(caught.value)


@pytest.mark.parametrize("name", ["small_cnn", "inception"])
def test_nothing_published(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(name, "default")
    hint = "set backbone.weights to none, or to the path of a file"
    assert str(caught.value) == f"{name} has no published weights (backbone.weights = default): {hint}"


def test_published_without_a_file_to_read() -> None:
    def build(*, channels: int, height: int, width: int, base_width: int, original: bool) -> nn.Module:
        raise AssertionError

    entry = BackboneEntry(build, "a network", lambda: Published(None, 224, None))
    with pytest.raises(ConfigError, match="it has no published weights"):
        fill(Features(nn.Identity(), 1), entry, "default", name="it")


def test_a_checkpoint_will_fill_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> State:
        raise AssertionError("nothing is to be read")

    monkeypatch.setattr(weights, "pretrained", refuse)
    monkeypatch.setattr(weights, "read_state_dict", refuse)
    for source in ("default", "file"):
        config = BackboneConfig(name="resnet18", weights=source)
        build_backbone(config, channels=3, height=32, width=32, load_weights=False)
        with pytest.raises(AssertionError, match="nothing is to be read"):
            build_backbone(config, channels=3, height=32, width=32)


def test_empty_source() -> None:
    with pytest.raises(ConfigError, match=r"must be none, default or a path \(backbone.weights\)"):
        BackboneConfig(weights="")
