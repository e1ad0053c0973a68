from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesnet.data import ArrayExamples
from bayesnet.data.corruption_tools import Draws, convolve, disk_kernel, fractal_noise, interpolation, line_kernel
from bayesnet.data.corruptions import CORRUPTIONS, SEVERITIES, CorruptedExamples, corrupt
from bayesnet.errors import ConfigError, DataError
from bayesnet.workflows.robustness import SomeImages
from tests.data.photographs import photograph_crops

NAMES = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
RANDOM = {
    "gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost", "fog",
    "elastic_transform",
}  # fmt: skip


def noise_images(num: int, channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, channels, height, width), dtype=torch.uint8, generator=generator)


def distances(x_NCHW: Tensor, name: str) -> list[float]:
    """Return the mean distance to the clean images at each severity, grey levels."""
    clean = x_NCHW.float()
    return [float((corrupt(x_NCHW, name, severity, 0).float() - clean).abs().mean()) for severity in SEVERITIES]


def test_the_table_holds_the_fifteen_kinds() -> None:
    assert tuple(CORRUPTIONS) == NAMES


@pytest.mark.parametrize(("side", "channels", "num"), [(8, 1, 60), (28, 3, 40), (32, 3, 40), (64, 3, 20), (96, 3, 8)])
@pytest.mark.parametrize("name", NAMES)
def test_severity_takes_photographs_further_from_the_clean_ones(name: str, side: int, channels: int, num: int) -> None:
    found = distances(photograph_crops(num, side, channels), name)
    assert found[0] > 0.4
    assert all(low < high for low, high in itertools.pairwise(found)), found


@pytest.mark.parametrize("side", [16, 48, 84, 112, 160])
def test_glass_gets_worse_at_every_size(side: int) -> None:
    """Its blur hides what its displacement does, and both grow with the size."""
    found = distances(photograph_crops(6, side), "glass_blur")
    assert all(low < high for low, high in itertools.pairwise(found)), found


def test_a_corruption_of_an_image_does_not_depend_on_how_many_were_chosen() -> None:
    split = ArrayExamples(noise_images(30, 1, 8, 8), torch.arange(30))
    few, many = (SomeImages.of(split, most) for most in (5, 20))
    assert set(few.positions_N.tolist()) < set(many.positions_N.tolist())
    (few_x, positions_F), (many_x, positions_M) = (
        (CorruptedExamples(each.examples, "snow", 5, 0, each.positions_N).read(range(len(each.examples))), each[1])
        for each in (few, many)
    )
    places = [positions_M.tolist().index(position) for position in positions_F.tolist()]
    assert torch.equal(many_x[places], few_x)
    assert torch.equal(few_x, CorruptedExamples(split, "snow", 5, 0).read(positions_F))


def test_severity_is_ordered_at_the_size_of_imagenet() -> None:
    x_NCHW = photograph_crops(2, 224)
    for name in ("gaussian_noise", "glass_blur", "snow", "frost", "fog", "pixelate"):
        found = distances(x_NCHW, name)
        assert found == sorted(found), name


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 8, 13), (1, 3, 21, 9)])
@pytest.mark.parametrize("name", NAMES)
def test_any_size_keeps_shape_type_and_the_input(name: str, shape: tuple[int, int, int, int]) -> None:
    x_NCHW = noise_images(*shape)
    before = x_NCHW.clone()
    for severity in SEVERITIES:
        out = corrupt(x_NCHW, name, severity, 3)
        assert out.dtype == torch.uint8
        assert out.shape == x_NCHW.shape
        assert out.is_contiguous()
        assert not torch.equal(out, x_NCHW)
        assert out.data_ptr() != x_NCHW.data_ptr()
    assert torch.equal(x_NCHW, before)


@pytest.mark.parametrize("name", NAMES)
def test_black_and_white_images_are_no_special_case(name: str) -> None:
    for value in (0, 255):
        x_NCHW = torch.full((2, 3, 16, 16), value, dtype=torch.uint8)
        out = corrupt(x_NCHW, name, 5, 0)
        # A warning of a division by zero would fail this test; a result without meaning is far from the image.
        if name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate"):
            assert torch.equal(out, x_NCHW)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_which_others_are_read(name: str) -> None:
    x_NCHW = noise_images(7, 3, 12, 12)
    whole = corrupt(x_NCHW, name, 3, 1)
    assert torch.equal(corrupt(x_NCHW, name, 3, 1), whole)
    chosen = torch.tensor([5, 0, 3])
    assert torch.equal(corrupt(x_NCHW[chosen], name, 3, 1, chosen), whole[chosen])
    assert torch.equal(corrupt(x_NCHW[6:], name, 3, 1, [6]), whole[6:])


