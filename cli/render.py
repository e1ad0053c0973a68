"""From result objects to what a person reads: tables on stdout, every name made safe for a terminal."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence

import click
from rich.console import Console
from rich.table import Table

from bayesnet.battery.base import FAMILY_COLUMNS
from bayesnet.errors import printable
from bayesnet.types import JsonObject

METRICS = {"accuracy": "accuracy", "nll": "NLL (nats)", "brier": "Brier", "ece": "ECE", "aurc": "AURC"}
MAX_NAMES = 5


def print_json(record: JsonObject) -> None:
    """Print one JSON object; NaN has become null on the way here."""
    click.echo(json.dumps(record, indent=2, allow_nan=False))


def print_train_summary(summary: JsonObject) -> None:
    """Print the data, the table of both models, the posterior's fit, the run directory and what to try next."""
    data, models, run = summary["data"], summary["models"], shlex.quote(summary["run"])
    splits = ", ".join(f"{data[f'num_{split}']} {split}" for split in ("train", "validation", "calibration", "test"))
    say(f"{data['name']}: {len(data['classes'])} classes; images: {splits}")
    rows = [[label, *(with_interval(model, key) for model in models.values())] for key, label in METRICS.items()]
    rows.append(["training seconds", *(f"{model['seconds']:.1f}" for model in models.values())])
    headers = [f"{name} ({model['family']})" for name, model in models.items()]
    table(f"test split, {data['num_test']} images, 95 % intervals in brackets", ["", *headers], rows)
    for name, model in models.items():
        scale = model["posterior_scale"]
        if scale["final"] is not None:
            sampled = "" if model["kl_is_exact"] else " (one draw)"
            train = "" if model["train_nll"] is None else f"train NLL {model['train_nll']:.4f}, "
            start = "" if scale["initial"] is None else f"{scale['initial']:.4f} -> "
            say(
                f"{name}: posterior temperature {model['posterior_temperature']:g}, {train}KL {model['kl']:.1f} "
                f"nats{sampled}, KL/N {model['kl_per_example']:.4f}; median posterior sd {start}{scale['final']:.4f}"
            )
    say(f"run: {run}")
    examples = "FILE_OR_FOLDER" if data["name"] == "folder" else f"{run}/examples"
    say(f"next: bayesnet calibrate {run}")
    say(f"      bayesnet predict {examples} --run {run}")


def print_predictions(record: JsonObject, *, with_classes: bool = False) -> None:
    """Print one row per image, with its classes where asked, and what the intervals are."""
    interval = record["interval"]
    rows = [
        [
            printable(row["path"]),
            printable(row["label"]),
            f"{row['probability']:.3f}",
            f"[{row['lower']:.3f}, {row['upper']:.3f}]" if interval["samples"] > 1 else "-",
            f"{row['entropy']:.3f}",
            f"{row['mutual_information']:.3f}",
            _names(row["set"]) + (" abstains" if row["abstain"] else ""),
            *(["\n".join(map(_class_bounds, row["classes"]))] if with_classes else []),
        ]
        for row in record["predictions"]
    ]
    headers = ["image", "label", "probability", f"{interval['level']:.0%} interval", "entropy", "mutual inf.", "set"]
    headers += ["classes"] if with_classes else []
    table(None, headers, rows)
    state = "calibrated" if record["calibrated"] else "not calibrated: run `bayesnet calibrate`"
    say(f"{record['model']} model of {record['run']}, {state}")
    say(f"{_interval_sentence(interval, widened=interval['widened'])} Entropies in nats.")


def say_what_intervals_are(interval: JsonObject) -> None:
    """Say on stderr what the intervals of a stream of predictions are."""
    click.echo(_interval_sentence(interval), err=True)


def _interval_sentence(interval: JsonObject, *, widened: float | None = None) -> str:
    """Return what the intervals are and are not."""
    how_often = "" if widened is None else f", widened for {widened:.0%} of the labels"
    return (
        f"The interval ({interval['kind']}, {interval['samples']} draws{how_often}) holds the class probability under "
        "the posterior; it is no promise about the label."
    )


def _class_bounds(entry: JsonObject) -> str:
    return f"{printable(entry['name'])} {entry['probability']:.3f} [{entry['lower']:.3f}, {entry['upper']:.3f}]"


