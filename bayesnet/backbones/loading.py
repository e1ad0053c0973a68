"""Weights of others into a backbone: every name and every shape has to agree."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bayesnet import weights
from bayesnet.backbones.base import BackboneEntry, Features
from bayesnet.errors import CheckpointError, ConfigError

NONE, DEFAULT = "none", "default"

# Files of DenseNets are from a time when names of modules could have dots in them.
_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def fill(backbone: nn.Module, entry: BackboneEntry, source: str, *, name: str) -> None:
    """Fill a backbone with weights, in place.

    Args:
        backbone: As ``entry.build`` made it.
        entry: Its row of the table.
        source: "default", or the path of a file.
        name: The backbone's public name.

    Raises:
        ConfigError: "default", where nobody published any.
        CheckpointError: They cannot be had or read, or are those of another network.
    """
    if source != DEFAULT:
        fill_from_state(backbone, weights.read_state_dict(Path(source).expanduser()), where=source)
        return
    published = entry.published()
    if published is None or published.read is None:
        hint = "set backbone.weights to none, or to the path of a file"
        raise ConfigError(f"{name} has no published weights", where="backbone.weights = default", hint=hint)
    fill_from_state(backbone, published.read(), where=f"the published weights of {name}")


def fill_from_state(backbone: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Fill a backbone with a state dict, in place; entries of a classifier that was taken off are left out.

    The network's own rules for renaming entries of older versions are followed.

    Args:
        backbone: The network itself, or Features around it.
        state: Tensors by the network's own names.
        where: What they are called in errors.

    Raises:
        CheckpointError: A name is missing or unexpected, or a shape differs; the backbone is then of no use.
    """
    network = backbone.network if isinstance(backbone, Features) else backbone
    classifiers = tuple(f"{part}." for part in backbone.classifiers) if isinstance(backbone, Features) else ()
    own = network.state_dict()
    state = {_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    given = OrderedDict((key, value) for key, value in state.items() if key in own or not key.startswith(classifiers))
    for key, value in given.items():
        if key in own and value.shape != own[key].shape:
            hint = f"{key} has shape {tuple(value.shape)}, the backbone's has {tuple(own[key].shape)}"
            raise CheckpointError("the weights do not fit the backbone", where=where, hint=hint)
        if key in own and own[key].is_floating_point():
            if not value.is_floating_point():  # a cast would cut off what does not fit
                hint = f"{key} holds {str(value.dtype).removeprefix('torch.')} numbers"
                raise CheckpointError("the weights are not floating-point numbers", where=where, hint=hint)
            if not bool(torch.isfinite(value).all()):
                raise CheckpointError("the weights are not finite", where=where, hint=f"{key} has NaN or infinity")
    # The version of the network as a whole is the present one; parts without a version are taken for old ones, which
    # lets batch norm do without counts and vision transformers rename their layers.
    given._metadata = {"": {"version": getattr(network, "_version", 1)}}  # type: ignore[attr-defined]
    try:
        missing, unexpected = network.load_state_dict(given, strict=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError("the weights do not fit the backbone", where=where, hint=reason) from error
    named = (("missing", missing), ("unexpected", unexpected))
    found = [f"{len(keys)} {what}, first {keys[0]}" for what, keys in named if keys]
    if found:
        raise CheckpointError("the weights do not fit the backbone", where=where, hint="; ".join(found))
