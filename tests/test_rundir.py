from __future__ import annotations

import os
import platform
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bayesnet import locking, rundir, storage
from bayesnet.checkpoint import save_checkpoint
from bayesnet.errors import BusyError, CheckpointError, ConfigError, StorageError
from bayesnet.rundir import RunDirectory, find_run, slug

NOON = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "_now", lambda: NOON)


def finished_run(root: Path, name: str, finished_at: object) -> RunDirectory:
    run = RunDirectory.create(root / name, "")
    run.write_text("config.toml", "")
    run.write_json("summary.json", {"finished": True, "finished_at": finished_at})
    return run


def test_the_files_have_their_documented_names(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    paths = (run.config, run.environment, run.classes, run.metrics, run.summary, run.calibration, run.log)
    others = (run.posterior, run.predictions, run.report, run.plots, run.model_checkpoints("bayesian"))
    assert [str(path.relative_to(tmp_path)) for path in (*paths, *others)] == [
        *("config.toml", "environment.json", "classes.json", "metrics.jsonl", "summary.json", "calibration.json"),
        *("log.txt", "posterior.nc", "predictions.jsonl", "report.html", "plots", "models/bayesian/checkpoints"),
    ]


def test_create_names_the_run_after_time_and_label(tmp_path: Path, frozen: None) -> None:
    root = tmp_path / "deep" / "runs"
    run = RunDirectory.create(None, "digits-mean_field", root)
    assert run.path == root / f"{NOON.astimezone():%Y-%m-%d-%H%M%S}-digits-mean_field"
    assert run.path.is_dir()


def test_runs_of_the_same_second_get_different_names(tmp_path: Path, frozen: None) -> None:
    paths = [RunDirectory.create(None, "digits", tmp_path).path for _ in range(20)]
    assert len(set(paths)) == 20
    assert all(path.name.startswith(paths[0].name) for path in paths)


def test_create_takes_a_new_or_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert RunDirectory.create(out, "ignored").path == out


def test_create_refuses_a_directory_with_files(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        RunDirectory.create(tmp_path, "digits")
    assert str(caught.value) == (
        f"output directory is not empty ({tmp_path}): choose another --out, or go on with --resume {tmp_path}"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_create_on_a_run_says_whether_it_is_busy_or_just_there(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    with pytest.raises(BusyError, match="another process is starting a run in the directory"):
        RunDirectory.create(run.path, "")
    run.write_text("config.toml", "")
    with pytest.raises(ConfigError, match="output directory is not empty"):
        RunDirectory.create(run.path, "")
    with run.lock(), pytest.raises(BusyError, match=f"in use by process {os.getpid()}"):
        RunDirectory.create(run.path, "")


def test_create_loses_to_a_start_between_its_look_and_its_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = storage.write_new

    def second(path: Path, data: bytes) -> None:
        real(path, b"{}")  # the other process claims first
        real(path, data)

    monkeypatch.setattr(storage, "write_new", second)
    with pytest.raises(BusyError, match="another process is starting a run in the directory"):
        RunDirectory.create(tmp_path / "run", "")
    assert (tmp_path / "run" / ".lock").read_bytes() == b"{}"


def test_create_reports_what_the_file_system_refuses_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(StorageError, match="cannot create the run directory: "):
            RunDirectory.create(out, "")

    def read_only(*_: object) -> int:
        raise OSError(30, os.strerror(30))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", read_only)
        for out_or_none in (tmp_path / "a" / "b", None):
            with pytest.raises(StorageError) as caught:
                RunDirectory.create(out_or_none, "digits", tmp_path / "runs")
            assert str(caught.value) == (
                f"cannot create the run directory: Read-only file system ({out_or_none or tmp_path / 'runs'}): "
                "choose a directory that you may write to"
            )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_create_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(StorageError, match="Permission denied"):
        RunDirectory.create(tmp_path / "run", "")


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        RunDirectory.open(tmp_path / "gone")
    assert str(caught.value) == (f"run directory does not exist ({tmp_path / 'gone'}): make one with `bayesnet train`")
    with pytest.raises(CheckpointError, match="not a run directory, it has no config"):
        RunDirectory.open(tmp_path)
    with pytest.raises(CheckpointError, match="File name too long"):
        RunDirectory.open(tmp_path / ("x" * 300))
    (tmp_path / "config.toml").write_bytes(b"")
    assert RunDirectory.open(tmp_path).path == tmp_path


def test_json_and_metrics_round_trip(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    run.write_json("classes.json", {"names": ["a", "\udcff"]})
    run.write_text("log.txt", "caf\u00e9 \udcff\n")
    run.append_metrics({"epoch": 1})
    run.append_metrics({"epoch": 2})
    assert run.read_json("classes.json") == {"names": ["a", "\udcff"]}
    assert run.log.read_text("utf-8") == "caf\u00e9 \\udcff\n"
    assert run.read_metrics() == [{"epoch": 1}, {"epoch": 2}]


def test_a_missing_file_says_that_the_run_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        RunDirectory(tmp_path).read_json("classes.json")
    assert str(caught.value) == (
        f"run is incomplete, classes.json is missing ({tmp_path}): "
        "train the run again, or go on with `bayesnet train --resume`"
    )


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".lock", "/etc/passwd"])
def test_file_names_stay_in_the_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a file name of a run"):
        RunDirectory(tmp_path).write_json(name, {})


def test_planted_links_do_not_lead_out(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    (tmp_path / "outside").mkdir()
    (run.path / "models").symlink_to(tmp_path / "outside")
    (run.path / "plots").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="a link leads out of the run directory"):
        run.model_checkpoints("bayesian")
    with pytest.raises(CheckpointError, match="a link leads out of the run directory"):
        _ = run.plots
    run.path.joinpath(".lock").unlink()
    run.path.joinpath(".lock").symlink_to(tmp_path / "outside" / "file")
    with pytest.raises(StorageError, match="cannot lock the run directory"), run.lock():
        pass
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_run_may_lie_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    run = RunDirectory.create(None, "digits", tmp_path / "runs")
    assert run.model_checkpoints("bayesian").is_relative_to(run.path)


def test_finish_makes_a_run_findable(tmp_path: Path, frozen: None) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    run.write_text("config.toml", "")
    assert not run.is_finished
    with pytest.raises(CheckpointError) as caught:
        find_run(None, tmp_path)
    assert str(caught.value) == f"there is no finished run ({tmp_path}): make one with `bayesnet train`"
    run.finish({"accuracy": 0.9, "finished": False})
    assert RunDirectory.open(run.path).is_finished
    assert run.read_summary() == {"accuracy": 0.9, "finished": True, "finished_at": NOON.isoformat()}
    assert find_run(None, tmp_path).path == run.path


def test_find_run_takes_the_newest_finished_one(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with pytest.raises(CheckpointError, match="there is no finished run"):
        find_run(None, root)
    finished_run(root, "z-early", "2026-11-23T10:00:00+00:00")
    finished_run(root, "a-late", "2026-11-23T09:30:00-05:00")  # 14:30 UTC: text order would be wrong
    finished_run(root, "b-tie", "2026-11-23T14:30:00")
    finished_run(root, "z-broken-time", "yesterday")
    finished_run(root, "z-no-time", None)
    finished_run(root, "z-damaged", "2027-01-01T00:00:00").summary.write_bytes(b"{")
    finished_run(root, "z-unfinished", "2027-01-01T00:00:00").write_json("summary.json", {"finished": "yes"})
    (root / "notes.txt").write_bytes(b"")
    assert find_run(None, root).path.name == "b-tie"
    assert find_run(root / "z-early").path.name == "z-early"
    assert find_run(str(root / "z-early")).path.name == "z-early"
    with pytest.raises(CheckpointError, match="does not exist"):
        find_run(root / "gone")


def test_a_damaged_summary_is_an_error_where_the_run_was_named(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "run", None)
    run.summary.write_bytes(b"{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        _ = run.is_finished


@pytest.mark.parametrize("has_flock", [True, False])
def test_the_lock_is_exclusive_and_reusable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_flock: bool) -> None:
    monkeypatch.setattr(locking, "_HAS_FLOCK", has_flock)
    run = RunDirectory.create(tmp_path / "run", "")
    with run.lock():
        with pytest.raises(BusyError) as caught, RunDirectory(run.path).lock():
            pass
        who = f"process {os.getpid()} on {platform.node()}"
        assert str(caught.value).startswith(f"run directory is in use by {who} ({run.path}): wait for it")
    with run.lock():
        pass
    with pytest.raises(RuntimeError, match="inside"), run.lock():
        raise RuntimeError("inside")
    with run.lock():
        pass


def test_a_file_system_without_flock_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    run = RunDirectory.create(tmp_path / "run", "")
    with run.lock():
        held = run.path / ".lock-held"
        with pytest.raises(BusyError, match=f"wait for it; if it is dead, delete {held}"), run.lock():
            pass
    assert not held.exists()


@pytest.mark.parametrize("owner", [b"", b"[" * 900, b'{"pid": "\x1b[31m"}', b"\xff"])
def test_a_strange_lock_file_still_gives_one_line(tmp_path: Path, owner: bytes) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    with run.lock():
        (run.path / ".lock").write_bytes(owner)
        with pytest.raises(BusyError, match="run directory is in use by another process"), run.lock():
            pass


def test_the_lock_notices_that_the_directory_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    real = os.open

    def replaced_after_opening(path: Path, *arguments: int) -> int:
        descriptor = real(path, *arguments)
        path.rename(tmp_path / "old-lock")
        path.write_bytes(b"")
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", replaced_after_opening)
        with pytest.raises(BusyError, match="was replaced while it was being locked"), run.lock():
            pass


def test_locking_a_deleted_run_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot lock the run directory: No such file"):
        RunDirectory(tmp_path / "gone").lock().__enter__()


def test_discard_removes_a_failed_start(tmp_path: Path) -> None:
    run = RunDirectory.create(None, "digits", tmp_path / "a" / "runs")
    with run.lock():
        run.write_text("config.toml", "")
        run.write_json("environment.json", {})
        run.append_metrics({"epoch": 1})
        run.model_checkpoints("bayesian").mkdir(parents=True)
        assert run.discard()
    assert list(tmp_path.iterdir()) == []


def test_discard_spares_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run = RunDirectory.create(tmp_path / "out", "")
    run.write_text("config.toml", "")
    (run.path / "mine.txt").write_bytes(b"")
    assert run.discard()
    assert [path.name for path in run.path.iterdir()] == ["mine.txt"]

    kept = RunDirectory.create(tmp_path / "kept", "")
    kept.write_text("config.toml", "")
    assert not RunDirectory.open(kept.path).discard()
    save_checkpoint(kept.model_checkpoints("bayesian"), 1, {}, {})
    assert not kept.discard()
    assert kept.config.exists()


def test_the_lock_clears_what_a_killed_process_left(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    run = RunDirectory.create(tmp_path / "run", "")
    stale = run.path / storage.temporary_name().replace(f"-{os.getpid()}-", f"-{child}-")
    stale.write_bytes(b"")
    with run.lock():
        assert not stale.exists()


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("digits-mean_field", "digits-mean_field"),
        ("../../etc/passwd", "etc-passwd"),
        ("/absolute", "absolute"),
        ("caf\u00e9 \u4e2d", "cafe"),
        ("\x00\n\x1b[31m", "31m"),
        ("", "run"),
        ("..", "run"),
        ("-rf", "rf"),
        ("x" * 300, "x" * 60),
    ],
)
def test_slug(label: str, expected: str) -> None:
    assert slug(label) == expected
