"""Residual networks (He et al. 2016, arXiv:1512.03385), torchvision's, with a stem for small images.

Up to 64 pixels the 7x7 stride-2 stem and its max pooling would discard most of the picture, so a 3x3 stride-1
convolution stands in their place, as is usual on CIFAR. With weights of others the stem is theirs, whatever the size of
the images. torchvision is imported when a network is built, not before.
"""

from __future__ import annotations

from torch import nn

from bayesnet.backbones.base import Features, require_fixed_width, take_off_classifier
from bayesnet.backbones.zoo import classification_network
from bayesnet.errors import ConfigError

SMALL_IMAGE = 64
MIN_IMAGE = 8
DEFAULT_WIDTH = 64


def resnet(name: str, *, channels: int, height: int, width: int, base_width: int, original: bool) -> nn.Module:
    """Return the feature extractor of torchvision's residual network ``name`` for images of this size.

    Raises:
        ConfigError: A width other than 64 was asked for, or the images have fewer than 8 pixels.
    """
    require_fixed_width(name, base_width, DEFAULT_WIDTH)
    if min(height, width) < MIN_IMAGE:
        raise ConfigError(f"images too small for {name}", where=f"{height}x{width}", hint="use small_cnn")
    network = classification_network(name, original=original)
    if min(height, width) <= SMALL_IMAGE and not original:
        network.conv1 = nn.Conv2d(channels, DEFAULT_WIDTH, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif channels != 3:
        network.conv1 = nn.Conv2d(channels, DEFAULT_WIDTH, 7, stride=2, padding=3, bias=False)
    stem = network.get_submodule("conv1")
    assert isinstance(stem, nn.Conv2d)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    classifier, num_features = take_off_classifier(network)
    return Features(network, num_features, classifiers=(classifier,))
