"""Two estimators of the evidence lower bound, neither of which ever waits for the device.

    ELBO(q) = E_q[log p(y | x, w)] - KL(q || p),    loss = -ELBO / N = mean NLL + KL / N   (nats per example)

*Weight space* runs any Pyro model and guide: one joint weight draw per batch. *Local reparameterisation* (Kingma et al.
2015, arXiv:1506.02557) samples each image's logits instead of the weights: same mean, lower variance, no weight draw;
it needs the closed-form moments that Gaussian heads give.

Stock Pyro estimators turn every site's log-probability into a Python float and check it for NaN, one host
synchronisation each; here sums stay tensors. The Kullback-Leibler divergence is closed form wherever one is registered,
and the result says whether it was. A guide may also draw auxiliary sites that the model does not have, and make its
latent site a Delta of them, as Pyro's automatic guides do: the divergence is then that of the draw,

    log q(auxiliary) + log q(latent | auxiliary) - log p(latent),

whose first term holds the entropy. The closed form of a Delta alone would be -log p(latent): a bound without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from bayesnet.errors import ConfigError
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


@contextlib.contextmanager
def private_pyro() -> Iterator[None]:
    """Run a Pyro program with a parameter store of its own, which is gone afterwards, however its modules were built.

    Parameters of modules stay in their modules. Validation is off, since it reads values back from the device.
    """
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        yield


def trace_elbo(model: PyroProgram, guide: PyroProgram, *args: Tensor, closed_form_kl: bool = True) -> ElboTerms:
    """Return a one-draw estimate of the ELBO of a Pyro model and guide, without host synchronisation.

    Args:
        model: A Pyro program whose observed sites are scaled to the whole data set (a plate of size N).
        guide: A Pyro program with a sample site for each latent site of the model, and any auxiliary ones. Its
            parameters are those of modules: what a plain function asks of `pyro.param` starts anew in every call.
        args: Passed to both.
        closed_form_kl: Use registered closed forms; otherwise every site's KL is log q - log p of the draw.

    Raises:
        ConfigError: The guide lacks a latent site of the model.

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
    with private_pyro():
        guide_trace = poutine.trace(guide, graph_type="flat").get_trace(*args)
        guide_trace.compute_log_prob()
    with private_pyro():  # another store: parameters of one name in model and guide are two
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace), graph_type="flat").get_trace(*args)
        model_trace.compute_log_prob()
    log_likelihood, kl, kl_is_exact = torch.zeros(()), torch.zeros(()), True
    model_sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
    for name, site in model_sites.items():
        if site["is_observed"]:
            log_likelihood = log_likelihood + site["log_prob_sum"]
            continue
        guide_site = guide_sites.get(name)
        if guide_site is None:
            raise ConfigError("the guide lacks a latent site of the model", where=name)
        divergence = _closed_form_kl(guide_site, site) if closed_form_kl else None
        kl_is_exact = kl_is_exact and divergence is not None
        kl = kl + (guide_site["log_prob_sum"] - site["log_prob_sum"] if divergence is None else divergence)
    for name in [name for name in guide_sites if name not in model_sites]:  # in order: a float sum depends on it
        kl, kl_is_exact = kl + guide_sites[name]["log_prob_sum"], False
    return ElboTerms(log_likelihood, kl, kl_is_exact, model_trace.nodes["_RETURN"]["value"])


def sample_sites(trace: poutine.Trace) -> dict[str, Mapping[str, Any]]:
    """Return the sample sites of a trace by name, in order, but for those that choose a plate's subsample."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    }


def is_delta(distribution: object) -> bool:
    """Return whether a distribution is a point mass, however it is wrapped."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(distribution, Delta)


def closed_form_divergence(guide: Distribution, prior: Distribution) -> Tensor | None:
    """Return KL(guide || prior), nats per batch entry, or None where torch knows no closed form.

    Example:
        >>> from torch.distributions import Laplace, Normal, StudentT
        >>> closed_form_divergence(Normal(0.0, 1.0), Laplace(0.0, 1.0))
        tensor(0.0721)
        >>> closed_form_divergence(Normal(0.0, 1.0), StudentT(4.0)) is None
        True
    """
    if is_delta(guide):  # what Pyro registers for a Delta leaves out its log_density
        return None
    try:
        divergence: Tensor = kl_divergence(guide, prior)
    except NotImplementedError:
        return None
    return divergence


def divergence_or_draw(guide: Distribution, prior: Distribution) -> Tensor:
    """Return KL(guide || prior), nats, summed over all entries: closed form, or else log q - log p of one draw.

    Args:
        guide: A distribution that can be sampled with gradients.
        prior: Of the same shape.
    """
    divergence = closed_form_divergence(guide, prior)
    if divergence is None:
        value = guide.rsample()
        divergence = guide.log_prob(value) - prior.log_prob(value)
    return divergence.sum()


def _closed_form_kl(guide_site: Mapping[str, Any], model_site: Mapping[str, Any]) -> Tensor | None:
    """Return the scaled sum of KL(guide || prior) of a site, or None where torch knows no closed form."""
    divergence = closed_form_divergence(guide_site["fn"], model_site["fn"])
    if divergence is None:
        return None
    total: Tensor = scale_and_mask(divergence, guide_site["scale"], guide_site["mask"]).sum()
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
