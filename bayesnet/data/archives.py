"""The file formats of public data sets: archives of pickled batches, idx and MATLAB files, parsed from their bytes.

No archive is unpacked to disk, nothing in a pickle is run, and nothing is unpacked or allocated without a limit.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bayesnet import weights
from bayesnet.errors import DataError
from bayesnet.weights import Fetched

MAX_UNPACKED_BYTES = 2**29
MAX_MEMBERS = 64
MAX_CLASSES = 100
_DAMAGED = "delete it to have it downloaded"

# Types of elements in a MATLAB 5 file; those of numbers with what NumPy calls them.
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15
_NUMERIC_CLASSES = range(6, 16)
_COMPLEX = 8
_DIGIT_LABELS = np.arange(1, 11)


class Arrays(NamedTuple):
    """The images of one official part.

    Attributes:
        images_NCHW: uint8 pixels.
        labels_N: Class indices.
    """

    images_NCHW: NDArray[np.uint8]
    labels_N: NDArray[np.int64]


def gunzip(file: Fetched) -> bytes:
    """Return what a gzip file holds.

    Raises:
        DataError: It is damaged, or would unpack to more than 512 MiB.
    """
    try:
        with gzip.open(io.BytesIO(file.data)) as unpacked:
            data = unpacked.read(MAX_UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError("cannot unpack the file", where=file.path, hint=f"{error}; {_DAMAGED}") from error
    if len(data) > MAX_UNPACKED_BYTES:
        raise DataError(f"file unpacks to more than {MAX_UNPACKED_BYTES} bytes", where=file.path)
    return data


def read_members(file: Fetched, names: Sequence[str]) -> list[bytes]:
    """Return the contents of the members of a tar.gz that have exactly these names; the others are ignored.

    Nothing is written to disk, so that no member's name or link can lead anywhere.

    Raises:
        DataError: The archive is damaged or too large, or one of the members is missing, twice there or no plain file:
            a link, or a sparse file, whose size is what its header states and not what the archive holds.
    """
    found: dict[str, bytes] = {}
    data = gunzip(file)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for count, member in enumerate(archive):
                if count >= MAX_MEMBERS:
                    raise DataError(f"archive has more than {MAX_MEMBERS} members", where=file.path)
                if member.name not in names:
                    continue
                plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
                content = archive.extractfile(member) if plain and 0 <= member.size <= len(data) else None
                if content is None or member.name in found:
                    where = f"{file.path}: {member.name}"
                    raise DataError("member of the archive is no plain file or there twice", where=where)
                found[member.name] = content.read()
    except (MemoryError, DataError):
        raise
    except Exception as error:  # the reader's errors are of many types
        raise DataError("cannot read the archive", where=file.path, hint=f"{error}; {_DAMAGED}") from error
    for name in names:
        if name not in found:
            raise DataError(f"archive has no {name}", where=file.path, hint=_DAMAGED)
    return [found[name] for name in names]


def read_cifar(
    files: Sequence[Fetched], *, folder: str, train: Sequence[str], test: str, labels: bytes
) -> tuple[Arrays, Arrays]:
    """Return the parts of a CIFAR archive: pickled dictionaries of rows of 3,072 pixels, red, green, blue."""
    [file] = files
    batches = []
    for data in read_members(file, [f"{folder}/{name}" for name in (*train, test)]):
        batch = weights.read_arrays(data)
        rows_NP, labels_N = (batch.get(b"data"), batch.get(labels)) if isinstance(batch, dict) else (None, None)
        if not isinstance(rows_NP, np.ndarray) or rows_NP.dtype != np.uint8 or rows_NP.shape[1:] != (3072,):
            raise DataError("archive holds no rows of 3072 pixels", where=file.path, hint=_DAMAGED)
        if not isinstance(labels_N, list) or not all(
            type(label) is int and 0 <= label < MAX_CLASSES for label in labels_N
        ):
            raise DataError(f"archive holds no {labels.decode()}", where=file.path, hint=_DAMAGED)
        batches.append(Arrays(rows_NP.reshape(-1, 3, 32, 32), np.array(labels_N, dtype=np.int64)))
    images_NCHW, labels_N = (np.concatenate(arrays) for arrays in zip(*batches[:-1], strict=True))
    last = batches[-1]
    return Arrays(images_NCHW, labels_N), Arrays(last.images_NCHW.copy(), last.labels_N)


def read_mnist(files: Sequence[Fetched]) -> tuple[Arrays, Arrays]:
    """Return the parts of the four files of MNIST: training images and labels, test images and labels."""
    images, labels, test_images, test_labels = files
    train = Arrays(_read_idx(images, 3)[:, None], _read_idx(labels, 1).astype(np.int64))
    return train, Arrays(_read_idx(test_images, 3)[:, None], _read_idx(test_labels, 1).astype(np.int64))


def _read_idx(file: Fetched, dimensions: int) -> NDArray[np.uint8]:
    """Return the uint8 array of an idx.gz file: two zeros, type 8, number of dimensions, sizes (big-endian), data."""
    data = gunzip(file)
    start = 4 * (1 + dimensions)
    sizes = struct.unpack(f">{dimensions}I", data[4:start]) if len(data) >= start else ()
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) - start != math.prod(sizes):
        raise DataError("not an idx file of the expected size", where=file.path, hint=_DAMAGED)
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes).copy()


def read_svhn(files: Sequence[Fetched]) -> tuple[Arrays, Arrays]:
    """Return the parts of the two files of SVHN."""
    train, test = map(_read_mat, files)
    return train, test


def _read_mat(file: Fetched) -> Arrays:
    """Return images and labels of a MATLAB 5 file: X of shape (32, 32, 3, N); y of shape (N, 1), where 10 means 0."""
    try:
        held = _matrices(file.data, ("X", "y"))
        images_HWCN, labels_N1 = held["X"], held["y"]
        if images_HWCN.dtype != np.uint8 or not np.isin(labels_N1, _DIGIT_LABELS).all():
            raise ValueError(f"pixels are {images_HWCN.dtype}, or a label is not 1 to 10")
        images_NCHW = np.ascontiguousarray(images_HWCN.transpose(3, 2, 0, 1))
        labels_N = labels_N1.reshape(-1).astype(np.int64)
    except (ValueError, LookupError, TypeError, struct.error, zlib.error) as error:
        reason = f"{type(error).__name__}: {error}; {_DAMAGED}"
        raise DataError("cannot read the MATLAB file", where=file.path, hint=reason) from error
    return Arrays(images_NCHW, labels_N % 10)


def _matrices(data: bytes, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return the arrays of numbers with these names in a MATLAB 5 file, as views of its contents.

    Reference: MAT-File Format, The MathWorks, chapter 1. Compressed elements are unpacked to 512 MiB in all.
    """
    if data[124:128] != b"\0\1IM":
        raise ValueError("not a little-endian MATLAB 5 file")
    found: dict[str, NDArray[Any]] = {}
    left = MAX_UNPACKED_BYTES
    for kind, content in _elements(memoryview(data)[128:]):
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(content, left + 1)
            left -= len(unpacked)
            if left < 0:
                raise ValueError(f"it unpacks to more than {MAX_UNPACKED_BYTES} bytes")
            if not unpacker.eof:
                raise ValueError("a compressed element is cut off")
            kind, content = next(_elements(memoryview(unpacked)), (0, content))
        name = _matrix_name(content) if kind == _MATRIX else ""
        if name in found:
            raise ValueError(f"{name} is there twice")
        if name in names:
            found[name] = _matrix(content)
    return found


