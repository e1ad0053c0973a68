"""The random number of an image, for the randomised scores: always the same for the same image.

A fresh random number would give one image another set each time it is asked for. So the number is a hash of the
image. The guarantee does not suffer: the hash is one fixed function, chosen before any data were seen, so the score
of an image and its label is a fixed function of both, and scores of exchangeable images are exchangeable. Only that
the sets are no larger than they need be rests on the hash looking uniform and unrelated to the label, as a hash does
that nobody fitted to the data. Copies of one image tie, and ties only raise coverage.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_KEY = b"bayesnet conformal uniforms 1"  # another key, another set for every image: never change it


def image_uniforms(x_BCHW: Tensor) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each image, (B,): 53 bits of a keyed BLAKE2b hash of its shape and pixels.

    Args:
        x_BCHW: uint8 or float32 pixels, before normalisation, on any device; the batch and its order do not matter.

    Raises:
        ValueError: The images are not uint8 or float32 (B, C, H, W).

    Example:
        >>> image_uniforms(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).round(6).tolist()
        [0.078757, 0.078757]
    """
    if x_BCHW.dtype not in (torch.uint8, torch.float32) or x_BCHW.ndim != 4:
        raise ValueError(f"images must be uint8 or float32 (B, C, H, W); got {x_BCHW.dtype} {tuple(x_BCHW.shape)}")
    header = ",".join(str(size) for size in x_BCHW.shape[1:]).encode() + b";"
    pixels_BCHW = x_BCHW.contiguous().cpu().numpy()  # the layout in memory is no part of the image
    if x_BCHW.dtype == torch.float32:
        header += b"float32;"
        pixels_BCHW = (pixels_BCHW + np.float32(0)).astype("<f4")  # nor are the sign of zero and the byte order
    return np.array([_uniform(header, image.tobytes()) for image in pixels_BCHW], np.float64)


def _uniform(header: bytes, pixels: bytes) -> float:
    digest = hashlib.blake2b(header, digest_size=8, key=_KEY)
    digest.update(pixels)
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53
