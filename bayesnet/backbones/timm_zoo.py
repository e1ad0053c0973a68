"""``timm:NAME``: the networks of timm (PyTorch Image Models), an extra: ``pip install 'bayesnet[timm]'``.

A name may carry the tag of its weights, as in ``timm:resnet18.a1_in1k``. timm is imported when one of the functions is
called, not before.

What is checked of published weights: they come from Hugging Face by its own client over https, only as safetensors, a
format that holds no code, and every name and shape must be the network's. What is not: nobody publishes a hash of the
files that could be pinned here, so their contents are whatever the owner of the repository has put there last.
"""

from __future__ import annotations

import math
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from bayesnet import weights
from bayesnet.backbones.base import (
    BackboneEntry,
    Features,
    Published,
    Zoo,
    require_fit,
    require_fixed_width,
    unknown_model,
)
from bayesnet.errors import CheckpointError, ConfigError

PREFIX = "timm"
FILE_NAME = "model.safetensors"
CROP_SHARE = 0.875
"""Side of the crop over the short side of the image, where timm names none."""


@cache
def names() -> tuple[str, ...]:
    """Return the names of timm's networks, without the tags of their weights."""
    return tuple(_timm().list_models())


def published(name: str) -> Published:
    """Return what timm says about the weights of a name; it keeps no accuracies."""
    config = _pretrained_config(name)
    _, height, width = config.input_size
    hosted = config.hf_hub_id and not config.custom_load
    file_name = config.hf_hub_filename or FILE_NAME
    is_safe = hosted and file_name.endswith(".safetensors")
    return Published(
        read=partial(_download, config.hf_hub_id, file_name) if is_safe else None,
        input_size=int(width),
        accuracy=None,
        # A few were evaluated on a crop that is larger than the image, with a border around it.
        resize=max(int(width), math.floor(width / (config.crop_pct or CROP_SHARE))),
        crop=int(width) if height == width else 0,
        mean=tuple(config.mean),
        std=tuple(config.std),
    )


def build(name: str, *, channels: int, height: int, width: int, base_width: int, original: bool) -> nn.Module:
    """Return a network's feature extractor for images of this size.

    Raises:
        ConfigError: A width was asked for, or the network does not take images of this size.
    """
    public_name = f"{PREFIX}:{name}"
    require_fixed_width(public_name, base_width)
    network: nn.Module = _timm().create_model(name, pretrained=False, num_classes=0, in_chans=channels)
    config = _pretrained_config(name)
    num_features = require_fit(
        public_name,
        network,
        channels=channels,
        height=height,
        width=width,
        published_size=int(config.input_size[-1]),
        min_size=int(config.min_input_size[-1]) if config.min_input_size else 1,
    )
    classifiers = (config.classifier,) if isinstance(config.classifier, str) else tuple(config.classifier or ())
    return Features(network, num_features, classifiers=classifiers)


def entry(name: str) -> BackboneEntry:
    """Return the row of a network.

    Raises:
        ConfigError: timm is not installed, or has no such network.
    """
    # Only names of the lists get through: timm itself would also take addresses of repositories.
    if name not in names() and name not in _timm().list_pretrained():
        raise unknown_model(PREFIX, name, names())
    return BackboneEntry(partial(build, name), f"timm's {name}", partial(published, name))


def _timm() -> ModuleType:
    """Return the package."""
    try:
        import timm
    except ImportError as error:
        hint = "pip install 'bayesnet[timm]'"
        raise ConfigError("timm is not installed", where=f"{PREFIX}:NAME", hint=hint) from error
    package: ModuleType = timm
    return package


def _pretrained_config(name: str) -> Any:  # noqa: ANN401 - timm.models.PretrainedCfg, which need not be installed
    """Return timm's record of a name's weights, of the default ones where the name has no tag."""
    timm = _timm()
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return config if config is not None else timm.models.PretrainedCfg()


def _download(repository: str, file_name: str) -> dict[str, Tensor]:
    """Return the weights in a file on Hugging Face, from its client's cache once they have been fetched."""
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(repository, file_name)
    except Exception as error:  # of its own, of the network and of the file system
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError("cannot download the weights", where=f"{repository}/{file_name}", hint=reason) from error
    return weights.read_state_dict(Path(path))


ZOO = Zoo(names, entry, "the networks of timm, PyTorch Image Models", "timm")
