"""Backbones of a head that is fitted on stored features: what gives it features, and what stands in for it in a fit."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from bayesnet.backbones.base import Backbone

MIN_SCALE = 1e-6
"""Smallest standard deviation that a feature is divided by: a feature that never varies stays 0."""


class StandardizedFeatures(nn.Module):
    """A backbone whose features are shifted and scaled: zero mean and unit variance where they were measured.

    Args:
        backbone: Images (B, C, H, W) to features (B, D).
    """

    shift_D: Tensor
    scale_D: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = cast("Backbone", backbone).num_features
        self.register_buffer("shift_D", torch.zeros(self.num_features))
        self.register_buffer("scale_D", torch.ones(self.num_features))

    def standardize(self, features_BD: Tensor) -> Tensor:
        """Return ``(features - shift) / scale``, (B, D)."""
        return (features_BD - self.shift_D) / self.scale_D

    @torch.no_grad()
    def measure(self, features_ND: Tensor) -> None:
        """Make mean and standard deviation of these features (N, D) the shift and scale."""
        double_ND = features_ND.double()
        self.shift_D.copy_(double_ND.mean(0))
        scale_D = double_ND.std(0, correction=0)
        self.scale_D.copy_(torch.where(scale_D > MIN_SCALE, scale_D, 1.0))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return standardised features (B, D) of images (B, C, H, W)."""
        features_BD: Tensor = self.backbone(x_BCHW)
        return self.standardize(features_BD)


class FeatureInput(nn.Module):
    """A backbone for inputs that are features already, stored as images of one row: (B, 1, 1, D) to (B, D).

    Args:
        num_features: D.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x_B11D: Tensor) -> Tensor:
        """Return the features (B, D)."""
        return x_B11D.flatten(1)
