"""Two estimators of the evidence lower bound, neither of which ever waits for the device.

    ELBO(q) = E_q[log p(y | x, w)] - KL(q || p),    loss = -ELBO / N = mean NLL + KL / N   (nats per example)

*Weight space* runs any Pyro model and guide: one joint weight draw per batch. *Local reparameterisation* (Kingma et al.
2015, arXiv:1506.02557) samples each image's logits instead of the weights: same mean, lower variance, no weight draw;
it needs the closed-form moments that Gaussian heads give.

Stock Pyro estimators turn every site's log-probability into a Python float and check it for NaN, one host
synchronisation each; here sums stay tensors. The Kullback-Leibler divergence is closed form wherever one is registered,
and the result says whether it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

from bayesnet.types import LogitGaussian, Loss

PyroProgram = Callable[..., Any]


class ElboTerms(NamedTuple):
    """The two sums of an ELBO estimate, 0-dimensional, in nats.

    Attributes:
        log_likelihood: Log-likelihood of the data set as estimated from the batch (scaled by N / B).
        kl: Divergence from the prior, closed form or one-sample.
        kl_is_exact: Whether every latent site had a registered closed form.
        value: What the model returned.
    """

    log_likelihood: Tensor
    kl: Tensor
    kl_is_exact: bool
    value: Any


def trace_elbo(model: PyroProgram, guide: PyroProgram, *args: Tensor, closed_form_kl: bool = True) -> ElboTerms:
    """Return a one-draw estimate of the ELBO of a Pyro model and guide, without host synchronisation.

    Args:
        model: A Pyro program whose observed sites are scaled to the whole data set (a plate of size N).
        guide: A Pyro program with a sample site for each latent site of the model.
        args: Passed to both.
        closed_form_kl: Use registered closed forms; otherwise every site's KL is log q - log p of the draw.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("z", dist.Normal(0.5, 1.0))
        >>> trace_elbo(model, guide, torch.tensor(1.0)).kl
        tensor(0.1250)
    """
    # A store of its own: the programs' parameters stay out of the global one, however their modules were built.
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        guide_trace = poutine.trace(guide, graph_type="flat").get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace), graph_type="flat").get_trace(*args)
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
    log_likelihood, kl, kl_is_exact = torch.zeros(()), torch.zeros(()), True
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
            continue
        if site["is_observed"]:
            log_likelihood = log_likelihood + site["log_prob_sum"]
            continue
        guide_site = guide_trace.nodes[name]
        divergence = _closed_form_kl(guide_site, site) if closed_form_kl else None
        kl_is_exact = kl_is_exact and divergence is not None
        kl = kl + (guide_site["log_prob_sum"] - site["log_prob_sum"] if divergence is None else divergence)
    return ElboTerms(log_likelihood, kl, kl_is_exact, model_trace.nodes["_RETURN"]["value"])


def _closed_form_kl(guide_site: Mapping[str, Any], model_site: Mapping[str, Any]) -> Tensor | None:
    """Return the scaled sum of KL(guide || prior) of a site, or None where torch knows no closed form."""
    try:
        divergence: Tensor = kl_divergence(guide_site["fn"], model_site["fn"])
    except NotImplementedError:
        return None
    total: Tensor = (divergence * guide_site["scale"]).sum()
    return total


def weight_space_loss(head: PyroProgram, guide: PyroProgram, features_BD: Tensor, y: Tensor, num_examples: int) -> Loss:
    """Return the negative ELBO per example, estimated with one joint draw of the head's weight.

    Args:
        head: The Pyro program from features to labels, which returns the logits (B, K), its plate of size N.
        guide: The guide over its latent site.
        features_BD: Features (B, D).
        y: Labels (B,), int64, or soft labels (B, K).
        num_examples: N.
    """
    terms = trace_elbo(head, guide, features_BD, y)
    fit = -terms.log_likelihood / num_examples
    nll = fit if y.dim() == 1 else cross_entropy(terms.value, y)[1]
    return Loss(fit + terms.kl / num_examples, nll, terms.kl, fit)


def local_loss(moments: LogitGaussian, y: Tensor, kl: Tensor, num_examples: int) -> Loss:
    """Return the negative ELBO per example by local reparameterisation: one draw of each image's logits.

    Args:
        moments: The Gaussian of the logits.
        y: Labels (B,), int64, or soft labels (B, K).
        kl: Divergence from the prior, nats.
        num_examples: N.
    """
    logits_BK = moments.mean_BK + moments.scale_BK * standard_normal(moments.scale_BK)
    if moments.factor_BKR.shape[-1]:
        noise_BR = standard_normal(moments.factor_BKR[:, 0])
        logits_BK = logits_BK + (moments.factor_BKR @ noise_BR.unsqueeze(-1)).squeeze(-1)
    fit, nll = cross_entropy(logits_BK, y)
    return Loss(fit + kl / num_examples, nll, kl, fit)


def cross_entropy(logits_BK: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy to the labels, and the plain mean NLL of the most probable label, nats.

    Args:
        logits_BK: Logits (B, K).
        y: Labels (B,), int64, for which both are one number; or soft labels (B, K), rows that add up to 1.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> fit, nll = cross_entropy(logits, torch.tensor([[0.9, 0.1]]))
        >>> round(float(fit), 3), round(float(nll), 3)
        (0.327, 0.127)
    """
    fit = nn.functional.cross_entropy(logits_BK, y)
    return (fit, fit) if y.dim() == 1 else (fit, nn.functional.cross_entropy(logits_BK.detach(), y.argmax(1)))


def standard_normal(like: Tensor) -> Tensor:
    """Return standard normal noise shaped as ``like``: the one place where per-image noise is drawn."""
    return torch.randn_like(like)
