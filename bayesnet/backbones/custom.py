"""Backbones around other modules: a user's own, and one whose weights stay as they are."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bayesnet.backbones.base import Features
from bayesnet.errors import ConfigError


class FrozenBackbone(nn.Module):
    """A backbone that is not trained: no gradients, batch norm and dropout always as in evaluation.

    Args:
        backbone: A module with ``num_features``; its parameters are marked as not to be trained.
    """

    num_features: int

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        num_features = backbone.num_features
        assert isinstance(num_features, int)
        self.num_features = num_features
        self.backbone = backbone.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Set the mode of this wrapper alone; what it holds stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return features (B, D) of images (B, C, H, W), without a graph."""
        with torch.no_grad():
            features_BD: Tensor = self.backbone(x_BCHW)
        return features_BD


def custom_backbone(module: nn.Module, *, channels: int, height: int, width: int) -> nn.Module:
    """Return a user's module as a backbone; D is found by running a copy of it on two black images.

    Args:
        module: Maps images (B, C, H, W) to features (B, D), any D, floating point. It is not copied and not changed:
            parameters, buffers and mode stay as they are.
        channels: Image channels.
        height: Image height in pixels.
        width: Image width in pixels.

    Raises:
        ConfigError: It is no module, fails on such images, or gives something else.

    Example:
        >>> own = nn.Sequential(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> custom_backbone(own, channels=1, height=8, width=8).num_features
        6
    """
    if not isinstance(module, nn.Module):
        raise ConfigError("the backbone must be a torch.nn.Module", where=type(module).__name__)
    shape = (2, channels, height, width)
    try:
        # A copy, since a module may count or cache in ways that no state dict shows.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            features = copy_module(module).eval()(torch.zeros(shape))
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's code raises
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ConfigError("the backbone fails on images of this shape", where=shape, hint=reason) from error
    if not isinstance(features, Tensor):
        given = type(features).__name__
    elif features.dim() == 2 and features.shape[0] == 2 and features.shape[1] > 0 and features.is_floating_point():
        return Features(module, features.shape[1])
    else:
        given = f"{tuple(features.shape)}, {str(features.dtype).removeprefix('torch.')}"
    hint = "end it with nn.AdaptiveAvgPool2d(1) and nn.Flatten()" if "," in given else "return one tensor"
    what = f"the backbone must give features of shape (B, D), it gave {given}"
    raise ConfigError(what, where=f"for images {shape}", hint=hint)


def copy_module(module: nn.Module) -> nn.Module:
    """Return a copy of a user's module on the CPU.

    Raises:
        ConfigError: It has parts that cannot be copied.
    """
    try:
        return copy.deepcopy(module).cpu()
    except Exception as error:  # whatever the user's attributes raise
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ConfigError("the backbone cannot be copied", where=type(module).__name__, hint=reason) from error
