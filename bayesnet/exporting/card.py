"""The model card: what the programs of a directory are, how good, how to run them, and what they cannot do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from bayesnet.data import Preprocessing
from bayesnet.errors import printable
from bayesnet.exporting import snippets
from bayesnet.exporting.formats import FORMATS
from bayesnet.types import JsonObject

METRICS = {
    "accuracy": "accuracy",
    "nll": "NLL, nats",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "aurc": "area under the risk-coverage curve",
}
SPLITS = ("train", "validation", "calibration", "test")
MAX_NAMES = 50

_LIMITS = """\
## Limits

- It knows the classes above and no other: a photograph of anything else gets one of their names. High entropy and
  mutual information are a hint of that, no proof.
- This is one trained model. Training again with another seed gives another one, and the intervals of the metrics, which
  are over test images, do not say how different.
- The metrics hold for images like the test images. Another camera, light or crop is another question.
- What the posterior of its family leaves out, no interval shows: the network below the last layer may be a point
  estimate, and correlations between weights may be ignored."""

_SAFETY = """\
## Safety

An exported program is a program: run those of people you trust. What stands on this card is what its maker wrote."""


def model_card(record: JsonObject, preprocessing: Preprocessing) -> str:
    """Return the text of README.md, in Markdown.

    Args:
        record: What model.json holds.
        preprocessing: Of the model.
    """
    sections = [
        _head(record),
        _data(record),
        _metrics(record["metrics"], record["data"]["num_test"]),
        _outputs(record),
        _decisions(record),
        _running(record, preprocessing),
        _LIMITS,
        _licence(record),
        _SAFETY,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def markdown(text: object) -> str:
    r"""Return a text of any origin as Markdown that shows it: names of classes and data are strangers' words.

    Example:
        >>> print(markdown("<b>[a](b)" + chr(10)))
        \<b\>\[a\]\(b\)\\n
    """
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", printable(str(text)))


def _head(record: JsonObject) -> str:
    """Return title and the facts in a table."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    calibrator = f"`{record['calibrator']['name']}`" if record["calibrated"] else "none: the run was not calibrated"
    rows = {
        "family": f"`{record['family']}` ({record['model']} model)",
        "backbone": f"`{record['backbone']}`",
        "calibrator": calibrator,
        "draws": record["interval"]["samples"],
        "made with": versions,
        "run": markdown(record["run"]),
        "checkpoint, SHA-256": f"`{record['digest']}`",
    }
    table = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"# An image classifier: {markdown(record['data']['name'])}", "", "| | |", "|---|---|", *table])


def _data(record: JsonObject) -> str:
    """Return what it was trained on."""
    data, classes = record["data"], record["classes"]
    sizes = ", ".join(f"{data[f'num_{split}']} {split}" for split in SPLITS)
    shown = ", ".join(markdown(name) for name in classes[:MAX_NAMES])
    more = f" and {len(classes) - MAX_NAMES} more, in model.json" if len(classes) > MAX_NAMES else ""
    return (
        f"## Data\n\n{markdown(data['name'])}: {sizes} images.\n\n{len(classes)} classes, in this order: {shown}{more}."
    )


def _metrics(metrics: Mapping[str, JsonObject | None], num_test: int) -> str:
    """Return the table of metrics on the test split, before and after calibration."""
    columns = {name: values for name, values in metrics.items() if values is not None}
    titles = {"before": "before calibration", "after": "after calibration"} if len(columns) > 1 else {"before": "value"}
    rows = [
        f"| {title} | {' | '.join(_with_interval(values, key) for values in columns.values())} |"
        for key, title in METRICS.items()
    ]
    head = [f"| | {' | '.join(titles[name] for name in columns)} |", f"|---|{'---|' * len(columns)}"]
    text = f"On the {num_test} images of the test split, 95 % intervals over test images in brackets."
    which = " The programs give the calibrated probabilities." if len(columns) > 1 else ""
    return "\n".join(["## Metrics", "", text + which, "", *head, *rows])


