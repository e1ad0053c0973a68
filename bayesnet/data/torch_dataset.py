"""A user's map-style data set as examples: each item checked, and its random transforms made repeatable.

A transform that draws from the global generators of torch, NumPy and Python finds them seeded by (seed, epoch, index):
an item is the same in every process and after every interruption, and another in the next epoch.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesnet.data.examples import Examples
from bayesnet.data.images import pillow_pixels
from bayesnet.data.labels import plain_label
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.errors import DataError

# An axis of at least this length is rows or columns where the axis of the channels should be.
LONG_AXIS = 8
PIXEL_VALUES = (1, 3, 4)
_PIXEL_TYPES = ("uint8", "float16", "float32", "float64", "bfloat16")
_NOT_IN_TRAINING = "evaluation"


class DatasetExamples(Examples):
    """The items of a map-style data set, read one by one and not kept.

    Not for several threads at once: reading sets and restores the process-wide random generators. A transform with a
    generator of its own is out of reach.

    Args:
        dataset: Anything with a length and items (image, label), or images alone.
        labels_N: int64 class indices.
        prefix: What `name` puts before the index.
        expected: What the items' labels have to be, one each; None checks nothing.
        fit: Height and width that PIL images are scaled to; None takes them as they are.
        channels: 1 or 3 for PIL images; 0 makes grey ones 1 and others 3.

    Raises:
        DataError: There is not one label per item, or item 0 cannot be read.
    """

    def __init__(
        self,
        dataset: Any,  # noqa: ANN401 - a length and items are all it needs
        labels_N: Tensor,
        *,
        prefix: str = "item",
        expected: Sequence[Hashable] | None = None,
        fit: Preprocessing | None = None,
        channels: int = 0,
    ) -> None:
        if labels_N.dtype != torch.int64 or labels_N.shape != (len(dataset),):
            raise DataError("expected one int64 label per image", where=tuple(labels_N.shape))
        self.labels_N = labels_N
        self._dataset = dataset
        self._prefix = prefix
        self._expected = expected
        self._fit = fit
        self._channels = channels
        self._key = _NOT_IN_TRAINING
        self._like: Tensor | None = None
        self._like = self.read([0])[0] if len(dataset) else None

    def read(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return pixels (B, C, H, W), uint8 or float32.

        Raises:
            DataError: An item cannot be read, differs in shape or type from the first, or its label changed.
        """
        with own_random() as seed:
            pixels = []
            for index in torch.as_tensor(indices, dtype=torch.int64).tolist():
                seed(f"{self._key} {index}")
                pixels.append(self._pixels(index))
        if pixels:
            return torch.stack(pixels)
        assert self._like is not None
        return self._like.new_empty((0, *self._like.shape))

    def for_epoch(self, seed: int, epoch: int) -> Examples:
        """Return the same items with the random transforms of that epoch."""
        view = object.__new__(DatasetExamples)
        view.__dict__.update(self.__dict__)
        view._key = f"{seed} {epoch}"
        return view

    def name(self, index: int) -> str:
        """Return the prefix and the index."""
        return f"{self._prefix} {index}"

    def verify(self) -> None:
        """Read every item once.

        Raises:
            DataError: Some cannot be read; the message names the first and counts the others.
        """
        errors: list[DataError] = []
        for index in range(len(self)):
            try:
                self.read([index])
            except DataError as error:
                errors.append(error)
        if errors:
            hint = "; ".join(filter(None, [errors[0].hint, f"and {len(errors) - 1} more" if errors[1:] else None]))
            raise DataError(errors[0].what, where=errors[0].where, hint=hint or None) from errors[0]

    def _pixels(self, index: int) -> Tensor:
        """Return the pixels (C, H, W) of one item, checked."""
        name = self.name(index)
        image, label = read_item(self._dataset, index, name, labelled=self._expected is not None)
        try:
            x_CHW = _image_pixels(image, self._fit, self._channels)
        except DataError as error:
            raise DataError(error.what, where=name, hint=error.hint) from error
        except Exception as error:  # of Pillow, which may decode only now
            raise DataError("cannot read the image", where=name, hint=_reason(error)) from error
        like = self._like
        if like is not None and (x_CHW.shape != like.shape or x_CHW.dtype != like.dtype):
            hint = f"it is {_form(x_CHW)}, the first {_form(like)}; data.image_size scales PIL images"
            raise DataError("the image differs from the first in shape or type", where=name, hint=hint)
        if first_not_finite(x_CHW[None]) is not None:
            raise DataError("the image has pixels that are NaN or infinite", where=name)
        label = plain_label(label)
        if self._expected is not None and (isinstance(label, Tensor | np.ndarray) or label != self._expected[index]):
            hint = f"first {self._expected[index]!r}, now {label!r}"
            raise DataError("the label changed between reads", where=name, hint=hint)
        return x_CHW


