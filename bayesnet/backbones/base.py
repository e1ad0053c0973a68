"""What a backbone is: the contract, a row of the table, and the parts that networks of other libraries share."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from bayesnet.errors import ConfigError


class Backbone(Protocol):
    """What a module must offer to be used as a feature extractor."""

    num_features: int

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Return features (B, D) of normalised images (B, C, H, W)."""


class BackboneBuilder(Protocol):
    """A function that makes a backbone for images of one size."""

    def __call__(self, *, channels: int, height: int, width: int, base_width: int, original: bool) -> nn.Module:
        """Return a module with ``num_features``, initialised from torch's current random state.

        Args:
            channels: Image channels.
            height: Image height in pixels.
            width: Image width in pixels.
            base_width: BackboneConfig.width.
            original: Whether weights will be loaded, so that the network has to be as it was published.
        """


class Published(NamedTuple):
    """What is known of a network from those who trained it.

    Attributes:
        read: Downloads their weights, once, and returns them by name; None where there are none.
        input_size: Side of the images that they evaluated it on, pixels.
        accuracy: Top-1 accuracy on the validation images of ImageNet-1k, a share, as their own metadata say.
        resize: Short side that they scaled images to before they cropped the centre, pixels.
        crop: Side of that crop, pixels; 0 where it is not square.
        mean: Mean of each channel that they normalised images with, after a division by 255.
        std: Standard deviation of each channel, likewise.
    """

    read: Callable[[], dict[str, Tensor]] | None
    input_size: int
    accuracy: float | None
    resize: int = 0
    crop: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class Expected(NamedTuple):
    """How images are prepared for the published weights of a backbone.

    Attributes:
        size: Height and width of the central crop, pixels.
        resize: Short side that images are scaled to before, pixels.
        mean: Mean of each channel, after a division by 255.
        std: Standard deviation of each channel, likewise.
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def no_weights() -> Published | None:
    """Return None: for networks that nobody published weights of."""
    return None


class BackboneEntry(NamedTuple):
    """A row of the table.

    Attributes:
        build: Makes the network.
        description: One line on what it is.
        published: Looks up the published weights; a function, since it imports the library that knows them.
    """

    build: BackboneBuilder
    description: str
    published: Callable[[], Published | None] = no_weights


class Zoo(NamedTuple):
    """A collection of networks, used as ``PREFIX:NAME``.

    Attributes:
        names: Returns all names.
        entry: Returns the row of a name, or raises ConfigError with a suggestion.
        description: One line on what it is.
        package: The package that has to be installed.
    """

    names: Callable[[], tuple[str, ...]]
    entry: Callable[[str], BackboneEntry]
    description: str
    package: str


class Features(nn.Module):
    """A network without its classifier.

    Args:
        network: Images (B, C, H, W) to features (B, D).
        num_features: D.
        classifiers: Names of the parts that were taken off; entries of theirs in a file of weights are left out.
    """

    def __init__(self, network: nn.Module, num_features: int, *, classifiers: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.network = network
        self.num_features = num_features
        self.classifiers = classifiers

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return features (B, D) of images (B, C, H, W)."""
        features_BD: Tensor = self.network(x_BCHW)
        return features_BD


class Hollow(TorchFunctionMode):
    """Makes modules without memory for their weights: ``torch.empty`` gives tensors of the meta device.

    The meta device as torch's default device would also catch the small tensors that constructors compute with, as
    torchvision's RegNet does.

    Example:
        >>> with Hollow():
        ...     layer = nn.Linear(1_000_000, 1_000_000)
        >>> layer.weight.device.type
        'meta'
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run a torch function, ``torch.empty`` on the meta device."""
        settings = dict(kwargs or {})
        if func is torch.empty and settings.get("device") is None:
            settings["device"] = "meta"
        return func(*args, **settings)


def require_fixed_width(name: str, base_width: int, fixed: int = 0) -> None:
    """Refuse to change the width of a network that has one.

    Raises:
        ConfigError: ``base_width`` is neither 0 nor ``fixed``.
    """
    if base_width not in (0, fixed):
        raise ConfigError(f"{name} has a fixed width", where=f"backbone.width = {base_width}", hint="leave it at 0")


