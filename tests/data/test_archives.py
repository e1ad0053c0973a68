"""Formats of archives: what their headers state is never believed further than their bytes go."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from numpy.typing import NDArray

from bayesnet.data import archives
from bayesnet.errors import DataError
from bayesnet.weights import Fetched

PATH = Path("cache/archive")
NAME = "folder/batch"
N = 10


def members(unpacked: bytes) -> list[bytes]:
    return archives.read_members(Fetched(PATH, gzip.compress(unpacked), ""), [NAME])


def sparse_member(size: int) -> bytes:
    """Return the header of a file of that many zeros, in the sparse format of GNU tar: 512 bytes for any size."""
    member = tarfile.TarInfo(NAME)
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0" % 0 + b"%011o\0" % 0
    header[482:495] = b"\0" + b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax_sparse_member(size: int) -> bytes:
    """Return the same in the format 1.0 of pax, where it calls itself a plain file."""
    member = tarfile.TarInfo("GNUSparseFile/batch")
    member.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": NAME,
        "GNU.sparse.realsize": str(size),
    }
    member.size = 512
    return member.tobuf(tarfile.PAX_FORMAT) + b"0\n".ljust(512, b"\0")


@pytest.mark.parametrize("member", [sparse_member, pax_sparse_member])
def test_a_sparse_file_is_not_filled_up(member: Callable[[int], bytes]) -> None:
    with tarfile.open(fileobj=io.BytesIO(member(2**20) + bytes(1024))) as archive:
        file = archive.extractfile(NAME)
        assert file is not None
        assert len(file.read()) == 2**20  # Python fills it up, to any size
    for size in (100, 2**33 - 1):
        with pytest.raises(DataError) as caught:
            members(member(size) + bytes(1024))
        assert str(caught.value) == f"member of the archive is no plain file or there twice ({PATH}: {NAME})"


def test_a_header_that_python_stumbles_over() -> None:
    member = tarfile.TarInfo("x")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "many"}
    with pytest.raises(DataError, match=r"^cannot read the archive \(cache/archive\): .*; delete it"):
        members(member.tobuf(tarfile.PAX_FORMAT) + bytes(1024))


def matlab(held: Mapping[str, object], *, compressed: bool = True) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, dict(held), do_compression=compressed)
    return buffer.getvalue()


def svhn() -> dict[str, NDArray[np.uint8]]:
    """Return images (32, 32, 3, N) of noise and labels 1 to 10 as SVHN names and shapes them."""
    rng = np.random.default_rng(0)
    images_HWCN = rng.integers(0, 256, (32, 32, 3, N), dtype=np.uint8)
    return {"X": images_HWCN, "y": np.arange(1, N + 1, dtype=np.uint8)[:, None]}


def read(data: bytes) -> archives.Arrays:
    file = Fetched(PATH, data, "")
    train, test = archives.read_svhn([file, file])
    assert np.array_equal(train.images_NCHW, test.images_NCHW)
    assert np.array_equal(train.labels_N, test.labels_N)
    return train


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint32, np.int64, np.float32, np.float64])
def test_matlab_files_are_read_as_scipy_reads_them(compressed: bool, kind: type) -> None:
    others = {"a": 3.5, "text": "hello", "cells": np.array([1, "b"], dtype=object), "fields": {"c": 1}, "z": [[1j]]}
    held = svhn()
    data = matlab(others | {"y": held["y"].astype(kind), "X": held["X"], "last": [1, 2]}, compressed=compressed)
    found = read(data)
    assert np.array_equal(found.images_NCHW, scipy.io.loadmat(io.BytesIO(data))["X"].transpose(3, 2, 0, 1))
    assert found.labels_N.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert found.images_NCHW.flags.c_contiguous
    assert found.labels_N.dtype == np.int64


def damaged() -> dict[str, bytes]:
    held = svhn()
    images, labels = held["X"], held["y"]
    good, flat = matlab(held), bytearray(matlab(held, compressed=False))
    struct.pack_into("<i", flat, flat.index(struct.pack("<4i", 32, 32, 3, N)), 2**30)
    flags = struct.pack("<II", 6, 8)
    as_text = matlab(held, compressed=False).replace(flags + b"\x09", flags + b"\x04")
    contents: dict[str, Mapping[str, object]] = {
        "floating point": {"X": images.astype(np.float32), "y": labels},
        "three sides": {"X": images[0], "y": labels},
        "labels to 20": {"X": images, "y": labels + 10},
        "labels from 0": {"X": images, "y": labels - 1},
        "labels between": {"X": images, "y": labels - 0.5},
        "no numbers": {"X": images, "y": np.full(labels.shape, np.nan)},
        "complex": {"X": images, "y": labels + 1j},
        "text": {"X": images, "y": np.array(["a", "b"])},
        "cells": {"X": np.array([images, 1], dtype=object), "y": labels},
        "fields": {"X": {"a": images}, "y": labels},
        "no labels": {"X": images},
    }
    return {
        "nothing": b"",
        "something else": b"hello" * 100,
        "half": good[: len(good) // 2],
        "all but a byte": good[:-1],
        "big-endian": good[:126] + b"MI" + good[128:],
        "twice": good + matlab({"y": labels})[128:],
        "a size of a gigabyte": bytes(flat),
        "numbers of the class of text": as_text,
        "no element": good[:128] + b"\x0e\0\0\0\0\0\0\0",
        "an element beyond the end": good[:128] + struct.pack("<II", 14, 2**31),
        "a short element that is long": good[:128] + struct.pack("<II", 5 << 16 | 14, 0),
        **{name: matlab(content) for name, content in contents.items()},
    }


@pytest.mark.parametrize("name", damaged())
def test_matlab_files_that_are_something_else(name: str) -> None:
    with pytest.raises(DataError, match=r"^cannot read the MATLAB file \(cache/archive\): .*; delete it to have"):
        read(damaged()[name])


def test_the_limit_is_on_all_elements_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressed element is unpacked to the limit and not a byte further, whatever it is called."""
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 40_000)
    assert len(read(matlab(svhn())).labels_N) == N  # 30,720 bytes of pixels
    zeros = {f"a{number}": np.zeros(1000, np.uint8) for number in range(10)}
    for held in (zeros, {"b": np.zeros(10**7, np.uint8)}, {"X": np.zeros((32, 32, 3, 100), np.uint8)}):
        with pytest.raises(DataError, match="ValueError: it unpacks to more than 40000 bytes; delete it"):
            read(matlab(svhn() | held))
