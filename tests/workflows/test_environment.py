"""`doctor`: what this machine is, and what would stop a training run on it."""

from __future__ import annotations

import os
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from bayesnet.engine import available_devices
from bayesnet.errors import StorageError
from bayesnet.workflows import doctor
from bayesnet.workflows.environment import environment, versions

NAMES = ["packages", "python", "recipes", "arithmetic", "disk", "runs"]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current directory on a disk with room."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**12, 0, 10**12))


def failed(name: str) -> tuple[str, str, int]:
    """Return what was found, the advice and the exit code of the only check that fails."""
    record = doctor()
    assert record["ok"] is False
    [check] = [check for check in record["checks"] if not check["ok"]]
    assert check["name"] == name
    return check["found"], check["advice"], check["exit_code"]


def test_a_healthy_machine(tmp_path: Path) -> None:
    record = doctor()
    assert record["ok"] is True
    assert [check["name"] for check in record["checks"]] == NAMES
    assert all(check["ok"] is True and check["advice"] == "" and check["found"] for check in record["checks"])
    assert list(tmp_path.iterdir()) == []


def test_the_environment_names_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hunter2")
    record = environment()
    assert list(record["devices"]) == list(available_devices())
    assert record["versions"]["torch"] == metadata.version("torch")
    assert record["cpus"] == os.cpu_count()
    assert "hunter2" not in repr(record)
    assert "MY_TOKEN" not in repr(record)


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesnet.workflows.environment.PACKAGES", ("torch", "no-such-package"))
    assert versions()["no-such-package"] == "not installed"
    assert failed("packages") == ("no-such-package", "install bayesnet with pip", 2)


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**12, 10**12, 5 * 10**8))
    assert failed("disk") == ("0.5 GB free here", "free some space", 6)


def test_a_folder_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise StorageError("cannot write the file: Read-only file system", where=path.parent)

    monkeypatch.setattr("bayesnet.storage.write_bytes", refuse)
    found, advice, code = failed("runs")
    assert found == "cannot write the file: Read-only file system (.)"
    assert (advice, code) == ("change to a directory that you may write to", 6)


def test_a_device_that_does_not_calculate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesnet.workflows.environment.available_devices", lambda: ("meta", "cpu"))
    found, advice, code = failed("arithmetic")
    assert found.startswith("meta: ")
    assert (advice, code) == ("reinstall torch for this machine", 5)


def test_runs_are_probed_where_they_go(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    check = doctor()["checks"][-1]
    assert check["found"] == f"can write to {tmp_path / 'runs'}"
    assert list((tmp_path / "runs").iterdir()) == []
