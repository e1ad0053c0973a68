"""Crops of scikit-learn's two photographs, for the tests that need images of the real world."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor


def photograph_crops(num: int, side: int, channels: int = 3) -> Tensor:
    """Return square crops, uint8 (num, channels, side, side), of the temple and the flower in turn."""
    rng = np.random.default_rng(0)
    images = [np.asarray(image) for image in load_sample_images().images]
    crops = []
    for index in range(num):
        image_HWC = images[index % 2]
        top, left = (int(rng.integers(0, size - side + 1)) for size in image_HWC.shape[:2])
        crops.append(image_HWC[top : top + side, left : left + side, :channels])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
