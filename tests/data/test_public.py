"""Public data sets, on small archives in the right formats: what is read from them, and what is refused."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import struct
import tarfile
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import scipy.io
import torch
from numpy.typing import NDArray

from bayesnet import download, weights, workflows
from bayesnet.data import DATASETS, DataConfig, ImageData, Preprocessing, archives, load_data, public
from bayesnet.errors import BayesnetError, ConfigError, DataError

Parts = dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]
Install = Callable[..., Path]

PER_CLASS = {"train": 10, "test": 1}


@functools.cache
def noise(name: str) -> Parts:
    """Return images (N, C, H, W) and labels of a small training and test part, in a random order."""
    row = public.SETS[name]
    rng = np.random.default_rng(0)
    found: Parts = {}
    for part, count in PER_CLASS.items():
        labels = rng.permutation(np.repeat(np.arange(len(row.classes)), count))
        shape = (len(labels), row.channels, row.side, row.side)
        found[part] = rng.integers(0, 256, shape, dtype=np.uint8), labels
    return found


def pickled(value: object) -> bytes:
    """Return a value as Python 2 pickled it, for the types in a CIFAR batch."""
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(pickled, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(pickled(key) + pickled(item) for key, item in value.items()) + b"u"
    assert isinstance(value, np.ndarray)
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01("
    shape = b"".join(map(pickled, value.shape)) + b"t"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return made + shape + dtype + b"\x89" + pickled(value.tobytes()) + b"tb"


def tar_gz(members: Sequence[tuple[str, bytes | None]]) -> bytes:
    """Return an archive of files, with a symbolic link to /etc/passwd where the content is None."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(content or b"")
            archive.addfile(info, io.BytesIO(content or b""))
    return buffer.getvalue()


def batch(images: NDArray[np.uint8], labels: NDArray[np.int64], key: bytes) -> bytes:
    held = {b"batch_label": b"batch", key: labels.tolist(), b"data": images.reshape(len(images), 3072)}
    return b"\x80\x02" + pickled(held) + b"."


def cifar10_members() -> list[tuple[str, bytes | None]]:
    parts = noise("cifar10")
    images, labels = parts["train"]
    batches: list[tuple[str, bytes | None]] = [
        (f"data_batch_{number + 1}", batch(images[number * 20 :][:20], labels[number * 20 :][:20], b"labels"))
        for number in range(5)
    ]
    test = ("test_batch", batch(*parts["test"], b"labels"))
    return [(f"cifar-10-batches-py/{name}", data) for name, data in [("readme.html", b"hello"), test, *batches]]


def idx(values: NDArray[Any]) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return gzip.compress(head + values.astype(np.uint8).tobytes())


