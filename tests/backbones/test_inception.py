"""The Inception network: branches side by side, and pooling only while the picture is large enough."""

from __future__ import annotations

import pytest
import torch

from bayesnet.backbones.inception import InceptionBlock, inception
from bayesnet.errors import ConfigError


@pytest.mark.parametrize(("size", "picture"), [(8, 4), (9, 5), (15, 4), (16, 4), (28, 4), (32, 4), (64, 8), (224, 28)])
def test_pictures_in_the_blocks_have_at_least_4_pixels(size: int, picture: int) -> None:
    network = inception(channels=3, height=size, width=size, base_width=4, original=False).eval()
    seen = network.get_submodule("layers")(torch.zeros(1, 3, size, size))
    assert seen.shape[2:] == (picture, picture)


def test_too_small() -> None:
    with pytest.raises(ConfigError, match=r"images too small for inception \(7x9\): use small_cnn"):
        inception(channels=3, height=7, width=9, base_width=0, original=False)


def test_every_branch_is_in_the_result_in_order() -> None:
    block = InceptionBlock(3, 2, (4, 5), (2, 3), 1).eval()
    x_BCHW = torch.randn(2, 3, 6, 6)
    whole = block(x_BCHW)
    assert whole.shape == (2, block.num_channels, 6, 6)
    parts = torch.split(whole, [2, 5, 3, 1], dim=1)
    for part, branch in zip(parts, (block.point, block.medium, block.large, block.pooled), strict=True):
        assert torch.equal(part, branch(x_BCHW))
