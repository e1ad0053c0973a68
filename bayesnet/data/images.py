"""Image files: reading their headers, decoding them to uint8 tensors. Every failure is a DataError.

A file from a stranger meets six decoders, never the forty that Pillow has; its size is checked from the header, and
what its pixels mean (orientation, transparency, 16 bits) is settled here once, for training and prediction alike.
"""

from __future__ import annotations

import io
import math
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from bayesnet.data.finding import reason_of, stat_file
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.errors import DataError

# Pillow's own Image.open warns of large images through the process-wide warnings module, which threads cannot silence
# safely. These classes are what it would pick, and the limit of `_check_pixels` is stricter.
_DECODERS: tuple[tuple[tuple[bytes, ...], Callable[[IO[bytes], str], ImageFile]], ...] = (
    ((b"\xff\xd8\xff",), JpegImageFile),
    ((b"\x89PNG\r\n\x1a\n",), PngImageFile),
    ((b"GIF87a", b"GIF89a"), GifImageFile),
    ((b"BM",), BmpImageFile),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImageFile),
)
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_SIDEWAYS = (5, 6, 7, 8)


def read_image(path: Path | str, preprocessing: Preprocessing) -> Tensor:
    """Return one image as uint8 pixels of shape (C, H, W).

    It is turned upright (EXIF), laid on white where it is transparent, scaled (bilinear, antialiased) and cropped in
    the centre. It is scaled so that it just covers H x W, and where it has that size already its pixels are untouched;
    or, where the preprocessing says so, so that its short side is ``resize``. 16-bit pixels keep their upper 8 bits. Of
    an animation, the first frame is read.

    Args:
        path: A regular file: JPEG, PNG, WebP, GIF, BMP or TIFF, whatever its suffix.
        preprocessing: Channels, size and pixel limit; the statistics are not used here.

    Raises:
        DataError: It is no such file, is damaged or too large, or its pixels have no defined range; or the model
            takes no image files.
    """
    _check_takes_files(preprocessing, path)
    with _opened(Path(path), preprocessing.max_pixels) as image:
        # A large photograph is decoded at 1/2, 1/4 or 1/8 while that leaves twice the size needed.
        side = 2 * max(preprocessing.resize, preprocessing.height, preprocessing.width)
        image.draft(None, (side, side))
        ImageOps.exif_transpose(image, in_place=True)
        return _to_tensor(_on_white(_fitted(_eight_bits(image), preprocessing)), preprocessing.channels)


def pillow_pixels(image: Image.Image, preprocessing: Preprocessing | None, channels: int) -> Tensor:
    """Return uint8 pixels (C, H, W) of an image in memory, by the rules of `read_image`.

    Args:
        image: Any image of Pillow's.
        preprocessing: The size to scale to; None leaves it as it is.
        channels: 1 or 3; 0 makes a grey image 1 and any other 3.

    Raises:
        DataError: Its pixels have no defined range.
    """
    try:
        eight = _eight_bits(ImageOps.exif_transpose(image))
    except ValueError as error:
        raise DataError("cannot use the image", hint=str(error)) from error
    whole = _on_white(eight if preprocessing is None else _fitted(eight, preprocessing))
    return _to_tensor(whole, channels or (1 if whole.mode == "L" else 3))


def image_size(path: Path | str, *, max_pixels: int) -> tuple[int, int]:
    """Return (height, width) of an upright image, pixels, from its header alone.

    Raises:
        DataError: The header cannot be read, or the image has more than ``max_pixels`` pixels.
    """
    with _opened(Path(path), max_pixels) as image:
        width, height = image.size
        # Pillow turns the size of a TIFF itself; a PNG whose EXIF comes after its pixels is not looked into.
        turned = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
        return (width, height) if turned else (height, width)


class ImageFacts(NamedTuple):
    """What an image file is, once all of it was decoded.

    Attributes:
        format: "JPEG", "PNG", "WEBP", "GIF", "BMP" or "TIFF".
        mode: Of its pixels, in Pillow's words: "L", "RGB", "RGBA", "P", "CMYK", "I;16", ...
        height: Pixels, upright.
        width: Pixels, upright.
        num_frames: 1, or more for an animation or a file of several pages, of which the first is read.
        orientation: Of its EXIF data, 1 to 8; 1 is upright.
    """

    format: str
    mode: str
    height: int
    width: int
    num_frames: int
    orientation: int


