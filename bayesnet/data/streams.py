"""Numbers that are the same in every version and on every machine: raw streams of PCG64, named by a key.

NumPy promises the same raw stream in every version; it makes no such promise of shuffles, nor torch of randint. And
torch's generator takes 32 bits of its seed on a CPU, so that all seeds would give one order.
"""

from __future__ import annotations

import enum

import numpy as np
from numpy.typing import NDArray


class Stream(enum.IntEnum):
    """What the numbers of an epoch are for: the third part of the key, so that turning one on changes no other.

    There is no 0: that key would be the one without a third part again.
    """

    ORDER = 1
    MIXUP = 7
    BALANCE = 8
    ROTATION = 0x0A01
    CROP = 0x0A02
    COLOUR = 0x0A03
    ERASE = 0x0A04


def raw_numbers(count: int, *, seed: int, epoch: int, stream: Stream | None = None) -> NDArray[np.uint64]:
    """Return raw 64-bit numbers (count,); without a stream those of shift and flip, the first that there were."""
    key = [seed, epoch] if stream is None else [seed, epoch, int(stream)]
    return np.asarray(np.random.PCG64(key).random_raw(count))


def uniform_numbers(num: int, columns: int, *, seed: int, epoch: int, stream: Stream) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1), shape (num, columns)."""
    raw_NK = raw_numbers(num * columns, seed=seed, epoch=epoch, stream=stream).reshape(num, columns)
    return (raw_NK >> np.uint64(11)).astype(np.float64) * 2.0**-53
