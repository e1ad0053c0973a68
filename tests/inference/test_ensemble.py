"""The ensemble: its members are independent networks, its draws are theirs, and what it cannot be is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from bayesnet.backbones import BackboneConfig, build_backbone
from bayesnet.errors import ConfigError
from bayesnet.inference import ensemble
from bayesnet.inference.base import Family, Parts, Posterior, no_finalize
from bayesnet.inference.deterministic import Deterministic
from bayesnet.inference.ensemble import Ensemble, EnsembleConfig
from bayesnet.testing import (
    CHECKS,
    OperatorCounter,
    build,
    check_no_shared_storage,
    check_same_seed_same_logits,
    check_shapes,
    toy_problem,
    train_toy,
)
from bayesnet.types import Loss

PROBLEM = toy_problem()
IMAGES_BCHW = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def new_backbone() -> torch.nn.Module:
    return build_backbone(BackboneConfig(width=2), channels=1, height=8, width=8)


def make(members: int = 3, **settings: object) -> Posterior:
    torch.manual_seed(0)
    parts = Parts(new_backbone(), 3, 60, table_seed=7, new_backbone=new_backbone)
    return ensemble.build(parts, EnsembleConfig(members=members, **settings)).eval()  # type: ignore[arg-type]


def _of_mean_fields(parts: Parts, config: EnsembleConfig) -> Posterior:
    return ensemble.build(parts, dataclasses.replace(config, members=3, member_family="mean_field"))


FAMILIES = {"deterministic": ensemble.FAMILY, "mean_field": ensemble.FAMILY._replace(build=_of_mean_fields)}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("members", ["mean_field"])
def test_the_family_conforms(members: str, check: Callable[[Family], None]) -> None:
    check(FAMILIES[members])


class RandomTurns(Ensemble):
    """Asks its members in another order each time."""

    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        draws_SBK = super().predict_draws(x_BCHW, num_samples)
        return draws_SBK + 1e-3 * torch.randn(len(draws_SBK), 1, 1)


class AlwaysAll(Ensemble):
    """Gives all its draws, however few are asked for."""

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        return super().logits(x_BCHW, len(self.members()))


class OneNetwork(Ensemble):
    """Holds one network several times."""

    def __init__(self, networks: list[Posterior]) -> None:
        super().__init__([networks[0]] * len(networks))


@pytest.mark.parametrize(
    ("planted", "check"),
    [
        (RandomTurns, check_same_seed_same_logits),
        (AlwaysAll, check_shapes),
        (OneNetwork, check_no_shared_storage),
    ],
)
def test_planted_faults_are_caught(planted: type[Ensemble], check: Callable[[Family], None]) -> None:
    def build_planted(parts: Parts, config: EnsembleConfig) -> Posterior:
        return planted(list(ensemble.build(parts, config).members()))

    with pytest.raises(AssertionError):
        check(ensemble.FAMILY._replace(build=build_planted))


@pytest.mark.parametrize("asked", [1, 2, 3, 256])
def test_the_draws_are_the_members_own(asked: int) -> None:
    posterior = make()
    with torch.no_grad():
        alone = torch.cat([member.logits(IMAGES_BCHW, 1) for member in posterior.members()])
        for draws_SBK in (posterior.logits(IMAGES_BCHW, asked), posterior.predict_draws(IMAGES_BCHW, asked)):
            assert torch.equal(draws_SBK, alone[:asked])


@pytest.mark.parametrize("asked", [1, 4, 64])
def test_members_with_a_posterior_take_turns(asked: int) -> None:
    posterior = make(member_family="mean_field")
    assert posterior.max_draws is None
    with torch.no_grad():
        draws_SBK = posterior.predict_draws(IMAGES_BCHW, asked)
        assert len(draws_SBK) == asked
        for index, member in enumerate(posterior.members()):
            turns_SBK = draws_SBK[index::3]
            if len(turns_SBK):
                rows = 1 << (len(draws_SBK[::3]) - 1).bit_length()
                assert torch.equal(turns_SBK, member.predict_draws(IMAGES_BCHW, rows)[: len(turns_SBK)])


def test_the_members_are_independent_and_the_first_is_the_twin() -> None:
    posterior = make()
    torch.manual_seed(0)
    twin = Deterministic(Parts(new_backbone(), 3, 60))
    members = posterior.members()
    assert all(torch.equal(left, right) for left, right in zip(members[0].parameters(), twin.parameters(), strict=True))
    for index, member in enumerate(members):
        for other in members[:index]:
            for name in ("backbone.layers.0.weight", "head.weight"):
                assert not torch.allclose(member.get_parameter(name), other.get_parameter(name))
    tables = [member.get_buffer("table_SE") for member in make(member_family="mean_field").members()]
    assert not torch.equal(tables[0], tables[1])


def test_names_say_which_member() -> None:
    names = list(make(2).state_dict())
    assert names[0] == "networks.0.backbone.layers.0.weight"
    assert names[-1] == "networks.1.head.bias"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_loss_is_the_mean_of_the_members(family: str) -> None:
    posterior = make(member_family=family)
    y_B = torch.arange(6) % 3
    torch.manual_seed(3)
    losses = [member.loss(IMAGES_BCHW, y_B) for member in posterior.members()]
    torch.manual_seed(3)
    whole = posterior.loss(IMAGES_BCHW, y_B)
    for part in Loss._fields:
        expected = torch.stack([getattr(loss, part) for loss in losses]).mean()
        assert torch.allclose(getattr(whole, part), expected)


def test_it_owns_what_its_members_own() -> None:
    posterior = make(member_family="mean_field")
    assert len(posterior.variational_parameters()) == 2 * len(posterior.scale_parameters()) == 6
    scale = posterior.posterior_scale()
    assert scale is not None
    assert scale.shape == (3 * 3 * 9,)
    assert posterior.kl_is_exact
    assert make().posterior_scale() is None
    assert make().variational_parameters() == []


def test_the_mixture_is_no_worse_than_its_members_on_average() -> None:
    """Jensen's inequality: no false alarm."""
    posterior = build(ensemble.FAMILY, PROBLEM)
    train_toy(posterior, PROBLEM, steps=20)
    with torch.no_grad():
        log_SBK = posterior.predict_draws(PROBLEM.x_NCHW, 256).log_softmax(-1)
    of_label_SB = log_SBK.gather(2, PROBLEM.y_N.expand(len(log_SBK), -1)[..., None]).squeeze(-1)
    mixture = of_label_SB.exp().mean(0).log().mean()
    assert mixture >= of_label_SB.mean()