def print_bench(record: JsonObject) -> None:
    """Print one row per arm and the control."""
    rows = [
        [
            row["device"],
            row["phase"],
            f"{row['model']} ({row['family']})",
            str(row["batch"]),
            str(row["samples"]),
            f"{row['images_per_second']:,.0f}",
            f"{row['ms_median']:.3f} {interval_text(row['ci95'], 3)}",
            f"{row['ms_p95']:.3f}",
            "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**20:.0f}",
            f"{row['ratio_to_deterministic']:.3f} {interval_text(row['ratio_ci95'], 3)}",
        ]
        for row in record["rows"]
    ]
    headers = ["device", "phase", "model", "batch", "draws", "images/s", "ms median", "ms p95", "peak MiB", "ratio"]
    table(f"{record['source']}: time per step or prediction, 95 % intervals in brackets", headers, rows)
    say("ratio: median over rounds of the time over the twin's in the same round; a CPU keeps no count of its memory")
    for row in record["control"]["rows"]:
        say(
            f"control, {row['device']} {row['phase']}: the twin against itself {row['ratio']:.3f} "
            f"{interval_text(row['ci95'], 3)}; differences of this size are noise"
        )


def print_comparison(record: JsonObject) -> None:
    """Print one row per model of every run."""
    rows = [
        [
            printable(row["run"]),
            f"{row['model']} ({row['family']})" + (", calibrated" if row["calibrated"] else ""),
            str(row["seed"]),
            *(with_interval(row["metrics"], key) for key in METRICS),
        ]
        for row in record["rows"]
    ]
    table("test metrics, 95 % intervals in brackets", ["run", "model", "seed", *METRICS.values()], rows)
    _print_groups(record["groups"])
    for notice in record["notices"]:
        say(notice)
    if not record["same_test_split"]:
        say("These runs have different data or splits: their metrics cannot be compared.")


def _print_groups(groups: Sequence[JsonObject]) -> None:
    """Print mean and standard deviation over seeds, and below the Bayesian models their difference to the twin."""
    rows = []
    for group in groups:
        title = f"{group['model']} ({group['family']})" + (", calibrated" if group["calibrated"] else "")
        seeds = str(len(group["seeds"]))
        values = [group["metrics"][key] for key in METRICS]
        rows.append([title, seeds, *("-" if v["mean"] is None else f"{v['mean']:.4f} ± {v['sd']:.4f}" for v in values)])
        if "difference_to_twin" in group:
            values = [group["difference_to_twin"][key] for key in METRICS]
            cells = ["-" if v["mean"] is None else f"{v['mean']:+.4f} {interval_text(v['ci95'])}" for v in values]
            rows.append(["  less its twin", seeds, *cells])
    if rows:
        title = "over seeds: mean ± sd; differences with 95 % t intervals"
        table(title, ["model", "seeds", *METRICS.values()], rows)


def print_export(record: JsonObject) -> None:
    """Print the files, what they take and give, and how far they are from `predict`."""
    for note in record["notes"]:
        say(note)
    found = {name: f"{value:.1e}" for name, value in record["max_differences"].items() if value is not None}
    rows = [[name, printable(record["files"][name]), difference] for name, difference in found.items()]
    table(None, ["program", "file", "largest difference to predict"], rows, texts=("file",))
    entry, verified = record["input"], record["verified"]
    state = "calibrated" if record["calibrated"] else "not calibrated: run `bayesnet calibrate`"
    say(f"{record['model']} model ({record['family']}) of {record['run']}, {state}")
    say(f"input {entry['name']}: {entry['dtype']} pixels ({', '.join(map(str, entry['shape']))}), N from 1 up")
    say(f"outputs: {', '.join(record['outputs'])}; {_interval_sentence(record['interval'])}")
    sizes = ", ".join(map(str, verified["batch_sizes"]))
    say(f"compared on {verified['num_images']} images ({verified['source']}), in batches of {sizes}")
    say(f"model card: {record['out']}/README.md; an exported program is a program: run those of people you trust")


