"""What every posterior family must satisfy, as functions that users can run on their own; toy problems; counters.

    from bayesnet.testing import CHECKS
    for check in CHECKS:
        check(MY_FAMILY)

Every check is deterministic (fixed seeds), raises AssertionError, and takes well under a second but for the last, which
trains. They are equalities, not tolerances on noise: per-image noise is set to zero, weight noise to one seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, Self
from unittest import mock

import pyro
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from bayesnet import elbo
from bayesnet.engine import Engine
from bayesnet.inference.base import Family, GaussianHeadPosterior, HeadPosterior, Parts, Posterior
from bayesnet.model import linear_logits
from bayesnet.optim import OptimizerConfig, build_optimizers

HOST_SYNCS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")


class FlattenBackbone(nn.Module):
    """A backbone without parameters: the pixels are the features. The posterior over the head is then the whole model.

    Args:
        num_features: D, pixels times channels.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the pixels as features (B, D)."""
        return x_BCHW.flatten(1)


class ToyProblem(NamedTuple):
    """A softmax regression with known generating weights.

    Attributes:
        x_NCHW: Standard normal "images" (N, 1, 1, D).
        y_N: Labels drawn from the model.
        weight_KD: The weights (K, D + 1) that the labels were drawn from.
    """

    x_NCHW: Tensor
    y_N: Tensor
    weight_KD: Tensor

    def parts(self) -> Parts:
        """Return fresh parts for a family to build a posterior from."""
        num_features = self.x_NCHW.shape[-1]
        return Parts(FlattenBackbone(num_features), len(self.weight_KD), len(self.y_N))


def toy_problem(num_examples: int = 60, num_features: int = 4, num_classes: int = 3, *, seed: int = 0) -> ToyProblem:
    """Return a softmax regression problem whose weights are drawn from a standard normal prior."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(num_examples, num_features, generator=generator)
    weight_KD = torch.randn(num_classes, num_features + 1, generator=generator)
    probabilities_NK = linear_logits(x_ND, weight_KD).softmax(-1)
    y_N = torch.multinomial(probabilities_NK, 1, generator=generator).squeeze(1)
    return ToyProblem(x_ND[:, None, None, :], y_N, weight_KD)


def build(family: Family, problem: ToyProblem, *, seed: int = 0, **settings: Any) -> Posterior:  # noqa: ANN401
    """Return the family's untrained posterior on a toy problem, in evaluation mode.

    Args:
        family: The family.
        problem: The data.
        seed: Of the initial weights.
        settings: Fields of the family's configuration to set, where it has them.
    """
    names = {field.name for field in fields(family.config)}
    config = replace(family.config(), **{key: value for key, value in settings.items() if key in names})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.build(problem.parts(), config).eval()


@contextlib.contextmanager
def fixed_noise(seed: int = 0) -> Iterator[None]:
    """Make losses comparable: per-image noise becomes zero, joint weight draws come from one seed."""
    with torch.random.fork_rng(devices=[]), mock.patch.object(elbo, "standard_normal", torch.zeros_like):
        torch.manual_seed(seed)
        yield


def loss_value(posterior: Posterior, x_BCHW: Tensor, y_B: Tensor) -> tuple[float, float, float]:
    """Return (total, nll, kl) of a batch under fixed noise."""
    with fixed_noise(), torch.no_grad():
        loss = posterior.loss(x_BCHW, y_B)
    return float(loss.total), float(loss.nll), float(loss.kl)


def train_toy(posterior: Posterior, problem: ToyProblem, *, steps: int, seed: int = 0) -> None:
    """Train on the whole toy problem with the optimizers and the step that `fit` uses, the rate falling to zero."""
    engine = Engine(torch.device("cpu"))
    optimizers = build_optimizers(posterior, OptimizerConfig())
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        posterior.train()
        for step in range(steps):
            for optimizer, peaks in zip(optimizers, rates, strict=True):
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * (1 - step / steps)
            engine.train_step(posterior, optimizers, problem.x_NCHW, problem.y_N)
    posterior.eval()