@pytest.mark.parametrize("name", sorted(NAMES))
def test_seed_and_position_change_what_is_random_and_nothing_else(name: str) -> None:
    x_NCHW = photograph_crops(1, 16)
    out = corrupt(x_NCHW, name, 5, 0)
    others = [corrupt(x_NCHW, name, 5, seed) for seed in (1, 2, 3)]
    others += [corrupt(x_NCHW, name, 5, 0, [position]) for position in (1, 2, 3)]
    differs = [not torch.equal(out, other) for other in others]
    assert any(differs) == (name in RANDOM)


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    severity=st.sampled_from(SEVERITIES),
    seed=st.integers(0, 2**63),
    order=st.permutations(range(5)),
)
def test_examples_read_in_any_order_are_the_same(name: str, severity: int, seed: int, order: list[int]) -> None:
    images = noise_images(5, 1, 8, 8)
    examples = CorruptedExamples(ArrayExamples(images, torch.arange(5)), name, severity, seed)
    whole = examples.read(range(5))
    assert torch.equal(examples.read(order), whole[torch.tensor(order)])
    assert torch.equal(whole, corrupt(images, name, severity, seed))


def test_examples_keep_labels_and_name_their_images() -> None:
    clean = ArrayExamples(noise_images(3, 1, 8, 8), torch.tensor([2, 0, 1]), prefix="digit")
    examples = CorruptedExamples(clean, "fog", 2, 0)
    examples.verify()
    assert examples.labels_N.tolist() == [2, 0, 1]
    assert examples.name(1) == "digit 1, fog 2"
    assert examples.in_memory
    assert len(examples) == 3


def test_no_images_give_no_images() -> None:
    assert corrupt(noise_images(0, 3, 8, 8), "snow", 1, 0).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("name", "severity", "seed", "text"),
    [
        ("fogg", 1, 0, "unknown corruption (fogg): did you mean 'fog'?"),
        ("fog", 0, 0, "must be from 1 to 5 (severity = 0)"),
        ("fog", 6, 0, "must be from 1 to 5 (severity = 6)"),
        ("fog", 1, -1, "must not be negative (seed = -1)"),
    ],
)
def test_wrong_names_and_numbers_are_refused(name: str, severity: int, seed: int, text: str) -> None:
    clean = ArrayExamples(noise_images(1, 1, 8, 8), torch.tensor([0]))
    with pytest.raises(ConfigError) as direct:
        corrupt(clean.read([0]), name, severity, seed)
    with pytest.raises(ConfigError) as wrapped:
        CorruptedExamples(clean, name, severity, seed)
    assert text in str(direct.value)
    assert str(direct.value) == str(wrapped.value)


