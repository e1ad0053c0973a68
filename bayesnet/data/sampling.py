"""Which image comes when: the order of an epoch, plain or balanced over classes, and mixup's shares.

All of it is a function of (seed, epoch), so an interrupted epoch continues where it stood.

    effective size of a balanced sample = (sum_n v_n)^2 / sum_n v_n^2 = K^2 / sum_k (1 / n_k),   v_n = N / (K n_k)

Balanced sampling shows each class equally often, which weighs image n by v_n. Its effective size (Kish 1965) is the
number of equally weighted images that say as much; as N in KL / N it keeps the posterior from becoming as narrow as if
repeated images were new ones. It is N where classes are balanced already.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bayesnet.data.streams import Stream, raw_numbers, uniform_numbers


def epoch_order(num_examples: int, *, seed: int, epoch: int) -> Tensor:
    """Return the order (N,) of the training images in an epoch: a permutation, a function of seed and epoch alone."""
    raw_N = raw_numbers(num_examples, seed=seed, epoch=epoch, stream=Stream.ORDER)
    return torch.from_numpy(np.argsort(raw_N, kind="stable"))


def balanced_order(labels_N: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Return N indices in which every class comes equally often (counts differ by at most one).

    A small class is repeated whole before any of its images comes once more; of a large one, other images come each
    epoch.

    Args:
        labels_N: int64 class indices; every class from 0 up has at least one example.
        seed: Of the run.
        epoch: From 0.

    Example:
        >>> order = balanced_order(torch.tensor([0, 0, 0, 0, 0, 1]), seed=0, epoch=0)
        >>> torch.tensor([0, 0, 0, 0, 0, 1])[order].bincount().tolist()
        [3, 3]
    """
    labels = labels_N.numpy()
    counts_K = np.bincount(labels)
    num_examples, num_classes = len(labels), len(counts_K)
    wanted_K = np.full(num_classes, num_examples // num_classes)
    # Who gets the remainder changes from epoch to epoch.
    wanted_K[(np.arange(num_examples % num_classes) + epoch) % num_classes] += 1
    shuffled_N = np.lexsort((raw_numbers(num_examples, seed=seed, epoch=epoch, stream=Stream.BALANCE), labels))
    starts_K = np.cumsum(counts_K) - counts_K
    classes = zip(starts_K, counts_K, wanted_K, strict=True)
    chosen_N = np.concatenate([shuffled_N[start + np.arange(want) % count] for start, count, want in classes])
    return torch.from_numpy(chosen_N)[epoch_order(num_examples, seed=seed, epoch=epoch)]


def effective_size(labels_N: Tensor, *, balanced: bool) -> int:
    """Return the N of KL / N: the number of images, or Kish's effective size of a balanced sample, rounded.

    Example:
        >>> effective_size(torch.tensor([0, 0, 0, 1]), balanced=True)
        3
    """
    if not balanced:
        return len(labels_N)
    counts_K = torch.bincount(labels_N).double()
    return round(len(counts_K) ** 2 / float((1 / counts_K).sum()))


def mixup_shares(num_examples: int, alpha: float, *, seed: int, epoch: int) -> Tensor:
    """Return each image's own share (N,) under mixup, Beta(alpha, alpha), float32.

    Args:
        num_examples: N.
        alpha: Above 0; 1 is uniform, small values mix little.
        seed: Of the run.
        epoch: From 0.
    """
    from scipy.special import betaincinv  # half a second that only mixup should wait for

    uniform_N = uniform_numbers(num_examples, 1, seed=seed, epoch=epoch, stream=Stream.MIXUP)[:, 0]
    return torch.from_numpy(betaincinv(alpha, alpha, uniform_N).astype(np.float32))


def soft_labels(y_B: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Return the label smoothed over the classes (B, K): 1 - smoothing on it, and smoothing / K on every class.

    Example:
        >>> soft_labels(torch.tensor([1]), 4, 0.2)
        tensor([[0.0500, 0.8500, 0.0500, 0.0500]])
    """
    one_hot_BK = torch.nn.functional.one_hot(y_B, num_classes).to(torch.float32)
    return one_hot_BK * (1 - smoothing) + smoothing / num_classes


def mix(values: Tensor, share_B: Tensor) -> Tensor:
    """Return each example mixed with the one before it in the batch: share x own + (1 - share) x other.

    The order of a batch is random, so the neighbour is a random partner.

    Args:
        values: (B, ...), float.
        share_B: Own shares (B,).
    """
    share = share_B.view(-1, *(1 for _ in values.shape[1:]))
    return share * values + (1 - share) * values.roll(1, 0)
