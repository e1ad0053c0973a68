"""A user's data set as examples: items, their errors, upright images, and random transforms that repeat."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from bayesnet.data.dataset import DataConfig
from bayesnet.data.examples import SubsetExamples
from bayesnet.data.loading import read_batches
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.data.torch_dataset import DatasetExamples, own_random
from bayesnet.errors import BayesnetError, DataError
from tests.data.items import IMAGES_NHWC, LABELS, Items, N, load


def vary(index: int) -> int:
    return index % 2


def test_pillow_images_follow_the_rules_of_files() -> None:
    grey = load(Items(lambda i: (Image.fromarray(IMAGES_NHWC[i]).convert("L"), vary(i))))
    assert grey.preprocessing.shape == (1, 10, 8)
    colour = load(
        Items(lambda i: (Image.fromarray(IMAGES_NHWC[i]).convert("L"), vary(i))), None, DataConfig(channels=3)
    )
    assert colour.preprocessing.shape == (3, 10, 8)
    clear = load(Items(lambda i: (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), vary(i))))
    assert clear.train.read([0]).unique().tolist() == [255]
    sizes = Items(lambda i: (Image.new("RGB", (8 + i, 20)), vary(i)))
    with pytest.raises(DataError, match=r"differs from the first.* \(train item \d+\): .*data.image_size scales"):
        load(sizes).train.verify()
    assert load(sizes, None, DataConfig(image_size=16)).train.read([0]).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fit", [None, Preprocessing(3, 6, 4, (0.0,) * 3, (1.0,) * 3)])
def test_pillow_images_are_turned_upright(orientation: int, fit: Preprocessing | None) -> None:
    image = Image.fromarray(IMAGES_NHWC[0])
    image.getexif()[0x0112] = orientation
    got_CHW = DatasetExamples([image], torch.tensor([0]), fit=fit).read([0])[0]
    upright = ImageOps.exif_transpose(image)
    if fit is not None:
        upright = ImageOps.fit(upright, (4, 6), Image.Resampling.BILINEAR)
    expected_CHW = torch.from_numpy(np.asarray(upright).transpose(2, 0, 1).copy()).int()
    assert got_CHW.shape == expected_CHW.shape
    # Filtering columns before rows rounds otherwise than rows before columns.
    assert (got_CHW.int() - expected_CHW).abs().max() <= (0 if fit is None else 1)


ERRORS = [ValueError("bad\npixel"), KeyError(3), StopIteration(), OSError(5, "Input/output error"), MemoryError(),
          SyntaxError("broken PNG"), RuntimeError(), AssertionError(), IndexError("x"), DataError("inner")]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_exception_of_the_data_set_names_the_item(error: Exception) -> None:
    def make(index: int) -> object:
        if index in (3, 7):
            raise error
        return IMAGES_NHWC[index]

    examples = DatasetExamples(Items(make), torch.from_numpy(LABELS), prefix="train item")
    text = rf"^the data set cannot read the item \(train item 3\): {type(error).__name__}[^\n]*$"
    with pytest.raises(DataError, match=text) as caught:
        examples.read([1, 3])
    assert caught.value.__cause__ is error
    with pytest.raises(DataError, match=r"\(train item 3\): .*; and 1 more$"):
        examples.verify()
    with pytest.raises(DataError, match=text):
        list(read_batches(examples, torch.arange(8).split(2), workers=2))


def test_an_interruption_is_no_bad_item() -> None:
    def make(index: int) -> object:
        if index:
            raise KeyboardInterrupt
        return IMAGES_NHWC[0]

    with pytest.raises(KeyboardInterrupt):
        DatasetExamples(Items(make), torch.from_numpy(LABELS)).read([1])


def test_items_that_change() -> None:
    def examples(image: np.ndarray) -> DatasetExamples:
        return DatasetExamples(Items(lambda i: image if i == 2 else IMAGES_NHWC[0]), torch.from_numpy(LABELS))

    for image in (IMAGES_NHWC[0, :9], IMAGES_NHWC[0].astype(np.float32), IMAGES_NHWC[0, :, :, 0]):
        with pytest.raises(DataError, match=r"^the image differs from the first in shape or type \(item 2\)"):
            examples(image).read([0, 1, 2])
    nan = DatasetExamples(Items(lambda i: np.full((8, 8), np.nan if i == 2 else 0.0)), torch.from_numpy(LABELS))
    with pytest.raises(DataError, match=r"NaN or infinite \(item 2\)"):
        nan.read([2])
    assert examples(IMAGES_NHWC[0]).read([]).shape == (0, 3, 10, 8)


def noisy_examples() -> DatasetExamples:
    def make(index: int) -> object:
        return torch.tensor([[torch.rand(()).item(), np.random.rand(), random.random(), float(index)]])  # noqa: NPY002

    return DatasetExamples(Items(make), torch.from_numpy(LABELS))


def test_random_transforms_are_a_function_of_seed_epoch_and_index() -> None:
    examples = noisy_examples()
    plain = examples.read(range(N))
    epochs = {(seed, epoch): examples.for_epoch(seed, epoch).read(range(N)) for seed in (0, 1) for epoch in (0, 1)}
    views = [plain, *epochs.values()]
    for column in range(3):  # each generator: no number twice, in no epoch and for no item
        numbers = torch.cat([view[..., column].flatten() for view in views])
        assert len(numbers.unique()) == len(numbers) == 5 * N
    assert torch.equal(examples.read(range(N)), plain)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert torch.equal(examples.for_epoch(1, 1).read(order), epochs[1, 1][order])
    subset = SubsetExamples(examples, order[:7])
    assert torch.equal(subset.for_epoch(0, 1).read(range(7)), epochs[0, 1][order[:7]])
    for workers in (1, 2, 4):
        batches = read_batches(subset.for_epoch(0, 1), torch.arange(7).split(2), workers=workers)
        assert torch.equal(torch.cat(list(batches)), epochs[0, 1][order[:7]])


@pytest.mark.parametrize("fails", [False, True])
def test_the_caller_s_generators_are_left_as_they_were(fails: bool) -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002

    with own_random() as seed:  # so that this test leaves no trace either
        seed("start")
        expected = draw()
        seed("start")
        examples = noisy_examples()
        examples.read([1, 2])
        if fails:
            with pytest.raises(BayesnetError):
                DatasetExamples(Items(lambda i: draw() and 1 / 0), torch.from_numpy(LABELS))
        assert draw() == expected
