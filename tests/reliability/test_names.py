"""Names from outside never become paths outside."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesnet.checkpoint import load_checkpoint, save_checkpoint
from bayesnet.errors import CheckpointError
from bayesnet.rundir import RunDirectory

HOSTILE = st.sampled_from(
    ["../x", "/tmp/x", "..", ".", "a/../../x", "C:\\x", "\udcff", "con", "x" * 400, "\u202e", "~"]
)
NAMES = st.text(max_size=80) | st.text(alphabet="./\\~ \0\n-a", max_size=20) | HOSTILE


@settings(max_examples=100, deadline=None)
@given(label=NAMES, model=NAMES, tensor=st.text(max_size=40) | st.sampled_from(["../x", "/tmp/x", "a/../../x"]))
def test_no_name_writes_outside_the_run(label: str, model: str, tensor: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        sandbox = Path(temporary)
        root = sandbox / "inner" / "runs"
        run = RunDirectory.create(None, label, root)
        assert run.path.parent == root
        assert run.path.name.isascii()
        assert run.path.name.isprintable()
        assert len(run.path.name) <= 100
        try:
            directory = run.model_checkpoints(model)
        except CheckpointError:
            directory = run.model_checkpoints("bayesian")
        path = save_checkpoint(directory, 1, {tensor: torch.ones(1)}, {"class": model})
        loaded = load_checkpoint(path)
        assert list(loaded.tensors) == [tensor]
        assert loaded.state == {"class": model}
        files = {Path(folder) / name for folder, _, names in os.walk(sandbox) for name in names}
        assert len(files) == 4
        assert all(file.parent in (run.path, path) for file in files)
