"""Augmentation: equal to a loop over images, and to torchvision where that is exact; independent of the batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from bayesnet.data import DataConfig, Preprocessing
from bayesnet.data.augment import Augmentation, AugmentDraws, augment, epoch_draws
from bayesnet.errors import ConfigError

BOTH = Augmentation(crop_padding=3, flip=True)
ALL = Augmentation(crop_padding=3, flip=True, rotate=30, min_crop=0.3, colour=0.4, erase=0.1)
STILL = (torch.zeros(1, 2, dtype=torch.int64), torch.tensor([False]))


def images(num: int, height: int = 6, width: int = 9) -> Tensor:
    return torch.randint(256, (num, 3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def by_loop(x_BCHW: Tensor, draws: AugmentDraws, padding: int) -> Tensor:
    results = []
    _, _, height, width = x_BCHW.shape
    for image_CHW, (row, column), flip in zip(x_BCHW, draws.offset_N2.tolist(), draws.flip_N.tolist(), strict=True):
        padded = torch.nn.functional.pad(image_CHW.float()[None], (padding,) * 4, mode="reflect")[0].to(torch.uint8)
        crop = padded[:, padding + row : padding + row + height, padding + column : padding + column + width]
        results.append(crop.flip(-1) if flip else crop)
    return torch.stack(results)


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (3, False), (3, True), (5, True)])
def test_equals_a_loop_over_images(padding: int, flip: bool) -> None:
    x_BCHW = images(200)
    draws = epoch_draws(200, Augmentation(padding, flip), seed=1, epoch=2)
    result = augment(x_BCHW, draws)
    assert result.dtype == torch.uint8
    assert torch.equal(result, by_loop(x_BCHW, draws, padding))


def test_independent_of_the_batch() -> None:
    x_NCHW = images(50)
    draws = epoch_draws(50, BOTH, seed=0, epoch=0)
    indices_B = torch.tensor([41, 3, 3, 17])
    assert torch.equal(augment(x_NCHW[indices_B], draws.select(indices_B)), augment(x_NCHW, draws)[indices_B])


def test_flip_mirrors() -> None:
    x_BCHW = images(2)
    draws = AugmentDraws(torch.zeros(2, 2, dtype=torch.int64), torch.tensor([False, True]))
    result = augment(x_BCHW, draws)
    assert torch.equal(result[0], x_BCHW[0])
    assert torch.equal(result[1], x_BCHW[1].flip(-1))
    assert not torch.equal(result[1], x_BCHW[1])


def test_no_augmentation_changes_nothing() -> None:
    x_BCHW = images(5)
    assert Augmentation().is_identity
    assert not BOTH.is_identity
    assert torch.equal(augment(x_BCHW, epoch_draws(5, Augmentation(), seed=0, epoch=0)), x_BCHW)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2)])
def test_tiny_images_stay_inside(shape: tuple[int, int]) -> None:
    x_BCHW = images(20, *shape)
    result = augment(x_BCHW, epoch_draws(20, BOTH, seed=0, epoch=0))
    assert result.shape == x_BCHW.shape
    for before, after in zip(x_BCHW, result, strict=True):
        assert set(after.unique().tolist()) <= set(before.unique().tolist())


@pytest.mark.parametrize("augmentation", [BOTH, ALL])
def test_empty_batch(augmentation: Augmentation) -> None:
    assert augment(images(0), epoch_draws(0, augmentation, seed=0, epoch=0)).shape == (0, 3, 6, 9)


@pytest.mark.parametrize("augmentation", [BOTH, ALL])
def test_the_host_waits_for_no_value(augmentation: Augmentation) -> None:
    # A tensor on the meta device has no values: any look at one would raise.
    draws = epoch_draws(3, augmentation, seed=0, epoch=0).to("meta")
    result = augment(images(3).to("meta"), draws.select(torch.arange(3, device="meta")))
    assert (result.device.type, result.shape, result.dtype) == ("meta", (3, 3, 6, 9), torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_padding": -1}, "must not be negative (crop_padding)"),
        ({"rotate": 181.0}, "must be from 0 to 180 degrees (rotate = 181.0)"),
        ({"rotate": math.nan}, "must be from 0 to 180 degrees (rotate = nan)"),
        ({"min_crop": 0.0}, "must be above 0 and at most 1 (min_crop = 0.0)"),
        ({"min_crop": 1.5}, "must be above 0 and at most 1 (min_crop = 1.5)"),
        ({"colour": 1.0}, "must be in [0, 1) (colour = 1.0)"),
        ({"erase": -0.1}, "must be in [0, 1) (erase = -0.1)"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(BOTH, **change)
    assert str(caught.value) == message


def test_from_config_takes_every_field() -> None:
    values = dataclasses.asdict(ALL)
    assert Augmentation.from_config(DataConfig(**values)) == ALL
    for name in values:  # each alone is not nothing
        assert not dataclasses.replace(Augmentation(), **{name: values[name]}).is_identity


def test_colour_needs_pixels_with_a_range_and_known_channels() -> None:
    floats = Preprocessing(3, 8, 8, (0.0,) * 3, (1.0,) * 3, pixel_scale=1.0)
    five = Preprocessing(5, 8, 8, (0.0,) * 5, (1.0,) * 5)
    what = (
        r"floating-point pixels have no defined range, so their colour cannot be changed \(data.colour\): set it to 0"
    )
    with pytest.raises(ConfigError, match=what):
        ALL.check(floats)
    with pytest.raises(
        ConfigError, match=r"images with 5 channels have no colour to change \(data.colour\): set it to 0"
    ):
        ALL.check(five)
    ALL.check(Preprocessing(1, 8, 8, (0.0,), (1.0,)))
    for preprocessing in (floats, five):
        dataclasses.replace(ALL, colour=0.0).check(preprocessing)


def warped_by_loop(image_CHW: Tensor, draws: AugmentDraws, index: int) -> NDArray[np.float64]:
    """Follow each pixel of one result back, in float64: mirror, shift, crop, rotate; then interpolate."""
    channels, height, width = image_CHW.shape
    margin = 3 * max(height, width)
    padded_CHW = np.pad(image_CHW.double().numpy(), ((0, 0), (margin, margin), (margin, margin)), "symmetric")
    crop_N4 = (
        torch.tensor([[1.0, width / height, 0, 0]]).repeat(index + 1, 1) if draws.crop_N4 is None else draws.crop_N4
    )
    area, aspect, down, right = crop_N4[index].tolist()
    crop_width = math.sqrt(area * height * width * aspect)
    crop_height = math.sqrt(area * height * width / aspect)
    if crop_width > width:
        crop_width, crop_height = width, area * height
    if crop_height > height:
        crop_width, crop_height = area * width, height
    top, left = down * (height - crop_height), right * (width - crop_width)
    cos, sin = (1.0, 0.0) if draws.rotation_N2 is None else draws.rotation_N2[index].tolist()
    result_CHW = np.zeros((channels, height, width))
    for row in range(height):
        for column in range(width):
            shifted_column = (width - 1 - column if draws.flip_N[index] else column) + int(draws.offset_N2[index, 1])
            # The centre of pixel 0 is at 0.5.
            y = top + (row + int(draws.offset_N2[index, 0]) + 0.5) * crop_height / height - height / 2
            x = left + (shifted_column + 0.5) * crop_width / width - width / 2
            source_y = sin * x + cos * y + height / 2 - 0.5 + margin
            source_x = cos * x - sin * y + width / 2 - 0.5 + margin
            y0, x0 = math.floor(source_y), math.floor(source_x)
            weight_2 = np.array([1 - (source_y - y0), source_y - y0])
            across_2 = np.array([1 - (source_x - x0), source_x - x0])
            result_CHW[:, row, column] = padded_CHW[:, y0 : y0 + 2, x0 : x0 + 2] @ across_2 @ weight_2
    return result_CHW


@pytest.mark.parametrize("shape", [(12, 12), (8, 15), (15, 8)])
@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(rotate=180),
        Augmentation(min_crop=0.1),
        Augmentation(rotate=40, min_crop=0.3),
        Augmentation(crop_padding=3, flip=True, rotate=90, min_crop=0.2),
    ],
)
def test_warp_equals_a_loop_over_pixels(augmentation: Augmentation, shape: tuple[int, int]) -> None:
    x_BCHW = images(12, *shape)
    draws = epoch_draws(12, augmentation, seed=3, epoch=1)
    result = augment(x_BCHW, draws)
    result_float = augment(x_BCHW.float(), draws)
    assert (result.dtype, result_float.dtype) == (torch.uint8, torch.float32)
    assert torch.equal(result, result_float.round().to(torch.uint8))
    for index in range(12):
        expected_CHW = torch.from_numpy(warped_by_loop(x_BCHW[index], draws, index))
        # A step of one pixel is up to 255 levels: float32 coordinates are right to about 1e-6 of a pixel.
        torch.testing.assert_close(result_float[index].double(), expected_CHW, atol=0.01, rtol=0)


def test_rotation_is_that_of_torchvision_where_nothing_is_filled_in() -> None:
    x_1CHW = images(1, 32, 32).float()
    y_H = torch.arange(32) - 15.5
    inside_HW = (y_H[:, None] ** 2 + y_H**2).sqrt() < 15
    for angle in (-170.0, -30.0, 10.0, 90.0):
        radians = math.radians(angle)
        draws = AugmentDraws(*STILL, rotation_N2=torch.tensor([[math.cos(radians), math.sin(radians)]]))
        expected_1CHW = reference.rotate(x_1CHW, angle, InterpolationMode.BILINEAR)
        difference = (augment(x_1CHW, draws) - expected_1CHW)[..., inside_HW]
        assert difference.abs().max() < 0.02


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 0), (0.5, 1)])
def test_resized_crop_is_that_of_torchvision(down: float, right: float) -> None:
    x_1CHW = images(1, 32, 48).float()
    # A quarter of the area, of the aspect of the image: 16 x 24 pixels.
    draws = AugmentDraws(*STILL, crop_N4=torch.tensor([[0.25, 1.5, down, right]]))
    expected_1CHW = reference.resized_crop(
        x_1CHW, int(16 * down), int(24 * right), 16, 24, [32, 48], InterpolationMode.BILINEAR, antialias=False
    )
    # Torchvision sees nothing outside the crop: its border pixels differ.
    difference = (augment(x_1CHW, draws) - expected_1CHW)[..., 1:-1, 1:-1]
    assert difference.abs().max() < 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_is_that_of_torchvision(channels: int) -> None:
    x_BCHW = images(40, 7, 9)[:, :channels]
    draws = epoch_draws(40, Augmentation(colour=0.8), seed=0, epoch=0)
    assert draws.colour_N3 is not None
    result = augment(x_BCHW, draws)
    for image_CHW, before_CHW, factors in zip(result, x_BCHW, draws.colour_N3.tolist(), strict=True):
        expected_CHW = before_CHW.float() / 255
        expected_CHW = reference.adjust_brightness(expected_CHW, factors[0])
        expected_CHW = reference.adjust_contrast(expected_CHW, factors[1])
        expected_CHW = reference.adjust_saturation(expected_CHW, factors[2])
        assert (image_CHW.float() - 255 * expected_CHW).abs().max() <= 0.501  # rounded once


@pytest.mark.parametrize("share", [0.02, 0.3, 0.95])
@pytest.mark.parametrize("shape", [(32, 32), (12, 20), (40, 12)])
def test_one_rectangle_of_that_area_is_erased(shape: tuple[int, int], share: float) -> None:
    height, width = shape
    x_BCHW = torch.randn(50, 2, height, width, generator=torch.Generator().manual_seed(0))
    result = augment(x_BCHW, epoch_draws(50, Augmentation(erase=share), seed=0, epoch=0))
    for before_CHW, after_CHW in zip(x_BCHW, result, strict=True):
        erased_HW = (before_CHW != after_CHW).all(0)
        rows, columns = erased_HW.any(1).nonzero().flatten(), erased_HW.any(0).nonzero().flatten()
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        left, right = int(columns[0]), int(columns[-1]) + 1
        expected_HW = torch.zeros(shape, dtype=torch.bool)
        expected_HW[top:bottom, left:right] = True
        assert torch.equal(erased_HW, expected_HW)
        tall, wide = bottom - top, right - left
        assert abs(tall * wide - share * height * width) <= tall / 2 + 1e-3  # the width is rounded
        if tall < height and wide < width:  # else it was clipped to fit
            assert (wide - 1) / (tall + 1) <= 3.3
            assert (wide + 1) / max(tall - 1, 1) >= 0.3
        mean_C = before_CHW.mean((1, 2))
        torch.testing.assert_close(after_CHW[:, erased_HW], mean_C[:, None].expand(2, tall * wide))


def test_the_last_place_is_inside() -> None:
    # The largest draw below 1 is 1 as a float32.
    draws = AugmentDraws(*STILL, erase_N4=torch.tensor([[0.25, 1.0, 1.0, 1.0]]))
    x_1CHW = torch.arange(36.0).reshape(1, 1, 6, 6)
    assert (augment(x_1CHW, draws) != x_1CHW)[0, 0].nonzero().tolist() == [[r, c] for r in (3, 4, 5) for c in (3, 4, 5)]


def test_uint8_is_erased_with_the_rounded_mean_and_kept_elsewhere() -> None:
    x_BCHW = images(20, 9, 9)
    result = augment(x_BCHW, epoch_draws(20, Augmentation(erase=0.2), seed=0, epoch=0))
    mean_BC11 = x_BCHW.double().mean((2, 3), keepdim=True).round().to(torch.uint8)
    assert ((result == x_BCHW) | (result == mean_BC11)).all()
    assert (result != x_BCHW).any(1).flatten(1).any(1).all()


@pytest.mark.parametrize("size", [(32, 32), (9, 7), (1, 1), (2, 3)])
def test_an_image_alone_is_the_same_in_a_batch(size: tuple[int, int]) -> None:
    x_NCHW = images(40, *size)
    draws = epoch_draws(40, ALL, seed=0, epoch=0)
    result = augment(x_NCHW, draws)
    for index in range(40):
        indices_B = torch.tensor([index])
        assert torch.equal(augment(x_NCHW[indices_B], draws.select(indices_B))[0], result[index])
    indices_B = torch.tensor([1, 3, 3, 17])
    assert torch.equal(augment(x_NCHW[indices_B], draws.select(indices_B)), result[indices_B])


def test_the_mean_of_an_image_has_the_same_bits_in_a_batch() -> None:
    x_BCHW = torch.randn(8, 1, 300, 201, generator=torch.Generator().manual_seed(0))
    draws = epoch_draws(8, Augmentation(erase=0.1), seed=0, epoch=0)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(4)  # one large image is shared out between threads, of many each has its own
    try:
        alone = augment(x_BCHW[:1], draws.select(torch.tensor([0])))
        assert torch.equal(alone[0], augment(x_BCHW, draws)[0])
        torch.testing.assert_close(x_BCHW[0].mean(), alone[alone != x_BCHW[:1]].mean())
    finally:
        torch.set_num_threads(num_threads)


def test_float_pixels_of_any_range_stay_within_it() -> None:
    x_BCHW = 1000 * torch.randn(30, 5, 10, 10, generator=torch.Generator().manual_seed(0))
    result = augment(x_BCHW, epoch_draws(30, dataclasses.replace(ALL, colour=0), seed=0, epoch=0))
    assert result.dtype == torch.float32
    low_BC, high_BC = x_BCHW.flatten(2).aminmax(dim=2)
    assert (result.flatten(2) >= low_BC[..., None] - 0.01).all()
    assert (result.flatten(2) <= high_BC[..., None] + 0.01).all()
    assert result.flatten(2).std() > 300  # not a constant, which would be within it too


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    count = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_crop_and_flip_alone_run_no_more_operators_than_they_need() -> None:
    x_BCHW, draws = images(4), epoch_draws(4, BOTH, seed=0, epoch=0)
    operators: Operators = Operators()  # type: ignore[no-untyped-call]
    with operators:
        augment(x_BCHW, draws)
    assert operators.count == 27