def test_predicting_never_waits_for_the_device() -> None:
    posterior = make()
    with torch.inference_mode(), OperatorCounter() as counter:
        posterior.predict_draws(IMAGES_BCHW, 256)
    assert counter.num_host_syncs == 0


def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for members in (1, 257):
        with pytest.raises(ConfigError) as caught:
            EnsembleConfig(members=members)
        assert str(caught.value) == f"must be from 2 to 256 (inference.members = {members})"
    with pytest.raises(ConfigError) as caught:
        ensemble.build(Parts(new_backbone(), 3, 60), EnsembleConfig())
    hint = "give Parts.new_backbone, a function that returns another one"
    assert str(caught.value) == f"an ensemble needs a backbone for each member: {hint}"
    size = ensemble.ensemble_bytes(Deterministic(Parts(new_backbone(), 3, 60)), 3)
    assert size == sum(tensor.nbytes for tensor in make().state_dict().values())
    monkeypatch.setattr(ensemble, "MAX_TENSORS_BYTES", size)
    make(3)
    with pytest.raises(
        ConfigError, match=r"^the ensemble is too large \(4 members: 0.0 GiB, at most 0.0\): take fewer"
    ):
        make(4)


def test_members_are_of_families_that_training_alone_fits() -> None:
    names = get_args(get_type_hints(EnsembleConfig)["member_family"])
    assert tuple(ensemble.MEMBER_FAMILIES) == names
    assert all(ensemble.MEMBER_FAMILIES[name].finalize is no_finalize for name in names)
