"""What `bayesnet calibrate` prints: both models before and after, what `predict` does from now on, and the answer."""

from __future__ import annotations

from collections.abc import Iterator

from bayesnet.types import JsonObject

from .render import METRICS, interval_text, say, table, with_interval

CORRUPTED = ("accuracy", "nll", "ece")


def print_calibration(record: JsonObject) -> None:
    """Print the tables, what is stored for `predict`, where the report is, and the closing sentence."""
    _print_metrics(record)
    for name, model in record["models"].items():
        for line in _lines(name, model):
            say(line)
    _print_shift(record)
    conformal = record["conformal"]
    asked = f"{100 * (1 - conformal['alpha']):.6g}%"
    say(
        f"label sets ({conformal['method']}) at {asked}: coverage {conformal['coverage']:.3f} (expected "
        f"{interval_text(conformal['coverage_band'])}), {conformal['mean_set_size']:.2f} labels on average"
        + (f"; {conformal['notice']}" if conformal["notice"] else "")
    )
    for what in record["left_out"]:
        say(what)
    say(f"report: {record['report']}")
    say(record["sentence"])


def _print_metrics(record: JsonObject) -> None:
    """Print the metrics of both models on the test split."""
    headers, columns = [""], []
    for name, model in record["models"].items():
        temperature = model["temperature"]
        what = model["calibrator"]["name"] if temperature is None else f"T = {temperature:.3f}"
        headers += [f"{name}, before", f"after ({what})"]
        columns += [model["before"], model["after"]]
    rows = [[label, *(with_interval(column, key) for column in columns)] for key, label in METRICS.items()]
    rows.append(["ECE if perfect", *(interval_text(column["ece_null95"]) for column in columns)])
    table("test split, 95 % intervals in brackets", headers, rows)


def _lines(name: str, model: JsonObject) -> Iterator[str]:
    """Yield what else is to be said of one model."""
    if model["posterior_temperature"] != 1:
        yield f"{name}: posterior temperature {model['posterior_temperature']:g} in training"
    if model["notice"]:
        yield f"{name}: {model['notice']}"
    abstention = model["abstention"]
    if abstention is not None:
        yield f"{name}: {_abstention(abstention)}"


def _abstention(found: JsonObject) -> str:
    """Return what the limit on the risk came to."""
    limit, level, test = found["max_risk"], found["confidence_level"], found["test"]
    if not found["attained"]:
        return f"{found['notice']}"
    risk = "-" if test["risk"] is None else f"{test['risk']:.4f} {interval_text(test['ci95'])}"
    return (
        f"answers where its confidence is at least {found['threshold']:.4f}: at most {100 * limit:g}% of the answers "
        f"are wrong ({level:.0%} confidence); {test['coverage']:.1%} of the test images, risk {risk}"
    )


def _print_shift(record: JsonObject) -> None:
    """Print how well unfamiliar images are told, and what corruption costs."""
    models = record["models"]
    sets = list(next(iter(models.values()))["unfamiliar"])
    rows = [
        [f"{each}: {score}", *(_auroc(model["unfamiliar"][each]["scores"][score]) for model in models.values())]
        for each in sets
        for score in next(iter(models.values()))["unfamiliar"][each]["scores"]
    ]
    if rows:
        described = next(iter(models.values()))["unfamiliar"]
        with_interval = any(found["no_interval"] is None for found in described.values())
        title = "unfamiliar images: AUROC against the test split" + (", 95 % intervals" if with_interval else "")
        table(title, ["", *models], rows)
        for name, found in described.items():
            if found["no_interval"]:
                say(f"{name}: no interval, as {found['no_interval']}")
    tested = {name: model["robustness"] for name, model in models.items() if model["robustness"]}
    if tested:
        severities = range(len(next(iter(tested.values()))["mean"]))
        headers = ["severity", *(f"{name}: {METRICS[key]}" for name in tested for key in CORRUPTED)]
        rows = [
            [str(severity), *(_number(each["mean"][severity][key]) for each in tested.values() for key in CORRUPTED)]
            for severity in severities
        ]
        [count] = {each["num_images"] for each in tested.values()}
        table(f"{count} test images, mean over the corruptions", headers, rows)


def _auroc(found: JsonObject) -> str:
    if found["auroc"] is None:
        return "-"
    ends = "" if found["auroc_ci95"][0] is None else f" {interval_text(found['auroc_ci95'], 3)}"
    return f"{found['auroc']:.3f}{ends}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
