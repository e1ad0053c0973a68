"""``torchvision:NAME``: every classification network of torchvision, without its classifier.

Names, sizes, accuracies and addresses are read from torchvision's own tables. torchvision is imported when one of the
functions is called, not before.

What is checked of published weights: torchvision's file names hold the first 32 bits of their SHA-256, no more. They
tell a damaged download from a whole one; that nobody put other weights in their place rests on https and on who keeps
the server. The files of PINNED are checked against all 256 bits.
"""

from __future__ import annotations

import re
from functools import cache, partial
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from torch import nn

from bayesnet import weights
from bayesnet.backbones.base import (
    BackboneEntry,
    Features,
    Published,
    Zoo,
    replace_stem,
    require_fit,
    require_fixed_width,
    take_off_classifier,
    unknown_model,
)

PREFIX = "torchvision"
IMAGENET = "ImageNet-1K"

# The default weights of the networks in BACKBONES. Each hash is compared with in at least two public repositories that
# have nothing to do with each other, and it begins as the name of the file says.
PINNED = {
    "resnet18-f37072fd.pth": "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
    "resnet34-b627a593.pth": "b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f",
    "resnet50-11ad3fa6.pth": "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",
}

_WITH_SIDE_CLASSIFIERS = ("googlenet", "inception_v3")
_SIDE_CLASSIFIERS = ("aux1", "aux2", "AuxLogits")
_HASH = re.compile(r"-([0-9a-f]{8,64})\.pth$")


@cache
def names() -> tuple[str, ...]:
    """Return the names of torchvision's classification networks."""
    from torchvision import models

    return tuple(models.list_models(module=models))


def classification_network(name: str, *, original: bool) -> nn.Module:
    """Return one of torchvision's networks with its classifier, freshly initialised.

    Args:
        name: As torchvision calls it.
        original: Whether it is for published weights: GoogLeNet and Inception v3, whose weights are from another
            library, then shift their input to what those weights expect.
    """
    from torchvision import models

    arguments: dict[str, Any] = {}
    if name in _WITH_SIDE_CLASSIFIERS:
        arguments = {"aux_logits": False, "init_weights": not original, "transform_input": original}
    elif name.startswith("vit_"):  # the one kind that has to be told
        arguments = {"image_size": _metadata(name)["min_size"][0]}
    network: nn.Module = models.get_model(name, weights=None, **arguments)
    return network


def published(name: str) -> Published:
    """Return what torchvision says about the default weights of a network."""
    from torchvision import models

    best = models.get_model_weights(name).DEFAULT
    transforms = best.transforms()
    [crop], [resize] = transforms.crop_size, transforms.resize_size
    file = PurePosixPath(urlsplit(best.url).path)
    found = _HASH.search(file.name)
    assert found is not None, best.url
    sha256 = PINNED.get(file.name, found[1])
    return Published(
        read=partial(weights.pretrained, best.url, sha256=sha256, name=f"{PREFIX}-{file.stem}"),
        input_size=crop,
        accuracy=round(best.meta["_metrics"][IMAGENET]["acc@1"] / 100, 5),
        resize=resize,
        crop=crop,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def build(name: str, *, channels: int, height: int, width: int, base_width: int, original: bool) -> nn.Module:
    """Return a network's feature extractor for images of this size.

    Raises:
        ConfigError: A width was asked for, or the network does not take images of this size.
    """
    public_name = f"{PREFIX}:{name}"
    require_fixed_width(public_name, base_width)
    network = classification_network(name, original=original)
    classifier, _ = take_off_classifier(network)
    if channels != 3:
        replace_stem(network, channels)
    num_features = require_fit(
        public_name,
        network,
        channels=channels,
        height=height,
        width=width,
        published_size=published(name).input_size,
        min_size=min(_metadata(name)["min_size"]),
    )
    return Features(network, num_features, classifiers=(classifier, *_SIDE_CLASSIFIERS))


def entry(name: str) -> BackboneEntry:
    """Return the row of a network.

    Raises:
        ConfigError: torchvision has no such network.
    """
    if name not in names():
        raise unknown_model(PREFIX, name, names())
    return BackboneEntry(partial(build, name), f"torchvision's {name}", partial(published, name))


def _metadata(name: str) -> dict[str, Any]:
    """Return what torchvision records of the default weights."""
    from torchvision import models

    metadata: dict[str, Any] = models.get_model_weights(name).DEFAULT.meta
    return metadata


ZOO = Zoo(names, entry, "torchvision's classification networks", "torchvision")
