"""Splits: which example serves which purpose. Stratified by class, and the same on every machine for a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from bayesnet.errors import DataError


def stratified_split(labels_N: Tensor, fractions: Sequence[float], *, seed: int) -> tuple[Tensor, ...]:
    """Return one sorted index tensor per fraction: disjoint, exhaustive, each class in proportion.

    In each class the split sizes are the fractions of its count, rounded by largest remainder; ties go to the smaller
    split, and between equals alternate from class to class. The first split (training) gets at least one example of
    each class.

    Args:
        labels_N: int64 class indices.
        fractions: Positive shares; they are divided by their sum.
        seed: At least 0.

    Example:
        >>> [part.tolist() for part in stratified_split(torch.tensor([0, 0, 0, 1, 1, 1]), (2, 1), seed=0)]
        [[1, 2, 3, 4], [0, 5]]
    """
    order_N = _class_order(labels_N, seed)
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    start = 0
    for position, count in enumerate(np.unique(labels_N.numpy(), return_counts=True)[1].tolist()):
        for part, size in zip(parts, _apportion(count, fractions, position), strict=True):
            part.append(order_N[start : start + size])
            start += size
    empty = np.empty(0, dtype=np.int64)
    return tuple(torch.from_numpy(np.sort(np.concatenate([empty, *part]))) for part in parts)


def halves(labels_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return two sorted index tensors, each with half of every class; sizes differ by at most one.

    Args:
        labels_N: int64 class indices.
        seed: At least 0.

    Example:
        >>> [half.tolist() for half in halves(torch.tensor([0, 0, 1, 1, 1]), seed=0)]
        [[1, 3, 4], [0, 2]]
    """
    # Every other example of the list sorted by class: an odd class gives its extra one to each half in turn.
    order_N = _class_order(labels_N, seed)
    return torch.from_numpy(np.sort(order_N[0::2])), torch.from_numpy(np.sort(order_N[1::2]))


def random_choice(num_examples: int, most: int, seed: int) -> Tensor:
    """Return sorted indices of at most ``most`` examples, drawn by seed; of fewer, a part of those of more.

    Args:
        num_examples: How many there are.
        most: How many to take at most.
        seed: At least 0.

    Example:
        >>> random_choice(5, 2, seed=0).tolist(), random_choice(5, 3, seed=0).tolist(), random_choice(2, 9, 0).tolist()
        ([2, 3], [1, 2, 3], [0, 1])
    """
    # NumPy promises the raw stream in every version, and not how it is made into permutations.
    order_N = np.argsort(np.random.PCG64(seed).random_raw(num_examples), kind="stable")
    return torch.from_numpy(np.sort(order_N[:most]))


def check_every_class(splits: Sequence[Tensor], labels_N: Tensor, classes: Sequence[str], config_key: str) -> None:
    """Raise unless each class has an example in each split.

    Args:
        splits: Index tensors.
        labels_N: int64 class indices.
        classes: Class names.
        config_key: The setting with the fractions, for the message.

    Raises:
        DataError: A class has too few examples.
    """
    for split_N in splits:
        counts_K = torch.bincount(labels_N[split_N], minlength=len(classes))
        if counts_K.min() == 0:
            label = int(counts_K.argmin())
            raise DataError(
                f"class has {_count(int((labels_N == label).sum()))}, too few for one in each of {len(splits)} splits",
                where=classes[label],
                hint=f"add images, give the splits as folders of their own, or change {config_key}",
            )


def _class_order(labels_N: Tensor, seed: int) -> np.ndarray:
    """Return the indices sorted by class and, within each, in an order drawn by seed."""
    # NumPy promises the same raw stream in every version; it makes no such promise of shuffles, nor torch of randperm.
    key_N = np.random.PCG64(seed).random_raw(len(labels_N))
    return np.lexsort((key_N, labels_N.numpy()))


def _apportion(count: int, fractions: Sequence[float], position: int) -> list[int]:
    """Return the split sizes of one class by largest remainder; exact arithmetic, so .1 * 6 and .6 tie as they should.

    Args:
        count: Examples of the class.
        fractions: Positive shares.
        position: Which class it is: ties between equal splits alternate with it.
    """
    shares = [Fraction(str(fraction)) for fraction in fractions]
    quotas = [count * share / sum(shares) for share in shares]
    sizes = [math.floor(quota) for quota in quotas]
    direction = -1 if position % 2 else 1
    ranked = sorted(range(len(sizes)), key=lambda s: (sizes[s] - quotas[s], quotas[s], direction * s))
    for split in ranked[: count - sum(sizes)]:
        sizes[split] += 1
    if sizes[0] == 0 and count > 0:
        sizes[sizes.index(max(sizes))] -= 1
        sizes[0] = 1
    return sizes


def _count(num_images: int) -> str:
    return f"{num_images} image{'s' * (num_images != 1)}"