def print_doctor(record: JsonObject) -> None:
    """Print versions, devices and checks."""
    table(None, ["package", "version"], list(map(list, record["versions"].items())))
    devices = ", ".join(f"{name} ({what})" for name, what in record["devices"].items())
    say(f"devices: {devices}; {record['threads']} threads on {record['cpus']} CPUs; {record['platform']}")
    for check in record["checks"]:
        line = f"{'ok  ' if check['ok'] else 'FAIL'} {check['name']}: {check['found']}"
        say(line + (f": {check['advice']}" if check["advice"] else ""))


def print_selftest(record: JsonObject) -> None:
    """Print the worst outcome of each check, the families' table and the planted faults; every failure by name."""
    worst: dict[tuple[str, str], JsonObject] = {}
    for test in record["tests"]:
        key = test["id"], test["name"]
        if key not in worst or _closeness(test) > _closeness(worst[key]):
            worst[key] = test
    rows = [
        [test["id"], test["name"], _number(test["value"]), _number(test["bound"]), "ok" if test["passed"] else "FAIL"]
        for test in worst.values()
    ]
    table("worst outcome of each check", ["", "check", "value", "bound", ""], rows, texts=("check",))
    if record["families"]:
        columns = list(dict.fromkeys(key for row in record["families"].values() for key in row))
        rows = [[name, *(_number(row.get(key)) for key in columns)] for name, row in record["families"].items()]
        table("families", ["", *columns], rows)
        for key in columns:
            say(f"{key}: {FAMILY_COLUMNS[key]}")
    for test in record["tests"]:
        if not test["passed"]:
            say(
                f"FAIL {test['id']} {test['name']}: {test['what']}: {_number(test['value'])} > {_number(test['bound'])}"
            )
    for missed in record["planted"]["missed"]:
        say(f"FAIL not caught: {missed['fault']}, by {missed['check']}")
    planted, failed = record["planted"], sum(not test["passed"] for test in record["tests"])
    say(
        f"{len(record['tests']) - failed} of {len(record['tests'])} outcomes within bounds; planted faults caught: "
        f"{planted['caught']} of {planted['tried']}; {record['seconds']:.0f} s"
    )


def _closeness(test: JsonObject) -> float:
    """Return how near an outcome is to its bound; a failure is nearer than all others."""
    if not test["passed"] or test["value"] is None:
        return math.inf
    return float(test["value"] / test["bound"]) if test["bound"] else 0.0


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def table(
    title: str | None, headers: Sequence[str], rows: Sequence[Sequence[str]], *, texts: Sequence[str] = ()
) -> None:
    """Print a table; off a terminal it is as wide as it needs to be.

    Args:
        title: Over it.
        headers: Of the columns; the first is a text, the others are numbers, to the right.
        rows: Of cells.
        texts: Headers of other columns that are texts, to the left.
    """
    grid = Table(title=title, title_justify="left", title_style="", header_style="bold")
    for position, header in enumerate(headers):
        grid.add_column(header, justify="left" if position == 0 or header in texts else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    width = None if sys.stdout.isatty() else 240
    console = Console(width=width, markup=False, highlight=False, emoji=False)
    with console.capture() as text:  # rich itself would end a broken pipe with exit code 1
        console.print(grid)
    click.echo(text.get(), nl=False)


def say(text: str) -> None:
    """Print a line, its control characters escaped."""
    click.echo(printable(text))


def with_interval(values: Mapping[str, object], key: str) -> str:
    """Return ``0.993 [0.978, 0.998]``, or a dash for a metric that does not exist here."""
    value, interval = values[key], values["ci95"][key]  # type: ignore[index]
    return "-" if value is None else f"{value:.4f} {interval_text(interval)}"


def interval_text(bounds: Sequence[float | None], decimals: int = 4) -> str:
    """Return ``[0.978, 0.998]``, with dashes for ends that do not exist."""
    low, high = ("-" if bound is None else f"{bound:.{decimals}f}" for bound in bounds)
    return f"[{low}, {high}]"


def _names(names: Sequence[str] | None) -> str:
    """Return the labels of a conformal set, shortened; a dash where the run is not calibrated."""
    if names is None:
        return "-"
    shown = ", ".join(printable(name) for name in names[:MAX_NAMES])
    return f"{{{shown}{', ...' if len(names) > MAX_NAMES else ''}}}"
