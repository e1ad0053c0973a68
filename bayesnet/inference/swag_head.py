"""The last layer of a network and a low-rank Gaussian around it, fitted to the path of constant-rate SGD."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesnet.elbo import cross_entropy
from bayesnet.inference.base import Batches
from bayesnet.inference.sgd_path import SgdPlan, follow_sgd
from bayesnet.model import linear_logits
from bayesnet.types import LogitGaussian


class SwagHead(nn.Module):
    """The last layer and the Gaussian around it, whose buffers are zero until `finalize`.

    Args:
        num_features: D.
        num_classes: K.
        rank: R.
    """

    def __init__(self, num_features: int, num_classes: int, rank: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_classes)
        shape = (num_classes, num_features + 1)
        self.register_buffer("offset_KD", torch.zeros(shape))
        self.register_buffer("scale_KD", torch.zeros(shape))
        self.register_buffer("factor_KDR", torch.zeros(*shape, rank))

    def trained(self) -> Tensor:
        """Return the weight that was trained (K, D + 1), bias last."""
        return torch.cat([self.linear.weight, self.linear.bias.unsqueeze(1)], 1)

    @property
    def loc(self) -> Tensor:
        """The mean (K, D + 1), bias last: the trained weight until `finalize`."""
        return self.trained() + self.get_buffer("offset_KD")

    def logit_moments(self, features_BD: Tensor) -> LogitGaussian:
        """Return the Gaussian of the logits, its factor (B, K, R)."""
        factor_KDR = self.get_buffer("factor_KDR")
        variance_BK = linear_logits(features_BD.square(), self.get_buffer("scale_KD").square())
        factor_BKR = torch.einsum("bd,kdr->bkr", features_BD, factor_KDR[:, :-1]) + factor_KDR[:, -1]
        return LogitGaussian(linear_logits(features_BD, self.loc), variance_BK.sqrt(), factor_BKR)

    def sample(self, num_samples: int) -> Tensor:
        """Return joint draws of the weight (S, K, D + 1), bias last, from torch's random state."""
        scale_KD, factor_KDR = self.get_buffer("scale_KD"), self.get_buffer("factor_KDR")
        noise_SKD = torch.randn(num_samples, *scale_KD.shape, dtype=scale_KD.dtype, device=scale_KD.device)
        noise_SR = torch.randn(num_samples, factor_KDR.shape[-1], dtype=scale_KD.dtype, device=scale_KD.device)
        return self.loc + scale_KD * noise_SKD + torch.einsum("kdr,sr->skd", factor_KDR, noise_SR)

    def fit_spread(self, batches: Batches, plan: SgdPlan, seed: int) -> None:
        """Run the constant-rate SGD on batches of features (B, D) and labels, and write the Gaussian to the buffers."""
        weights = [p.detach().clone().requires_grad_() for p in (self.linear.weight, self.linear.bias)]

        def loss(features_BD: Tensor, y_B: Tensor) -> Tensor:
            return cross_entropy(nn.functional.linear(features_BD, *weights), y_B)[0]

        spread = follow_sgd(weights, loss, batches, plan, torch.Generator().manual_seed(seed))
        mean_KD, scale_KD, factor_KDR = (self._bias_last(part) for part in spread)
        offset_KD = mean_KD - self.trained().detach().cpu()
        for name, value in (("offset_KD", offset_KD), ("scale_KD", scale_KD), ("factor_KDR", factor_KDR)):
            self.get_buffer(name).copy_(value.to(self.linear.weight.dtype))

    def _bias_last(self, values_P: Tensor) -> Tensor:
        """Return numbers (P, ...), those of the weights before those of the biases, as (K, D + 1, ...)."""
        weight, bias = values_P.split([self.linear.weight.numel(), self.linear.bias.numel()])
        return torch.cat([weight.unflatten(0, self.linear.weight.shape), bias.unsqueeze(1)], 1)
