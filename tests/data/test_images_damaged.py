"""Image files that are damaged, hostile or no images: nothing but a DataError comes out, and it names the file."""

from __future__ import annotations

import io
import os
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from bayesnet.data.images import image_size, read_image
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.errors import DataError

FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


def preprocessing(height: int, width: int, channels: int = 3, max_pixels: int = 50_000_000) -> Preprocessing:
    return Preprocessing(channels, height, width, (0.0,) * channels, (1.0,) * channels, max_pixels)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(b"")
    chunks = [
        struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) for body in (header, pixels)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("side", [7072, 10_000, 100_000])
def test_bomb_is_refused_at_once(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.png").write_bytes(png_header(side, side))
    start = time.process_time()  # not wall time, which other processes lengthen
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / "a.png", preprocessing(8, 8))
    assert time.process_time() - start < 0.1
    pixels = f"it has {side * side} pixels; if you trust it, raise data.max_pixels above 50000000"
    assert str(caught.value) == f"cannot read the image ({tmp_path}/a.png): {pixels}"


def test_pixel_limit_is_exact_and_can_be_raised(tmp_path: Path) -> None:
    picture(10, 10).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", preprocessing(8, 8, max_pixels=100)).shape == (3, 8, 8)
    with pytest.raises(DataError, match="it has 100 pixels"):
        read_image(tmp_path / "a.png", preprocessing(8, 8, max_pixels=99))
    with pytest.raises(DataError, match="it has 100 pixels"):
        image_size(tmp_path / "a.png", max_pixels=99)


def test_tiles_count_as_pixels(tmp_path: Path) -> None:
    # Width, length, bits, compression, photometric, samples, tile width, tile length, tile offset, tile bytes.
    tags = {256: 10, 257: 10, 258: 8, 259: 1, 262: 1, 277: 1, 322: 60_000, 323: 60_000, 324: 8, 325: 100}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<IH", 8, len(tags))
    (tmp_path / "a.tif").write_bytes(header + entries + bytes(4 + 100))
    with pytest.raises(DataError, match="it has 3600000000 pixels"):
        read_image(tmp_path / "a.tif", preprocessing(8, 8))


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # opening it would block for ever
    for path in (tmp_path / "pipe.png", tmp_path, Path("/dev/zero")):
        with pytest.raises(DataError, match=rf"not a regular file \({path}\)"):
            read_image(path, preprocessing(8, 8))


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("nowhere")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image at all")
    for name, message in {
        "gone.png": "file or folder does not exist (",
        "link.png": "link leads nowhere (",
        "empty.png": "cannot read the image (",
        "text.png": "cannot read the image (",
        "nul\0.png": "cannot read (",
    }.items():
        with pytest.raises(DataError) as caught:
            read_image(tmp_path / name, preprocessing(8, 8))
        assert str(caught.value).startswith(message)
        assert name.replace("\0", "\\x00") in str(caught.value)
    with pytest.raises(DataError, match=r"text.png.*not a JPEG, PNG, WebP, GIF, BMP or TIFF file"):
        read_image(tmp_path / "text.png", preprocessing(8, 8))


def test_other_formats_are_not_decoded(tmp_path: Path) -> None:
    for name in ("PPM", "TGA", "ICO", "PCX"):
        picture(8, 8).save(tmp_path / "a.png", format=name)
        with pytest.raises(DataError, match="not a JPEG, PNG"):
            read_image(tmp_path / "a.png", preprocessing(8, 8))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    picture(40, 40).save(buffer, format=name)
    (tmp_path / "cut.bin").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(DataError, match=r"cannot read the image \(.*cut.bin\): "):
        read_image(tmp_path / "cut.bin", preprocessing(8, 8))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    "error",
    [
        OSError("a"),
        PermissionError(13, "Permission denied"),
        SyntaxError("b"),
        struct.error("c"),
        ValueError("d"),
        TypeError("e"),
        KeyError("f"),
        IndexError("g"),
        EOFError(),
        MemoryError(),
        ZeroDivisionError("h"),
        Image.DecompressionBombError("i"),
        zlib.error("j"),
        UnicodeDecodeError("ascii", b"\xff", 0, 1, "k"),
    ],
)
def test_every_decoder_exception_becomes_a_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    picture(8, 8).save(tmp_path / "a.png")

    def fail(_: ImageFile.ImageFile) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(DataError, match=r"cannot read the image \(.*a.png\): .") as caught:
        read_image(tmp_path / "a.png", preprocessing(8, 8))
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_interruptions_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]) -> None:
    picture(8, 8).save(tmp_path / "a.png")

    def fail(_: ImageFile.ImageFile) -> None:
        raise interruption

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(interruption):
        read_image(tmp_path / "a.png", preprocessing(8, 8))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_mutated_files_give_an_image_or_a_data_error(tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    picture(12, 12).save(buffer, format=name, **({"compression": "tiff_lzw"} if name == "TIFF" else {}))
    rng = random.Random(name)
    outcomes: list[tuple[int, ...] | str] = []
    path = tmp_path / f"a{FORMATS[name]}"
    for _ in range(40):
        content = bytearray(buffer.getvalue())
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(min(len(content), rng.choice((64, len(content)))))] = rng.randrange(256)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            outcomes.append(tuple(read_image(path, preprocessing(8, 10, max_pixels=10**6)).shape))
        except DataError as error:
            outcomes.append("named" if str(path) in str(error) else str(error))
    possible: set[tuple[int, ...] | str] = {"named", (3, 8, 10)}
    # Each chunk of a PNG has a checksum, so none of these passes.
    assert set(outcomes) == (possible if name != "PNG" else {"named"})
