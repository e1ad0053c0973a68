"""The family "nuts": its density against the Pyro program, its sampler against known distributions, its bookkeeping.

Stochastic checks use fixed seeds and cut z at 4.892 (1e-6 each, two-sided), with the effective sample size of the very
quantity. Of 800 effective draws the smallest faults caught with power 0.99 are a mean moved by 0.26 sd and an sd wrong
by 18 %; T7 (tests/statistical) catches smaller ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from bayesnet import convergence
from bayesnet.errors import ConfigError, DivergedError
from bayesnet.inference import deterministic, nuts
from bayesnet.inference.base import Family, Parts, Posterior
from bayesnet.inference.nuts import FAMILY, Nuts, NutsConfig, StoredDraws, cost, finalize
from bayesnet.inference.nuts_sampler import Chains, Diagnostics, HeadTarget, diagnose, run_chains, sample_head
from bayesnet.model import WEIGHT, BayesianHead, PriorName
from bayesnet.testing import (
    FlattenBackbone,
    OperatorCounter,
    build,
    check_batches_add_up,
    check_draws_ignore_companions,
    check_no_shared_storage,
    check_particles_equal_a_loop,
    toy_problem,
    train_toy,
)
from bayesnet.types import Loss

PROBLEM = toy_problem()
QUICK = NutsConfig(chains=2, warmup=20, draws=10, max_draws=16)
LIMIT = 4.892


@pytest.fixture(autouse=True)
def store_stays_empty() -> Iterator[None]:
    yield
    assert not list(pyro.get_param_store().keys())


def quick(config: NutsConfig = QUICK, *, table_seed: int = 0) -> Nuts:
    torch.manual_seed(0)
    built = nuts.build(PROBLEM.parts()._replace(table_seed=table_seed), config)
    assert isinstance(built, Nuts)
    return built.eval()


def batches(size: int = 60) -> list[tuple[Tensor, Tensor]]:
    return list(zip(PROBLEM.x_NCHW.split(size), PROBLEM.y_N.split(size), strict=True))


class KLPerBatch(Nuts):
    """Divides the log prior by the batch instead of N."""

    def loss_from_features(self, features_BD: Tensor, y: Tensor) -> Loss:
        loss = super().loss_from_features(features_BD, y)
        return loss._replace(total=loss.fit + loss.kl / len(y))


class RepeatedDraws(Nuts):
    """Stacks one draw."""

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        return super().logits(x_BCHW, num_samples)[:1].expand(num_samples, -1, -1)


class CentredFeatures(Nuts):
    """Centres the features of each batch by themselves."""

    def features(self, x_BCHW: Tensor) -> Tensor:
        features_BD = super().features(x_BCHW)
        return features_BD - features_BD.mean(0)


class WeightTwice(Nuts):
    """Registers the prior's scale a second time."""

    def __init__(self, parts: Parts, config: NutsConfig) -> None:
        super().__init__(parts, config)
        self.register_buffer("again", self.model.head.prior_scale)


PLANTED: list[tuple[type[Nuts], Callable[[Family], None]]] = [
    (KLPerBatch, check_batches_add_up),
    (RepeatedDraws, check_particles_equal_a_loop),
    (CentredFeatures, check_draws_ignore_companions),
    (WeightTwice, check_no_shared_storage),
]


@pytest.mark.parametrize(("planted", "check"), PLANTED, ids=lambda value: value.__name__)
def test_planted_fault_is_caught(planted: type[Nuts], check: Callable[[Family], None]) -> None:
    with pytest.raises(AssertionError):
        check(FAMILY._replace(build=planted))


def program_potential(head: BayesianHead, features_ND: Tensor, y_N: Tensor, weight_KD: Tensor) -> Tensor:
    """Return minus the log-joint of the head's Pyro program, which shares no code with the sampler's density."""
    trace = poutine.trace(poutine.condition(head, data={WEIGHT: weight_KD})).get_trace(features_ND, y_N)
    return -torch.as_tensor(trace.log_prob_sum())