@pytest.mark.parametrize(
    ("x_NCHW", "text"),
    [
        (torch.zeros(1, 1, 8, 8), "corruptions need uint8 pixels of shape (N, 1 or 3, H, W) (torch.float32"),
        (torch.zeros(1, 2, 8, 8, dtype=torch.uint8), "corruptions need uint8 pixels of shape (N, 1 or 3, H, W)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "corruptions need uint8 pixels of shape (N, 1 or 3, H, W)"),
        (torch.zeros(1, 1, 7, 8, dtype=torch.uint8), "corruptions need images of at least 8 x 8 pixels"),
    ],
)
def test_pixels_that_cannot_be_corrupted_are_refused(x_NCHW: Tensor, text: str) -> None:
    with pytest.raises(DataError) as caught:
        corrupt(x_NCHW, "fog", 1, 0)
    assert text in str(caught.value)


def test_noise_has_the_published_strength() -> None:
    # 200 images of 32 x 32: the standard error of a standard deviation is 0.16 %, of a mean 0.0002.
    grey = torch.full((200, 1, 32, 32), 128, dtype=torch.uint8)
    gaussian = corrupt(grey, "gaussian_noise", 1, 0).double() / 255
    assert float(gaussian.std()) == pytest.approx(0.04, rel=0.01)
    shot = corrupt(grey, "shot_noise", 5, 0).double() / 255
    # A count of 50 x 0.502 photons has the variance of its mean. The brightest are cut off: 6.5 deviations away.
    level = 128 / 255
    assert float(shot.mean()) == pytest.approx(level, abs=0.002)
    assert float(shot.std()) == pytest.approx((level / 50) ** 0.5, rel=0.01)
    impulse = corrupt(grey, "impulse_noise", 5, 0)
    for value in (0, 255):
        assert float((impulse == value).double().mean()) == pytest.approx(0.035, abs=0.002)


def test_shot_noise_is_poisson() -> None:
    from scipy.stats import chisquare, poisson

    x = torch.full((100, 1, 32, 32), 51, dtype=torch.uint8)
    counts = (corrupt(x, "shot_noise", 5, 0).double() / 255 * 50).round().long().flatten()
    observed = np.append(np.bincount(counts.numpy(), minlength=25)[:25], int((counts >= 25).sum()))
    expected = np.append(poisson.pmf(np.arange(25), 10), poisson.sf(24, 10)) * len(counts)
    # 1e-6: the rate of false alarms of this fixed seed is what a change of the stream has once.
    assert chisquare(observed, expected).pvalue > 1e-6


def test_brightness_keeps_hue_and_contrast_keeps_the_mean() -> None:
    x_NCHW = torch.tensor([60, 30, 90], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    bright = corrupt(x_NCHW, "brightness", 5, 0)[0, :, 0, 0].double()
    assert bright.tolist() == pytest.approx([60 * (90 + 76.5) / 90, 30 * (90 + 76.5) / 90, 90 + 76.5], abs=0.51)
    noise = noise_images(1, 1, 32, 32)
    flat = corrupt(noise, "contrast", 5, 0).double()
    assert float(flat.mean()) == pytest.approx(float(noise.double().mean()), abs=0.1)
    assert float(flat.std()) == pytest.approx(0.15 * float(noise.double().std()), rel=0.02)


def test_kernels_and_textures_are_normalised() -> None:
    for kernel in (disk_kernel(0.2, 0.4), disk_kernel(3.3, 0.5), line_kernel(0.5, 0.3), line_kernel(4, -0.7)):
        assert kernel.sum() == pytest.approx(1, abs=1e-12)
        assert kernel == pytest.approx(kernel[::-1, ::-1], abs=1e-12)
    texture = fractal_noise(Draws(0, "fog", [0, 1]), (9, 14), 1.75)
    assert texture.shape == (2, 9, 14)
    assert texture.min((1, 2)).tolist() == [0, 0]
    assert texture.max((1, 2)).tolist() == [1, 1]
    matrix = interpolation(5, np.array([-1.0, 0.25, 4.0, 9.0]))
    assert matrix.sum(1).tolist() == [1, 1, 1, 1]
    assert matrix[1, :2].tolist() == [0.75, 0.25]


def test_convolution_agrees_with_scipy() -> None:
    from scipy.ndimage import convolve as reference

    x = noise_images(1, 1, 10, 14).numpy().astype(np.float32)
    kernel = line_kernel(1.5, 0.4)
    expected = reference(x[0, 0], kernel[::-1, ::-1], mode="reflect")
    assert convolve(x, kernel)[0, 0] == pytest.approx(expected, abs=1e-3)


def test_corrupting_is_fast() -> None:
    x_NCHW = noise_images(60, 1, 8, 8)
    start = time.process_time()
    for name in NAMES:
        corrupt(x_NCHW, name, 3, 0)
    # A twentieth of a second where this was written: only a loop over pixels in Python would take this long.
    assert time.process_time() - start < 2


def test_an_image_gets_worse_and_not_just_different() -> None:
    grey = torch.full((3, 1, 16, 16), 128, dtype=torch.uint8)
    weak, strong = (corrupt(grey, "impulse_noise", severity, 0) != 128 for severity in (2, 4))
    assert weak.any()
    assert (strong | ~weak).all()
    assert int(strong.sum()) > int(weak.sum())
