"""Runs that were damaged or edited: every command that reads them ends with 4 and leaves them as they are.

The hashes of a checkpoint show any changed bit of it; the digest in summary.json shows a checkpoint that was exchanged
for another valid one. Of the other files each is checked for what commands take from it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bayesnet import strict_json

RunCli = Callable[..., tuple[int, str, str]]
Snapshot = Callable[[Path], dict[str, str]]

PREDICT = "predict {run}/examples --run {run}"
COMPARE = "compare {run}"
CALIBRATE = "calibrate {run}"
BENCH = "bench {run} --seconds 0.1"


def checkpoint(run: Path, model: str = "bayesian") -> Path:
    summary = json.loads((run / "summary.json").read_text())
    return run / "models" / model / "checkpoints" / f"step-{summary['models'][model]['step']:08d}"


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file and write it as the library would."""
    record = json.loads(path.read_text())
    change(record)
    path.write_bytes(strict_json.json_bytes(record))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def forge(run: Path) -> None:
    """Change the tensors and make the manifest agree."""
    path = checkpoint(run)
    flip(path / "tensors.safetensors")
    digest = hashlib.sha256((path / "tensors.safetensors").read_bytes()).hexdigest()
    edit(path / "MANIFEST.json", lambda record: record["files"]["tensors.safetensors"].update(sha256=digest))


def exchange(run: Path) -> None:
    """Put the twin's checkpoint, which is valid, in the place of the Bayesian model's."""
    shutil.rmtree(checkpoint(run))
    shutil.copytree(checkpoint(run, "deterministic"), checkpoint(run))


def in_json(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    return lambda run: edit(run / name, change)


def of_model(change: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda record: change(record["models"]["bayesian"])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensors flipped": (lambda run: flip(checkpoint(run) / "tensors.safetensors"), "SHA-256 differs from the manifest"),
    "state flipped": (lambda run: flip(checkpoint(run) / "state.json"), "SHA-256 differs from the manifest"),
    "manifest flipped": (lambda run: flip(checkpoint(run) / "MANIFEST.json"), "does not match the expected digest"),
    "tensors gone": (lambda run: (checkpoint(run) / "tensors.safetensors").unlink(), "tensors.safetensors is missing"),
    "checkpoint forged": (forge, "does not match the expected digest"),
    "checkpoint exchanged": (exchange, "does not match the expected digest"),
    "checkpoint gone": (lambda run: shutil.rmtree(checkpoint(run)), "checkpoint does not exist"),
    "classes swapped": (
        in_json("classes.json", lambda record: record["classes"].reverse()),
        "classes.json differs from",
    ),
    "classes gone": (lambda run: (run / "classes.json").unlink(), "run is incomplete, classes.json is missing"),
    "digest edited": (in_json("summary.json", of_model(lambda m: m.update(digest="0" * 64))), "not match the expected"),
    "step edited": (
        in_json("summary.json", of_model(lambda m: m.update(step=-1))),
        "has no finished bayesian model",
    ),
    "model gone": (in_json("summary.json", lambda record: record.update(models={})), "the run has no trained model"),
    "summary cut": (lambda run: (run / "summary.json").write_text('{"models": {'), "not valid JSON"),
    "summary gone": (lambda run: (run / "summary.json").unlink(), ""),
}
CALIBRATION: dict[str, tuple[Callable[[Any], None], str]] = {
    "digest": (lambda model: model.update(digest="0" * 64), "the calibration belongs to another checkpoint"),
    "no digest": (lambda model: model.pop("digest"), "not a calibration"),
    "no calibrator": (lambda model: model.pop("calibrator"), "not a calibration"),
    "no threshold": (lambda model: model.pop("threshold"), "not a calibration"),
    "other calibrator": (lambda model: model.update(calibrator={"name": "platt"}), "unknown calibrator (platt)"),
    "no parameters": (
        lambda model: model.update(calibrator={"name": "vector"}),
        "vector calibrator has unexpected keys (name)",
    ),
    "zero temperature": (
        lambda model: model.update(calibrator={"name": "temperature", "temperature": 0}),
        "temperature cannot be used (0)",
    ),
    "threshold of 2": (lambda model: model["threshold"].update(threshold=2.0), "conformal threshold cannot be used"),
    "threshold of nothing": (lambda model: model.update(threshold=None), "conformal threshold has other keys"),
    "abstention of 5": (lambda model: model.update(abstention_threshold=5), "abstention threshold has other keys"),
}


def assert_refused(run_cli: RunCli, snapshot: Snapshot, line: str, run: Path, text: str) -> None:
    before = snapshot(run)
    code, out, err = run_cli(line, run=run)
    assert (code, out) == (4, ""), err
    assert err.startswith("bayesnet: error: ")
    assert err.count("\n") == 1
    assert text in err
    assert snapshot(run) == before


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_refused_by_every_command(
    run_cli: RunCli, snapshot: Snapshot, calibrated_copy: Path, name: str
) -> None:
    damage, text = DAMAGES[name]
    damage(calibrated_copy)
    for line in (PREDICT, COMPARE, CALIBRATE, BENCH):
        assert_refused(run_cli, snapshot, line, calibrated_copy, text)


@pytest.mark.parametrize("name", CALIBRATION)
def test_a_damaged_calibration_is_refused_where_it_is_used(
    run_cli: RunCli, snapshot: Snapshot, calibrated_copy: Path, name: str
) -> None:
    change, text = CALIBRATION[name]
    path = calibrated_copy / "calibration.json"
    edit(path, of_model(change))
    for part in (text, str(path)):
        assert_refused(run_cli, snapshot, PREDICT, calibrated_copy, part)


@pytest.mark.parametrize("text", ["", "[]", '{"models": []}', '{"models": {"bayesian": 3}}'])
def test_what_is_no_calibration_is_refused(
    run_cli: RunCli, snapshot: Snapshot, calibrated_copy: Path, text: str
) -> None:
    (calibrated_copy / "calibration.json").write_text(text)
    for line in (PREDICT, COMPARE):
        assert_refused(run_cli, snapshot, line, calibrated_copy, str(calibrated_copy / "calibration.json"))


def test_an_edited_configuration_is_refused_where_it_is_used(
    run_cli: RunCli, snapshot: Snapshot, calibrated_copy: Path
) -> None:
    config = calibrated_copy / "config.toml"
    config.write_text(config.read_text().replace("crop_padding", "crop_paddin"))
    for line in (CALIBRATE, COMPARE, "train --resume {run}"):
        if line.startswith("train"):
            (calibrated_copy / "summary.json").unlink()
        assert_refused(run_cli, snapshot, line, calibrated_copy, "the run's configuration is not valid")


def leaves(record: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:  # noqa: ANN401 - JSON is any
    """Yield the path of every key of nested objects."""
    for key, value in record.items() if isinstance(record, dict) else ():
        yield (*path, key)
        yield from leaves(value, (*path, key))


def test_no_key_missing_from_the_summary_is_a_bug(run_cli: RunCli, calibrated_copy: Path) -> None:
    """Without any one key of summary.json a command works or ends with 4, and never with 1, the code of a bug."""
    path = calibrated_copy / "summary.json"
    whole = path.read_text()
    codes = set()
    for keys in leaves(json.loads(whole)):
        record = json.loads(whole)
        inner = record
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        path.write_text(json.dumps(record))
        for line in (COMPARE, "train --resume {run}"):
            code, _, err = run_cli(line, run=calibrated_copy)
            assert code in (0, 4), (line, keys, err)
            codes.add(code)
    assert codes == {0, 4}