def unknown_model(prefix: str, model: str, names: Iterable[str]) -> ConfigError:
    """Return (not raise) the error for a name that a zoo does not have; zoos are too large to be listed in it."""
    close = difflib.get_close_matches(model, list(names), n=1, cutoff=0.5)
    suggestion = f"did you mean '{prefix}:{close[0]}'? " if close else ""
    hint = f"{suggestion}See `bayesnet list backbones '{prefix}:*'`"
    return ConfigError("unknown backbone", where=f"{prefix}:{model}", hint=hint)


def take_off_classifier(network: nn.Module) -> tuple[str, int]:
    """Replace the last layer by the identity, in place.

    It is the last ``nn.Linear`` in the order of modules, or the last convolution of networks that have none.

    Returns:
        The layer's name and D, the number of features that it was given.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10))
        >>> take_off_classifier(network)
        ('2', 8)
    """
    linear = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if linear:
        name, num_features = linear[-1][0], linear[-1][1].in_features
    else:
        name, last = [pair for pair in network.named_modules() if isinstance(pair[1], nn.Conv2d)][-1]
        assert isinstance(last, nn.Conv2d)
        num_features = last.in_channels
    network.set_submodule(name, nn.Identity())
    return name, num_features


def replace_stem(network: nn.Module, channels: int) -> None:
    """Give the first convolution of a network another number of input channels, in place.

    Its new weights are normal, with the spread that keeps the scale of its output for normalised images.
    """
    stem = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    scale = float(stem.weight.detach().std()) * (stem.in_channels / channels) ** 0.5
    weight = torch.empty(stem.out_channels, channels, *stem.weight.shape[2:]).normal_(std=scale)
    stem.in_channels, stem.weight = channels, nn.Parameter(weight)


def features_shape(network: nn.Module, channels: int, height: int, width: int) -> tuple[int, ...]:
    """Return the shape of what a network gives for two images in evaluation mode, without any arithmetic.

    The weights are replaced by ones of the meta device for the time of the call. Whatever the network raises for images
    that it cannot take comes through.

    Args:
        network: In training mode, in which it is left.
        channels: Image channels.
        height: Image height in pixels.
        width: Image width in pixels.
    """
    tensors = {name: tensor.to("meta") for name, tensor in chain(network.named_parameters(), network.named_buffers())}
    images = torch.empty(2, channels, height, width, device="meta")
    network.eval()
    try:
        with torch.no_grad():
            result: Tensor = functional_call(network, tensors, (images,))
    finally:
        network.train()
    return tuple(result.shape)


def require_fit(
    name: str, network: nn.Module, *, channels: int, height: int, width: int, published_size: int, min_size: int = 1
) -> int:
    """Return D, the number of features that a network gives, after making sure that it takes images of this size.

    Args:
        name: The backbone's public name.
        network: In training mode, without its classifier.
        channels: Image channels.
        height: Image height in pixels.
        width: Image width in pixels.
        published_size: Side of the images that it was published for, pixels.
        min_size: The smallest side that its library promises, pixels.

    Raises:
        ConfigError: It does not take such images.
    """
    try:
        shape = features_shape(network, channels, height, width)
    except Exception as error:  # networks assert, raise ValueError and RuntimeError alike
        fixed = not _takes(network, channels, 2 * published_size)
        size = f"{published_size}x{published_size} pixels"
        if not fixed and min(height, width) < min_size:
            size = f"at least {min_size}x{min_size} pixels"
        hint = f"it takes {size}, see data.image_size and data.preset"
        raise ConfigError(f"{name} cannot take images of this size", where=f"{height}x{width}", hint=hint) from error
    if len(shape) != 2:
        raise ConfigError(f"{name} gives no feature vector", where=f"shape {shape}", hint="choose another backbone")
    return shape[1]


def _takes(network: nn.Module, channels: int, size: int) -> bool:
    """Return whether a network takes square images of this size."""
    try:
        features_shape(network, channels, size, size)
    except Exception:
        return False
    return True
