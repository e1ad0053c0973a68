"""Every family on one data set: metrics against the twin over seeds, posterior temperatures, and the cost of a step.

    python benchmarks/families.py --seeds 5 --out benchmarks/results
    python benchmarks/families.py --worker 0/2 ...      (half of the jobs; another process does the other half)

Each job is one `bayesnet train` with the family's recipe on the same splits. For families that have a posterior
temperature it is 1 unless another of --temperatures has a lower validation NLL by more than its error over the seeds;
the table gives the test NLL at each. Jobs are kept in --work, one JSON file each: an interrupted run goes on. With
--smoke, three families, one epoch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import bayesnet
from bayesnet.metrics.resampling import t_interval
from bayesnet.settings import resolve_settings

TWIN = "deterministic"
TEMPERED = ("mean_field", "matrix_normal", "low_rank", "full_rank", "vbll", "mean_field_all")
METRICS = ("accuracy", "nll", "brier", "ece", "validation_nll", "seconds", "posterior_temperature", "facts")


class Job(NamedTuple):
    """One training run."""

    family: str
    temperature: float
    seed: int

    @property
    def name(self) -> str:
        """What its file is called."""
        return f"{self.family}-T{self.temperature:g}-seed{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="digits", help="a data set with recipes")
    parser.add_argument("--families", default=",".join(name for name in bayesnet.FAMILIES if name != "guide"))
    parser.add_argument("--temperatures", default="1,0.3,0.1")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", dest="overrides")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--worker", default="0/1", help="I/N: do every Nth job, from the Ith")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bayesnet-families")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.seeds, arguments.overrides = 1, [*arguments.overrides, "training.epochs=1"]
        arguments.families, arguments.temperatures = "deterministic,vbll,laplace", "1"
        arguments.work = Path(tempfile.mkdtemp())
    families = arguments.families.split(",")
    temperatures = [float(text) for text in arguments.temperatures.split(",")]
    jobs = [
        Job(family, temperature, seed)
        for seed in range(arguments.seeds)
        for family in families
        for temperature in temperatures_of(family, arguments.data, temperatures)
    ]
    arguments.work.mkdir(parents=True, exist_ok=True)
    position, count = (int(part) for part in arguments.worker.split("/"))
    for job in jobs[position::count]:
        record = run(job, arguments)
        print(f"{job.name}: accuracy {record['accuracy']:.4f} NLL {record['nll']:.4f}", file=sys.stderr, flush=True)
    for family in [each for each in families if each != TWIN][position::count]:
        bench(family, arguments)
    if all((arguments.work / f"{job.name}.json").exists() for job in jobs):
        write(arguments, {job: run(job, arguments) for job in jobs}, families)


def temperatures_of(family: str, data: str, asked: Sequence[float]) -> Sequence[float]:
    """Return those that a family is trained at: what is asked, or 1 and its recipe's own where that has one."""
    if family not in TEMPERED:
        return (1.0,)
    own = resolve_settings(data=data, family=family).training.temperature
    return asked if own == 1 else (1.0, own)


