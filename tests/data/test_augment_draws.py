"""The draws of augmentation: functions of seed, epoch and image alone, uniform, and independent of each other."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from bayesnet.data.augment import Augmentation, AugmentDraws, augment, epoch_draws

BOTH = Augmentation(crop_padding=3, flip=True)
ALL = Augmentation(crop_padding=3, flip=True, rotate=30, min_crop=0.3, colour=0.4, erase=0.1)


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


def test_new_draws_are_the_same_on_every_machine() -> None:
    last = [draws_N[999] for draws_N in epoch_draws(1000, ALL, seed=7, epoch=3)[2:] if draws_N is not None]
    # To the last bits of the sines and exponentials, which differ between processors.
    expected = [0.8755561, -0.4831164, 0.3970446, 0.8475259, 0.5214509, 0.7317907, 0.9956905, 1.2824509, 1.0145112]
    assert torch.cat(last).tolist() == pytest.approx([*expected, 0.1, 1.6090314, 0.1320810, 0.7351556], rel=1e-6)


def columns(draws: AugmentDraws) -> dict[str, Tensor]:
    """Return each uniform number of the new draws, as a float64 column."""
    assert draws.rotation_N2 is not None
    assert draws.crop_N4 is not None
    assert draws.colour_N3 is not None
    assert draws.erase_N4 is not None
    return {
        "angle": torch.rad2deg(torch.atan2(*draws.rotation_N2.double().flip(1).unbind(1))),
        **{f"crop {i}": value.log() if i == 1 else value for i, value in enumerate(draws.crop_N4.double().unbind(1))},
        **{f"colour {i}": value for i, value in enumerate(draws.colour_N3.double().unbind(1))},
        **{f"erase {i + 1}": value for i, value in enumerate(draws.erase_N4.double()[:, 1:].unbind(1))},
    }


def is_uniform(values_N: Tensor, low: float, high: float) -> bool:
    """Return whether values are uniform in [low, high]: range, mean and mean square within six sd.

    False alarm below 1e-8 per column. With 20,000 values a mean that is off by 2 % of the range is caught.
    """
    scaled_N = (values_N - low) / (high - low)
    inside = bool((scaled_N >= -1e-5).all() and (scaled_N <= 1 + 1e-5).all())
    moments = [(scaled_N, 1 / 2, 1 / 12), (scaled_N**2, 1 / 3, 4 / 45)]
    near = [abs(x_N.mean().item() - mean) < 6 * math.sqrt(variance / len(x_N)) for x_N, mean, variance in moments]
    return inside and all(near)


def test_new_draws_are_uniform_and_independent() -> None:
    found = columns(epoch_draws(20_000, ALL, seed=0, epoch=0))
    ranges = {"angle": (-30.0, 30.0), "crop 0": (0.3, 1.0), "crop 1": (math.log(3 / 4), math.log(4 / 3))}
    ranges |= {f"colour {i}": (0.6, 1.4) for i in range(3)}
    found["erase 1"] = found["erase 1"].log()
    ranges["erase 1"] = (math.log(0.3), math.log(3.3))
    for name, values_N in found.items():
        assert is_uniform(values_N, *ranges.get(name, (0.0, 1.0))), name
    # sd of a correlation is 0.007: six sd over 55 pairs, false alarm below 1e-6; a shared stream gives 1.
    correlation = torch.corrcoef(torch.stack(list(found.values())))
    assert (correlation - torch.eye(len(found))).abs().max() < 6 / math.sqrt(20_000)
    # The controls: a rotation to one side, an area that is uniform in its side, the aspect in itself.
    assert not is_uniform(found["angle"].abs(), -30, 30)
    assert not is_uniform(found["crop 0"].sqrt(), 0.3, 1)
    assert not is_uniform(found["crop 1"].exp(), 3 / 4, 4 / 3)


def test_the_place_of_the_erased_rectangle_is_uniform() -> None:
    x_BCHW = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(14_000, 1, 1, 1)
    draws = epoch_draws(14_000, Augmentation(erase=4 / 64), seed=0, epoch=0)
    assert draws.erase_N4 is not None
    draws.erase_N4[:, 1] = 1  # 2 x 2 pixels
    first = (augment(x_BCHW, draws) != x_BCHW).flatten(1).int().argmax(1)
    # 7 x 7 places; 2,000 expected in each row and column, sd 41: six sd, false alarm below 1e-7
    for count in (first // 8).bincount(minlength=8).tolist(), (first % 8).bincount(minlength=8).tolist():
        assert count[7] == 0
        assert all(abs(number - 2000) < 6 * 41.4 for number in count[:7])


def test_new_draws_depend_on_seed_epoch_and_image_alone() -> None:
    late = columns(epoch_draws(50, ALL, seed=0, epoch=5))
    early = columns(epoch_draws(50, ALL, seed=0, epoch=0))
    again = columns(epoch_draws(80, ALL, seed=0, epoch=5))  # after another epoch, with more images
    other = columns(epoch_draws(50, ALL, seed=5, epoch=0))
    for name, values_N in late.items():
        assert torch.equal(again[name][:50], values_N)
        assert not torch.isin(values_N, early[name]).any()
        assert not torch.isin(values_N, other[name]).any()


def test_a_feature_changes_no_draw_of_another() -> None:
    every = epoch_draws(50, ALL, seed=7, epoch=3)
    before = epoch_draws(50, BOTH, seed=7, epoch=3)
    assert before[2:] == (None,) * 4
    assert torch.equal(every.offset_N2, before.offset_N2)
    assert torch.equal(every.flip_N, before.flip_N)
    for position, name in enumerate(("rotate", "min_crop", "colour", "erase"), 2):
        alone = epoch_draws(50, Augmentation(**{name: getattr(ALL, name)}), seed=7, epoch=3)[position]
        expected = every[position]
        assert alone is not None
        assert expected is not None
        assert torch.equal(alone, expected)
