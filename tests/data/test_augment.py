"""Augmentation: keyed by seed, epoch and image; equal to a loop over images."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from bayesnet.data.augment import Augmentation, AugmentDraws, augment, epoch_draws
from bayesnet.errors import ConfigError

BOTH = Augmentation(crop_padding=3, flip=True)


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


def test_draws_cover_their_range_evenly() -> None:
    draws = epoch_draws(70_000, BOTH, seed=0, epoch=0)
    for axis in range(2):
        counts = (draws.offset_N2[:, axis] + 3).bincount(minlength=7)
        assert counts.shape == (7,)
        # 10,000 expected, sd 93: six sd either way, false alarm below 1e-7
        assert (counts - 10_000).abs().max() < 560
    assert abs(draws.flip_N.sum().item() - 35_000) < 6 * 133


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    first = epoch_draws(100, BOTH, seed=0, epoch=0)
    torch.rand(3)  # the global generator plays no part
    again = epoch_draws(100, BOTH, seed=0, epoch=0)
    assert torch.equal(first.offset_N2, again.offset_N2)
    assert torch.equal(first.flip_N, again.flip_N)
    for seed, epoch in ((0, 1), (1, 0), (1, 1)):
        assert not torch.equal(first.offset_N2, epoch_draws(100, BOTH, seed=seed, epoch=epoch).offset_N2)
    # (0, 1) and (1, 0) are different epochs, not one sum
    assert not torch.equal(
        epoch_draws(100, BOTH, seed=0, epoch=1).offset_N2, epoch_draws(100, BOTH, seed=1, epoch=0).offset_N2
    )


def test_draws_are_the_same_on_every_machine() -> None:
    draws = epoch_draws(1000, BOTH, seed=7, epoch=3)
    content = draws.offset_N2.numpy().astype("<i8").tobytes() + draws.flip_N.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "c5eedddc88720408"


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


def test_empty_batch() -> None:
    assert augment(images(0), epoch_draws(0, BOTH, seed=0, epoch=0)).shape == (0, 3, 6, 9)


def test_the_host_waits_for_no_value() -> None:
    # A tensor on the meta device has no values: any look at one would raise.
    draws = epoch_draws(3, BOTH, seed=0, epoch=0).to("meta")
    result = augment(images(3).to("meta"), draws.select(torch.arange(3, device="meta")))
    assert (result.device.type, result.shape) == ("meta", (3, 3, 6, 9))


def test_negative_padding_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must not be negative \(crop_padding\)"):
        Augmentation(crop_padding=-1)
