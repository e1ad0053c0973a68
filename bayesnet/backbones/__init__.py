"""Feature extractors: the table BACKBONES and the configuration that picks from it.

A backbone is any module that maps images (B, C, H, W) to features (B, D) and says D as ``num_features``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

from torch import Tensor, nn

from bayesnet.backbones.resnet import resnet18
from bayesnet.backbones.small_cnn import small_cnn
from bayesnet.config import require
from bayesnet.registry import Registry


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which feature extractor, and how wide.

    Attributes:
        name: A name of BACKBONES, ``torchvision:NAME`` or ``timm:NAME``; ``custom`` is a module given from Python.
        width: Channels of the first stage; 0 takes the backbone's own default.
        weights: ``none`` (random), ``default`` (the published ones, downloaded once) or the path of a file of weights,
            safetensors or a state dict that torch saved.
        freeze: Whether its weights stay as they are and batch norm uses its stored statistics: only the head is
            trained.
    """

    name: str = "small_cnn"
    width: int = 0
    weights: str = "none"
    freeze: bool = False

    def __post_init__(self) -> None:
        require(0 <= self.width <= 4096, "width must be from 0 to 4096", where="backbone.width")


class Backbone(Protocol):
    """What a module must offer to be used as a feature extractor."""

    num_features: int

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Return features (B, D) of normalised images (B, C, H, W)."""


class BackboneBuilder(Protocol):
    """A function that makes a backbone for images of one size."""

    def __call__(self, *, channels: int, height: int, width: int, base_width: int) -> nn.Module:
        """Return a module with ``num_features``; ``base_width`` is BackboneConfig.width."""


class BackboneEntry(NamedTuple):
    """A row of the table: the builder, and one line on what it is."""

    build: BackboneBuilder
    description: str


BACKBONES: Registry[BackboneEntry] = Registry(
    "backbone",
    {
        "small_cnn": BackboneEntry(small_cnn, "four 3x3 convolutions with batch norm; seconds on a CPU"),
        "resnet18": BackboneEntry(resnet18, "ResNet-18; a 3x3 stem without pooling for images up to 64 pixels"),
    },
)


def build_backbone(config: BackboneConfig, *, channels: int, height: int, width: int) -> nn.Module:
    """Return the backbone that ``config`` names, initialised from torch's current random state.

    Args:
        config: Name and width.
        channels: Image channels, 1 or 3.
        height: Image height in pixels.
        width: Image width in pixels.

    Raises:
        ConfigError: The name is unknown, or the images are too small for this backbone.

    Example:
        >>> import torch
        >>> backbone = build_backbone(BackboneConfig(), channels=1, height=8, width=8)
        >>> backbone(torch.zeros(2, 1, 8, 8)).shape[1] == num_features(backbone)
        True
    """
    entry = BACKBONES[config.name]
    return entry.build(channels=channels, height=height, width=width, base_width=config.width)


def num_features(backbone: nn.Module) -> int:
    """Return D, the number of features that the backbone gives per image."""
    return cast("Backbone", backbone).num_features
