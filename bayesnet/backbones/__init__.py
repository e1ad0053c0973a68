"""Feature extractors: the table BACKBONES, the collections ZOOS, and the configuration that picks from them.

A backbone is any module that maps images (B, C, H, W) to features (B, D) and says D as ``num_features``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, NoReturn, cast

import torch
from torch import nn

from bayesnet.backbones import timm_zoo, zoo
from bayesnet.backbones.base import Backbone, BackboneBuilder, BackboneEntry, Expected, Hollow, Zoo
from bayesnet.backbones.custom import FrozenBackbone, copy_module, custom_backbone
from bayesnet.backbones.inception import inception
from bayesnet.backbones.loading import DEFAULT, NONE, fill
from bayesnet.backbones.resnet import resnet
from bayesnet.backbones.small_cnn import small_cnn
from bayesnet.config import require
from bayesnet.errors import ConfigError
from bayesnet.registry import Registry, unknown_name

__all__ = [
    "BACKBONES",
    "CUSTOM",
    "ZOOS",
    "Backbone",
    "BackboneBuilder",
    "BackboneConfig",
    "BackboneEntry",
    "BackboneFacts",
    "Expected",
    "build_backbone",
    "custom_backbone",
    "describe",
    "expected_preprocessing",
    "num_features",
    "resolve",
]

CUSTOM = "custom"
"""The name that stands for the caller's own module."""

_LISTED_SIZE = 32
_RESNET = "with a 3x3 stem and no pooling for images up to 64 pixels"


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
        require(self.weights != "", "must be none, default or a path", where="backbone.weights")


class BackboneFacts(NamedTuple):
    """What a listing shows of a backbone.

    Attributes:
        name: Public name.
        description: One line on what it is.
        num_features: D.
        parameters: How many numbers are trained, without the head.
        input_size: Side of the images that it was published for, pixels; None for any.
        accuracy: Published top-1 accuracy on ImageNet-1k, a share; None where there is none.
    """

    name: str
    description: str
    num_features: int
    parameters: int
    input_size: int | None
    accuracy: float | None


def _residual(name: str, layers: int) -> BackboneEntry:
    return BackboneEntry(partial(resnet, name), f"ResNet-{layers}, {_RESNET}", partial(zoo.published, name))


BACKBONES: Registry[BackboneEntry] = Registry(
    "backbone",
    {
        "small_cnn": BackboneEntry(small_cnn, "four 3x3 convolutions with batch norm; seconds on a CPU"),
        "inception": BackboneEntry(inception, "two Inception blocks after GoogLeNet's stem, with batch norm"),
        "resnet18": _residual("resnet18", 18),
        "resnet34": _residual("resnet34", 34),
        "resnet50": _residual("resnet50", 50),
    },
)

ZOOS: Registry[Zoo] = Registry("collection of backbones", {zoo.PREFIX: zoo.ZOO, timm_zoo.PREFIX: timm_zoo.ZOO})


def resolve(name: str) -> BackboneEntry:
    """Return the row of a name: of the table, ``PREFIX:NAME`` of a collection, or ``custom``.

    Raises:
        ConfigError: There is no such backbone (with a suggestion), or its collection is not installed.

    Example:
        >>> resolve("inceptoin")
        Traceback (most recent call last):
        bayesnet.errors.ConfigError: unknown backbone (inceptoin): did you mean 'inception'? Known: small_cnn, ...
    """
    prefix, colon, model = name.partition(":")
    if colon and prefix in ZOOS:
        return ZOOS[prefix].entry(model)
    if name == CUSTOM:
        return BackboneEntry(_no_module, "a module of the caller's own, from Python")
    if name not in BACKBONES:
        raise unknown_name("backbone", name, [*BACKBONES, CUSTOM, *(f"{each}:NAME" for each in ZOOS)])
    return BACKBONES[name]


