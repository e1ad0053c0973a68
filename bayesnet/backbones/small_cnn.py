"""A small convolutional network that trains in seconds on a CPU.

Four 3x3 convolutions, each with batch norm and ReLU; the first two are followed by 2x2 max pooling while the picture is
larger than 4 pixels; global average pooling gives 4 x width features (128 by default).
"""

from __future__ import annotations

from torch import Tensor, nn

DEFAULT_WIDTH = 32


class SmallCNN(nn.Module):
    """Convolutions and pooling to one feature vector per image.

    Args:
        channels: Image channels.
        size: Shorter side of the images in pixels; decides how often they are pooled.
        width: Channels of the first convolution; the features are 4 x width.
    """

    def __init__(self, channels: int, size: int, width: int) -> None:
        super().__init__()
        self.num_features = 4 * width
        plan = ((channels, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 4 * width))
        layers: list[nn.Module] = []
        for stage, (num_in, num_out) in enumerate(plan):
            layers += [
                nn.Conv2d(num_in, num_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(num_out),
                nn.ReLU(inplace=True),
            ]
            if stage < 2 and size > 4:
                layers.append(nn.MaxPool2d(2))
                size //= 2
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return features (B, 4 x width) of images (B, C, H, W)."""
        features_BDHW: Tensor = self.layers(x_BCHW)
        return features_BDHW.mean((2, 3))


def small_cnn(*, channels: int, height: int, width: int, base_width: int, original: bool) -> nn.Module:
    """Return a SmallCNN for images of this size; any size from 1 pixel up."""
    return SmallCNN(channels, min(height, width), base_width or DEFAULT_WIDTH)
