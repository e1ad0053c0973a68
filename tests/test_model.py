"""The generative model is a complete Pyro program: stock inference runs on it, the fast path gives the same ELBO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from pyro.optim import Adam as PyroAdam  # type: ignore[attr-defined]
from torch import Tensor

from bayesnet.backbones import BackboneConfig, build_backbone
from bayesnet.elbo import trace_elbo
from bayesnet.errors import ConfigError
from bayesnet.inference import build_inference_config, build_posterior
from bayesnet.inference.base import Parts
from bayesnet.inference.mean_field import MeanField, MeanFieldGuide
from bayesnet.model import LABEL, WEIGHT, BayesianClassifier, BayesianHead, PriorName, linear_logits
from bayesnet.testing import FlattenBackbone, toy_problem


@pytest.fixture(autouse=True)
def clean_store() -> Iterator[None]:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def classifier(num_examples: int = 60) -> BayesianClassifier:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(width=4), channels=1, height=8, width=8)
    return BayesianClassifier(backbone, num_classes=3, num_examples=num_examples)


def images(num_images: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_images, 1, 8, 8, generator=generator), torch.randint(3, (num_images,), generator=generator)


def test_it_is_a_pyro_module_with_one_latent_site() -> None:
    model = classifier()
    assert isinstance(model, PyroModule)
    trace = pyro.poutine.trace(model).get_trace(*images())
    latent = [name for name, site in trace.nodes.items() if site["type"] == "sample" and not site["is_observed"]]
    assert [name for name in latent if name != "data"] == [WEIGHT]
    value = trace.nodes[WEIGHT]["value"]
    assert value is not None
    assert value.shape == (3, 16 + 1)
    assert trace.nodes[LABEL]["scale"] == 60 / 12


def test_whole_program_and_head_on_features_give_the_same_elbo() -> None:
    model = classifier().eval()
    guide = MeanFieldGuide(model.head.prior_scale, 0.3)
    x_BCHW, y_B = images()
    estimates = []
    for program, inputs in ((model, x_BCHW), (model.head, model.backbone(x_BCHW))):
        torch.manual_seed(2)
        estimates.append(trace_elbo(program, guide, inputs, y_B))
    assert torch.equal(estimates[0].log_likelihood, estimates[1].log_likelihood)
    assert torch.equal(estimates[0].kl, estimates[1].kl)


@pytest.mark.parametrize("guide_type", [AutoNormal, AutoLowRankMultivariateNormal])
def test_stock_svi_trains_backbone_and_guide(guide_type: type[AutoNormal]) -> None:
    model = classifier(num_examples=12)
    x_BCHW, y_B = images()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    svi = SVI(model, guide_type(model), PyroAdam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(x_BCHW, y_B) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_stock_svi_takes_our_guide() -> None:
    problem = toy_problem()
    model = BayesianClassifier(FlattenBackbone(4), 3, 60)
    guide = MeanFieldGuide(model.head.prior_scale, 0.2)
    svi = SVI(model, guide, PyroAdam({"lr": 0.05}), TraceMeanField_ELBO())
    losses = [svi.step(problem.x_NCHW, problem.y_N) for _ in range(60)]
    assert sum(losses[-5:]) < sum(losses[:5])


def own_guide(x_BCHW: Tensor, y_B: Tensor | None = None) -> None:
    """A plain Pyro function, its parameters in the global store, as users write them."""
    loc = pyro.param("loc", torch.zeros(3, 17))
    scale = pyro.param("scale", torch.full((3, 17), 0.2), constraint=dist.constraints.positive)
    pyro.sample(WEIGHT, dist.Normal(loc, scale).to_event(2))


def test_stock_svi_trains_a_users_function() -> None:
    model = classifier(num_examples=12)
    x_BCHW, y_B = images()
    svi = SVI(model, own_guide, PyroAdam({"lr": 0.02}), TraceMeanField_ELBO())
    losses = [svi.step(x_BCHW, y_B) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert float((pyro.param("loc").detach()).abs().max()) > 0.1


def test_stock_svi_runs_on_a_users_unrelated_model() -> None:
    """With names that ours have too."""

    def model(y: Tensor) -> None:
        rate = pyro.sample(WEIGHT, dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample(LABEL, dist.Poisson(rate), obs=y)

    pyro.set_rng_seed(0)
    y = torch.tensor([3.0, 4.0, 5.0, 4.0] * 10)
    guide = AutoNormal(model)
    svi = SVI(model, guide, PyroAdam({"lr": 0.05}), Trace_ELBO())
    for _ in range(200):
        svi.step(y)
    expected = (2.0 + float(y.sum())) / (1.0 + len(y))  # the conjugate posterior's mean
    assert float(guide.median()[WEIGHT]) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("guide_type", [AutoNormal, AutoLowRankMultivariateNormal, None])
def test_stock_predictive_draws_from_a_guide(guide_type: type[AutoNormal] | None) -> None:
    model = classifier().eval()
    x_BCHW, y_B = images()
    guide = own_guide if guide_type is None else guide_type(model)
    guide(x_BCHW, y_B)
    draws = Predictive(model, guide=guide, num_samples=5, return_sites=[LABEL, WEIGHT])(x_BCHW)
    assert draws[LABEL].shape == (5, 12)
    features_BD = model.backbone(x_BCHW).detach()
    weights = {WEIGHT: draws[WEIGHT].reshape(5, 1, 3, 17)}
    together = Predictive(model.head, weights, parallel=True, return_sites=["_RETURN"])(features_BD)["_RETURN"]
    expected = torch.stack([linear_logits(features_BD, weight_KD) for weight_KD in draws[WEIGHT].reshape(5, 3, 17)])
    assert torch.allclose(together.reshape(5, 12, 3), expected, atol=1e-5)


def test_stock_predictive_gives_labels_and_weights() -> None:
    model, guide = classifier().eval(), None
    x_BCHW, _ = images()
    draws = Predictive(model, guide=guide, num_samples=5, return_sites=[LABEL, WEIGHT])(x_BCHW)
    assert draws[LABEL].shape[0] == 5
    assert draws[LABEL].numel() == 5 * len(x_BCHW)
    assert set(draws[LABEL].unique().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("prior", get_args(PriorName))
def test_stock_nuts_runs_on_the_head(prior: PriorName) -> None:
    problem = toy_problem(num_examples=20, num_features=2)
    head = BayesianHead(2, 3, 20, 1.0, 1.0, prior)
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(head), num_samples=8, warmup_steps=8, disable_progbar=True)
    mcmc.run(problem.x_NCHW.flatten(1), problem.y_N)
    assert mcmc.get_samples()[WEIGHT].shape == (8, 3, 3)


def test_any_number_of_leading_dimensions() -> None:
    features_BD = torch.randn(5, 4)
    weight_SKD = torch.randn(7, 3, 5)
    expected = torch.stack([features_BD @ weight[:, :4].T + weight[:, 4] for weight in weight_SKD])
    assert torch.allclose(linear_logits(features_BD, weight_SKD), expected, atol=1e-6)
    assert torch.allclose(linear_logits(features_BD, weight_SKD[:, None]), expected, atol=1e-6)


@pytest.mark.parametrize("key", ["prior_scale", "prior_bias_scale"])
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_prior_scale_must_be_positive_and_finite(key: str, scale: float) -> None:
    config = build_inference_config({"family": "mean_field", key: scale})
    with pytest.raises(ConfigError, match=f"must be positive and finite \\(inference.{key} = {scale}\\)"):
        build_posterior(Parts(FlattenBackbone(4), 3, 10), config)


def test_twin_and_bayesian_head_start_from_the_same_weights() -> None:
    starts = []
    for family in ("deterministic", "mean_field"):
        torch.manual_seed(3)
        posterior = build_posterior(Parts(FlattenBackbone(4), 3, 10), build_inference_config({"family": family}))
        if isinstance(posterior, MeanField):
            starts.append(posterior.guide.loc.detach())
        else:
            layer = posterior.get_submodule("head")
            starts.append(torch.cat([layer.get_parameter("weight"), layer.get_parameter("bias")[:, None]], 1).detach())
    assert torch.equal(*starts)
