"""The file formats of public data sets: archives of pickled batches, idx and MATLAB files, parsed from their bytes.

No archive is unpacked to disk, nothing in a pickle is run, and nothing is unpacked without a limit.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bayesnet import weights
from bayesnet.errors import DataError

MAX_UNPACKED_BYTES = 2**29
MAX_MEMBERS = 64
MAX_CLASSES = 100
_DAMAGED = "delete it to have it downloaded"


class Arrays(NamedTuple):
    """The images of one official part.

    Attributes:
        images_NCHW: uint8 pixels.
        labels_N: Class indices.
    """

    images_NCHW: NDArray[np.uint8]
    labels_N: NDArray[np.int64]


def gunzip(path: Path) -> bytes:
    """Return what a gzip file holds.

    Raises:
        DataError: It is damaged, or would unpack to more than 512 MiB.
    """
    try:
        with gzip.open(path) as file:
            data = file.read(MAX_UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError("cannot unpack the file", where=path, hint=f"{error}; {_DAMAGED}") from error
    if len(data) > MAX_UNPACKED_BYTES:
        raise DataError(f"file unpacks to more than {MAX_UNPACKED_BYTES} bytes", where=path)
    return data


def read_members(path: Path, names: Sequence[str]) -> list[bytes]:
    """Return the contents of the members of a tar.gz that have exactly these names; the others are ignored.

    Nothing is written to disk, so that no member's name or link can lead anywhere.

    Raises:
        DataError: The archive is damaged or too large, or one of the members is missing, twice there or no file.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(gunzip(path)), mode="r:") as archive:
            for count, member in enumerate(archive):
                if count >= MAX_MEMBERS:
                    raise DataError(f"archive has more than {MAX_MEMBERS} members", where=path)
                if member.name not in names:
                    continue
                file = archive.extractfile(member) if member.isreg() and member.name not in found else None
                if file is None:
                    raise DataError("member of the archive is a link or there twice", where=f"{path}: {member.name}")
                found[member.name] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError("cannot read the archive", where=path, hint=f"{error}; {_DAMAGED}") from error
    for name in names:
        if name not in found:
            raise DataError(f"archive has no {name}", where=path, hint=_DAMAGED)
    return [found[name] for name in names]


def read_cifar(
    paths: Sequence[Path], *, folder: str, train: Sequence[str], test: str, labels: bytes
) -> tuple[Arrays, Arrays]:
    """Return the parts of a CIFAR archive: pickled dictionaries of rows of 3,072 pixels, red, green, blue."""
    [path] = paths
    batches = []
    for data in read_members(path, [f"{folder}/{name}" for name in (*train, test)]):
        batch = weights.read_arrays(data)
        rows_NP, labels_N = (batch.get(b"data"), batch.get(labels)) if isinstance(batch, dict) else (None, None)
        if not isinstance(rows_NP, np.ndarray) or rows_NP.dtype != np.uint8 or rows_NP.shape[1:] != (3072,):
            raise DataError("archive holds no rows of 3072 pixels", where=path, hint=_DAMAGED)
        if not isinstance(labels_N, list) or not all(
            type(label) is int and 0 <= label < MAX_CLASSES for label in labels_N
        ):
            raise DataError(f"archive holds no {labels.decode()}", where=path, hint=_DAMAGED)
        batches.append(Arrays(rows_NP.reshape(-1, 3, 32, 32), np.array(labels_N, dtype=np.int64)))
    images_NCHW, labels_N = (np.concatenate(arrays) for arrays in zip(*batches[:-1], strict=True))
    last = batches[-1]
    return Arrays(images_NCHW, labels_N), Arrays(last.images_NCHW.copy(), last.labels_N)


def read_mnist(paths: Sequence[Path]) -> tuple[Arrays, Arrays]:
    """Return the parts of the four files of MNIST: training images and labels, test images and labels."""
    images, labels, test_images, test_labels = paths
    train = Arrays(_read_idx(images, 3)[:, None], _read_idx(labels, 1).astype(np.int64))
    return train, Arrays(_read_idx(test_images, 3)[:, None], _read_idx(test_labels, 1).astype(np.int64))


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return the uint8 array of an idx.gz file: two zeros, type 8, number of dimensions, sizes (big-endian), data."""
    data = gunzip(path)
    start = 4 * (1 + dimensions)
    sizes = struct.unpack(f">{dimensions}I", data[4:start]) if len(data) >= start else ()
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) - start != math.prod(sizes):
        raise DataError("not an idx file of the expected size", where=path, hint=_DAMAGED)
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes).copy()


def read_svhn(paths: Sequence[Path]) -> tuple[Arrays, Arrays]:
    """Return the parts of the two files of SVHN."""
    train, test = map(_read_mat, paths)
    return train, test


def _read_mat(path: Path) -> Arrays:
    """Return images and labels of a MATLAB 5 file: X of shape (32, 32, 3, N); y of shape (N, 1), where 10 means 0."""
    import scipy.io  # nobody else should wait for it

    try:
        held = scipy.io.loadmat(path, variable_names=("X", "y"))
        images_HWCN, labels_N1 = held["X"], held["y"]
        images_NCHW = np.ascontiguousarray(images_HWCN.transpose(3, 2, 0, 1))
        labels_N = labels_N1.reshape(-1).astype(np.int64)
        if images_NCHW.dtype != np.uint8 or labels_N.min() < 1:
            raise ValueError(f"pixels are {images_NCHW.dtype}, labels begin at {labels_N.min()}")
    except MemoryError:
        raise
    except Exception as error:  # the reader's errors are of many types
        reason = f"{type(error).__name__}: {error}; {_DAMAGED}"
        raise DataError("cannot read the MATLAB file", where=path, hint=reason) from error
    return Arrays(images_NCHW, labels_N % 10)
