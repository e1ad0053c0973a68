"""Examples: reading by index from memory and files, the cache, and naming the bad file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bayesnet.data import examples as module
from bayesnet.data.examples import ArrayExamples, Examples, FileExamples, SubsetExamples
from bayesnet.data.images import read_image
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.errors import DataError

SMALL = Preprocessing(3, 8, 8, (0.0,) * 3, (1.0,) * 3)
IMAGE_BYTES = 3 * 8 * 8


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    found = [tmp_path / f"{index}.png" for index in range(6)]
    for path in found:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that records each decoded file."""
    record: list[Path] = []

    def recording(path: Path, preprocessing: Preprocessing) -> torch.Tensor:
        record.append(path)
        return read_image(path, preprocessing)

    monkeypatch.setattr(module, "read_image", recording)
    return record


def files(paths: list[Path], cache_bytes: int) -> FileExamples:
    return FileExamples(paths, torch.arange(len(paths)) % 2, SMALL, cache_bytes)


def test_array_examples() -> None:
    images_NCHW = torch.arange(4 * 12).to(torch.uint8).view(4, 3, 2, 2)
    examples: Examples = ArrayExamples(images_NCHW, torch.tensor([0, 1, 1, 0]), prefix="digits test")
    assert len(examples) == 4
    assert torch.equal(examples.read([3, 0]), images_NCHW[[3, 0]])
    assert torch.equal(examples.read(torch.tensor([1])), images_NCHW[1:2])
    examples.read([0]).zero_()
    assert images_NCHW[0].any()  # what is read is a copy
    assert examples.name(2) == "digits test 2"
    examples.verify()


def test_wrong_arrays_are_refused() -> None:
    labels_N = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(DataError, match=r"expected uint8 or float32 pixels of shape \(N, C, H, W\)"):
        ArrayExamples(torch.zeros(2, 3, 4, 4, dtype=torch.float64), labels_N)
    with pytest.raises(DataError, match="expected one int64 label per image"):
        ArrayExamples(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), labels_N)
    with pytest.raises(DataError, match="expected one int64 label per image"):
        FileExamples([Path("a")], labels_N, SMALL)


@pytest.mark.parametrize("cache_bytes", [0, 6 * IMAGE_BYTES - 1, 6 * IMAGE_BYTES])
@pytest.mark.parametrize("num_threads", [1, 4])
def test_files_are_read_in_the_order_asked(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, cache_bytes: int, num_threads: int
) -> None:
    monkeypatch.setattr(FileExamples, "_num_threads", num_threads)
    examples = files(paths, cache_bytes)
    expected_NCHW = torch.stack([read_image(path, SMALL) for path in paths])
    for indices in ([4, 0, 4, 5], [1], [], list(range(6))):
        assert torch.equal(examples.read(indices), expected_NCHW[indices])
    assert examples.name(3) == str(paths[3])


def test_cache_decodes_once_and_nothing_before_it_is_asked(paths: list[Path], decoded: list[Path]) -> None:
    examples = files(paths, 6 * IMAGE_BYTES)
    assert decoded == []
    examples.read([1, 2, 1])
    assert sorted(decoded) == paths[1:3]
    examples.verify()
    examples.read(range(6))
    assert sorted(decoded) == paths
    examples.read([0]).zero_()
    assert examples.read([0]).any()  # what is read is a copy


def test_without_cache_each_read_decodes_and_verify_reads_headers_only(paths: list[Path], decoded: list[Path]) -> None:
    examples = files(paths, 6 * IMAGE_BYTES - 1)
    examples.verify()
    assert decoded == []
    examples.read([0])
    examples.read([0])
    assert decoded == [paths[0]] * 2


@pytest.mark.parametrize("num_threads", [1, 4])
def test_verify_names_the_first_bad_file_and_counts_the_others(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    monkeypatch.setattr(FileExamples, "_num_threads", num_threads)
    for index in (1, 3, 4, 5):
        paths[index].write_bytes(paths[index].read_bytes()[:60])
    with pytest.raises(DataError, match=r"cannot read the image \(.*1.png\): .*; and 3 more$"):
        files(paths, 6 * IMAGE_BYTES).verify()
    for path in paths[3:]:
        path.unlink()
    with pytest.raises(DataError, match=r"file or folder does not exist \(.*3.png\): and 2 more$"):
        files(paths, 0).verify()


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_read_names_the_bad_file_again_and_again(paths: list[Path], cache_bytes: int) -> None:
    paths[2].write_bytes(b"GIF89a")
    examples = files(paths, cache_bytes)
    for _ in range(2):
        with pytest.raises(DataError, match=r"cannot read the image \(.*2.png\)"):
            examples.read([0, 2])
    assert examples.read([0, 1]).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_a_subset_reads_its_own_members_only(paths: list[Path], cache_bytes: int) -> None:
    paths[2].write_bytes(b"GIF89a")
    whole = files(paths, cache_bytes)
    assert whole.in_memory == (cache_bytes > 0)  # from the second time on
    SubsetExamples(whole, torch.tensor([5, 0])).verify()
    bad = SubsetExamples(whole, torch.tensor([4, 2]))
    assert (bad.name(1), bad.labels_N.tolist()) == (str(paths[2]), [0, 0])
    assert torch.equal(bad.read([0]), whole.read([4]))
    with pytest.raises(DataError, match=r"cannot read the image \(.*2.png\)"):
        bad.verify()


def test_threads_for_large_files_only(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert files(paths, 0)._num_threads == 1
    monkeypatch.setattr(module, "MIN_THREADED_BYTES", 100)
    assert files(paths, 0)._num_threads == module.MAX_THREADS
    assert files([Path("nul\0"), *paths], 0)._num_threads == module.MAX_THREADS


@pytest.mark.parametrize("num_threads", [1, 4])
def test_interruption_stops_the_other_threads(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    monkeypatch.setattr(FileExamples, "_num_threads", num_threads)
    tried: list[Path] = []

    def interrupted(path: Path, _: Preprocessing) -> torch.Tensor:
        tried.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files(paths * 100, 10**6).read(range(600))
    assert len(tried) <= num_threads