def _elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield type and contents of one element after another; a short one has its contents in its tag."""
    start = 0
    while start < len(data):
        kind, size = struct.unpack_from("<II", data, start)
        begin = start + 8
        if kind >> 16:
            kind, size, begin = kind & 0xFFFF, kind >> 16, start + 4
        if begin + size > len(data) or (begin < start + 8 and size > 4):
            raise ValueError("an element is cut off")
        yield kind, data[begin : begin + size]
        # Elements begin at multiples of 8 bytes, but for what follows a compressed one.
        start = begin + size if kind == _COMPRESSED else start + 8 + (size + 7) // 8 * 8 * (begin == start + 8)


def _matrix_name(content: memoryview) -> str:
    """Return the name of a matrix, the third element in it."""
    elements = _elements(content)
    return bytes([element for _, (_, element) in zip(range(3), elements, strict=False)][-1]).decode("latin1")


def _matrix(content: memoryview) -> NDArray[Any]:
    """Return the array in a matrix: flags, sizes, name, and the numbers in columns."""
    elements = _elements(content)
    (_, flags), (_, sizes), _, (kind, values) = (next(elements, (0, memoryview(b""))) for _ in range(4))
    if kind not in _NUMBERS or flags[0] not in _NUMERIC_CLASSES or flags[1] & _COMPLEX:
        raise TypeError("an array is not of real numbers")
    shape = np.frombuffer(sizes, "<i4").tolist()
    return np.frombuffer(values, f"<{_NUMBERS[kind]}").reshape(shape, order="F")
