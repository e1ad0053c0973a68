r"""Deep ensemble: M networks of one family, trained one after the other from different random states.

    p(y | x) = 1/M sum_m p(y | x, network m),    loss = 1/M sum_m loss_m    (training minimises each loss_m by itself)

Assumptions: the members are what independent runs would give, each its own backbone and head; the first is the run of
its family for the same seed. Each has its own initial weights, order, augmentation and noise, but where a backbone
comes with weights (pretrained or a caller's own) the initial weights differ in the head alone. Members of one draw give
M draws in all, no sample of a posterior: an interval is their range. Members with a posterior of their own give theirs
in turns: the mixture with equal weights.
Cost: M times training, M passes per prediction, M times the weights in memory and on disk. The passes are a loop: one
vectorised pass (torch.func) took 0.9 to 1.6 times as long on a CPU, and its stacked weights as much memory again.
Reference: Lakshminarayanan, Pritzel and Blundell 2017, "Simple and scalable predictive uncertainty estimation using
deep ensembles", arXiv:1612.01474.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from bayesnet.checkpoint import MAX_TENSORS_BYTES
from bayesnet.config import require
from bayesnet.errors import ConfigError
from bayesnet.inference import deterministic, mean_field
from bayesnet.inference.base import Family, Parts, Posterior, no_finalize
from bayesnet.registry import Registry
from bayesnet.types import Loss

MAX_MEMBERS = 256

MEMBER_FAMILIES: Registry[Family] = Registry(
    "member family",
    {"deterministic": deterministic.FAMILY, "mean_field": mean_field.FAMILY},
)
"""What an ensemble can be made of: families that training alone fits, each with its default settings."""


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """Settings of the ensemble.

    Attributes:
        family: The name, "ensemble".
        members: M, networks.
        member_family: What each of them is, with that family's default settings.
    """

    family: str = "ensemble"
    members: int = 5
    member_family: Literal["deterministic", "mean_field"] = "deterministic"

    def __post_init__(self) -> None:
        valid = 2 <= self.members <= MAX_MEMBERS
        require(valid, f"must be from 2 to {MAX_MEMBERS}", where=f"inference.members = {self.members}")


class Ensemble(Posterior):
    """Posteriors of one family, their predictions mixed with equal weights.

    Args:
        networks: The members, built alike.
    """

    def __init__(self, networks: Sequence[Posterior]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        own = networks[0].max_draws
        self.max_draws = None if own is None else own * len(networks)

    def members(self) -> tuple[Posterior, ...]:
        """Return the networks, which are trained one after the other."""
        return cast("tuple[Posterior, ...]", tuple(self.networks))

    def loss(self, x_BCHW: Tensor, y: Tensor) -> Loss:
        """Return the mean of the members' losses on a batch."""
        losses = zip(*(member.loss(x_BCHW, y) for member in self.members()), strict=True)
        return Loss(*(torch.stack(parts).mean() for parts in losses))

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return joint draws of the logits (S, B, K), the members taking turns; S is at most M for members of one."""
        return self._in_turns(num_samples, lambda member, num_draws: member.logits(x_BCHW, num_draws))

    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return draws of the logits (S, B, K), the same in every call, the members taking turns."""

        def draws(member: Posterior, num_draws: int) -> Tensor:
            # A member's table gives powers of two; what is too many is left out.
            return member.predict_draws(x_BCHW, 1 << (num_draws - 1).bit_length())[:num_draws]

        return self._in_turns(num_samples, draws)

    def _in_turns(self, num_samples: int, draws: Callable[[Posterior, int], Tensor]) -> Tensor:
        """Return S draws, the s-th from member s mod M; members whose turn never comes are not asked."""
        num_draws = min(num_samples, self.max_draws or num_samples)
        asked = self.members()[:num_draws]
        rounds = -(-num_draws // len(asked))
        draws_RMBK = torch.stack([draws(member, rounds) for member in asked], 1)
        return draws_RMBK.flatten(0, 1)[:num_draws]

    def variational_parameters(self) -> Sequence[nn.Parameter]:
        """Return those of all members."""
        return [parameter for member in self.members() for parameter in member.variational_parameters()]

    def scale_parameters(self) -> Sequence[nn.Parameter]:
        """Return those of all members."""
        return [parameter for member in self.members() for parameter in member.scale_parameters()]

    def posterior_scale(self) -> Tensor | None:
        """Return the posterior standard deviations of all members in one vector, or None for point estimates."""
        scales = [scale.flatten() for member in self.members() if (scale := member.posterior_scale()) is not None]
        return torch.cat(scales) if scales else None

    @property
    def kl_is_exact(self) -> bool:
        """Whether the KL of every member is closed form."""
        return all(member.kl_is_exact for member in self.members())


def ensemble_bytes(member: nn.Module, num_members: int) -> int:
    """Return how many bytes the tensors of an ensemble take, in memory and in the checkpoint of the whole.

    Example:
        >>> ensemble_bytes(nn.Linear(9, 10), 5)
        2000
    """
    member_bytes: int = sum(tensor.nbytes for tensor in member.state_dict().values())
    return num_members * member_bytes


def build(parts: Parts, config: EnsembleConfig) -> Posterior:
    """Return an untrained ensemble, its members initialised one after the other from torch's random state.

    Raises:
        ConfigError: It would be larger than a checkpoint can be, or nothing makes backbones for the other members.
    """
    family = MEMBER_FAMILIES[config.member_family]
    networks = [family.build(parts, family.config())]
    num_bytes = ensemble_bytes(networks[0], config.members)
    if num_bytes > MAX_TENSORS_BYTES:
        size = f"{num_bytes / 2**30:.1f} GiB, at most {MAX_TENSORS_BYTES / 2**30:.1f}"
        hint = "take fewer members, or the family mc_dropout, which has one network"
        raise ConfigError("the ensemble is too large", where=f"{config.members} members: {size}", hint=hint)
    for index in range(1, config.members):
        another = parts._replace(backbone=_another_backbone(parts), table_seed=parts.table_seed + index)
        networks.append(family.build(another, family.config()))
    return Ensemble(networks)


def _another_backbone(parts: Parts) -> nn.Module:
    """Return a backbone for another member.

    Raises:
        ConfigError: There is nothing to make it with: a copy would make all members start, and so often end, alike.
    """
    if parts.new_backbone is not None:
        return parts.new_backbone()
    if any(True for _ in parts.backbone.parameters()):
        hint = "give Parts.new_backbone, a function that returns another one"
        raise ConfigError("an ensemble needs a backbone for each member", hint=hint)
    return copy.deepcopy(parts.backbone)


FAMILY = Family(
    name="ensemble",
    config=EnsembleConfig,
    build=build,
    finalize=no_finalize,
    description="several networks, trained one after the other",
)
