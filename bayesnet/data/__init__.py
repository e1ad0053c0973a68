"""Data: labelled images in four disjoint splits. The table below is all there is; `load_data` reads one entry."""

from __future__ import annotations

from bayesnet.data.dataset import SPLITS, DataConfig, DataSource, ImageData
from bayesnet.data.digits import DIGITS
from bayesnet.data.examples import ArrayExamples, Examples, FileExamples
from bayesnet.data.folder import FOLDER
from bayesnet.data.mnist5k import MNIST5K
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.data.public import PUBLIC
from bayesnet.errors import ConfigError
from bayesnet.registry import Registry

__all__ = [
    "DATASETS",
    "SPLITS",
    "ArrayExamples",
    "DataConfig",
    "DataSource",
    "Examples",
    "FileExamples",
    "ImageData",
    "Preprocessing",
    "load_data",
]

DATASETS: Registry[DataSource] = Registry(
    "data set", {"digits": DIGITS, "folder": FOLDER, "mnist5k": MNIST5K, **PUBLIC}
)


def load_data(config: DataConfig, preprocessing: Preprocessing | None = None) -> ImageData:
    """Return the data set that ``config.spec`` names.

    Args:
        config: The section ``data``.
        preprocessing: That of an existing run, which is then used unchanged; None makes it from the training split.

    Raises:
        ConfigError: The name is unknown, a path is missing or not wanted, or the padding exceeds the images.
        DataError: The data cannot be used.

    Example:
        >>> data = load_data(DataConfig(spec="digits"))
        >>> len(data.train), len(data.validation), len(data.calibration), len(data.test)
        (1078, 180, 179, 360)
    """
    name, _, argument = config.spec.partition(":")
    source = DATASETS[name]
    if source.takes_path and not argument:
        raise ConfigError("the data set needs a path", where=config.spec, hint=f"write {name}:PATH")
    if not source.takes_path and ":" in config.spec:
        raise ConfigError("the data set takes no path", where=config.spec, hint=f"write {name}")
    data = source.load(config, argument, preprocessing)
    config.check_padding(data.preprocessing.height, data.preprocessing.width)
    return data
