"""kill -9 at random moments of continuous saving: the newest valid checkpoint is the last one committed, or the next.

A correct saver never fails here (false-alarm rate 0). A saver that is unsafe during a fraction f of its time escapes n
kills with probability (1 - f)**n: 15 kills catch f = 0.19, 150 catch f = 0.02, with 95 %.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bayesnet import storage
from bayesnet.checkpoint import newest_checkpoint, prune_checkpoints, save_checkpoint
from bayesnet.errors import CheckpointError

Save = Callable[[Path, int], None]
Start = Callable[[Callable[[], object]], int]
Kill = Callable[[int], None]
KillWhileSaving = Callable[[Path, Save, int, float], int]
NUM_VALUES = 100_000  # 400 kB


def save_steps(directory: Path, count: int) -> None:
    save_checkpoint(directory, count, {"w": torch.full((NUM_VALUES,), float(count))}, {"count": count})
    prune_checkpoints(directory, keep={count - 1, count})


def save_one_step_again(directory: Path, count: int) -> None:
    save_checkpoint(directory, 7, {"w": torch.full((NUM_VALUES,), float(count))}, {"count": count})


def save_in_place(directory: Path, count: int) -> None:
    """The planted bug: remove the old one, then move a new one there file by file."""
    save_checkpoint(directory / "new", 7, {"w": torch.full((NUM_VALUES,), float(count))}, {"count": count})
    shutil.rmtree(directory / "step-00000007", ignore_errors=True)
    (directory / "step-00000007").mkdir()
    for path in (directory / "new" / "step-00000007").iterdir():
        storage.write_bytes(directory / "step-00000007" / path.name, path.read_bytes())


@pytest.fixture
def kill_while_saving(start: Start, kill: Kill) -> KillWhileSaving:
    """Give a function that saves with counts from ``first`` on in a child, kills it after ``delay`` seconds, and
    returns the last count that was committed.
    """

    def run(directory: Path, save: Save, first: int, delay: float) -> int:
        reader, writer = os.pipe()

        def work() -> None:
            for count in range(first, first + 100_000):
                save(directory, count)
                os.write(writer, b"%d\n" % count)

        pid = start(work)
        os.close(writer)
        time.sleep(delay)
        kill(pid)
        with os.fdopen(reader, "rb") as file:
            return max([int(line) for line in file], default=first - 1)

    return run


def outcomes(directory: Path, save: Save, num_kills: int, kill_while_saving: KillWhileSaving) -> tuple[int, int, int]:
    """Return how many of ``num_kills`` kills lost the checkpoint, hit a save, and how many saves were committed."""
    save(directory, 0)
    generator, count, lost, hits = random.Random(0), 0, 0, 0
    for _ in range(num_kills):
        last = kill_while_saving(directory, save, count + 1, generator.uniform(0.005, 0.08))
        hits += any(path.name.startswith(".tmp-") for path in directory.rglob("*"))
        try:
            newest, rejected = newest_checkpoint(directory)
            if newest is None:
                raise CheckpointError("there is none at all", where=directory)
            count = newest.state["count"]
            assert torch.equal(newest.tensors["w"], torch.full((NUM_VALUES,), float(count)))
            lost += count not in (last, last + 1) or rejected != ()
        except CheckpointError:
            lost += 1
            count = last + 1
        prune_checkpoints(directory, keep=[*range(count - 1, count + 1), 7])
        assert not list(directory.glob(".tmp-*"))  # the dead child's leavings
    return lost, hits, count


@pytest.mark.parametrize("save", [save_steps, save_one_step_again])
@pytest.mark.parametrize("num_kills", [15, pytest.param(150, marks=pytest.mark.nightly)], ids=["15 kills", "150 kills"])
def test_no_kill_loses_a_checkpoint(
    tmp_path: Path, kill_while_saving: KillWhileSaving, save: Save, num_kills: int
) -> None:
    lost, hits, count = outcomes(tmp_path, save, num_kills, kill_while_saving)
    assert lost == 0
    assert hits > 0  # the kills did hit saves
    assert count > 0  # and saves did go through


def test_the_kills_catch_a_saver_that_is_not_atomic(tmp_path: Path, kill_while_saving: KillWhileSaving) -> None:
    lost, _, _ = outcomes(tmp_path, save_in_place, 15, kill_while_saving)
    assert lost > 0


def test_no_kill_tears_the_metrics(tmp_path: Path, kill_while_saving: KillWhileSaving) -> None:
    path, last = tmp_path / "metrics.jsonl", 0
    generator = random.Random(0)

    def append(_: Path, count: int) -> None:
        storage.append_line(path, {"count": count, "text": "x" * 20_000})

    for _ in range(8):
        last = kill_while_saving(tmp_path, append, last + 1, generator.uniform(0.005, 0.04))
        counts = [line["count"] for line in storage.read_lines(path)] if path.exists() else []
        assert counts == list(range(1, len(counts) + 1))
        assert len(counts) in (last, last + 1)
        last = len(counts)
    assert last > 0