def run(job: Job, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train once, or read what was found before."""
    path = arguments.work / f"{job.name}.json"
    if not path.exists():
        tempered = [f"training.temperature={job.temperature:g}"] if job.family in TEMPERED else []
        with tempfile.TemporaryDirectory() as folder:
            summary = bayesnet.train(
                data=arguments.data,
                family=job.family,
                seed=job.seed,
                overrides=["training.twin=false", *tempered, *arguments.overrides],
                out=Path(folder) / "run",
            )
        [model] = summary["models"].values()
        path.write_text(json.dumps({key: model[key] for key in METRICS} | {"data": summary["data"]}), encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def bench(family: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the rows that `bayesnet bench` gives for a run of one epoch, or what was measured before."""
    path = arguments.work / f"bench-{family}.json"
    if not path.exists():
        short = ["training.epochs=1", "inference.warmup=10", "inference.draws=10", "inference.max_draws=16"]
        overrides = [*arguments.overrides, *(short if family == "nuts" else short[:1])]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            bayesnet.train(data=arguments.data, family=family, overrides=overrides, out=out)
            record = bayesnet.bench(out, devices="cpu", seconds=0.1 if arguments.smoke else 2.0)
        path.write_text(json.dumps({"rows": record["rows"], "control": record["control"]}), encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def interval(differences: Sequence[float]) -> str:
    """Return the mean with its 95 % t interval over seeds."""
    mean, (low, high) = statistics.mean(differences), t_interval(differences)
    return f"{mean:+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if len(differences) > 1 else "")


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def against_one(records: dict[Job, dict[str, Any]], family: str, temperature: float, metric: str) -> list[float]:
    """Return a metric at a temperature less that at 1, seed by seed."""
    seeds = [job.seed for job in records if job.family == family and job.temperature == temperature]
    return [records[Job(family, temperature, seed)][metric] - records[Job(family, 1.0, seed)][metric] for seed in seeds]


def chosen_temperature(records: dict[Job, dict[str, Any]], family: str) -> float:
    """Return 1, or the temperature with the lowest mean validation NLL that is below that at 1 beyond its interval.

    At 1 the posterior is the one that the model states: it is left only for what validation shows beyond its error.
    """
    shown = {1.0: 0.0}
    for temperature in {job.temperature for job in records if job.family == family} - {1.0}:
        differences = against_one(records, family, temperature, "validation_nll")
        if t_interval(differences)[1] < 0:
            shown[temperature] = statistics.mean(differences)
    return min(shown, key=lambda temperature: shown[temperature])


def row(records: dict[Job, dict[str, Any]], family: str, arguments: argparse.Namespace) -> str:
    """Return a family's line of the table."""
    seeds, best = range(arguments.seeds), chosen_temperature(records, family)
    at_one = [records[Job(family, 1.0, seed)] for seed in seeds]
    at_best = [records[Job(family, best, seed)] for seed in seeds]
    others = sorted({job.temperature for job in records if job.family == family} - {1.0})
    tried = [(each, [records[Job(family, each, seed)]["nll"] for seed in seeds]) for each in others]
    twin = [records[Job(TWIN, 1.0, seed)]["nll"] for seed in seeds]
    difference = interval([record["nll"] - nll for record, nll in zip(at_best, twin, strict=True)])
    cells = [
        spread([record["accuracy"] for record in at_best]),
        spread([record["nll"] for record in at_one]),
        "; ".join(f"{each:g}: {spread(values)}" for each, values in tried),
        "; ".join(interval(against_one(records, family, each, "validation_nll")) for each in others),
        f"{best:g}",
        "" if family == TWIN else difference,
        "1" if family == TWIN else step_ratio(family, arguments),
    ]
    return f"| `{family}` | " + " | ".join(cells) + " |"


def step_ratio(family: str, arguments: argparse.Namespace) -> str:
    """Return the cost of a training step over the twin's, with its interval."""
    [found] = [
        entry
        for entry in bench(family, arguments)["rows"]
        if entry["phase"] == "train" and entry["model"] == "bayesian"
    ]
    low, high = found["ratio_ci95"]
    return f"{found['ratio_to_deterministic']:.2f} [{low:.2f}, {high:.2f}]"


def write(arguments: argparse.Namespace, records: dict[Job, dict[str, Any]], families: Sequence[str]) -> None:
    """Write the JSON and the Markdown file."""
    environment = bayesnet.doctor()
    command = "python benchmarks/families.py " + " ".join(sys.argv[1:])
    device = next(iter(environment["devices"]))
    data = next(iter(records.values()))["data"]
    stem = f"families-{arguments.data}_{device}_{date.today():%Y-%m-%d}"
    lines = [
        f"# Every family on {arguments.data}: {arguments.seeds} seeds, the same splits",
        "",
        f"{data['num_train']} training, {data['num_validation']} validation and {data['num_test']} test images. Mean ± "
        "standard deviation over seeds; differences are paired by seed, with 95 % t intervals over seeds (same test "
        "images: they speak of these images). T is the posterior temperature: 1 unless another of "
        f"{arguments.temperatures} (or the recipe's own) has a lower validation NLL beyond that interval. Accuracy and "
        "the difference of test NLL to the twin are those at T. The last column is the time of a training step over "
        "the twin's, interleaved, with the 95 % interval over rounds.",
        "",
        "| family | accuracy | NLL, T = 1 | NLL at other T | validation NLL there less T = 1 | T | NLL - twin | step |",
        "|---|---|---|---|---|---|---|---|",
        *(row(records, family, arguments) for family in families),
        "",
        f"Command: `{command}`. {environment['devices'][device]}, {environment['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        + ".",
        "",
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    environment.pop("checks")  # they name this machine's folders
    content = {
        "command": command,
        "environment": environment,
        "runs": [job._asdict() | record for job, record in records.items()],
        "bench": {family: bench(family, arguments) for family in families if family != TWIN},
    }
    (arguments.out / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (arguments.out / f"{stem}.md").write_text("\n".join(lines), encoding="utf-8")
    print(arguments.out / f"{stem}.md")


if __name__ == "__main__":
    main()
