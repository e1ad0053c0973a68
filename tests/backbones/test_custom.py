"""A user's own module becomes a backbone unchanged, or is refused in one line; frozen ones stay bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bayesnet.backbones import BackboneConfig, build_backbone, custom_backbone, num_features
from bayesnet.errors import ConfigError

CUSTOM = BackboneConfig(name="custom")


def own_module() -> nn.Sequential:
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers)


class Counter(nn.Module):
    """Counts its calls in a buffer and in an attribute, whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.count = 0

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        self.count += 1
        return x_BCHW.flatten(1)


class Gives(nn.Module):
    """Gives the same for all images."""

    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result

    def forward(self, x_BCHW: Tensor) -> object:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_features_are_counted_and_nothing_changes() -> None:
    module = own_module()
    module.get_submodule("1").eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    backbone = custom_backbone(module, channels=3, height=8, width=10)
    assert torch.equal(torch.get_rng_state(), random)
    assert num_features(backbone) == 6
    assert backbone.get_submodule("network") is module
    assert [layer.training for layer in module] == [True, False, True, True, True]
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert backbone(torch.randn(5, 3, 8, 10)).shape == (5, 6)


def test_the_dry_run_leaves_no_trace() -> None:
    counter = Counter()
    assert num_features(custom_backbone(counter, channels=1, height=2, width=3)) == 6
    assert (float(counter.get_buffer("calls")), counter.count, counter.training) == (0.0, 0, True)


def test_the_callers_module_is_copied() -> None:
    module = own_module()
    backbone = build_backbone(CUSTOM, channels=3, height=8, width=8, module=module)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1)
    assert torch.equal(module.get_parameter("0.weight") + 1, backbone.get_parameter("network.0.weight"))


def test_weights_go_into_it(tmp_path: Path) -> None:
    state = own_module().state_dict()
    torch.save(state, tmp_path / "own.pt")
    config = BackboneConfig(name="custom", weights=str(tmp_path / "own.pt"))
    backbone = build_backbone(config, channels=3, height=8, width=8, module=own_module())
    loaded = backbone.get_submodule("network").state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("result", "given"),
    [
        (torch.zeros(2, 6, 4, 4), "(2, 6, 4, 4), float32 .*: end it with nn.AdaptiveAvgPool2d"),
        (torch.zeros(2), "(2,), float32"),
        (torch.zeros(1, 6), "(1, 6), float32"),
        (torch.zeros(2, 0), "(2, 0), float32"),
        (torch.zeros(2, 6, dtype=torch.int64), "(2, 6), int64"),
        ([torch.zeros(2, 6)], "list (for images (2, 3, 8, 8)): return one tensor"),
    ],
)
def test_what_is_no_features(result: object, given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        custom_backbone(Gives(result), channels=3, height=8, width=8)
    start, _, end = given.partition(" .*")
    assert str(caught.value).startswith(f"the backbone must give features of shape (B, D), it gave {start}")
    assert end in str(caught.value)


def test_a_module_that_fails() -> None:
    with pytest.raises(ConfigError) as caught:
        custom_backbone(Gives(ValueError("no\nsuch size")), channels=3, height=8, width=8)
    expected = "the backbone fails on images of this shape ((2, 3, 8, 8)): ValueError: no"
    assert str(caught.value) == expected


def test_what_is_no_module() -> None:
    with pytest.raises(ConfigError, match=r"the backbone must be a torch.nn.Module \(str\)"):
        custom_backbone("resnet18", channels=3, height=8, width=8)  # type: ignore[arg-type]
    stuck = own_module()
    stuck.cache = torch.ones(2, requires_grad=True) * 2  # part of a graph
    with pytest.raises(ConfigError, match=r"the backbone cannot be copied \(Sequential\): RuntimeError"):
        build_backbone(CUSTOM, channels=3, height=8, width=8, module=stuck)


def test_names_and_modules_go_together() -> None:
    with pytest.raises(ConfigError) as caught:
        build_backbone(CUSTOM, channels=3, height=8, width=8)
    hint = "give it: bayesnet.load(run, backbone=...)"
    assert str(caught.value) == f"the backbone is the caller's own module (backbone.name = custom): {hint}"
    with pytest.raises(
        ConfigError, match=r"a module was given beside a backbone's name \(small_cnn\): set backbone.name"
    ):
        build_backbone(BackboneConfig(), channels=3, height=8, width=8, module=own_module())
    with pytest.raises(ConfigError, match="width is not for modules of your own"):
        build_backbone(BackboneConfig(name="custom", width=4), channels=3, height=8, width=8, module=own_module())
    config = BackboneConfig(name="custom", weights="default")
    with pytest.raises(ConfigError, match="custom has no published weights"):
        build_backbone(config, channels=3, height=8, width=8, module=own_module())


@pytest.mark.parametrize(("name", "freeze"), [("small_cnn", True), ("resnet18", True), ("small_cnn", False)])
def test_frozen(name: str, freeze: bool) -> None:
    """Not one bit of a frozen backbone moves while the head does; without freezing both do."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name, freeze=freeze), channels=3, height=8, width=8)
    head = nn.Linear(num_features(backbone), 3)
    model = nn.Sequential(backbone, head).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    loss = nn.functional.cross_entropy(model(torch.randn(6, 3, 8, 8)), torch.tensor([0, 1, 2] * 2))
    loss.backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {"1.weight", "1.bias"} <= moved
    assert any(key.startswith("0.") for key in moved) == (not freeze)
    assert (moved == {"1.weight", "1.bias"}) == freeze
    assert backbone.training
    assert any(layer.training for layer in list(backbone.modules())[1:]) == (not freeze)
