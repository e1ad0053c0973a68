"""Splits: disjoint, exhaustive, stratified, the same everywhere."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesnet.data.splits import check_every_class, halves, stratified_split
from bayesnet.errors import DataError

DEFAULT = (0.6, 0.1, 0.1, 0.2)


def labels(*counts: int) -> Tensor:
    """Return shuffled labels with these counts per class."""
    ordered = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return ordered[torch.randperm(len(ordered), generator=torch.Generator().manual_seed(0))]


def digest(parts: tuple[Tensor, ...]) -> str:
    return hashlib.sha256(b"|".join(part.numpy().astype("<i8").tobytes() for part in parts)).hexdigest()[:16]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    shares=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    seed=st.integers(0, 2**40),
)
def test_disjoint_exhaustive_and_proportional(counts: list[int], shares: list[int], seed: int) -> None:
    labels_N = labels(*counts)
    parts = stratified_split(labels_N, shares, seed=seed)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(labels_N)))
    assert all(torch.equal(part, part.sort().values) for part in parts)
    for label, count in enumerate(counts):
        sizes = [int((labels_N[part] == label).sum()) for part in parts]
        assert sizes[0] >= min(count, 1)
        quotas = [Fraction(count * share, sum(shares)) for share in shares]
        slack = 1 if quotas[0] >= 1 else 2  # a class too small for its share still trains
        assert all(abs(size - quota) < slack for size, quota in zip(sizes, quotas, strict=True))


def test_exact_shares_are_exact() -> None:
    parts = stratified_split(labels(100, 50), DEFAULT, seed=0)
    assert [len(part) for part in parts] == [90, 15, 15, 30]


def test_ties_alternate_between_equal_splits() -> None:
    # 25 per class leave 2.5 for validation and calibration each; over ten classes they must come out even.
    parts = stratified_split(labels(*[25] * 10), DEFAULT, seed=0)
    assert [len(part) for part in parts] == [150, 25, 25, 50]


def test_seed_decides() -> None:
    labels_N = labels(30, 30)
    assert digest(stratified_split(labels_N, DEFAULT, seed=1)) == digest(stratified_split(labels_N, DEFAULT, seed=1))
    assert digest(stratified_split(labels_N, DEFAULT, seed=1)) != digest(stratified_split(labels_N, DEFAULT, seed=2))


def test_the_same_on_every_machine() -> None:
    labels_N = torch.arange(200) % 7
    assert digest(stratified_split(labels_N, DEFAULT, seed=0)) == "bfdf08b4df18fe55"
    assert digest(halves(labels_N, 0)) == "a8a2bf268874f2f4"


@pytest.mark.parametrize("counts", [(10, 10), (3, 5, 7, 9), (1, 1, 1), (2,), (1,)])
def test_halves(counts: tuple[int, ...]) -> None:
    labels_N = labels(*counts)
    half_a, half_b = halves(labels_N, seed=3)
    assert torch.equal(torch.cat([half_a, half_b]).sort().values, torch.arange(len(labels_N)))
    assert 0 <= len(half_a) - len(half_b) <= 1
    for label in range(len(counts)):
        assert abs(int((labels_N[half_a] == label).sum()) - int((labels_N[half_b] == label).sum())) <= 1


def test_every_class_in_every_split() -> None:
    # Six images fill four splits of 60/10/10/20 (3, 1, 1, 1), five do not.
    enough = labels(6, 20)
    check_every_class(stratified_split(enough, DEFAULT, seed=0), enough, ("cat", "dog"), "data.fractions")
    few = labels(20, 5)
    with pytest.raises(DataError) as caught:
        check_every_class(stratified_split(few, DEFAULT, seed=0), few, ("cat", "dog"), "data.fractions")
    assert str(caught.value) == (
        "class has 5 images, too few for one in each of 4 splits (dog): "
        "add images, give the splits as folders of their own, or change data.fractions"
    )
