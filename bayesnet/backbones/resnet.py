"""Residual networks (He et al. 2016, arXiv:1512.03385), torchvision's, with a stem for small images.

Up to 64 pixels the 7x7 stride-2 stem and its max pooling would discard most of the picture, so a 3x3 stride-1
convolution stands in their place, as is usual on CIFAR. torchvision is imported when a network is built, not before.
"""

from __future__ import annotations

from torch import Tensor, nn

from bayesnet.errors import ConfigError

SMALL_IMAGE = 64
DEFAULT_WIDTH = 64


class ResNetFeatures(nn.Module):
    """A torchvision ResNet without its classifier.

    Args:
        network: The residual network; its stem is replaced where the images are small.
        channels: Image channels.
        small_images: Whether to use the 3x3 stem without pooling.
    """

    def __init__(self, network: nn.Module, *, channels: int, small_images: bool) -> None:
        super().__init__()
        head = network.get_submodule("fc")
        assert isinstance(head, nn.Linear)
        self.num_features = head.in_features
        if small_images:
            network.conv1 = nn.Conv2d(channels, DEFAULT_WIDTH, 3, padding=1, bias=False)
            network.maxpool = nn.Identity()
        elif channels != 3:
            network.conv1 = nn.Conv2d(channels, DEFAULT_WIDTH, 7, stride=2, padding=3, bias=False)
        if isinstance(network.conv1, nn.Conv2d):
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.fc = nn.Identity()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return features (B, D) of images (B, C, H, W)."""
        features_BD: Tensor = self.network(x_BCHW)
        return features_BD


def resnet18(*, channels: int, height: int, width: int, base_width: int) -> nn.Module:
    """Return ResNet-18's feature extractor, 512 features, for images of this size.

    Raises:
        ConfigError: A width other than 64 was asked for, or the images have fewer than 8 pixels.
    """
    if base_width not in (0, DEFAULT_WIDTH):
        raise ConfigError("resnet18 has a fixed width", where=f"backbone.width = {base_width}", hint="leave it at 0")
    if min(height, width) < 8:
        raise ConfigError("images too small for resnet18", where=f"{height}x{width}", hint="use small_cnn")
    from torchvision.models import resnet18 as build

    network: nn.Module = build(weights=None)
    return ResNetFeatures(network, channels=channels, small_images=min(height, width) <= SMALL_IMAGE)