def check_same_seed_same_logits(family: Family) -> None:
    """The same seed gives the same joint draws; predictions need no seed at all."""
    problem = toy_problem()
    posterior = build(family, problem)
    with torch.no_grad():
        first, second = (_seeded_logits(posterior, problem, 4) for _ in range(2))
        assert torch.equal(first, second), "same seed, different logits"
        draws = [posterior.predict_draws(problem.x_NCHW, 4) for _ in range(2)]
        assert torch.equal(*draws), "predict_draws is not deterministic"
        with_features, _ = posterior.draws_and_features(problem.x_NCHW, 4)
        assert torch.equal(with_features, draws[0]), "draws_and_features gives other draws than predict_draws"


def check_state_round_trip(family: Family) -> None:
    """Build and load_state_dict gives bit-equal logits and draws."""
    problem = toy_problem()
    source, target = build(family, problem, seed=1), build(family, problem, seed=2)
    target.load_state_dict(source.state_dict())
    with torch.no_grad():
        assert torch.equal(_seeded_logits(source, problem, 4), _seeded_logits(target, problem, 4))
        assert torch.equal(source.predict_draws(problem.x_NCHW, 8), target.predict_draws(problem.x_NCHW, 8))


def check_names_never_change(family: Family) -> None:
    """Names and shapes in state_dict are the same before and after the first loss and after finalize."""
    problem = toy_problem()
    posterior = build(family, problem)
    before = {name: tensor.shape for name, tensor in posterior.state_dict().items()}
    assert before, "a posterior without state"
    torch.autograd.backward(posterior.loss(problem.x_NCHW, problem.y_N).total)
    family.finalize(posterior, [(problem.x_NCHW, problem.y_N)])
    after = {name: tensor.shape for name, tensor in posterior.state_dict().items()}
    assert before == after, f"state changed: {sorted(before.keys() ^ after.keys())}"


def check_no_shared_storage(family: Family) -> None:
    """No two tensors of state_dict share storage: safetensors would refuse them."""
    pointers = [t.untyped_storage().data_ptr() for t in build(family, toy_problem()).state_dict().values() if t.numel()]
    assert len(set(pointers)) == len(pointers), "tensors share storage"


def check_param_store_stays_empty(family: Family) -> None:
    """Building, training and predicting leave Pyro's global parameter store alone."""
    problem = toy_problem()
    before = set(pyro.get_param_store().keys())
    posterior = build(family, problem)
    train_toy(posterior, problem, steps=2)
    with torch.no_grad():
        posterior.logits(problem.x_NCHW, 2)
    assert set(pyro.get_param_store().keys()) == before, "the global parameter store was written to"


def check_loss_ignores_order_and_duplicates(family: Family) -> None:
    """Reordering or duplicating a batch leaves its loss (1e-6 relative, evaluation mode, fixed noise)."""
    problem = toy_problem()
    posterior = build(family, problem).double()
    x, y = problem.x_NCHW.double(), problem.y_N
    whole = loss_value(posterior, x, y)
    _assert_close(loss_value(posterior, x.flip(0), y.flip(0)), whole, "reordered batch")
    _assert_close(loss_value(posterior, torch.cat([x, x]), torch.cat([y, y])), whole, "duplicated batch")


def check_batches_add_up(family: Family) -> None:
    """Sum over batches of B_b x loss_b = N x full-data loss, ragged last batch included; each has the whole KL."""
    problem = toy_problem(num_examples=60)
    posterior = build(family, problem).double()
    x, y = problem.x_NCHW.double(), problem.y_N
    total, nll, kl = loss_value(posterior, x, y)
    batches = [loss_value(posterior, *batch) for batch in zip(x.split(17), y.split(17), strict=True)]
    sizes = [len(batch) for batch in y.split(17)]
    assert sizes[-1] not in (0, 17), "the last batch is meant to be ragged"
    mean = [sum(size * batch[part] for size, batch in zip(sizes, batches, strict=True)) / len(y) for part in (0, 1)]
    _assert_close(mean, (total, nll), "batches do not add up")
    _assert_close([batch[2] for batch in batches], [kl] * len(batches), "the KL depends on the batch")
    _assert_close([total], [nll + kl / len(y)], "total is not NLL + KL / N")


