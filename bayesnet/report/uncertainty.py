"""Where uncertainty comes from, whether it tells errors, and the images that carry most of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bayesnet.report.markup import details, figure, number, paragraph, percent, section, table, text
from bayesnet.types import JsonObject

_PARTS = {"total": "total", "aleatoric": "aleatoric: in the image", "epistemic": "epistemic: in the model"}
_GRIDS = {
    "most_uncertain": "The test images that it is most uncertain of, with the confidence and the total uncertainty.",
    "most_epistemic": (
        "The test images on which the draws of its weights disagree most: more training images like these would help. "
        "With the confidence and the epistemic uncertainty."
    ),
    "confidently_wrong": "Its most confident mistakes. Look here for wrong labels, too.",
}


def uncertainty(record: JsonObject, figures: Mapping[str, bytes]) -> str:
    """Return the split of uncertainty of each model, with the figures and images of it."""
    words = paragraph(
        "Uncertainty in nats: 0 for a sure answer, more for a spread one. The aleatoric part is doubt that each draw "
        "of the weights has by itself, such as of a blurred image, and more training would not remove it. The "
        "epistemic part is disagreement between the draws: what the model could still learn. A model with a single "
        "set of weights has none but what an uncertain temperature gives it. AUROC is the chance that a wrong answer "
        "was more uncertain than a right one; 50% would be chance."
    )
    caption = (
        "Numbers of test images, right and wrong, by uncertainty; dashed lines are means. The further apart the two "
        "colours, the better uncertainty tells errors. Note the logarithmic axis."
    )
    models = record["models"]
    # The Bayesian model's images: it is the one with both parts.
    shown = "bayesian" if "bayesian" in models else list(models)[-1]
    grids = [
        figure(figures.get(key), f"{shown}: {words_of[0].lower()}{words_of[1:]}", "grid")
        for key, words_of in _GRIDS.items()
    ]
    parts = [_split(name, model["uncertainty"]) for name, model in models.items()]
    classes = [
        details(f"{text(name)}: mean uncertainty by class", _by_class(model["uncertainty"]["by_class"]))
        for name, model in models.items()
    ]
    lists = [details(f"{text(shown)}: the images by name", *_lists(models[shown]["uncertainty"]))]
    histograms = figure(figures.get("uncertainty"), caption, "wide")
    return section("Where the uncertainty lies", words, *parts, histograms, *grids, *classes, *lists)


def _split(name: str, parts: Mapping[str, Any]) -> str:
    """Return the parts of uncertainty of one model and how well each tells errors."""
    rows = [
        (
            title,
            number(parts[part]["mean"]),
            number(parts[part]["mean_right"]),
            number(parts[part]["mean_wrong"]),
            percent(parts[part]["auroc_error"]),
        )
        for part, title in _PARTS.items()
    ]
    head = ("part", "mean", "of right answers", "of wrong answers", "AUROC of errors")
    return table(head, rows, f"{text(name)}, nats")


def _by_class(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the mean parts by true class."""
    rows = [(text(each["name"]), *(number(each[part]) for part in _PARTS)) for each in entries]
    return table(("true class", "total", "aleatoric", "epistemic"), rows) if rows else ""


def _lists(parts: Mapping[str, Any]) -> list[str]:
    """Return the images behind the grids, by the name of their file or their place in the test split."""
    titles = {"most_uncertain": "most uncertain", "most_epistemic": "most epistemic"}
    found = []
    for key in _GRIDS:
        rows = [
            (
                f"{text(each['name'])}: {text(each['label'])} taken for {text(each['predicted'])}"
                if each["label"] != each["predicted"]
                else f"{text(each['name'])}: {text(each['label'])}",
                f"{each['index']:d}",
                percent(each["probability"]),
                number(each["value"]),
            )
            for each in parts[key]
        ]
        if rows:
            caption = titles.get(key, "confidently wrong")
            found.append(table(("image", "place in the test split", "confidence", "value"), rows, caption))
    return found