def inspect_image(path: Path | str, *, max_pixels: int) -> ImageFacts:
    """Decode a file as `read_image` does and return what it is.

    Raises:
        DataError: `read_image` would not read it.
    """
    with _opened(Path(path), max_pixels) as image:
        width, height = image.size
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        mode, num_frames = image.mode, int(getattr(image, "n_frames", 1))
        image.seek(0)
        image.draft(None, (1, 1))  # the cheapest scale: all bytes are read
        _eight_bits(image).load()
        sideways = orientation in _SIDEWAYS and not isinstance(image, TiffImageFile)  # Pillow turns a TIFF itself
        size = (width, height) if sideways else (height, width)
        known = orientation if orientation in range(1, 9) else 1
        return ImageFacts(str(image.format), mode, *size, num_frames, known)


def write_png(path: Path | str, image_CHW: Tensor) -> None:
    """Write a PNG file.

    Args:
        path: The file to write.
        image_CHW: uint8 pixels with 1 or 3 channels.
    """
    _to_pillow(image_CHW).save(path, format="PNG")


def scaled_pixels(image_CHW: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return what a file of these pixels reads as under a preprocessing: uint8 (C', H, W) of its channels and size.

    Args:
        image_CHW: uint8 pixels with 1 or 3 channels.
        preprocessing: Channels and size of the result; the statistics are not used here.

    Raises:
        DataError: The model takes no image files.
    """
    _check_takes_files(preprocessing, "pixels in memory")
    return pillow_pixels(_to_pillow(image_CHW), preprocessing, preprocessing.channels)


def png_file(image_CHW: Tensor) -> bytes:
    """Return an image, uint8 (C, H, W) with 1 or 3 channels, as the bytes of a PNG file."""
    with io.BytesIO() as file:
        _to_pillow(image_CHW).save(file, format="PNG")
        return file.getvalue()


def jpeg_pixels(image_CHW: Tensor, quality: int) -> Tensor:
    """Return what is left of an image, uint8 (C, H, W), after it was stored as a JPEG file.

    Args:
        image_CHW: uint8 pixels with 1 or 3 channels.
        quality: Of the file, 1 to 95.
    """
    with io.BytesIO() as file:
        _to_pillow(image_CHW).save(file, format="JPEG", quality=quality)
        file.seek(0)
        return _to_tensor(JpegImageFile(file), image_CHW.shape[0])


def _check_takes_files(preprocessing: Preprocessing, path: Path | str) -> None:
    """Raise DataError where the model was trained on arrays that no image file can hold."""
    if preprocessing.pixel_scale == 1:
        what = "the model was trained on floating-point arrays, not image files"
    elif preprocessing.channels not in (1, 3):
        what = f"cannot read image files with {preprocessing.channels} channels"
    else:
        return
    raise DataError(what, where=path, hint="give the model arrays from Python")


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[ImageFile]:
    """Open an image by its header; whatever goes wrong then or in the ``with`` block becomes one DataError."""
    # A pipe or device is refused before it is opened: opening it could block for ever.
    if not stat.S_ISREG(stat_file(path).st_mode):
        raise DataError("not a regular file", where=path)
    try:
        with path.open("rb") as file:
            prefix = file.read(16)
            file.seek(0)
            image = _decoder(prefix)(file, "")
            _check_pixels(image, max_pixels)
            yield image
    except Exception as error:  # decoders raise far more than OSError: SyntaxError, struct.error, MemoryError, ...
        raise DataError("cannot read the image", where=path, hint=reason_of(error)) from error


def _decoder(prefix: bytes) -> Callable[[IO[bytes], str], ImageFile]:
    """Return the decoder for a file that begins with these 16 bytes."""
    for signatures, decoder in _DECODERS:
        if prefix.startswith(signatures):
            return decoder
    if prefix[:4] == b"RIFF" and prefix[8:12] == b"WEBP":
        return WebPImageFile
    raise ValueError("the file is empty" if not prefix else "not a JPEG, PNG, WebP, GIF, BMP or TIFF file")


def _check_pixels(image: ImageFile, max_pixels: int) -> None:
    """Raise ValueError if the header announces no pixels, or more than are allowed."""
    width, height = image.size
    if min(width, height) < 1:
        raise ValueError("the image has no pixels")
    pixels = width * height
    if isinstance(image, TiffImageFile):  # a tile is decoded whole, however small the image that it is cut to
        tile = [image.tag_v2.get(_TILE_WIDTH, 0), image.tag_v2.get(_TILE_LENGTH, 0)]
        if not all(isinstance(side, int) for side in tile):
            raise ValueError("the size of its tiles is damaged")
        pixels = max(pixels, math.prod(tile))
    if pixels > max_pixels:
        raise ValueError(f"it has {pixels} pixels; if you trust it, raise data.max_pixels above {max_pixels}")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the image as L, RGB or RGBA, 8 bits per channel.

    Raises:
        ValueError: Its pixels have no defined range.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; convert the file to 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        return image.convert("RGBA")
    target = "L" if image.mode in ("L", "1") else "RGB"
    return image if image.mode == target else image.convert(target)


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Return an image of mode I;16 or I as mode L, scaled by 65535; one of mode I that needs only 8 bits is kept."""
    values_HW = np.asarray(image).astype(np.int32)
    low, high = int(values_HW.min()), int(values_HW.max())
    if low < 0 or high > 65535:
        raise ValueError(f"integer pixels from {low} to {high} are not 8 or 16 bits; convert the file")
    scaled_HW = values_HW if image.mode == "I" and high <= 255 else (values_HW + 128) // 257
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a 16-bit grey PNG can name one value that is transparent
        scaled_HW = np.where(values_HW == transparent, 255, scaled_HW)
    return Image.fromarray(scaled_HW.astype(np.uint8))


def _fitted(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Return the image scaled and cropped in the centre to (width, height)."""
    size = (preprocessing.width, preprocessing.height)
    if preprocessing.resize:
        return _centre_of_resized(image, preprocessing.resize, size)
    # `fit` crops before it scales, so an image of 1 x 50,000,000 pixels does not grow.
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.BILINEAR)


def _centre_of_resized(image: Image.Image, resize: int, size: tuple[int, int]) -> Image.Image:
    """Return the central (width, height) of the image scaled to a short side of ``resize``, as torchvision takes it.

    Only that part is scaled, from the pixels that it needs, so an image of 1 x 50,000,000 pixels does not grow.
    """
    short = min(image.size)
    part: list[int] = []
    box: list[float] = []
    for side, target in zip(image.size, size, strict=True):
        scaled = resize * side // short
        first = round((scaled - target) / 2)
        start, stop = first * side / scaled, (first + target) * side / scaled
        margin = math.ceil(max(side / scaled, 1)) + 1  # as far as the bilinear filter reaches
        low, high = max(0, math.floor(start) - margin), min(side, math.ceil(stop) + margin)
        part += [low, high]
        # From the corner of the part: Pillow's box is float32, which cannot point to one pixel of 50,000,000.
        box += [start - low, min(stop, side) - low]
    left, right, top, bottom = part
    near = image if (right - left, bottom - top) == image.size else image.crop((left, top, right, bottom))
    return near.resize(size, Image.Resampling.BILINEAR, box=(box[0], box[2], box[1], box[3]))


def _on_white(image: Image.Image) -> Image.Image:
    """Return the image without transparency, laid on white."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_pillow(image_CHW: Tensor) -> Image.Image:
    """Return uint8 pixels (C, H, W) of 1 or 3 channels as an image of Pillow's."""
    assert image_CHW.dtype == torch.uint8, image_CHW.dtype
    assert image_CHW.shape[0] in (1, 3), image_CHW.shape
    array = image_CHW.detach().cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _to_tensor(image: Image.Image, channels: int) -> Tensor:
    """Return uint8 pixels (C, H, W), contiguous, that own their memory."""
    mode = "L" if channels == 1 else "RGB"
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return torch.from_numpy((array[None] if channels == 1 else array.transpose(2, 0, 1)).copy(order="C"))
