"""Class probabilities of Gaussian logits without draws: the probit approximation and the Laplace bridge.

References: MacKay 1992, "The evidence framework applied to classification networks"; Hobbhahn et al. 2022, "Fast
predictive uncertainty for classification with Bayesian deep networks", arXiv:2003.01227.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayesnet.types import LogitGaussian


def probit(moments: LogitGaussian) -> Tensor:
    """Return log-probabilities (B, K): softmax of each mean, shrunk by its own variance (MacKay 1992).

    Example:
        >>> wide = LogitGaussian(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 3.0]]), torch.zeros(1, 2, 0))
        >>> probit(wide).exp()
        tensor([[0.7189, 0.2811]])
    """
    variance_BK = moments.scale_BK.square() + moments.factor_BKR.square().sum(-1)
    return (moments.mean_BK * (1 + math.pi / 8 * variance_BK).rsqrt()).log_softmax(-1)


def bridge(moments: LogitGaussian) -> Tensor:
    """Return log-probabilities (B, K): the mean of the Dirichlet that the Laplace bridge makes of the logits' Gaussian.

        alpha_k = (1 - 2 / K + exp(m_k) / K^2 sum_l exp(-m_l)) / S_kk,    for m, S conditioned on sum_k logit_k = 0

    Between two classes of equal variance it is the softmax of the means, however wide the logits are.

    Example:
        >>> wide = LogitGaussian(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 3.0]]), torch.zeros(1, 2, 0))
        >>> bridge(wide).exp()
        tensor([[0.8808, 0.1192]])
    """
    # What is conditioned away, the prior's variance along (1, ..., 1), may exceed the rest a million times: float64.
    mean_BK, scale_BK, factor_BKR = (in_float64(part) for part in moments)
    num_classes = mean_BK.shape[-1]
    variance_BK = scale_BK.square() + factor_BKR.square().sum(-1)
    shared_BK = scale_BK.square() + (factor_BKR @ factor_BKR.sum(1).unsqueeze(-1)).squeeze(-1)
    gain_BK = shared_BK / shared_BK.sum(1, keepdim=True)
    mean_BK = mean_BK - gain_BK * mean_BK.sum(1, keepdim=True)
    variance_BK = (variance_BK - gain_BK * shared_BK).clamp_min(torch.finfo(variance_BK.dtype).tiny)
    log_sum_B1 = (-mean_BK).logsumexp(1, keepdim=True) - 2 * math.log(num_classes)
    base = mean_BK.new_tensor(1 - 2 / num_classes).log()
    return (torch.logaddexp(base, mean_BK + log_sum_B1) - variance_BK.log()).log_softmax(-1).to(moments.mean_BK)


PREDICTIVES: dict[str, Callable[[LogitGaussian], Tensor]] = {"probit": probit, "bridge": bridge}


def in_float64(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on the host where its device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
