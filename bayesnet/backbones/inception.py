"""A small network of Inception blocks (Szegedy et al. 2015, arXiv:1409.4842), the first layers of GoogLeNet.

A 7x7 stride-2 convolution, max pooling, a 3x3 convolution, max pooling, two Inception blocks, global average pooling;
every convolution is followed by batch norm (which the paper did not have) and ReLU. A pooling is left out where it
would make the picture smaller than 4 pixels: from 8 pixels on a picture has at least 4 in the blocks. With the default
width the layers have the paper's sizes, and there are 480 features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesnet.errors import ConfigError

DEFAULT_WIDTH = 64
MIN_WIDTH = 4
MIN_IMAGE = 8
MIN_PICTURE = 4


def convolution(num_in: int, num_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution that keeps the picture's size (over ``stride``), batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(num_out),
        nn.ReLU(inplace=True),
    )


class InceptionBlock(nn.Module):
    """Four branches over the same picture, side by side in the channels of the result.

    Args:
        num_in: Channels of the input.
        point: Channels of the 1x1 branch.
        medium: Channels of the 3x3 branch, after its 1x1 and at its end.
        large: Channels of the 5x5 branch, likewise.
        pooled: Channels of the branch that pools first.
    """

    def __init__(self, num_in: int, point: int, medium: tuple[int, int], large: tuple[int, int], pooled: int) -> None:
        super().__init__()
        self.num_channels = point + medium[1] + large[1] + pooled
        self.point = convolution(num_in, point, 1)
        self.medium = nn.Sequential(convolution(num_in, medium[0], 1), convolution(*medium, 3))
        self.large = nn.Sequential(convolution(num_in, large[0], 1), convolution(*large, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), convolution(num_in, pooled, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the four branches' channels, the picture as large as it was."""
        branches = (self.point, self.medium, self.large, self.pooled)
        return torch.cat([branch(x_BCHW) for branch in branches], dim=1)


class Inception(nn.Module):
    """Stem, two Inception blocks, global average pooling.

    Args:
        channels: Image channels.
        size: Shorter side of the images in pixels; decides how often they are pooled.
        width: Channels of the first convolution; all others are in proportion.
    """

    def __init__(self, channels: int, size: int, width: int) -> None:
        super().__init__()
        size = -(-size // 2)
        layers: list[nn.Module] = [convolution(channels, width, 7, stride=2)]
        for next_layer in (convolution(width, 3 * width, 3), None):
            if -(-size // 2) >= MIN_PICTURE:
                layers.append(nn.MaxPool2d(3, stride=2, padding=1))
                size = -(-size // 2)
            if next_layer is not None:
                layers.append(next_layer)
        half, quarter = width // 2, width // 4
        first = InceptionBlock(3 * width, width, (3 * half, 2 * width), (quarter, half), half)
        second = InceptionBlock(first.num_channels, 2 * width, (2 * width, 3 * width), (half, 3 * half), width)
        self.layers = nn.Sequential(*layers, first, second)
        self.num_features = second.num_channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return features (B, 7.5 x width) of images (B, C, H, W)."""
        features_BDHW: Tensor = self.layers(x_BCHW)
        return features_BDHW.mean((2, 3))


def inception(*, channels: int, height: int, width: int, base_width: int, original: bool) -> nn.Module:
    """Return an Inception for images of this size.

    Raises:
        ConfigError: A width below 4 was asked for, or the images have fewer than 8 pixels.
    """
    if 0 < base_width < MIN_WIDTH:
        hint = f"use {MIN_WIDTH} or more"
        raise ConfigError("inception is too narrow", where=f"backbone.width = {base_width}", hint=hint)
    if min(height, width) < MIN_IMAGE:
        raise ConfigError("images too small for inception", where=f"{height}x{width}", hint="use small_cnn")
    return Inception(channels, min(height, width), base_width or DEFAULT_WIDTH)
