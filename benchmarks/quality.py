"""Test metrics of a recipe over several seeds: the Bayesian model beside its twin, before and after calibration.

    python benchmarks/quality.py --config digits/mean_field --seeds 5 --out benchmarks/results

Each seed is one `bayesnet train --bayesian` and one `bayesnet calibrate` on the same splits. Written are a JSON file
with every number and a Markdown table with the mean and standard deviation over seeds, and the paired differences with
their 95 % t intervals. With --smoke, one seed of one epoch.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import bayesnet
from bayesnet.metrics.resampling import t_interval

METRICS = ("accuracy", "nll", "brier", "ece", "aurc")
MODELS = ("deterministic", "bayesian")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default="digits/mean_field")
    parser.add_argument("--data", help="overrides the recipe's data set, such as folder:PATH")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", dest="overrides")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    seeds, epochs = (1, 1) if arguments.smoke else (arguments.seeds, arguments.epochs)
    records = []
    for seed in range(seeds):
        records.append(run_seed(arguments, seed, epochs))
        print(f"seed {seed}: {summary_line(records[-1])}", file=sys.stderr, flush=True)
    write(arguments, records, epochs)


def run_seed(arguments: argparse.Namespace, seed: int, epochs: int | None) -> dict[str, Any]:
    """Train, calibrate, and return the metrics of both models."""
    with tempfile.TemporaryDirectory() as folder:
        summary = bayesnet.train(
            bayesian=True,
            config=arguments.config,
            data=arguments.data,
            seed=seed,
            epochs=epochs,
            overrides=arguments.overrides,
            out=Path(folder) / "run",
        )
        calibration = bayesnet.calibrate(summary["run"])
    return {
        "seed": seed,
        "data": summary["data"],
        "seconds": {name: summary["models"][name]["seconds"] for name in MODELS},
        "posterior_scale": summary["models"]["bayesian"]["posterior_scale"],
        "kl": summary["models"]["bayesian"]["kl"],
        "models": {
            name: {
                stage: {metric: calibration["models"][name][stage][metric] for metric in METRICS}
                for stage in ("before", "after")
            }
            | {"temperature": calibration["models"][name]["temperature"]}
            for name in MODELS
        },
    }


def summary_line(record: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} accuracy {record['models'][name]['before']['accuracy']:.4f} NLL "
        f"{record['models'][name]['before']['nll']:.4f} -> {record['models'][name]['after']['nll']:.4f}"
        for name in MODELS
    )


def paired(records: list[dict[str, Any]], stage: str, metric: str) -> tuple[float, float]:
    """Return the mean difference (Bayesian minus twin) over seeds and the half-width of its 95 % t interval."""
    values = [r["models"]["bayesian"][stage][metric] - r["models"]["deterministic"][stage][metric] for r in records]
    if len(values) < 2:
        return values[0], math.nan
    low, high = t_interval(values)
    return statistics.mean(values), (high - low) / 2


def table(records: list[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    lines = ["| | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for stage in ("before", "after"):
        for name in MODELS:
            cells = []
            for metric in METRICS:
                values = [record["models"][name][stage][metric] for record in records]
                spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.4f}{spread}")
            lines.append(f"| {name}, {stage} calibration | " + " | ".join(cells) + " |")
        differences = [paired(records, stage, metric) for metric in METRICS]
        cells = [f"{mean:+.4f} [{mean - width:+.4f}, {mean + width:+.4f}]" for mean, width in differences]
        lines.append(f"| difference, {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(arguments: argparse.Namespace, records: list[dict[str, Any]], epochs: int | None) -> None:
    """Write the JSON and the Markdown file."""
    environment = bayesnet.doctor()
    command = "python benchmarks/quality.py " + " ".join(sys.argv[1:])
    hardware = environment["devices"][next(iter(environment["devices"]))]
    stem = f"quality-{arguments.config.replace('/', '-')}_{next(iter(environment['devices']))}_{date.today():%Y-%m-%d}"
    data = records[0]["data"]
    head = [
        f"# {arguments.config}: {len(records)} seeds, the same splits",
        "",
        f"{data['num_train']} training, {data['num_validation']} validation, {data['num_calibration']} calibration and "
        f"{data['num_test']} test images. Mean ± standard deviation over seeds; differences are Bayesian minus twin, "
        "paired by seed, with 95 % t intervals over seeds (same test images: they speak of these images).",
        "",
        table(records),
        "",
        "Median posterior sd "
        + ", ".join(f"{r['posterior_scale']['initial']:.3f} -> {r['posterior_scale']['final']:.3f}" for r in records)
        + "; temperatures "
        + ", ".join(
            f"{r['models']['deterministic']['temperature']:.2f} / {r['models']['bayesian']['temperature']:.2f}"
            for r in records
        )
        + " (twin / Bayesian).",
        "",
        f"Command: `{command}`. {hardware}, {environment['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        + ".",
        "",
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "epochs": epochs, "environment": environment, "seeds": records}
    (arguments.out / f"{stem}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (arguments.out / f"{stem}.md").write_text("\n".join(head), encoding="utf-8")
    print(arguments.out / f"{stem}.md")


if __name__ == "__main__":
    main()