@pytest.mark.parametrize("num_examples", [60, 90])
@pytest.mark.parametrize("prior", get_args(PriorName))
def test_density_and_gradient_are_those_of_the_pyro_program(prior: PriorName, num_examples: int) -> None:
    head = BayesianHead(4, 3, num_examples, 0.7, 2.0, prior)
    features_ND = PROBLEM.x_NCHW.flatten(1).double()
    target = HeadTarget(head, features_ND, PROBLEM.y_N)
    for seed in range(3):
        weight_KD = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        variable_KD = weight_KD.clone().requires_grad_()
        expected = program_potential(head.double(), features_ND, PROBLEM.y_N, variable_KD)
        [slope_KD] = torch.autograd.grad(expected, [variable_KD])
        potential, gradient_KD = target.potential_and_gradient(weight_KD)
        assert float(potential) == pytest.approx(float(expected.detach()), rel=1e-12)
        assert torch.allclose(gradient_KD, slope_KD, rtol=1e-10, atol=1e-12)


def test_mode_and_curvature() -> None:
    target = HeadTarget(BayesianHead(4, 3, 90, 0.7, 2.0), PROBLEM.x_NCHW.flatten(1), PROBLEM.y_N)
    mode_KD = target.mode(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    assert target.potential_and_gradient(mode_KD)[1].abs().max() < 1e-6
    step = 1e-5 * torch.eye(15, dtype=torch.float64).view(15, 3, 5)
    slopes = [
        (target.potential_and_gradient(mode_KD + s)[1] - target.potential_and_gradient(mode_KD - s)[1]) / 2e-5
        for s in step
    ]
    hessian = torch.stack(slopes).view(15, 15)
    assert torch.allclose(target.curvature(mode_KD), hessian, atol=1e-6)


def z_scores(draws_CSP: Tensor, expected_P: Tensor) -> Tensor:
    """Return (mean - expected) / its Monte Carlo standard error."""
    errors = [convergence.mcse_mean(draws_CS) for draws_CS in draws_CSP.permute(2, 0, 1).numpy()]
    return (draws_CSP.mean((0, 1)) - expected_P) / torch.tensor(errors)


def test_draws_of_a_gaussian() -> None:
    """Of a correlated one, means and squares: ten assertions. Controls: means 0.3 sd away, an sd 15 % other."""
    covariance = torch.full((5, 5), 0.5).double() + torch.diag(torch.tensor([0.5, 1.5, 0.1, 3.5, 0.5]).double())
    precision, mean_P = covariance.inverse(), torch.arange(5.0).double()

    def function(u_P: Tensor) -> tuple[Tensor, Tensor]:
        gradient_P = precision @ (u_P - mean_P)
        return 0.5 * gradient_P @ (u_P - mean_P), gradient_P

    found = run_chains(function, torch.zeros(2, 5).double(), num_warmup=100, num_draws=400, seed=1)
    assert found.num_divergences == 0
    squares_CSP, variance_P = (found.draws_CSP - mean_P).square(), covariance.diagonal()
    for shift, scale, accepted in ((0.0, 1.0, True), (0.3, 1.0, False), (0.0, 0.85, False), (0.0, 1.18, False)):
        means = z_scores(found.draws_CSP, mean_P + shift * variance_P.sqrt())
        spreads = z_scores(squares_CSP, scale**2 * variance_P)
        assert (float(torch.cat([means, spreads]).abs().max()) < LIMIT) == accepted


@pytest.mark.parametrize("prior", ["student_t", pytest.param("laplace", marks=pytest.mark.nightly)])
def test_without_information_the_posterior_is_the_prior(prior: PriorName) -> None:
    """Features of 0 tell nothing of the weights: E|w| is the scale, of a Laplace and of a Student-t with 4 df."""
    target = HeadTarget(BayesianHead(1, 2, 20, 0.5, 0.5, prior), torch.zeros(20, 1), torch.arange(20) % 2)
    found = sample_head(target, torch.zeros(2, 2), chains=2, warmup=100, draws=200, seed=0)
    weights_CSP = found.draws_CSP[..., [0, 2]]
    assert float(z_scores(weights_CSP.abs(), torch.full((2,), 0.5)).abs().max()) < LIMIT
    assert float(z_scores(weights_CSP.abs(), torch.full((2,), 0.8)).abs().max()) > LIMIT


def test_an_energy_that_goes_astray_is_counted() -> None:
    def cliff(u_P: Tensor) -> tuple[Tensor, Tensor]:
        """Return a Gaussian with a wall whose slope the gradient does not show."""
        return 0.5 * u_P.square().sum() + 1e5 * (u_P > 1).sum(), u_P

    found = run_chains(cliff, torch.zeros(2, 1).double(), num_warmup=20, num_draws=50, seed=0)
    assert found.num_divergences > 0


def test_finalize_stores_draws_of_the_trained_head() -> None:
    posterior = quick(replace(QUICK, warmup=50, draws=40))
    assert posterior.diagnostics() is None
    assert posterior.posterior_scale() is None
    train_toy(posterior, PROBLEM, steps=150)
    finalize(posterior, batches())
    diagnostics, scale_KD = posterior.diagnostics(), posterior.posterior_scale()
    assert diagnostics is not None
    assert 0.9 < diagnostics.max_rhat < 2
    assert diagnostics.min_ess > 4
    assert diagnostics.num_divergences == 0
    assert scale_KD is not None
    assert 0.2 < float(scale_KD.median()) < 1.5, "the prior's is 1"
    with torch.no_grad():
        draws_SBK = posterior.predict_draws(PROBLEM.x_NCHW, 256)
    assert draws_SBK.shape == (16, 60, 3)
    assert (draws_SBK.softmax(-1).mean(0).argmax(-1) == PROBLEM.y_N).float().mean() > 0.6, "chance is 1/3"


def test_finalize_is_a_function_of_data_and_seed() -> None:
    first, again, other, ran = quick(), quick(), quick(), quick(table_seed=1)
    state = torch.get_rng_state()
    finalize(first, batches())
    finalize(again, batches(17))
    other.train()
    with torch.inference_mode():
        finalize(other, batches())
    finalize(ran, batches())
    assert torch.equal(torch.get_rng_state(), state)
    assert other.training, "the mode is as it was"
    for posterior in (again, other):
        assert torch.equal(posterior.stored.deviation_SKD, first.stored.deviation_SKD)
    assert not torch.equal(ran.stored.deviation_SKD, first.stored.deviation_SKD)
    before = first.stored.deviation_SKD.clone()
    finalize(first, batches())
    assert torch.equal(first.stored.deviation_SKD, before), "a second call begins anew"


def test_a_sampled_posterior_saves_and_loads() -> None:
    source, target = quick(), quick(table_seed=3)
    finalize(source, batches())
    target.load_state_dict(source.state_dict())
    with torch.no_grad():
        assert torch.equal(target.predict_draws(PROBLEM.x_NCHW, 8), source.predict_draws(PROBLEM.x_NCHW, 8))
    assert target.diagnostics() == source.diagnostics()


def test_stored_draws() -> None:
    stored = StoredDraws(torch.ones(2, 3), 6, seed=0)
    draws_SKD = torch.arange(36.0).double().view(6, 2, 3)
    stored.store(draws_SKD)
    with torch.no_grad():
        assert torch.allclose(stored.first(4), draws_SKD[:4].float(), atol=1e-5)
        torch.manual_seed(0)
        assert sorted(stored.sample(6)[:, 0, 0].round().tolist()) == draws_SKD[:, 0, 0].tolist(), "each once"
        assert stored.sample(2).shape == (2, 2, 3)
        assert stored.sample(100).shape == stored.first(100).shape == (6, 2, 3)


def test_any_first_few_of_the_stored_draws_come_from_every_chain() -> None:
    label_CSP = torch.arange(4.0).double()[:, None, None].expand(4, 128, 1)
    kept = nuts._thinned(Chains(label_CSP, 0, 0), 256, seed=0).flatten()
    assert [int((kept == chain).sum()) for chain in range(4)] == [64] * 4
    assert min(int((kept[:32] == chain).sum()) for chain in range(4)) >= 2


def test_diagnostics_are_the_worst_of_all_weights() -> None:
    draws_CSP = torch.randn(4, 200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert diagnose(Chains(draws_CSP, 0, 0)).max_rhat < 1.02
    draws_CSP[0, :, 1] += 3
    found = diagnose(Chains(draws_CSP, 7, 0))
    assert found.max_rhat == convergence.rhat(draws_CSP[:, :, 1].numpy()) > 1.3
    assert found.min_ess == convergence.ess_bulk(draws_CSP[:, :, 1].numpy()) < 20
    assert found.num_divergences == 7
    assert isinstance(found, Diagnostics)


def test_the_loss_is_the_map_objective() -> None:
    posterior = quick(replace(QUICK, prior_scale=0.5, prior_bias_scale=2.0)).double()
    soft_NK = 0.8 * torch.nn.functional.one_hot(PROBLEM.y_N, 3).double() + 0.2 / 3
    weight_KD = posterior.stored.weight.detach()
    expected = 0.5 * (weight_KD / torch.tensor([0.5] * 4 + [2.0])).square().sum()
    for labels in (PROBLEM.y_N, soft_NK):
        loss = Loss(*(part.detach() for part in posterior.loss(PROBLEM.x_NCHW.double(), labels)))
        assert float(loss.kl) == pytest.approx(float(expected), rel=1e-9)
        assert float(loss.total) == pytest.approx(float(loss.fit + expected / 60), rel=1e-9)
    hard = posterior.loss(PROBLEM.x_NCHW.double(), PROBLEM.y_N)
    assert float(loss.nll) == pytest.approx(float(hard.nll.detach()), rel=1e-12), "nll is of the plain labels"
    assert posterior.variational_parameters() == (posterior.stored.weight,)
    assert posterior.kl_is_exact


def test_the_start_is_the_twins_and_a_step_costs_little_more() -> None:
    torch.manual_seed(0)
    twin = deterministic.build(PROBLEM.parts(), deterministic.DeterministicConfig())
    posterior = quick()
    layer = twin.get_submodule("head")
    start = torch.cat([layer.get_parameter("weight"), layer.get_parameter("bias")[:, None]], 1)
    assert torch.equal(posterior.stored.weight, start)
    counts: list[OperatorCounter] = []
    for each in (twin, posterior):
        each.loss(PROBLEM.x_NCHW, PROBLEM.y_N)  # the first makes the prior for the type and device
        with OperatorCounter() as counter:
            torch.autograd.backward(each.loss(PROBLEM.x_NCHW, PROBLEM.y_N).total)
        counts.append(counter)
    assert counts[1].num_host_syncs == 0
    assert counts[1].num_operators <= counts[0].num_operators + 60


def test_features_that_are_not_finite_are_refused() -> None:
    posterior = quick()
    message = "the backbone gives features that are not finite (nuts): train with a lower learning rate"
    with pytest.raises(DivergedError) as caught:
        finalize(posterior, [(PROBLEM.x_NCHW / 0.0, PROBLEM.y_N)])
    assert str(caught.value) == message


def test_what_never_ends_is_refused() -> None:
    def refused(num_features: int, num_examples: int, config: NutsConfig) -> str:
        with pytest.raises(ConfigError) as caught:
            nuts.build(Parts(FlattenBackbone(num_features), 10, num_examples), config)
        return str(caught.value)

    large = refused(512, 50_000, NutsConfig())
    assert large == (
        "NUTS samples at most 2048 weights (inference.family = nuts, 5130 weights): "
        "use laplace or full_rank, or a backbone with fewer features"
    )
    long = refused(128, 1_000_000, NutsConfig())
    assert long.startswith("sampling with 1000000 images takes about ")
    assert long.endswith(
        " hours, more than 2 (inference.family = nuts, 1290 weights): "
        "use laplace or full_rank, or fewer inference.draws and warmup"
    )
    assert isinstance(nuts.build(Parts(FlattenBackbone(128), 10, 45_000), NutsConfig()), Posterior)


def test_the_cost_grows_with_chains_rows_and_weights() -> None:
    base = cost(64, 10, 1000, NutsConfig())
    assert cost(64, 10, 1000, NutsConfig(chains=8)).seconds == pytest.approx(2 * base.seconds)
    assert cost(64, 10, 100_000, NutsConfig()).seconds > 10 * base.seconds
    assert base.num_bytes > 3 * 8 * 650**2
    assert math.isfinite(base.seconds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chains": 1}, "must be at least 2 (inference.chains = 1)"),
        ({"warmup": 0}, "must be at least 1 (inference.warmup = 0)"),
        ({"draws": 3}, "must be at least 4 (inference.draws = 3)"),
        ({"max_draws": 0}, "must be at least 1 (inference.max_draws = 0)"),
        (
            {"draws": 10},
            "must be at most chains x draws = 40 (inference.max_draws = 256): "
            "set inference.max_draws = 40, or draw more",
        ),
    ],
)
def test_settings_out_of_range(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NutsConfig(**settings)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_it_builds_as_other_families_do() -> None:
    assert isinstance(build(FAMILY, PROBLEM, prior="laplace"), Nuts)
