"""Curves that compare models: risk against coverage, metrics against severity, the objective against epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bayesnet.plots.style import (
    INK,
    MUTED,
    clean,
    legend,
    line_styles,
    new_figure,
    numbers,
    png_bytes,
    title,
)

_SEVERITY_METRICS = {"accuracy": "accuracy", "nll": "NLL, nats", "ece": "ECE"}


def risk_coverage_curves(models: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the risk-coverage curves of all models as a PNG: the error rate if only the most confident are answered.

    Args:
        models: Name to "risk_coverage" with ``coverage`` and ``risk``, shares of the images.
    """
    figure = new_figure(6.6, 3.9)
    axes = figure.add_axes((0.11, 0.14, 0.86, 0.82))
    marks: dict[str, Artist] = {}
    for name, (colour, style) in line_styles(models).items():
        curve = models[name]["risk_coverage"]
        coverage, risk = numbers(curve["coverage"]), numbers(curve["risk"])
        [marks[name]] = axes.plot(coverage, risk, style, color=colour, linewidth=1.8)
        axes.plot(coverage[-1:], risk[-1:], "o", color=colour, markersize=5, clip_on=False)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_xlabel("coverage: share of the images that is answered, the most confident first")
    axes.set_ylabel("risk: share of the answers that is wrong")
    clean(axes)
    legend(axes, marks)
    return png_bytes(figure)


def severity_curves(models: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return accuracy, NLL and ECE against the severity of corruption as a PNG.

    A thick line is the mean over corruptions, with the clean images at severity 0; a thin one is a corruption.

    Args:
        models: Name to "robustness" with ``mean`` and ``corruptions``; models where it is None are left out.
    """
    figure = new_figure(9.1, 3.3)
    for column, (metric, label) in enumerate(_SEVERITY_METRICS.items()):
        axes = figure.add_axes((0.065 + column * 0.338, 0.15, 0.25, 0.79))
        marks: dict[str, Artist] = {}
        for name, (colour, style) in line_styles(models).items():
            robustness = models[name]["robustness"]
            if robustness is None:
                continue
            for points in robustness["corruptions"].values():
                axes.plot(*_points(points, metric), style, color=colour, linewidth=0.7, alpha=0.3)
            [marks[name]] = axes.plot(*_points(robustness["mean"], metric), style, color=colour, linewidth=2.2)
        if metric == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
            axes.set_ylim(top=1)
            legend(axes, marks)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("severity of corruption (0: clean)")
        axes.set_ylabel(label)
        clean(axes)
    return png_bytes(figure)


def training_curves(models: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the training objective of each model by epoch as a PNG, a column for each.

    The objective is the negative ELBO per example; below it is its KL part where the model has one.

    Args:
        models: Name to "training", a list of ``epoch``, ``loss``, ``nll`` and ``kl``; empty ones are left out.
    """
    traces = {name: model["training"] for name, model in models.items() if model["training"]}
    figure = new_figure(4.55 * len(traces), 4.6)
    for column, (name, trace) in enumerate(traces.items()):
        left, width = (column + 0.15) / len(traces), 0.8 / len(traces)
        has_kl = any(point["kl"] for point in trace)
        upper = figure.add_axes((left, 0.42 if has_kl else 0.11, width, 0.5 if has_kl else 0.81))
        colour, _ = line_styles(models)[name]
        [objective] = upper.plot(*_points(trace, "loss", "epoch"), color=colour, linewidth=1.8)
        [nll] = upper.plot(*_points(trace, "nll", "epoch"), ":", color=INK, linewidth=1.5)
        upper.set_ylabel("nats per example")
        title(upper, name)
        lowest = upper
        if has_kl:
            upper.tick_params(labelbottom=False)
            lowest = figure.add_axes((left, 0.11, width, 0.25))
            lowest.plot(*_points(trace, "kl", "epoch"), color=MUTED, linewidth=1.8)
            lowest.set_ylabel("KL part")
        lowest.set_xlabel("epoch")
        for axes in {upper: None, lowest: None}:
            _mark_single(axes, len(trace))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            clean(axes)
        legend(upper, {"objective": objective, "its NLL part": nll})
    return png_bytes(figure)


def _points(points: list[dict[str, Any]], metric: str, by: str = "severity") -> tuple[Any, Any]:
    """Return x and y of a curve that the record holds as a list of points."""
    return numbers([point[by] for point in points]), numbers([point[metric] for point in points])


def _mark_single(axes: Axes, num_points: int) -> None:
    """Show a curve of one point, which has no line, as a mark."""
    if num_points == 1:
        for line in axes.lines:
            line.set_marker("o")