def read_item(dataset: Any, index: int, name: str, *, labelled: bool) -> tuple[Any, Any]:  # noqa: ANN401
    """Return the image and label of an item; the label is None where items are images alone.

    Raises:
        DataError: The data set raised anything, or the item is no (image, label) while ``labelled``.
    """
    try:
        item = dataset[index]
    except Exception as error:
        raise DataError("the data set cannot read the item", where=name, hint=_reason(error)) from error
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    if labelled:
        size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        hint = f"it is a {type(item).__name__}{size}; wrap the data set, or give its labels apart"
        raise DataError("expected an item (image, label)", where=name, hint=hint)
    return (item[0] if isinstance(item, tuple | list) and len(item) == 1 else item), None


@contextmanager
def own_random() -> Iterator[Callable[[str], None]]:
    """Give a function that seeds the global generators of torch (CPU), NumPy and Python; restore them at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - what transforms draw from
    torch_state = torch.get_rng_state()

    def seed(key: str) -> None:
        words = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=24).digest(), dtype="<u8").tolist()
        torch.default_generator.manual_seed(words[0] >> 1)
        np.random.seed(words[1] >> 32)  # noqa: NPY002
        random.seed(words[2])

    try:
        yield seed
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)


def as_pixels(values: np.ndarray | Tensor) -> Tensor:
    """Return uint8 or float32 values on the host, contiguous; of the same memory where nothing has to change.

    Raises:
        DataError: They are of another type: what their range means would be a guess.
    """
    name = values.dtype.name if isinstance(values, np.ndarray) else str(values.dtype).removeprefix("torch.")
    if name not in _PIXEL_TYPES:
        hint = "give uint8 pixels from 0 to 255, or floating-point ones"
        raise DataError(f"cannot take {values.dtype} pixels", hint=hint)
    if isinstance(values, np.ndarray):
        with warnings.catch_warnings():  # of memory that is read-only: nothing here writes to it
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            values = torch.from_numpy(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("=")))
    values = values.detach().cpu()
    return (values if values.dtype == torch.uint8 else values.to(torch.float32)).contiguous()


def first_not_finite(x_NCHW: Tensor) -> int | None:
    """Return the position of the first image with a NaN or infinite pixel, or None."""
    if not x_NCHW.is_floating_point():
        return None
    bad_N = ~torch.isfinite(x_NCHW).flatten(1).all(1)
    return int(bad_N.nonzero()[0]) if bool(bad_N.any()) else None


def _image_pixels(image: Any, fit: Preprocessing | None, channels: int) -> Tensor:  # noqa: ANN401
    """Return uint8 or float32 pixels (C, H, W) of a PIL image, an array (H, W[, C]) or a tensor ([C,] H, W)."""
    if hasattr(image, "getexif"):
        return pillow_pixels(image, fit, channels)
    if not isinstance(image, np.ndarray | Tensor):
        hint = f"got {type(image).__name__}; end the transforms with one that gives these"
        raise DataError("expected a PIL image, an array or a tensor", hint=hint)
    shape = tuple(image.shape)
    is_array = isinstance(image, np.ndarray)
    layout = "an array is (H, W) or (H, W, C), a tensor (H, W) or (C, H, W)"
    if len(shape) not in (2, 3) or 0 in shape:
        raise DataError(f"expected one image, got shape {shape}", hint=layout)
    channel_axis, row_axis = (2, 0) if is_array else (0, 2)
    if len(shape) == 3 and shape[channel_axis] >= LONG_AXIS and shape[row_axis] in PIXEL_VALUES:
        raise DataError(f"the channels seem to be on the wrong axis of shape {shape}", hint=layout)
    x = as_pixels(image)
    if x.dim() == 2:
        return x[None]
    return x.permute(2, 0, 1).contiguous() if is_array else x


def _form(x_CHW: Tensor) -> str:
    """Return type and shape, such as ``uint8 (3, 8, 8)``."""
    return f"{str(x_CHW.dtype).removeprefix('torch.')} {tuple(x_CHW.shape)}"


def _reason(error: Exception) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {error}".rstrip(": ").partition("\n")[0]
