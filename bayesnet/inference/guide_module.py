"""Any Pyro guide over the head's weight as a module: it trains, moves between devices, saves and loads like a layer.

A PyroModule or an automatic guide is a module already. A plain Pyro function is not: it keeps its parameters in Pyro's
global store. Here it runs once, in a store of its own; each `pyro.param` becomes an unconstrained parameter, and every
later run gets its constrained value in the place of the store's.

The guide is that of a head: its weight must not depend on the features or labels it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.distributions.constraints import Constraint

from bayesnet.config import require
from bayesnet.elbo import PyroProgram, is_delta, private_pyro, sample_sites
from bayesnet.errors import ConfigError
from bayesnet.model import WEIGHT, BayesianHead

GUIDE_HINT = "a guide is an automatic guide's class, or a function from the head that returns a PyroModule or function"
_TRIAL_DRAWS = 3


class GuideModule(nn.Module):
    """A Pyro guide with the parameters that it had after its first run; no later run adds or renames any.

    Args:
        program: A Pyro program of (features, labels) with a sample site "weight" of event shape (K, D + 1).
        head: The model that it is the guide of.

    Raises:
        ConfigError: The program cannot be called, lacks the site, gives it another shape, draws what the model does not
            have, or holds tensors of the model.

    Example:
        >>> import pyro.distributions as dist
        >>> def guide(features, y=None):
        ...     scale = pyro.param("scale", torch.full((3, 5), 0.1), constraint=dist.constraints.positive)
        ...     pyro.sample("weight", dist.Normal(torch.zeros(3, 5), scale).to_event(2))
        >>> module = GuideModule(guide, BayesianHead(4, 3, 100, 1.0, 1.0))
        >>> [(name, parameter.exp().mean().item()) for name, parameter in module.named_parameters()]
        [('param_scale', 0.1000...)]
        >>> module.sample(7).shape
        torch.Size([7, 3, 5])
    """

    def __init__(self, program: object, head: BayesianHead) -> None:
        super().__init__()
        if not callable(program):
            raise ConfigError("the guide is no Pyro program", where=type(program).__name__, hint=GUIDE_HINT)
        # A module is registered, so that its tensors are this module's; that of a bound method likewise.
        owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
        self.owner = owner if isinstance(owner, nn.Module) else None
        self._program: tuple[PyroProgram] | None = None if program is owner else (program,)
        self._constraints: dict[str, tuple[str, Constraint]] = {}
        self._shape = head.prior_scale.shape
        self.register_buffer("zero_features_BD", head.prior_loc.new_zeros(1, head.num_features), persistent=False)
        with private_pyro():
            trace = poutine.trace(self, graph_type="flat").get_trace(*self._inputs())
            self._adopt(pyro.get_param_store().get_state())
        self._check(trace, head)
        self._check_runs(head)
        self.vectorised = self._draws_together()

    @property
    def program(self) -> PyroProgram:
        """The guide as it was given."""
        if self._program is not None:
            return self._program[0]
        assert self.owner is not None
        return self.owner

    def forward(self, features_BD: Tensor, y: Tensor | None = None) -> object:
        """Run the guide as a Pyro program on features (B, D) and labels; return what it returns."""
        if not self._constraints:
            return self.program(features_BD, y)
        values = {
            name: transform_to(constraint)(self.get_parameter(key))
            for name, (key, constraint) in self._constraints.items()
        }
        with poutine.substitute(data=values):
            return self.program(features_BD, y)

    def sample(self, num_samples: int) -> Tensor:
        """Return draws of the weight (S, K, D + 1) from torch's random state, at once where the guide allows it."""
        with private_pyro():
            if self.vectorised:
                return _weight(self._together(num_samples))
            return torch.stack([_weight(self._alone()) for _ in range(num_samples)])

    def _inputs(self) -> tuple[Tensor, Tensor]:
        """Return features and labels of one image: zeros, since a guide without labels would draw them."""
        features_BD = self.get_buffer("zero_features_BD")
        return features_BD, torch.zeros(1, dtype=torch.int64, device=features_BD.device)

    def _adopt(self, store: Mapping[str, Any]) -> None:
        """Make parameters of what the first run put into the store and no module of this one owns."""
        self._names = frozenset(store["params"])
        owned = {id(parameter) for parameter in self.parameters()}
        for name, value in store["params"].items():
            if id(value) in owned:
                continue
            key = f"param_{name.replace('.', '_').replace('$$$', '_')}"
            require(key not in self._parameters, "two parameters of the guide have one name", where=name)
            # A layer that the function uses stays the layer's own; a tensor is copied, since it may be another's too.
            parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())
            self.register_parameter(key, parameter)
            self._constraints[name] = (key, store["constraints"][name])

    def _check(self, trace: poutine.Trace, head: BayesianHead) -> None:
        """Raise ConfigError unless the trace of a run is that of a guide over the head's weight."""
        sites = sample_sites(trace)
        found = ", ".join(sites) or "none"
        hint = f'end with pyro.sample("{WEIGHT}", ...)'
        require(WEIGHT in sites, f"the guide has no site '{WEIGHT}'", where=f"its sites: {found}", hint=hint)
        site = sites[WEIGHT]
        shape, expected = tuple(site["fn"].batch_shape), tuple(self._shape)
        event_shape = tuple(site["fn"].event_shape)
        require(
            not shape and event_shape == expected,
            f"the guide's site '{WEIGHT}' has the wrong shape",
            where=f"batch {shape}, event {event_shape}",
            hint=f"its event shape is (classes, features + 1) = {expected}, bias last: end with .to_event(2)",
        )
        others = [name for name in sites if name != WEIGHT]
        if others and not is_delta(site["fn"]):  # log q(others) would have nothing to be compared with
            hint = f"draw only '{WEIGHT}', or make it a Delta of what you draw"
            raise ConfigError("the guide draws what the model does not have", where=", ".join(others), hint=hint)
        tensors = {id(tensor) for tensor in (*head.parameters(), *head.buffers())}
        if any(id(tensor) in tensors for tensor in (*self.parameters(), *self.buffers())):
            raise ConfigError("the guide holds the head as a submodule", hint="keep it in a tuple: self.head = (head,)")

    @torch.no_grad()
    def _check_runs(self, head: BayesianHead) -> None:
        """Raise ConfigError where a second run makes new parameters, or other features make another weight."""
        weights = []
        for scale in (0.0, 1.0):
            features_BD = scale * torch.linspace(0.1, 1, 3 * head.num_features).view(3, -1)
            with torch.random.fork_rng(devices=[]), private_pyro():
                torch.manual_seed(0)
                y_B = torch.zeros(3, dtype=torch.int64)
                trace = poutine.trace(self, graph_type="flat").get_trace(features_BD.to(head.prior_loc.device), y_B)
                new = sorted(pyro.get_param_store().get_state()["params"].keys() - self._names)
            require(not new, "the guide makes new parameters when it runs again", where=", ".join(new))
            weights.append(_weight(trace))
        hint = "draw it from parameters alone: a posterior over weights is the same for every image"
        require(torch.equal(*weights), "the guide's weight depends on the features", where=WEIGHT, hint=hint)

    def _alone(self) -> poutine.Trace:
        """Return the trace of one run."""
        return poutine.trace(self, graph_type="flat").get_trace(*self._inputs())

    def _together(self, num_samples: int) -> poutine.Trace:
        """Return the trace of one run in a plate of S draws."""
        with pyro.plate("_draws", num_samples, dim=-1):
            return self._alone()

    @torch.no_grad()
    def _draws_together(self) -> bool:
        """Return whether draws in a plate are those that a run of its own for each would make of the same noise."""
        with torch.random.fork_rng(devices=[]), private_pyro():
            try:
                together = self._together(_TRIAL_DRAWS)
                sites = sample_sites(together)
                if sites[WEIGHT]["value"].shape != (_TRIAL_DRAWS, *self._shape):
                    return False
                return all(self._same_alone(sites, index) for index in range(_TRIAL_DRAWS))
            except (RuntimeError, ValueError, NotImplementedError, IndexError):
                return False  # it was not written for a plate around it: draw one by one

    def _same_alone(self, sites: Mapping[str, Any], index: int) -> bool:
        """Return whether a run by itself, given a draw's random values, has its log-densities and its weight."""
        drawn = {name: site["value"][index] for name, site in sites.items() if not is_delta(site["fn"])}
        program = poutine.condition(self, data=drawn)
        alone = sample_sites(poutine.trace(program, graph_type="flat").get_trace(*self._inputs()))
        return all(
            _close(site["fn"].log_prob(site["value"])[index], alone[name]["fn"].log_prob(drawn[name]))
            if name in drawn
            else _close(site["value"][index], alone[name]["value"])
            for name, site in sites.items()
        )


def make_guide(factory: Callable[[BayesianHead], object], head: BayesianHead) -> GuideModule:
    """Return the guide that a factory makes of the head's program, run once.

    Raises:
        ConfigError: See `GuideModule`; or the factory cannot be called.
    """
    if not callable(factory):
        raise ConfigError("the guide is no function from the head", where=type(factory).__name__, hint=GUIDE_HINT)
    return GuideModule(factory(head), head)


def _weight(trace: poutine.Trace) -> Tensor:
    weight_KD: Tensor = sample_sites(trace)[WEIGHT]["value"]
    return weight_KD


def _close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-4, atol=1e-4)
