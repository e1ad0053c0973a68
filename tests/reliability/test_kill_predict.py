"""kill -9 at random moments of `predict --out`: going on, killed again and again, gives the uninterrupted file.

A correct writer never fails here (false-alarm rate 0). One that loses or repeats a line in a fraction f of the moments
escapes n kills with probability (1 - f)**n: 50 kills catch f = 0.06 with 95 %.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bayesnet.data import DataConfig, load_data
from bayesnet.data.images import write_png
from bayesnet.workflows import ImageClassifier, continue_predictions, predict_to_file, prediction_file
from bayesnet.workflows.prediction_file import Done
from bayesnet.workflows.prediction_rows import RowFormat

Start = Callable[[Callable[[], object]], int]
Kill = Callable[[int], None]
Join = Callable[[int], int]
NUM_KILLS = 50
NUM_IMAGES = 160


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Give images, each listed several times."""
    folder, data = tmp_path_factory.mktemp("images"), load_data(DataConfig())
    paths = [folder / f"{index:03d}.png" for index in range(NUM_IMAGES)]
    for index, path in enumerate(paths):
        write_png(path, data.test.read([index])[0])
    return paths * 4


def survives(
    start: Start, kill: Kill, join: Join, run: Path, images: list[Path], folder: Path, *, num_kills: int, seed: int
) -> int:
    """Kill writers until that many died, each file going on until it is whole; return how many files are wrong."""

    def begin(out: Path) -> Callable[[], object]:
        return lambda: predict_to_file(images, out, ImageClassifier(run, devices="cpu"), format="jsonl")

    def go_on(out: Path) -> Callable[[], object]:
        return lambda: continue_predictions(out, devices="cpu")

    whole = folder / "whole.jsonl"
    started = time.monotonic()
    assert join(start(begin(whole))) == 0
    longest = time.monotonic() - started
    moments = random.Random(seed)
    killed, wrong, number = 0, 0, 0
    while killed < num_kills:
        out = folder / f"{number}.jsonl"
        number += 1
        for _ in range(3):
            fresh = not out.with_name(f"{out.name}.unfinished").exists()
            if fresh and out.exists():
                break
            pid = start(begin(out) if fresh else go_on(out))
            time.sleep(moments.uniform(0, longest))
            kill(pid)
            killed += 1
        if out.with_name(f"{out.name}.unfinished").exists():
            if join(start(go_on(out))) != 0:  # it found that the file is not as it was written
                wrong += 1
                continue
        elif not out.exists():
            continue
        wrong += out.read_bytes() != whole.read_bytes()
    return wrong


@pytest.mark.slow
def test_going_on_after_kills(
    start: Start, kill: Kill, join: Join, calibrated_run: Path, images: list[Path], tmp_path: Path
) -> None:
    assert survives(start, kill, join, calibrated_run, images, tmp_path, num_kills=NUM_KILLS, seed=0) == 0


@pytest.mark.slow
def test_a_writer_that_loses_a_line_is_caught(
    start: Start,
    kill: Kill,
    join: Join,
    calibrated_run: Path,
    images: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planted bug: the image whose line a kill kept from the file is taken for done."""
    keep = prediction_file._keep_complete_lines

    def keep_and_lose(out: Path, rows: RowFormat, paths: Iterator[str]) -> Done:
        done = keep(out, rows, paths)
        if done.num_rows:
            next(paths, None)
        return done

    monkeypatch.setattr(prediction_file, "_keep_complete_lines", keep_and_lose)
    assert survives(start, kill, join, calibrated_run, images, tmp_path, num_kills=12, seed=0) > 0