def check_shapes(family: Family) -> None:
    """Draws are (S, B, K) float32 at B = 1 and above; finite posteriors give at most their own."""
    problem = toy_problem()
    posterior = build(family, problem)
    num_classes = len(problem.weight_KD)
    for num_images in (1, 7):
        for asked in (1, 4):
            for method in (posterior.logits, posterior.predict_draws):
                with torch.no_grad():
                    draws = method(problem.x_NCHW[:num_images], asked)
                expected = (min(asked, posterior.max_draws or asked), num_images, num_classes)
                assert draws.shape == expected, f"{method.__name__} gave {tuple(draws.shape)}, not {expected}"
                assert draws.dtype == torch.float32, f"{method.__name__} gave {draws.dtype}"
    loss = posterior.loss(problem.x_NCHW[:1], problem.y_N[:1])
    assert all(part.dim() == 0 for part in loss), "the loss has parts that are not scalars"


def check_posteriors_are_independent(family: Family) -> None:
    """Training one posterior leaves another in the same process as it was."""
    problem = toy_problem()
    trained, other = build(family, problem, seed=1), build(family, problem, seed=1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    train_toy(trained, problem, steps=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items()), "nothing learnt"


def check_particles_equal_a_loop(family: Family) -> None:
    """Joint draws from stacked weights equal a loop over the draws (head families)."""
    problem = toy_problem()
    posterior = build(family, problem)
    if not isinstance(posterior, HeadPosterior):
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        features = posterior.features(problem.x_NCHW)
        torch.manual_seed(0)
        weights_SKD = posterior.head.sample(5)
        torch.manual_seed(0)
        logits_SBK = posterior.logits(problem.x_NCHW, 5)
    for weight_KD, logits_BK in zip(weights_SKD, logits_SBK, strict=True):
        expected_BK = features @ weight_KD[:, :-1].T + weight_KD[:, -1]
        assert torch.allclose(logits_BK, expected_BK, atol=1e-5), "vectorised draws differ from a loop"


def check_draws_ignore_companions(family: Family) -> None:
    """An image's draws do not depend on what else is in the batch (1e-5, evaluation mode)."""
    problem = toy_problem()
    posterior = build(family, problem)
    with torch.no_grad():
        together = posterior.predict_draws(problem.x_NCHW[:6], 8)
        alone = torch.cat([posterior.predict_draws(x[None], 8) for x in problem.x_NCHW[:6]], 1)
    assert torch.allclose(together, alone, atol=1e-5), "draws depend on companions"


def check_draws_match_moments(family: Family) -> None:
    """Mean and standard deviation of the predictions' draws are those of the posterior (head families).

    Gaussian heads: they equal the closed-form logit moments. The table's columns have mean 0 and variance 1 exactly, so
    this is an equality for heads without a factor; with one, the Sobol columns' correlations enter, below 0.05 at
    S = 256. Other heads: 256 draws are compared with 2,048 joint ones; over all images and classes the root mean square
    of the differences is within 0.25 standard deviations (0.07 is expected where all logits share their noise) and that
    of the log ratios of scales within 0.2 (0.05 is expected): a scale of 0.7 is caught.
    """
    problem = toy_problem()
    posterior = build(family, problem)
    if not isinstance(posterior, HeadPosterior):
        return
    with torch.no_grad():
        # In float64 a mean of equal draws is exactly that draw, so that a posterior without spread has none here.
        draws_SBK = posterior.predict_draws(problem.x_NCHW, 256).double()
        mean_BK, scale_BK = draws_SBK.mean(0), draws_SBK.std(0, correction=0)
        if not isinstance(posterior, GaussianHeadPosterior):
            joint_SBK = _seeded_logits(posterior, problem, 2048)
            difference_BK = (mean_BK - joint_SBK.mean(0)) / joint_SBK.std(0)
            assert difference_BK.square().mean().sqrt() <= 0.25, "means differ"
            assert (scale_BK / joint_SBK.std(0)).log().square().mean().sqrt() <= 0.2, "scales differ"
            return
        moments = posterior.head.logit_moments(posterior.features(problem.x_NCHW))
    exact_BK = (moments.scale_BK.square() + moments.factor_BKR.square().sum(-1)).sqrt()
    tolerance = 0.05 if moments.factor_BKR.shape[-1] else 1e-4
    assert ((mean_BK - moments.mean_BK).abs() <= tolerance * exact_BK).all(), "means differ"
    assert ((scale_BK - exact_BK).abs() <= tolerance * exact_BK).all(), "scales differ"


def has_initial_scale(family: Family) -> bool:
    """Return whether the family's posterior has a scale that a setting starts and gradients fit."""
    return "initial_scale" in {field.name for field in fields(family.config)}


def check_scale_is_fitted(family: Family) -> None:
    """Two runs whose initial posterior sd differ by a factor of 4 end with median sd within 20 %.

    A posterior whose scale stays where it started is a constant, not an inference. Both start far below the optimum:
    the gradient of a log sd is proportional to the variance there, so that an optimizer that does not rescale its
    gradients, such as the backbone's SGD, leaves them apart. Applies to families with an ``initial_scale``.
    """
    if not has_initial_scale(family):
        return
    problem = toy_problem(num_examples=400)
    ends = []
    for initial in (0.02, 0.08):
        posterior = build(family, problem, initial_scale=initial)
        train_toy(posterior, problem, steps=400)
        scale = posterior.posterior_scale()
        assert scale is not None, "a family with an initial scale has no posterior_scale"
        ends.append(float(scale.median()))
    assert max(ends) / min(ends) <= 1.2, f"median posterior sd ends at {ends[0]:.3f} or {ends[1]:.3f}"


CHECKS: tuple[Callable[[Family], None], ...] = (
    check_same_seed_same_logits,
    check_state_round_trip,
    check_names_never_change,
    check_no_shared_storage,
    check_param_store_stays_empty,
    check_loss_ignores_order_and_duplicates,
    check_batches_add_up,
    check_shapes,
    check_posteriors_are_independent,
    check_particles_equal_a_loop,
    check_draws_ignore_companions,
    check_draws_match_moments,
    check_scale_is_fitted,
)


class OperatorCounter(TorchDispatchMode):
    """Counts dispatched operators, and those that make the host wait for the device. Exact on a CPU, needs no GPU.

    Example:
        >>> with OperatorCounter() as counter:
        ...     _ = torch.ones(3).sum().item()
        >>> counter.num_operators, counter.num_host_syncs
        (3, 1)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_operators = 0
        self.num_host_syncs = 0

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        self.num_operators += 1
        self.num_host_syncs += func.overloadpacket.__name__ in HOST_SYNCS
        return func(*args, **(kwargs or {}))


def _seeded_logits(posterior: Posterior, problem: ToyProblem, num_samples: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return posterior.logits(problem.x_NCHW, num_samples)


def _assert_close(actual: Any, expected: Any, what: str) -> None:  # noqa: ANN401 - numbers in any sequence
    difference = (torch.tensor(actual).double() - torch.tensor(expected).double()).abs()
    limit = 1e-6 * torch.tensor(expected).double().abs().clamp_min(1e-9)
    assert (difference <= limit).all(), f"{what}: {actual} instead of {expected}"
