"""Image files: what their pixels mean, and how files are found."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms import v2

from bayesnet.data import images
from bayesnet.data.finding import image_paths
from bayesnet.data.images import image_size, read_image, write_png
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.errors import DataError, StopRequest

# The transposition that an orientation undoes when the image is shown.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def preprocessing(
    height: int, width: int, channels: int = 3, max_pixels: int = 50_000_000, resize: int = 0
) -> Preprocessing:
    return Preprocessing(channels, height, width, (0.0,) * channels, (1.0,) * channels, max_pixels, resize)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chw(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("name", ["PNG", "BMP", "TIFF", "WEBP"])
def test_pixels_are_untouched_at_the_right_size(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.bin"  # the suffix decides nothing
    image = picture(6, 9)
    image.save(path, format=name, **({"lossless": True} if name == "WEBP" else {}))
    result = read_image(path, preprocessing(6, 9))
    assert torch.equal(result, chw(image))
    assert result.is_contiguous()
    assert image_size(path, max_pixels=54) == (6, 9)


def test_jpeg_and_gif_are_read(tmp_path: Path) -> None:
    for name in ("JPEG", "GIF"):
        image = Image.new("RGB", (9, 6), (200, 40, 120))
        image.save(tmp_path / "a", format=name)
        assert (read_image(tmp_path / "a", preprocessing(6, 9)).float() - chw(image).float()).abs().max() <= 4


@pytest.mark.parametrize("name", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_eight_orientations_give_one_tensor(tmp_path: Path, name: str) -> None:
    upright = picture(16, 32).resize((32, 16), Image.Resampling.BILINEAR)
    if name == "JPEG":  # flat blocks of 8 x 8 survive compression in every direction
        upright = Image.fromarray(np.array(picture(2, 4)).repeat(8, 0).repeat(8, 1))
    for orientation, method in STORED.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        stored = upright if method is None else upright.transpose(method)
        options = {"lossless": True} if name == "WEBP" else {"quality": 100, "subsampling": 0} if name == "JPEG" else {}
        stored.save(tmp_path / "a", format=name, exif=exif, **options)
        result = read_image(tmp_path / "a", preprocessing(16, 32))
        assert (result.float() - chw(upright).float()).abs().max() <= (3 if name == "JPEG" else 0), orientation
        assert image_size(tmp_path / "a", max_pixels=1000) == (16, 32), orientation


@pytest.mark.parametrize(
    ("mode", "name"), [("I;16", "PNG"), ("I;16B", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I", "TIFF")]
)
def test_16_bit_ramp_keeps_its_levels(tmp_path: Path, mode: str, name: str) -> None:
    ramp = np.linspace(0, 65535, 1024).round().astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode])
    Image.frombytes(mode, (32, 32), ramp.tobytes()).save(tmp_path / "a", format=name)
    result = read_image(tmp_path / "a", preprocessing(32, 32, channels=1))
    assert len(result.unique()) == 256
    assert torch.equal(result.flatten(), torch.from_numpy(np.rint(ramp / 257).astype(np.uint8)))


def test_integer_tiff_of_8_bits_is_kept_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[0, 255], [7, 9]], dtype=np.int32)).save(path)
    assert read_image(path, preprocessing(2, 2, channels=1)).tolist() == [[[0, 255], [7, 9]]]
    for low, high in ((-1, 5), (0, 70000)):
        Image.fromarray(np.array([[low, high]], dtype=np.int32)).save(path)
        with pytest.raises(DataError, match=rf"\(.*a.tif\): integer pixels from {low} to {high} are not 8 or 16 bits"):
            read_image(path, preprocessing(2, 2))


def test_float_tiff_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a.tif\): floating-point pixels have no defined range; convert"):
        read_image(tmp_path / "a.tif", preprocessing(4, 4))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    hidden, shown, half = (255, 0, 0, 0), (10, 20, 30, 255), (0, 0, 0, 128)
    rgba = Image.new("RGBA", (3, 1))
    for column, pixel in enumerate((hidden, shown, half)):
        rgba.putpixel((column, 0), pixel)
    rgba.save(tmp_path / "rgba.png")
    result = read_image(tmp_path / "rgba.png", preprocessing(1, 3))
    assert result[:, 0].T.tolist() == [[255, 255, 255], [10, 20, 30], [127, 127, 127]]

    Image.merge("LA", [Image.new("L", (2, 2), 40), Image.new("L", (2, 2), 0)]).save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png", preprocessing(2, 2, channels=1)).unique().tolist() == [255]

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png", preprocessing(1, 2))[:, 0].T.tolist() == [[255, 255, 255], [0, 0, 255]]

    Image.frombytes("I;16", (2, 1), struct.pack("<HH", 0, 30000)).save(tmp_path / "i.png", transparency=30000)
    assert read_image(tmp_path / "i.png", preprocessing(1, 2, channels=1)).flatten().tolist() == [0, 255]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
        ("1", 1, (255, 255, 255)),
        ("L", 90, (90, 90, 90)),
    ],
)
def test_other_modes_are_converted(
    tmp_path: Path, mode: str, colour: int | tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.tif")
    result = read_image(tmp_path / "a.tif", preprocessing(4, 4))
    assert (result[:, 0, 0] - torch.tensor(expected)).abs().max() <= 2
    assert read_image(tmp_path / "a.tif", preprocessing(4, 4, channels=1)).shape == (1, 4, 4)


def test_adobe_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert (read_image(tmp_path / "a.jpg", preprocessing(8, 8))[:, 4, 4] - torch.tensor([255, 0, 0])).abs().max() <= 4


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for name in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if name == "WEBP" else {}
        frames[0].save(tmp_path / "a", format=name, save_all=True, append_images=frames[1:], **options)
        assert read_image(tmp_path / "a", preprocessing(4, 4))[:, 0, 0].tolist() == [255, 0, 0], name


def test_scaled_to_cover_then_cropped_in_the_centre(tmp_path: Path) -> None:
    # Left and right thirds are red, the middle is a grey ramp from top to bottom: only the middle survives.
    image = Image.new("RGB", (120, 40), "red")
    ramp_HW = np.linspace(0, 255, 40).round().astype(np.uint8)[:, None].repeat(40, 1)
    image.paste(Image.fromarray(ramp_HW).convert("RGB"), (40, 0))
    image.save(tmp_path / "a.png")
    result = read_image(tmp_path / "a.png", preprocessing(20, 20)).float()
    assert (result[0] - result[2]).abs()[:, 1:-1].max() == 0  # no red
    expected_H = torch.from_numpy(ramp_HW[:, 0].reshape(20, 2).mean(1)).float()
    assert (result[1, 2:-2, 10] - expected_H[2:-2]).abs().max() <= 2


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (1, 1), (7, 4001), (333, 332)])
def test_extreme_shapes_are_fitted_without_growing(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "a.png")
    for height, width in ((8, 8), (8, 31), (31, 8)):
        result = read_image(tmp_path / "a.png", preprocessing(height, width))
        assert result.shape == (3, height, width)
        assert result[:, 4, 4].tolist() == [1, 2, 3]


def test_large_jpeg_is_decoded_small_with_little_difference(tmp_path: Path) -> None:
    image = picture(10, 10).resize((800, 800), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.jpg", quality=100)
    image.save(tmp_path / "a.png")
    difference = read_image(tmp_path / "a.jpg", preprocessing(32, 32)).float()
    difference -= read_image(tmp_path / "a.png", preprocessing(32, 32)).float()
    assert difference.abs().max() <= 6


def by_torchvision(image: Image.Image, resize: int, height: int, width: int) -> torch.Tensor:
    scaled = v2.Resize(resize, v2.InterpolationMode.BILINEAR, antialias=True)(image)
    return chw(v2.CenterCrop([height, width])(scaled))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (97, 61), (256, 256), (300, 256), (257, 1031), (40, 40)])
@pytest.mark.parametrize(("resize", "height", "width"), [(256, 224, 224), (64, 64, 64), (48, 31, 44)])
def test_resize_then_centre_crop_is_that_of_torchvision(
    tmp_path: Path, size: tuple[int, int], resize: int, height: int, width: int
) -> None:
    image = picture(size[1], size[0])  # noise: a box that is off by a twentieth of a pixel shows
    image.save(tmp_path / "a.png")
    result = read_image(tmp_path / "a.png", preprocessing(height, width, resize=resize))
    difference = result.float() - by_torchvision(image, resize, height, width).float()
    assert difference.abs().max() <= 1
    assert result.is_contiguous()


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (3, 3001), (1, 1)])
def test_resize_of_thin_images_is_that_of_torchvision(tmp_path: Path, size: tuple[int, int]) -> None:
    image = picture(size[1], size[0])
    image.save(tmp_path / "a.png")
    result = read_image(tmp_path / "a.png", preprocessing(14, 14, resize=16))
    assert (result.float() - by_torchvision(image, 16, 14, 14).float()).abs().max() <= 1


@pytest.mark.parametrize("turned", [False, True])
def test_a_line_of_five_million_pixels_does_not_grow(tmp_path: Path, turned: bool) -> None:
    # Scaled whole to a short side of 256 it would have 327,680,000,000 pixels.
    line = np.zeros((1, 5_000_000), dtype=np.uint8)
    line[0, 2_500_000:] = 200  # a step in the very centre
    Image.fromarray(line.T if turned else line).save(tmp_path / "a.bmp")
    result = read_image(tmp_path / "a.bmp", preprocessing(224, 224, channels=1, resize=256))[0]
    result = result.T if turned else result
    assert (result == result[:1]).all()
    # Two pixels of the line fill 256: pixel c of the result is (c - 111.5) / 256 from the middle of the step.
    expected_W = 200 * (0.5 + (torch.arange(224) - 111.5) / 256)
    assert (result[0] - expected_W).abs().max() <= 0.51


def test_transparency_is_premultiplied_before_resizing(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))  # hidden red must not bleed into the black square
    image.paste((0, 0, 0, 255), (0, 0, 20, 40))
    image.save(tmp_path / "a.png")
    red, green, blue = read_image(tmp_path / "a.png", preprocessing(12, 12, resize=15))
    assert torch.equal(red, green)
    assert torch.equal(red, blue)
    assert (red[0, 0], red[0, -1]) == (0, 255)


def test_jpeg_is_decoded_small_only_where_twice_the_short_side_is_left(tmp_path: Path) -> None:
    wanted = preprocessing(224, 224, resize=256)
    for side, limit in ((1000, 1), (1100, 12)):  # 1000 // 512 = 1: decoded whole; 1100 // 512 = 2: at half size
        image = picture(30, 30).resize((side, side), Image.Resampling.BICUBIC)
        image.save(tmp_path / "a.jpg", quality=100, subsampling=0)
        with Image.open(tmp_path / "a.jpg") as whole:
            difference = read_image(tmp_path / "a.jpg", wanted).float() - by_torchvision(whole, 256, 224, 224).float()
        assert difference.abs().max() <= limit
        assert (difference.abs().max() > 1) == (side == 1100)


def test_models_of_arrays_take_no_files(tmp_path: Path) -> None:
    picture(8, 8).save(tmp_path / "a.png")
    for channels in (2, 4):
        with pytest.raises(DataError) as caught:
            read_image(tmp_path / "a.png", preprocessing(8, 8, channels))
        what = f"cannot read image files with {channels} channels ({tmp_path}/a.png): give the model arrays from Python"
        assert str(caught.value) == what
    floats = Preprocessing(3, 8, 8, (0.0,) * 3, (1.0,) * 3, pixel_scale=1.0)
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / "a.png", floats)
    assert str(caught.value).startswith("the model was trained on floating-point arrays, not image files (")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png"))
    picture(8, 8).save(path)
    assert image_paths([tmp_path]) == [path]
    assert read_image(path, preprocessing(8, 8)).shape == (3, 8, 8)
    path.write_bytes(b"bad")
    with pytest.raises(DataError) as caught:
        read_image(path, preprocessing(8, 8))
    assert "\\udcff\\udcfe.png" in str(caught.value)
    str(caught.value).encode()  # printable


@pytest.mark.parametrize("channels", [1, 3])
def test_write_png_round_trip(tmp_path: Path, channels: int) -> None:
    x_CHW = torch.randint(256, (channels, 5, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    write_png(tmp_path / "a.png", x_CHW)
    assert torch.equal(read_image(tmp_path / "a.png", preprocessing(5, 7, channels)), x_CHW)


def test_truncated_images_are_never_allowed_by_the_library() -> None:
    sources = Path(images.__file__).parent.rglob("*.py")
    assert not [path for path in sources if "LOAD_TRUNCATED" in path.read_text()]


def test_a_signal_while_decoding_is_no_corrupt_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C must end a long scan, not turn the image at hand into a corrupt one."""
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)

    def interrupted(*args: object) -> None:
        raise StopRequest(2)

    monkeypatch.setattr(images, "_to_tensor", interrupted)
    with pytest.raises(StopRequest):
        read_image(path, Preprocessing(channels=3, height=8, width=8, mean=(0.5,) * 3, std=(0.5,) * 3))
