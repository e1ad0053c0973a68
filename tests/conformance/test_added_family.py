"""A new family is one file and one name: a toy one is written, named, put through the suite, trained and used."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bayesnet import workflows
from bayesnet.errors import ConfigError
from bayesnet.inference import FAMILIES
from bayesnet.inference.base import Family
from bayesnet.testing import CHECKS, check_batches_add_up, check_draws_ignore_companions

NAME = "one_scale"

FILE = '''
"""Gaussian head whose entries share one standard deviation.

    q(w) = prod_kd Normal(m_kd, s^2),    prior p(w) = prod_kd Normal(0, 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesnet.elbo import local_loss
from bayesnet.inference.base import Family, GaussianHeadPosterior, Parts, Posterior, no_finalize
from bayesnet.model import BayesianClassifier
from bayesnet.types import LogitGaussian, Loss


@dataclass(frozen=True, kw_only=True)
class OneScaleConfig:
    """Settings.

    Attributes:
        family: The name.
        initial_scale: Posterior standard deviation at the start.
    """

    family: str = "one_scale"
    initial_scale: float = 0.2


class OneScaleHead(nn.Module):
    """The Gaussian over the last layer."""

    def __init__(self, num_classes: int, num_columns: int, initial_scale: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.randn(num_classes, num_columns) / num_columns**0.5)
        self.log_scale = nn.Parameter(torch.tensor([initial_scale]).log())

    def sample(self, num_samples: int) -> Tensor:
        """Return joint draws of the weight (S, K, D + 1)."""
        return self.loc + self.log_scale.exp() * torch.randn(num_samples, *self.loc.shape)

    def logit_moments(self, features_BD: Tensor) -> LogitGaussian:
        """Return the exact Gaussian of each image's logits."""
        mean_BK = features_BD @ self.loc[:, :-1].T + self.loc[:, -1]
        scale_B1 = self.log_scale.exp() * (1 + features_BD.square().sum(1, keepdim=True)).sqrt()
        return LogitGaussian(mean_BK, scale_B1.expand_as(mean_BK), mean_BK.new_empty((*mean_BK.shape, 0)))

    def kl(self) -> Tensor:
        """Return the divergence from the prior, nats."""
        squares = self.loc.square() + (2 * self.log_scale).exp()
        return 0.5 * (squares - 1 - 2 * self.log_scale).sum()


class OneScale(GaussianHeadPosterior):
    """Backbone and head."""

    def __init__(self, parts: Parts, config: OneScaleConfig) -> None:
        super().__init__(
            BayesianClassifier(parts.backbone, parts.num_classes, parts.num_examples),
            rank=0,
            table_seed=parts.table_seed,
        )
        self.gaussian = OneScaleHead(parts.num_classes, parts.num_features + 1, config.initial_scale)

    @property
    def head(self) -> OneScaleHead:
        """The Gaussian over the last layer."""
        return self.gaussian

    def loss_from_features(self, features_BD: Tensor, y: Tensor) -> Loss:
        """Return the negative ELBO per example."""
        return local_loss(self.head.logit_moments(features_BD), y, self.head.kl(), self.num_examples)

    def variational_parameters(self) -> Sequence[nn.Parameter]:
        """Return mean and scale."""
        return (self.gaussian.loc, self.gaussian.log_scale)

    def scale_parameters(self) -> Sequence[nn.Parameter]:
        """Return the scale."""
        return (self.gaussian.log_scale,)

    def posterior_scale(self) -> Tensor:
        """Return the one standard deviation."""
        return self.gaussian.log_scale.detach().exp()


def build(parts: Parts, config: OneScaleConfig) -> Posterior:
    """Return an untrained posterior."""
    return OneScale(parts, config)


FAMILY = Family("one_scale", OneScaleConfig, build, no_finalize, "one standard deviation for the whole head")
'''


def imported(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Family:
    """Write the file, import it, and return its family."""
    path = folder / f"{NAME}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"added_{NAME}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where its annotations are looked up
    spec.loader.exec_module(module)
    family = module.FAMILY
    assert isinstance(family, Family)
    return family


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """Return the family, its name put into the table: the table itself is the only place that knows names."""
    family = imported(tmp_path, FILE, monkeypatch)
    monkeypatch.setitem(FAMILIES._entries, NAME, family)
    return family


def test_an_added_family_conforms(added: Family) -> None:
    assert FAMILIES[NAME] is added
    for check in CHECKS:
        check(added)


@pytest.mark.parametrize(
    ("right", "wrong", "check"),
    [
        ("self.head.kl(), self.num_examples", "self.head.kl(), len(y)", check_batches_add_up),
        ("= features_BD @ self", "= (features_BD - features_BD.mean(0)) @ self", check_draws_ignore_companions),
    ],
    ids=["KL per batch", "features centred by the batch"],
)
def test_an_added_family_with_a_fault_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str, check: Callable[[Family], None]
) -> None:
    assert FILE.count(right) == 1
    family = imported(tmp_path, FILE.replace(right, wrong), monkeypatch)
    with pytest.raises(AssertionError):
        check(family)


def test_an_added_family_trains_and_predicts_by_its_name(tmp_path: Path, added: Family) -> None:
    """Through the public functions, with settings of its own and of training; and it is listed."""
    overrides = ("backbone.width=4", "inference.initial_scale=0.1", "training.temperature=0.5", "training.sam_rho=0.05")
    run = tmp_path / "run"
    summary = workflows.train(
        data="digits", family=NAME, epochs=1, devices="cpu", out=run, overrides=(*overrides, "training.twin=false")
    )
    model = summary["models"]["bayesian"]
    assert model["family"] == NAME
    assert model["posterior_temperature"] == 0.5
    assert model["kl"] > 0
    assert abs(model["posterior_scale"]["initial"] - 0.1) < 1e-6
    record = workflows.predict([run / "examples"], run=run, devices="cpu")
    assert record["interval"]["samples"] == 256
    assert any(row["name"] == NAME for row in workflows.list_families()["rows"])
    with pytest.raises(ConfigError, match=r"unknown configuration key \(inference.prior_scal\)"):
        workflows.train(data="digits", family=NAME, overrides=("inference.prior_scal=1",), out=tmp_path / "no")
