"""Examples: labelled images that are read by index, from memory or from files."""

from __future__ import annotations

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from bayesnet.data.ahead import MAX_THREADS as MAX_THREADS
from bayesnet.data.ahead import num_threads
from bayesnet.data.images import image_size, read_image
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.errors import DataError

# Below this size most of the time goes to Python code that holds the interpreter lock: two threads need half as long
# again as one for images of 32 x 32, and about 60 % of its time for 512 x 512.
MIN_THREADED_BYTES = 10_000
_SIZE_SAMPLE = 16
_VERIFY_CHUNK = 64


class Examples(ABC):
    """A sequence of labelled images.

    Attributes:
        labels_N: int64 class indices.
    """

    labels_N: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels_N)

    @abstractmethod
    def read(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return pixels of shape (B, C, H, W) for B indices, as new memory: uint8, or float32 where the data are that.

        Raises:
            DataError: An image cannot be read; the message names it.
        """

    def for_epoch(self, seed: int, epoch: int) -> Examples:
        """Return these examples as training reads them in an epoch: a function of seed and epoch, nothing else.

        Only examples whose reading is random (a data set with transforms of its own) differ from themselves.
        """
        return self

    @property
    def in_memory(self) -> bool:
        """Whether reading is a copy of memory, at least from the second time: no worker process could help."""
        return False

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what to call an example in a message or table, such as its path."""

    @abstractmethod
    def verify(self) -> None:
        """Look at every example once, so that a bad one is found now and not hours later.

        Raises:
            DataError: Some cannot be read; the message names the first and counts the others.
        """


class ArrayExamples(Examples):
    """Images in memory.

    Args:
        images_NCHW: Pixels, uint8 or float32.
        labels_N: int64 class indices.
        prefix: What `name` puts before the index.

    Raises:
        DataError: Shapes or types do not match.

    Example:
        >>> examples = ArrayExamples(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0]))
        >>> examples.read([2, 0]).shape, examples.name(2)
        (torch.Size([2, 1, 2, 2]), 'image 2')
    """

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor, *, prefix: str = "image") -> None:
        if images_NCHW.dtype not in (torch.uint8, torch.float32) or images_NCHW.dim() != 4:
            found = f"{images_NCHW.dtype}, {tuple(images_NCHW.shape)}"
            raise DataError("expected uint8 or float32 pixels of shape (N, C, H, W)", where=found)
        if labels_N.dtype != torch.int64 or labels_N.shape != images_NCHW.shape[:1]:
            raise DataError("expected one int64 label per image", where=tuple(labels_N.shape))
        self.labels_N = labels_N
        self._images_NCHW = images_NCHW
        self._prefix = prefix

    def read(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return pixels (B, C, H, W)."""
        return self._images_NCHW.index_select(0, _as_indices(indices))

    @property
    def in_memory(self) -> bool:
        """True."""
        return True

    def name(self, index: int) -> str:
        """Return the prefix and the index."""
        return f"{self._prefix} {index}"

    def verify(self) -> None:
        """Do nothing: pixels in memory are readable."""


class SubsetExamples(Examples):
    """Some examples of others, in a given order.

    Args:
        examples: The others.
        indices_N: int64 indices into them.
    """

    def __init__(self, examples: Examples, indices_N: Tensor) -> None:
        self._examples = examples
        self._indices_N = indices_N
        self.labels_N = examples.labels_N[indices_N]

    def read(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the pixels (B, C, H, W) of these members of the subset."""
        return self._examples.read(self._indices_N[_as_indices(indices)])

    def for_epoch(self, seed: int, epoch: int) -> Examples:
        """Return the same subset of what the others are in that epoch."""
        return SubsetExamples(self._examples.for_epoch(seed, epoch), self._indices_N)

    @property
    def in_memory(self) -> bool:
        """As the others."""
        return self._examples.in_memory

    def name(self, index: int) -> str:
        """Return the name that the others give it."""
        return self._examples.name(int(self._indices_N[index]))

    def verify(self) -> None:
        """Read every member once.

        Raises:
            DataError: Some cannot be read.
        """
        for indices_B in torch.arange(len(self)).split(_VERIFY_CHUNK):
            self.read(indices_B)


class FileExamples(Examples):
    """Images in files, decoded by a few threads when they are first read and kept where they fit.

    Args:
        paths: Image files.
        labels_N: int64 class indices.
        preprocessing: Channels, size and pixel limit of the result.
        cache_bytes: Memory for decoded pixels. All N images are kept, or none, so that no epoch is slower than another.

    Raises:
        DataError: There is not one label per path.
    """

    def __init__(
        self, paths: Sequence[Path], labels_N: Tensor, preprocessing: Preprocessing, cache_bytes: int = 0
    ) -> None:
        if labels_N.dtype != torch.int64 or labels_N.shape != (len(paths),):
            raise DataError("expected one int64 label per image", where=tuple(labels_N.shape))
        self.labels_N = labels_N
        self.paths = tuple(paths)
        self._preprocessing = preprocessing
        channels, height, width = preprocessing.shape
        self.pixel_bytes = len(paths) * channels * height * width
        self.cached = 0 < self.pixel_bytes <= cache_bytes
        self._cache_NCHW: Tensor | None = None
        self._filled_N = torch.zeros(len(paths), dtype=torch.bool)

    def read(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return uint8 pixels (B, C, H, W)."""
        indices_B = _as_indices(indices)
        if not self.cached:
            x_BCHW = torch.empty(len(indices_B), *self._preprocessing.shape, dtype=torch.uint8)
            _raise_first(self._decode(indices_B, x_BCHW))
            return x_BCHW
        _raise_first(self._fill(indices_B))
        assert self._cache_NCHW is not None
        return self._cache_NCHW.index_select(0, indices_B)

    @property
    def in_memory(self) -> bool:
        """Whether the images fit into the cache. What a worker process decoded would not be in this one's."""
        return self.cached

    def name(self, index: int) -> str:
        """Return the path."""
        return str(self.paths[index])

    def verify(self) -> None:
        """Decode every image into the cache; where they do not fit, read every header."""
        if self.cached:
            _raise_first(self._fill(torch.arange(len(self))))
            return

        def check(index: int) -> None:
            image_size(self.paths[index], max_pixels=self._preprocessing.max_pixels)

        _raise_first(_for_each(check, len(self), num_threads=1))

    @functools.cached_property
    def _num_threads(self) -> int:
        """How many threads decode, by the mean size of a few files."""
        sample = self.paths[:: max(1, len(self) // _SIZE_SAMPLE)]
        large = sum(map(_file_bytes, sample)) >= MIN_THREADED_BYTES * len(sample)
        return num_threads() if large else 1

    def _fill(self, indices_B: Tensor) -> list[DataError]:
        """Decode those images that are not in the cache yet; return the errors, by position."""
        if self._cache_NCHW is None:
            self._cache_NCHW = torch.empty(len(self), *self._preprocessing.shape, dtype=torch.uint8)
        missing_M = indices_B[~self._filled_N[indices_B]].unique()
        if len(missing_M) == 0:
            return []
        cache_NCHW = self._cache_NCHW
        missing = missing_M.tolist()

        def decode(position: int) -> None:
            index = missing[position]
            cache_NCHW[index] = read_image(self.paths[index], self._preprocessing)
            self._filled_N[index] = True  # after the pixels, so that no other thread can read them half-written

        return _for_each(decode, len(missing), self._num_threads)

    def _decode(self, indices_B: Tensor, out_BCHW: Tensor) -> list[DataError]:
        """Decode images into ``out_BCHW``; return the errors, by position."""
        indices = indices_B.tolist()

        def decode(position: int) -> None:
            out_BCHW[position] = read_image(self.paths[indices[position]], self._preprocessing)

        return _for_each(decode, len(indices), self._num_threads)


def _as_indices(indices: Tensor | Sequence[int]) -> Tensor:
    """Return int64 indices on the host, shape (B,)."""
    return torch.as_tensor(indices, dtype=torch.int64, device="cpu")


def _file_bytes(path: Path) -> int:
    """Return the size of a file; 0 for one that cannot be read, which is named when it is decoded."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


def _raise_first(errors: Sequence[DataError]) -> None:
    """Raise the first error, saying how many more there are."""
    if not errors:
        return
    first = errors[0]
    more = f"and {len(errors) - 1} more" if len(errors) > 1 else None
    hint = "; ".join(part for part in (first.hint, more) if part)
    raise DataError(first.what, where=first.where, hint=hint or None) from first


def _for_each(action: Callable[[int], None], count: int, num_threads: int) -> list[DataError]:
    """Run ``action(position)`` for 0..count-1 on some threads; return the DataErrors in order of position.

    Each thread takes every n-th position: one future per image would cost more than decoding a small one.
    """
    errors: dict[int, DataError] = {}
    stopped = threading.Event()

    def work(start: int) -> None:
        for position in range(start, count, num_threads):
            if stopped.is_set():
                return
            try:
                action(position)
            except DataError as error:
                errors[position] = error

    if num_threads == 1 or get_worker_info() is not None:  # each worker process is one of several already
        num_threads = 1
        work(0)
        return [errors[position] for position in sorted(errors)]
    with ThreadPoolExecutor(num_threads, thread_name_prefix="bayesnet-decode") as pool:
        futures = [pool.submit(work, start) for start in range(num_threads)]
        try:
            for future in futures:
                future.result()
        except BaseException:  # Ctrl-C must not wait for the other images
            stopped.set()
            raise
    return [errors[position] for position in sorted(errors)]
