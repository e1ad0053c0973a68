"""The code of a model card: a reader of image files, and how each program is run. Plain Pillow, NumPy, torch, ONNX."""

from __future__ import annotations

from bayesnet.data import Preprocessing

_READER = '''\
{imports}import numpy as np
from PIL import Image, ImageOps

WIDTH, HEIGHT = {width}, {height}

def read(path):
    """Return uint8 pixels ({channels}, HEIGHT, WIDTH): upright, scaled, cropped in the centre, laid on white."""
    with Image.open(path) as file:
        file.draft(None, ({side}, {side}))  # large JPEG files are decoded at half the size or less
        ImageOps.exif_transpose(file, in_place=True)
        if file.mode[0] in "IF":
            raise ValueError("convert it to 8 bits per channel first")
        transparent = file.has_transparency_data
        image = file.convert("RGBA" if transparent else "L" if file.mode in ("1", "L") else "RGB")
{scaling}
    if transparent:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    pixels = np.array(image.convert("{mode}"))
    return {layout}
'''
_COVER = """\
    if image.size != (WIDTH, HEIGHT):
        image = ImageOps.fit(image, (WIDTH, HEIGHT), Image.Resampling.BILINEAR)"""
_SHORT_SIDE = """\
    spans = []  # the part that is needed of each side, and where in it the centre lies
    for side, target in zip(image.size, (WIDTH, HEIGHT)):
        scaled = {resize} * side // min(image.size)
        first = round((scaled - target) / 2)
        start, stop = first * side / scaled, (first + target) * side / scaled
        margin = math.ceil(max(side / scaled, 1)) + 1
        low, high = max(0, math.floor(start) - margin), min(side, math.ceil(stop) + margin)
        spans.append((low, high, start - low, min(stop, side) - low))
    (left, right, x0, x1), (top, bottom, y0, y1) = spans
    part = image.crop((left, top, right, bottom))
    image = part.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))"""

_TORCH = """\
import torch

program = torch.export.load("model.pt2").module()
answer = {name: value.numpy() for name, value in program(torch.from_numpy(images)).items()}
"""
_ONNX = """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
answer = dict(zip([output.name for output in session.get_outputs()], session.run(None, {"images": images})))
"""
PRINTING = """\
import json

with open("model.json") as file:
    classes = json.load(file)["classes"]
top = answer["mean"][0].argmax()
print(classes[top], *(answer[name][0, top] for name in ("lower", "mean", "upper")))
print(answer["entropy"][0], answer["mutual_information"][0])
"""
RUNNERS = {"torch": _TORCH, "onnx": _ONNX}


def takes_files(preprocessing: Preprocessing) -> bool:
    """Return whether an image file can hold what the model was trained on."""
    return preprocessing.pixel_scale == 255 and preprocessing.channels in (1, 3)


def reader(preprocessing: Preprocessing) -> str:
    """Return code that reads an image file as `predict` does; 16-bit files, which that reads too, are refused."""
    assert takes_files(preprocessing)
    grey = preprocessing.channels == 1
    return _READER.format(
        width=preprocessing.width,
        height=preprocessing.height,
        channels=preprocessing.channels,
        side=2 * max(preprocessing.resize, preprocessing.height, preprocessing.width),
        imports="import math\n\n" if preprocessing.resize else "",
        scaling=_SHORT_SIDE.format(resize=preprocessing.resize) if preprocessing.resize else _COVER,
        mode="L" if grey else "RGB",
        layout="pixels[None]" if grey else "np.ascontiguousarray(pixels.transpose(2, 0, 1))",
    )


def images(preprocessing: Preprocessing) -> str:
    """Return the line that makes the program's input."""
    if takes_files(preprocessing):
        return 'images = np.stack([read("photo.png")])\n'
    dtype = "uint8" if preprocessing.pixel_scale == 255 else "float32"
    return f"import numpy as np\n\nimages = np.zeros((1, *{preprocessing.shape}), np.{dtype})  # your own pixels\n"
