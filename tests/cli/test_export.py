"""`export` as it is typed: what it prints, where it writes, and that nothing needs the run's own directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

RunCli = Callable[..., tuple[int, str, str]]


def test_a_person_is_told_files_differences_and_limits(run_cli: RunCli, calibrated_copy: Path) -> None:
    code, out, err = run_cli("export {run} --format torch", run=calibrated_copy)
    assert (code, err) == (0, "")
    assert "largest difference to predict" in out
    assert str(calibrated_copy / "export" / "model.pt2") in out
    assert "input images: uint8 pixels (N, 1, 8, 8), N from 1 up" in out
    assert "it is no promise about the label" in out
    assert "compared on 64 images (of the test split), in batches of 1, 2, 64" in out
    assert out.splitlines()[-1].endswith("an exported program is a program: run those of people you trust")
    files = {path.name for path in (calibrated_copy / "export").iterdir()}
    assert files == {"README.md", "model.json", "model.pt2"}


def test_another_place_leaves_the_run_alone(
    run_cli: RunCli, workplace: Path, calibrated_run: Path, snapshot: Callable[[Path], dict[str, str]]
) -> None:
    before = snapshot(calibrated_run)
    line = "export {run} --format torch --model deterministic --interval 0.5 --out given --json"
    code, out, _ = run_cli(line, run=calibrated_run)
    record = json.loads(out)
    assert (code, record["model"], record["interval"]["level"]) == (0, "deterministic", 0.5)
    assert record["out"] == str(workplace / "given")
    assert snapshot(calibrated_run) == before
    code, _, _ = run_cli("predict {card} --run {run}", card=workplace / "given", run=calibrated_run)
    assert code == 3, "an export holds no images"