def mat(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> bytes:
    buffer = io.BytesIO()
    ten_for_zero = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
    scipy.io.savemat(buffer, {"X": images.transpose(2, 3, 1, 0), "y": ten_for_zero}, do_compression=True)
    return buffer.getvalue()


@functools.cache
def originals(name: str) -> tuple[bytes, ...]:
    """Return the contents of a data set's files, in the order of the table."""
    parts = noise(name)
    if name == "cifar10":
        return (tar_gz(cifar10_members()),)
    if name == "cifar100":
        members = [(f"cifar-100-python/{part}", batch(*parts[part], b"fine_labels")) for part in ("train", "test")]
        return (tar_gz(members),)
    if name == "svhn":
        return tuple(mat(*parts[part]) for part in ("train", "test"))
    return tuple(idx(values) for part in ("train", "test") for values in (parts[part][0][:, 0], parts[part][1]))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Give a function that puts a data set's files where they belong, with the table's hashes theirs; no network."""
    monkeypatch.setenv("BAYESNET_CACHE", str(tmp_path / "cache"))

    def open_url(url: str) -> IO[bytes]:
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(download, "_open_url", open_url)

    def put(name: str, contents: Sequence[bytes] | None = None, folder: Path | None = None) -> Path:
        contents = originals(name) if contents is None else contents
        folder = folder or tmp_path / "cache" / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for file, content in zip(public.SETS[name].files, contents, strict=True):
            (folder / file.name).write_bytes(content)
            files.append(file._replace(sha256=hashlib.sha256(content).hexdigest()))
        monkeypatch.setitem(public.SETS, name, public.SETS[name]._replace(files=tuple(files)))
        return folder

    return put


def contents(data: ImageData, splits: Sequence[str]) -> set[tuple[bytes, int]]:
    return {
        (pixels.numpy().tobytes(), int(label))
        for split in splits
        for pixels, label in zip(
            getattr(data, split).read(range(len(getattr(data, split)))), getattr(data, split).labels_N, strict=True
        )
    }


@pytest.mark.parametrize("name", public.SETS)
def test_what_is_in_the_files_is_in_the_splits(install: Install, name: str) -> None:
    install(name)
    data = load_data(DataConfig(spec=name))
    row = public.SETS[name]
    assert (data.name, data.spec, data.classes) == (name, name, row.classes)
    assert data.preprocessing.shape == (row.channels, row.side, row.side)
    groups: Mapping[str, Sequence[str]] = {"train": ("train", "validation", "calibration"), "test": ("test",)}
    for part, splits in groups.items():
        images, labels = noise(name)[part]
        expected = {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}
        assert contents(data, splits) == expected
        assert sum(len(getattr(data, split)) for split in splits) == len(labels)
    assert data.notes == (
        "The test split is the official one; validation and calibration are carved by class and seed 0.",
    )
    again = load_data(DataConfig(spec=name))
    assert again.fingerprint == data.fingerprint
    assert load_data(DataConfig(spec=name, seed=1)).fingerprint != data.fingerprint


@pytest.mark.parametrize("name", public.SETS)
def test_training(install: Install, tmp_path: Path, name: str) -> None:
    install(name)
    overrides = ("backbone.width=4", "predict.samples=4", "data.fractions=[0.6, 0.1, 0.1, 0.2]")
    out = tmp_path / "run"
    summary = workflows.train(data=name, bayesian=True, epochs=1, devices="cpu", overrides=overrides, out=out)
    assert set(summary["models"]) == {"bayesian", "deterministic"}


def test_the_table() -> None:
    assert set(public.SETS) == {"cifar10", "cifar100", "mnist", "fashion_mnist", "svhn"}
    assert set(public.SETS) <= set(DATASETS)
    for row in public.SETS.values():
        assert len(set(row.classes)) == len(row.classes) in (10, 100)
        for file in row.files:
            assert file.url.startswith("https://")
            assert len(bytes.fromhex(file.sha256)) == 32
    hashes = [file.sha256 for row in public.SETS.values() for file in row.files]
    assert len(set(hashes)) == len(hashes) == 12
    assert list(public.SETS["cifar100"].classes) == sorted(public.SETS["cifar100"].classes)


def test_a_folder_of_ones_own(install: Install, tmp_path: Path) -> None:
    install("mnist", folder=tmp_path / "sets" / "mnist")
    install("fashion_mnist", folder=tmp_path / "sets" / "fashion_mnist")  # files of the same names
    root = str(tmp_path / "sets")
    mnist, fashion = (load_data(DataConfig(spec=name, root=root)) for name in ("mnist", "fashion_mnist"))
    assert mnist.classes != fashion.classes
    with pytest.raises(ConfigError, match=r"^cannot find the home folder \(~nobody-of-this-name\)$"):
        load_data(DataConfig(spec="mnist", root="~nobody-of-this-name"))


def test_grey_as_colour_and_the_preprocessing_of_a_run(install: Install) -> None:
    install("mnist")
    grey, colour = (load_data(DataConfig(spec="mnist", channels=channels)) for channels in (0, 3))
    assert colour.fingerprint == grey.fingerprint
    pixels = colour.test.read([3])
    assert pixels.shape == (1, 3, 28, 28)
    assert torch.equal(pixels[:, 2], grey.test.read([3])[:, 0])
    given = Preprocessing(3, 28, 28, (0.5,) * 3, (0.5,) * 3)
    again = load_data(DataConfig(spec="mnist"), given)
    assert again.preprocessing is given
    assert again.train.read([0]).shape == (1, 3, 28, 28)


def refusal(error: type[BayesnetError], name: str, **values: Any) -> str:  # noqa: ANN401 - any setting
    with pytest.raises(error) as caught:
        load_data(DataConfig(spec=name, **values))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_settings_that_the_images_cannot_be(install: Install) -> None:
    install("cifar10")
    assert refusal(ConfigError, "cifar10", image_size=28) == (
        "cifar10 is 32 x 32 pixels (data.image_size): leave it at 0"
    )
    assert refusal(ConfigError, "cifar10", channels=1) == "cifar10 has 3 channels (data.channels): leave it at 0"
    assert refusal(ConfigError, "mnist", preset="imagenet") == (
        "the preset needs image files (data.preset): leave it at auto"
    )
    assert len(load_data(DataConfig(spec="cifar10", image_size=32, channels=3)).test) == 10
    given = Preprocessing(3, 28, 28, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ConfigError, match="cifar10 is 32 x 32 pixels"):
        load_data(DataConfig(spec="cifar10"), given)


def test_without_a_network(install: Install, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "data" / "cifar10"
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    install("mnist")  # takes the network away
    assert refusal(DataError, "cifar10") == (
        f"cannot download the file: Network is unreachable ({url}): put cifar-10-python.tar.gz into {folder} yourself"
    )


def test_a_file_that_is_not_the_original(install: Install) -> None:
    path = install("cifar10") / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes() + b"x")
    assert refusal(DataError, "cifar10").startswith(f"the file is not the one that is expected ({path}): its SHA-256")


def changed_cifar10(name: str, content: bytes | None) -> bytes:
    """Return the archive with other contents for one batch."""
    return tar_gz([(each, content if each.endswith(name) else data) for each, data in cifar10_members()])


def short_rows() -> bytes:
    held = {b"labels": [0, 1], b"data": np.zeros((2, 3071), np.uint8)}
    return b"\x80\x02" + pickled(held) + b"."


def test_archives_that_are_damaged(install: Install) -> None:
    whole = originals("cifar10")[0]
    unpacked = gzip.decompress(whole)
    cases = {
        whole[: len(whole) // 2]: "cannot unpack the file",
        b"": "cannot read the archive",
        b"hello": "cannot unpack the file",
        gzip.compress(b"hello" * 1000): "cannot read the archive",
        gzip.compress(unpacked[: len(unpacked) // 2]): "cannot read the archive",
        tar_gz(cifar10_members()[:-1]): "archive has no cifar-10-batches-py/data_batch_5",
        tar_gz([(f"../{name}", data) for name, data in cifar10_members()]): "archive has no cifar-10-batches-py",
        tar_gz([(f"/{name}", data) for name, data in cifar10_members()]): "archive has no cifar-10-batches-py",
        tar_gz(cifar10_members() * 2): "member of the archive is no plain file or there twice",
        changed_cifar10("data_batch_2", None): "member of the archive is no plain file or there twice",
        tar_gz([(f"{number}", b"") for number in range(65)]): "archive has more than 64 members",
        changed_cifar10("data_batch_2", b"hello"): "not a pickle of arrays",
        changed_cifar10("data_batch_2", b"I1\n."): "archive holds no rows of 3072 pixels",
        changed_cifar10("test_batch", short_rows()): "archive holds no rows of 3072 pixels",
        changed_cifar10("test_batch", batch(*noise("cifar10")["test"], b"fine")): "archive holds no labels",
    }
    for content, message in cases.items():
        install("cifar10", [content])
        assert refusal(DataError, "cifar10").startswith(message)


def test_a_malicious_batch_runs_nothing(install: Install, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    install("cifar10", [changed_cifar10("data_batch_3", f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())])
    assert refusal(DataError, "cifar10") == ("not a pickle of arrays (os.system): it names something that is no array")
    assert not canary.exists()


def test_a_link_out_of_the_archive_is_not_followed(install: Install) -> None:
    folder = install("cifar10", [changed_cifar10("data_batch_1", None)])
    path = folder / "cifar-10-python.tar.gz"
    assert refusal(DataError, "cifar10") == (
        f"member of the archive is no plain file or there twice ({path}: cifar-10-batches-py/data_batch_1)"
    )
    assert [each.name for each in folder.iterdir()] == [path.name]


def test_a_bomb_is_not_unpacked(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 10_000)
    for name in ("cifar10", "mnist"):
        install(name)
        assert refusal(DataError, name).startswith("file unpacks to more than 10000 bytes (")


def test_what_is_hashed_is_what_is_parsed(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody puts another file in the place of each as soon as it has been checked."""
    for name in public.SETS:
        install(name)
    expected = {name: load_data(DataConfig(spec=name)).fingerprint for name in public.SETS}
    fetch = weights.fetch

    def fetch_and_swap(url: str, folder: Path, *, sha256: str, file_name: str) -> object:
        fetched = fetch(url, folder, sha256=sha256, file_name=file_name)
        (folder / file_name).write_bytes(b"something else")
        return fetched

    monkeypatch.setattr(weights, "fetch", fetch_and_swap)
    assert {name: load_data(DataConfig(spec=name)).fingerprint for name in public.SETS} == expected


def test_labels_and_images_that_do_not_fit(install: Install) -> None:
    images, labels = noise("cifar10")["test"]
    install("cifar10", [changed_cifar10("test_batch", batch(images, labels + 10, b"labels"))])
    assert refusal(DataError, "cifar10") == "cifar10 has a label that is no class (10 to 19)"
    install("cifar10", [changed_cifar10("test_batch", batch(images, labels + 1000, b"labels"))])
    assert refusal(DataError, "cifar10").startswith("archive holds no labels")
    install("cifar10", [changed_cifar10("test_batch", batch(images[:-1], labels, b"labels"))])
    assert refusal(DataError, "cifar10").startswith(
        "cifar10 has images of another shape than expected ((9, 3, 32, 32))"
    )
    install("cifar10", [changed_cifar10("test_batch", batch(images[:0], labels[:0], b"labels"))])
    assert refusal(DataError, "cifar10").startswith("cifar10 has images of another shape than expected")


def test_idx_and_matlab_files_that_are_damaged(install: Install) -> None:
    good = originals("mnist")
    raw = gzip.decompress(good[0])
    for bad in (
        raw[:-1],
        raw + b"x",
        raw[:10],
        b"",
        b"\x00\x00\x09\x03" + raw[4:],
        good[1] and gzip.decompress(good[1]),
    ):
        install("mnist", [gzip.compress(bad), *good[1:]])
        assert refusal(DataError, "mnist").startswith("not an idx file of the expected size (")
    install("mnist", [good[0][:-20], *good[1:]])
    assert refusal(DataError, "mnist").startswith("cannot unpack the file (")
    train, test = originals("svhn")
    images, labels = noise("svhn")["test"]
    images, labels = noise("svhn")["test"]
    other = io.BytesIO()
    scipy.io.savemat(other, {"X": images.transpose(2, 3, 1, 0).astype(np.float32), "y": labels[:, None] + 1})
    for content in (b"", b"hello" * 100, train[: len(train) // 2], other.getvalue()):
        install("svhn", [content, test])
        assert refusal(DataError, "svhn").startswith("cannot read the MATLAB file (")


def test_statistics_that_are_given(install: Install) -> None:
    """They are taken as they are, and nothing is measured; digits and mnist take the same way."""
    install("mnist")
    for name in ("mnist", "digits"):
        given = load_data(DataConfig(spec=name, mean=(0.25,), std=(0.5,))).preprocessing
        assert (given.mean, given.std) == ((0.25,), (0.5,))
        colour = load_data(DataConfig(spec=name, channels=3, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))).preprocessing
        assert (colour.channels, colour.mean, colour.std) == (3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert refusal(ConfigError, name, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)) == (
            f"{name} has 1 channel (data.mean has 3): set data.channels or leave it out"
        )
    assert refusal(ConfigError, "mnist", image_size=28, resize=32) == (
        "only image files are scaled and cropped (data.resize): leave it at 0"
    )
