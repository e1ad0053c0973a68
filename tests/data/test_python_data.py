"""Data from Python: what is taken, what is refused by which line, labels, and random transforms that repeat."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from bayesnet.data.dataset import DataConfig, ImageData
from bayesnet.data.examples import SubsetExamples
from bayesnet.data.python_data import (
    class_labels,
    encode_labels,
    from_python,
    loader_batch_size,
    read_labels,
    unlabelled,
)
from bayesnet.errors import ConfigError, DataError
from tests.data.items import CONFIG, IMAGES, IMAGES_NHWC, LABELS, Items, N, load


def pixels(data: ImageData) -> Tensor:
    """Return all images by original order, whichever split they went to."""
    parts = (data.train, data.validation, data.calibration, data.test)
    found = {}
    for part in parts:
        assert isinstance(part, SubsetExamples)
        for position, index in enumerate(part._indices_N.tolist()):
            found[index] = part.read([position])
    return torch.cat([found[index] for index in range(N)])


def vary(index: int) -> int:
    return index % 2


SOURCES: dict[str, Any] = {
    "array": (IMAGES, LABELS),
    "tensor": (torch.from_numpy(IMAGES), torch.from_numpy(LABELS)),
    "list of labels": (IMAGES, LABELS.tolist()),
    "tensor data set": TensorDataset(torch.from_numpy(IMAGES), torch.from_numpy(LABELS)),
    "subset": Subset(TensorDataset(torch.from_numpy(IMAGES).flip(0), torch.from_numpy(LABELS).flip(0)), range(N)[::-1]),
    "arrays": Items(lambda i: (IMAGES_NHWC[i], vary(i))),
    "tensors": Items(lambda i: (torch.from_numpy(IMAGES[i]), torch.tensor(vary(i)))),
    "pillow": Items(lambda i: (Image.fromarray(IMAGES_NHWC[i]), np.int64(vary(i)))),
    "list": [(IMAGES_NHWC[i], vary(i)) for i in range(N)],
    "images apart": (Items(lambda i: IMAGES_NHWC[i]), LABELS),
    "loader": DataLoader(Items(lambda i: (IMAGES_NHWC[i], vary(i))), batch_size=7, shuffle=True),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_form_gives_the_same_images(name: str) -> None:
    data = load(SOURCES[name])
    assert torch.equal(pixels(data), torch.from_numpy(IMAGES))
    assert (data.name, data.spec, data.classes) == ("python", "python", ("0", "1"))
    assert data.preprocessing.shape == (3, 10, 8)
    assert data.preprocessing.pixel_scale == 255
    assert [len(part) for part in (data.train, data.validation, data.calibration, data.test)] == [24, 4, 4, 8]
    assert data.notes[0].startswith("There are no validation, calibration, test data: carved")
    data.train.verify()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", ">f8"])
def test_floats_become_float32(dtype: str) -> None:
    images = IMAGES.astype(dtype) / np.array(4, dtype)
    data = load(images, LABELS)
    assert pixels(data).dtype == torch.float32
    assert torch.equal(pixels(data), torch.from_numpy(IMAGES).float() / 4)
    assert data.preprocessing.pixel_scale == 1


def test_grey_arrays_and_read_only_ones() -> None:
    images = IMAGES[:, 0]
    images.flags.writeable = False
    assert load(images, LABELS).preprocessing.shape == (1, 10, 8)
    assert load(Items(lambda i: (images[i], vary(i)))).preprocessing.shape == (1, 10, 8)


def not_finite(value: float) -> np.ndarray:
    images = IMAGES.astype(np.float32)
    images[5, 1, 2, 3] = value
    images[7, 0, 0, 0] = value
    return images


BAD: dict[str, tuple[Any, Any, str]] = {
    "channels last": (IMAGES_NHWC, LABELS, r"channels seem to come last \(train images, uint8.*\): give \(N, C, H, W"),
    "flat": (IMAGES.reshape(N, -1), LABELS, r"expected images \(N, H, W\) or \(N, C, H, W\)"),
    "int": (IMAGES.astype(np.int64), LABELS, r"^cannot take int64 pixels \(train images.*\): give uint8 pixels"),
    "bool": (IMAGES > 3, LABELS, "^cannot take bool pixels"),
    "object": (IMAGES.astype(object), LABELS, "^cannot take object pixels"),
    "nan": (not_finite(np.nan), LABELS, r"NaN or infinite \(train image 5\)"),
    "inf": (not_finite(np.inf), LABELS, r"NaN or infinite \(train image 5\)"),
    "beyond float32": (not_finite(1.0).astype(np.float64) * 1e300, LABELS, r"NaN or infinite \(train image 0\)"),
    "no labels": (IMAGES, None, r"^images without labels \(train\): give \(images, labels\)"),
    "twice": ((IMAGES, LABELS), LABELS, r"^labels are given twice \(train\)"),
    "length": (IMAGES, LABELS[:-1], r"^expected one label per image \(train: 40 images, 39 labels\)"),
    "empty": (IMAGES[:0], LABELS[:0], r"^there are no images \(train\)"),
    "empty data set": (Items(vary, 0), None, r"^there are no images \(train\)"),
    "one class": (IMAGES, [3] * N, r"^found 1 class, need at least 2 \(train labels\)"),
    "one-hot": (IMAGES, np.eye(2)[LABELS], r"expected one label per image.*\(40, 2\)\): .*not one-hot rows"),
    "missing": (IMAGES, ["a", None] * 20, r"^a label is missing \(train labels\[1\]\)"),
    "nan label": (IMAGES, [0.0, float("nan")] * 20, r"^a label is missing \(train labels\[1\]\)"),
    "list label": (IMAGES, [[0], [1]] * 20, r"^a label cannot be hashed \(train labels\[0\]\): got list"),
    "mixed labels": (IMAGES, [1, "1"] * 20, r"^two labels have the same text \(1 and '1'\)"),
    "scalar labels": (IMAGES, 3, r"^expected a sequence of labels"),
    "text": ("photos", None, r"^cannot take images from str \(train\): give \(images, labels\) arrays"),
    "mapping": ({0: IMAGES}, None, r"^cannot take images from dict"),
    "number": (3, None, r"^cannot take images from int"),
    "nothing": (None, None, r"^there are no training data"),
    "dict items": (Items(lambda i: {"image": 0}), None, r"^expected an item \(image, label\) \(train item 0\): .*dict"),
    "path items": (Items(lambda i: ("a.png", vary(i))), None, r"^expected a PIL image.*\(train item 0\): got str"),
    "item layout": (Items(lambda i: (IMAGES[i], vary(i))), None, r"wrong axis of shape \(3, 10, 8\) \(train item 0\)"),
    "item rank": (Items(lambda i: (IMAGES, vary(i))), None, r"^expected one image, got shape \(40, 3, 10, 8\)"),
    "item type": (Items(lambda i: (IMAGES_NHWC[i] > 1, vary(i))), None, r"^cannot take bool pixels \(train item 0\)"),
    "float image": (Items(lambda i: (Image.new("F", (8, 8)), vary(i))), None, r"item 0\): floating-point pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str) -> None:
    source, y, text = BAD[name]
    with pytest.raises(DataError, match=text):
        load(source, y)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


PLAIN = Items(lambda i: (IMAGES_NHWC[i], vary(i)))
LOADERS: dict[str, tuple[Any, str]] = {
    "stream": (Stream(), "^an IterableDataset cannot be split or shuffled"),
    "loader of a stream": (DataLoader(Stream()), "^an IterableDataset cannot be split or shuffled"),
    "sampler": (DataLoader(PLAIN, sampler=WeightedRandomSampler([1.0] * N, N)), "a sampler of its own.*give the data"),
    "replacement": (DataLoader(PLAIN, sampler=RandomSampler(PLAIN, replacement=True)), "a sampler of its own"),
    "part": (DataLoader(PLAIN, sampler=RandomSampler(PLAIN, num_samples=3)), "a sampler of its own"),
    "batch sampler": (DataLoader(PLAIN, batch_sampler=[[0, 1]]), "a sampler of its own"),
    "collate": (DataLoader(PLAIN, collate_fn=lambda batch: batch), "a collate_fn of its own"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_that_are_refused(name: str) -> None:
    source, text = LOADERS[name]
    with pytest.raises(DataError, match=text):
        load(source)


def test_batch_size_of_a_loader() -> None:
    assert loader_batch_size(DataLoader(PLAIN, batch_size=7)) == 7
    assert loader_batch_size(PLAIN) is None


def test_given_splits_are_used_and_must_match() -> None:
    data = from_python((IMAGES, LABELS), test=PLAIN, config=CONFIG)
    assert len(data.test) == N
    assert len(data.train) + len(data.validation) + len(data.calibration) == N
    with pytest.raises(DataError, match=r"^test has other classes than train \(test labels\): \+2$"):
        from_python(IMAGES, LABELS, test=(IMAGES, LABELS + 1), config=CONFIG)
    for other in (IMAGES.astype(np.float32), IMAGES[:, :1], IMAGES[:, :, :9]):
        with pytest.raises(DataError, match=r"^images of validation differ from those of train in shape or type"):
            from_python(IMAGES, LABELS, validation=(other, LABELS), config=CONFIG)
    # A split may lack a class, and the indices are still those of train.
    data = from_python(IMAGES, LABELS, test=(IMAGES[:3], [1, 1, 1]), config=CONFIG)
    assert data.test.labels_N.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (DataConfig(image_size=8), r"^the images are 10 x 8 pixels \(data.image_size\): leave it at 0"),
        (DataConfig(channels=1), r"^the images have 3 channels \(data.channels\)"),
        (DataConfig(crop_padding=8), r"^must be below the image side, 8 \(data.crop_padding\)"),
    ],
)
def test_configuration_that_arrays_do_not_follow(config: DataConfig, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load(IMAGES, LABELS, config)
    with pytest.raises(ConfigError, match=r"the images have 1 channel \(data.preset\)"):
        load(IMAGES[:, :1], LABELS, DataConfig(preset="imagenet"))


def test_the_preprocessing_of_a_run_is_kept_and_checked() -> None:
    preprocessing = load(IMAGES, LABELS).preprocessing
    assert (
        from_python(IMAGES[:30], LABELS[:30], config=CONFIG, preprocessing=preprocessing).preprocessing == preprocessing
    )
    for other in (IMAGES[:, :, :9], IMAGES.astype(np.float32)):
        with pytest.raises(
            DataError, match=r"^the images do not fit the model .*it takes uint8 images of shape \(3, 10"
        ):
            from_python(other, LABELS, config=CONFIG, preprocessing=preprocessing)
        with pytest.raises(DataError, match=r"^the images do not fit the model"):
            unlabelled(other, preprocessing)
    for source in (IMAGES, torch.from_numpy(IMAGES), PLAIN, DataLoader(PLAIN), [*IMAGES_NHWC]):
        assert torch.equal(unlabelled(source, preprocessing).read(range(N)), torch.from_numpy(IMAGES))
    with pytest.raises(DataError, match=r"^there are no images \(X\)"):
        unlabelled(IMAGES[:0], preprocessing)
    large = Items(lambda i: Image.fromarray(IMAGES_NHWC[i]).resize((16, 20)))
    assert unlabelled(large, preprocessing).read([0]).shape == (1, 3, 10, 8)


def test_fingerprint_is_of_pixels_labels_and_splits() -> None:
    first = load(IMAGES, LABELS).fingerprint
    assert load(IMAGES.copy(), LABELS.tolist()).fingerprint == first
    changed = IMAGES.copy()
    changed[-1, 0, 0, 0] ^= 1
    others = [
        load(changed, LABELS),
        load(IMAGES, LABELS[::-1].copy()),
        load(IMAGES, ["a", "b"] * 20),
        load(IMAGES, LABELS, DataConfig(seed=1)),
        from_python(IMAGES, LABELS, test=(IMAGES, LABELS), config=CONFIG),
    ]
    assert len({first, *(data.fingerprint for data in others)}) == 6
    assert load(PLAIN).fingerprint == load(PLAIN).fingerprint


def test_fingerprint_of_random_items_is_stable() -> None:
    noisy = Items(lambda i: (torch.randint(256, (3, 8, 8), dtype=torch.uint8), vary(i)))
    assert load(noisy).fingerprint == load(noisy).fingerprint


# Labels


@pytest.mark.parametrize(
    ("values", "originals"),
    [
        ([10, 2, 10, -1], (-1, 2, 10)),
        (["b10", "b2", "a"], ("a", "b10", "b2")),
        (np.array(["10", "9"]), ("10", "9")),
        (np.array([1.5, 0.5]), (0.5, 1.5)),
        (torch.tensor([3, 1]), (1, 3)),
        ([np.int32(3), torch.tensor(1)], (1, 3)),
        (np.array([True, False]), (False, True)),
        ([("a", 1), ("a", 0)], (("a", 0), ("a", 1))),
    ],
)
def test_labels_come_back(values: Sequence[Any], originals: tuple[Hashable, ...]) -> None:
    labels_N, found = encode_labels(values)
    assert found == originals
    assert [type(label) for label in found] == [type(label) for label in originals]
    assert [found[index] for index in labels_N.tolist()] == [getattr(v, "item", lambda v=v: v)() for v in values]
    assert class_labels(found) == originals
    assert encode_labels(values, found)[0].tolist() == labels_N.tolist()
    with pytest.raises(DataError, match="y has other classes than train"):
        encode_labels(values, found[:1])


def test_listed_labels_spare_a_reading_pass() -> None:
    listed = Items(lambda i: (IMAGES_NHWC[i], vary(i)))
    listed.targets = LABELS.tolist()  # type: ignore[attr-defined]
    assert read_labels(listed) == read_labels(Subset(listed, range(N))) == LABELS.tolist()
    assert listed.reads == 0
    listed.target_transform = str  # type: ignore[attr-defined]  # then the list is not what items give
    assert read_labels(listed) == LABELS.tolist()
    assert listed.reads == N
    listed.target_transform = None  # type: ignore[attr-defined]
    listed.targets = [1] * (N + 1)  # type: ignore[attr-defined]  # those of a larger data set
    assert read_labels(listed) == LABELS.tolist()


def test_a_label_that_changes_is_refused() -> None:
    listed = Items(lambda i: (IMAGES_NHWC[i], vary(i)))
    listed.targets = [0, *LABELS.tolist()[:1], 1, *LABELS.tolist()[3:]]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"^the label changed between reads \(test item 1\): first 0, now 1$"):
        from_python(PLAIN, test=listed, config=CONFIG)
    flips = Items(lambda i: (IMAGES_NHWC[i], torch.tensor([0, 1]) if flips.reads > N else vary(i)))
    with pytest.raises(DataError, match=r"^the label changed between reads \(train item 0\): first 0, now tensor"):
        load(flips)