def _with_interval(values: JsonObject, key: str) -> str:
    """Return "0.9931 [0.9780, 0.9981]", with n/a for what there is not."""
    low, high = values["ci95"][key]
    return f"{_number(values[key])} [{_number(low)}, {_number(high)}]"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _outputs(record: JsonObject) -> str:
    """Return what goes in, what comes out and what the interval means."""
    shape, interval = ", ".join(map(str, record["input"]["shape"])), record["interval"]
    kind, verified = f"{interval['level']:g} ({interval['kind']})", record["verified"]
    images = f"{verified['num_images']} images, {verified['source']}, on a CPU"
    scale = "0 to 255" if record["input"]["dtype"] == "uint8" else "as the training arrays were, before normalisation"
    return f"""\
## Input and outputs

Input `images`: pixels ({shape}), {record["input"]["dtype"]}, {scale}; N is 1 or more. The program normalises.

Outputs, float64, for N images and K = {len(record["classes"])} classes:

- `mean` (N, K): probability of each class, the mean over the draws of the posterior; it adds up to 1.
- `lower`, `upper` (N, K): the interval at level {kind} on each class *probability* under the
  posterior. It says how far the model is from knowing that probability. It is no promise about the label, no range that
  other networks or more training would stay in, and has no guarantee of coverage on new images.
- `entropy` (N): of `mean`, nats, from 0 to log K: the uncertainty in all.
- `mutual_information` (N): the part of it that more training data could remove, nats. With one draw it is 0.

Largest difference to `bayesnet predict` ({images}): {_differences(record)}."""


def _differences(record: JsonObject) -> str:
    found = record["max_differences"].items()
    return ", ".join(f"{name} {value:.1e}" for name, value in found if value is not None)


def _decisions(record: JsonObject) -> str:
    """Return how sets and abstention are had from the outputs, where `calibrate` set a threshold for them."""
    lines = []
    if (threshold := record["threshold"]) is not None:
        level = f"{1 - threshold['alpha']:g}"
        text = (
            f"- Label sets ({threshold['method']}) that hold the label with probability {level} over images like the "
        )
        text += "calibration images: the threshold is in model.json, under `threshold`."
        if threshold["method"] == "lac":
            text += f" A set holds the classes with `1 - mean` at most that (about {threshold['threshold']:.4g}); "
            text += "it can be empty."
        lines.append(text)
    if (limit := record["abstention_threshold"]) is not None:
        rule = "the limit could not be shown to hold: rely on no answer"
        if limit["threshold"] is not None:
            rule = "rely on no answer whose largest `mean` is below `abstention_threshold` of model.json "
            rule += f"(about {limit['threshold']:.4g})"
        lines.append(f"- Abstention, for a risk of at most {limit['max_risk']:g}: {rule}.")
    return "\n".join(["## Decisions", "", *lines]) if lines else ""


def _running(record: JsonObject, preprocessing: Preprocessing) -> str:
    """Return the code: the reader of images and, for each program, how to run it in this directory."""
    parts = ["## Running it", "Run these in this directory. No part of bayesnet is needed."]
    if snippets.takes_files(preprocessing):
        parts += [
            "An image file becomes the same pixels as in training and in `predict` (JPEG, PNG, WebP, GIF, BMP or TIFF "
            "of 8 bits per channel; Pillow and NumPy):",
            _code(snippets.reader(preprocessing)),
        ]
    parts.append(_code(snippets.images(preprocessing)))
    for name, text in snippets.RUNNERS.items():
        if record["files"][name] is not None:
            parts += [f"`{FORMATS[name].file}`:", _code(text)]
    parts += ["Either way, the class, its interval around the probability, and the uncertainties of the first image:"]
    return "\n\n".join([*parts, _code(snippets.PRINTING)])


def _code(text: str) -> str:
    return f"```python\n{text}```"


def _licence(record: JsonObject) -> str:
    """Return whose terms may hold, where training did not begin from nothing."""
    origin: Sequence[str] = record["weights"]
    terms = "The terms of the training images are those of whoever gave them."
    if origin:
        terms += (
            f" The network began from {' and '.join(map(markdown, origin))}: the licence of those weights holds too."
        )
    return f"## Licence\n\n{terms}"