def build_backbone(
    config: BackboneConfig,
    *,
    channels: int,
    height: int,
    width: int,
    module: nn.Module | None = None,
    load_weights: bool = True,
) -> nn.Module:
    """Return the backbone that ``config`` names, initialised from torch's current random state, or with weights.

    Args:
        config: Name, width, weights, whether it is frozen.
        channels: Image channels, 1 or 3.
        height: Image height in pixels.
        width: Image width in pixels.
        module: What ``custom`` stands for; the backbone is a copy of it.
        load_weights: False leaves the weights random, for a checkpoint to fill: nothing is downloaded or read. The
            architecture is the one that ``config.weights`` asks for all the same.

    Raises:
        ConfigError: The name is unknown, the images do not suit this backbone, nobody published weights of it, or a
            module is missing or not asked for.
        CheckpointError: The weights cannot be had or read, or are those of another network.

    Example:
        >>> import torch
        >>> backbone = build_backbone(BackboneConfig(), channels=1, height=8, width=8)
        >>> backbone(torch.zeros(2, 1, 8, 8)).shape[1] == num_features(backbone)
        True
    """
    entry = resolve(config.name)
    original = config.weights != NONE
    if module is not None:
        hint = f"set backbone.name to {CUSTOM}"
        require(config.name == CUSTOM, "a module was given beside a backbone's name", where=config.name, hint=hint)
        require(config.width == 0, "width is not for modules of your own", where="backbone.width", hint="leave it at 0")
        backbone = custom_backbone(copy_module(module), channels=channels, height=height, width=width)
    else:
        if original and channels != 3 and entry.published() is not None:
            where, hint = f"{channels} channels", "set data.channels to 3, or backbone.weights to none"
            raise ConfigError(f"weights for {config.name} need images of 3 channels", where=where, hint=hint)
        arguments = {"channels": channels, "height": height, "width": width}
        backbone = entry.build(**arguments, base_width=config.width, original=original)
    if original and load_weights:
        fill(backbone, entry, config.weights, name=config.name)
    return FrozenBackbone(backbone) if config.freeze else backbone


def expected_preprocessing(config: BackboneConfig) -> Expected | None:
    """Return how images have to be prepared for a backbone's published weights; nothing is downloaded for it.

    It is what those who published them evaluated them with: torchvision's transforms, timm's data configuration. Where
    they scaled images with bicubic interpolation, or to a square, images are scaled bilinearly and keep their shape all
    the same.

    Args:
        config: The section ``backbone``.

    Returns:
        Size and statistics; or None where the weights are random or from a file of the caller's, or nothing is known.

    Raises:
        ConfigError: There is no such backbone, or its collection is not installed.

    Example:
        >>> expected_preprocessing(BackboneConfig(name="resnet18", weights="default"))
        Expected(size=224, resize=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        >>> expected_preprocessing(BackboneConfig(name="resnet18")) is None
        True
    """
    published = resolve(config.name).published() if config.weights == DEFAULT else None
    if published is None or published.read is None or not (published.mean and published.crop):
        return None
    return Expected(published.crop, published.resize, published.mean, published.std)


def describe(name: str) -> BackboneFacts:
    """Return what a listing shows of a backbone, for colour images of its published size; no memory for weights.

    Raises:
        ConfigError: There is no such backbone, or it is the caller's own.
    """
    entry = resolve(name)
    published = entry.published()
    size = _LISTED_SIZE if published is None else published.input_size
    build = partial(entry.build, channels=3, height=size, width=size, base_width=0, original=published is not None)
    try:
        with Hollow():
            backbone = build()
    except RuntimeError:  # where a constructor computes with its weights
        with torch.device("meta"):
            backbone = build()
    return BackboneFacts(
        name,
        entry.description,
        num_features(backbone),
        sum(parameter.numel() for parameter in backbone.parameters()),
        None if published is None else published.input_size,
        None if published is None else published.accuracy,
    )


def num_features(backbone: nn.Module) -> int:
    """Return D, the number of features that the backbone gives per image."""
    return cast("Backbone", backbone).num_features


def _no_module(*, channels: int, height: int, width: int, base_width: int, original: bool) -> NoReturn:
    """Refuse to build what only the caller has."""
    hint = "give it: bayesnet.load(run, backbone=...)"
    raise ConfigError("the backbone is the caller's own module", where=f"backbone.name = {CUSTOM}", hint=hint)
