from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesnet import checkpoint, storage, strict_json
from bayesnet.checkpoint import (
    Checkpoint,
    checkpoint_digest,
    first_non_finite,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    step_name,
)
from bayesnet.errors import CheckpointError, StorageError

STATE = {"epoch": 3, "classes": ["a", "\udcff"], "learning_rate": 0.1}

# Schema version 1 as it was first written: later versions must go on reading it.
GOLDEN = {
    "tensors.safetensors": b"8\x00\x00\x00\x00\x00\x00\x00"
    b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  \x00\x00\x80?\x00\x00\x00\xc0',
    "state.json": b'{\n  "step": 7,\n  "state": {\n    "epoch": 1\n  }\n}\n',
    "MANIFEST.json": b"""{
  "schema_version": 1,
  "files": {
    "state.json": {
      "size": 49,
      "sha256": "1249a9674b888ff7182efa29c18ecdb7a81d37dbc33855da7bb417d5a77a1a7c"
    },
    "tensors.safetensors": {
      "size": 72,
      "sha256": "9c54a301d1883c1238adad7212e1c8b7a0ee5a828aa7b9a5fc5c4b58af05fe54"
    }
  }
}
""",
}


def tensors() -> dict[str, Tensor]:
    return {
        "weight": torch.arange(6.0).reshape(2, 3),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "steps": torch.tensor(12),
        "mask": torch.tensor([True, False]),
        "rng": torch.arange(7, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
    }


def edit_manifest(path: Path, **changes: Any) -> None:  # noqa: ANN401
    record = json.loads((path / "MANIFEST.json").read_bytes())
    (path / "MANIFEST.json").write_bytes(strict_json.json_bytes({**record, **changes}))


def rehash(path: Path, **contents: bytes) -> None:
    """Write files and a manifest that fits them: what a forger would do."""
    for name, data in contents.items():
        (path / name.replace("__", ".")).write_bytes(data)
    names = ("state.json", "tensors.safetensors")
    found = {name: (path / name).read_bytes() for name in names}
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in found.items()}
    edit_manifest(path, files=entries)


def error_of(path: Path, *, digest: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, digest=digest)
    return str(caught.value)


def test_round_trip(tmp_path: Path) -> None:
    saved = tensors()
    path = save_checkpoint(tmp_path / "models" / "bayesian" / "checkpoints", 1200, saved, STATE)
    assert path == tmp_path / "models" / "bayesian" / "checkpoints" / "step-00001200"
    assert {file.name for file in path.iterdir()} == {"tensors.safetensors", "state.json", "MANIFEST.json"}
    loaded = load_checkpoint(path)
    assert isinstance(loaded, Checkpoint)
    assert (loaded.path, loaded.step, loaded.state) == (path, 1200, STATE)
    assert loaded.digest == hashlib.sha256((path / "MANIFEST.json").read_bytes()).hexdigest() == checkpoint_digest(path)
    assert set(loaded.tensors) == set(saved)
    for name, tensor in saved.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)
        loaded.tensors[name].zero_()  # writable, without a warning


def test_schema_version_1_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "step-00000007"
    path.mkdir()
    for name, data in GOLDEN.items():
        (path / name).write_bytes(data)
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.state, loaded.tensors["w"].tolist()) == (7, {"epoch": 1}, [1.0, -2.0])


def test_the_same_contents_have_the_same_digest_and_others_another(tmp_path: Path) -> None:
    digests = [
        checkpoint_digest(save_checkpoint(tmp_path / str(index), step, tensors(), state))
        for index, (step, state) in enumerate([(1, STATE), (1, STATE), (2, STATE), (1, {})])
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_digest_is_checked(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, tensors(), STATE)
    digest = checkpoint_digest(path)
    assert load_checkpoint(path, digest=digest).digest == digest
    assert (
        error_of(path, digest="0" * 64)
        == f"checkpoint does not match the expected digest ({path}): its digest is {digest}"
    )


def test_parameters_and_views_are_saved_contiguous(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    parameter = torch.nn.Parameter(torch.ones(2))
    path = save_checkpoint(tmp_path, 1, {"t": base.T, "p": parameter}, {})
    loaded = load_checkpoint(path).tensors
    assert torch.equal(loaded["t"], base.T)
    assert loaded["t"].is_contiguous()
    assert not loaded["p"].requires_grad


def test_bugs_of_the_caller_are_told_apart_and_write_nothing(tmp_path: Path) -> None:
    base = torch.ones(4)
    with pytest.raises(ValueError, match="tensors 'a' and 'b' share storage: clone one of them"):
        save_checkpoint(tmp_path, 1, {"a": base, "b": base[2:]}, {})
    with pytest.raises(ValueError, match="cannot serialise the tensors"):
        save_checkpoint(tmp_path, 1, {"a": torch.ones(2, dtype=torch.complex128)}, {})
    with pytest.raises(ValueError, match="step must be at least 0, not -1"):
        save_checkpoint(tmp_path, -1, {}, {})
    with pytest.raises(TypeError, match="object has no JSON form"):
        save_checkpoint(tmp_path, 1, {}, {"a": object()})
    with pytest.raises(ValueError, match=r"state.json would have \d+ bytes, more than \d+"):
        save_checkpoint(tmp_path, 1, {}, {"a": "x" * strict_json.MAX_JSON_BYTES})
    assert list(tmp_path.iterdir()) == []


def test_nan_and_tuples_in_the_state_become_null_and_lists(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 0, {}, {"nll": float("nan"), "pair": (1, 2)})
    assert load_checkpoint(path).state == {"nll": None, "pair": [1, 2]}


def test_a_run_directory_that_was_deleted_is_not_born_again(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        save_checkpoint(tmp_path / "run" / "models" / "bayesian" / "checkpoints", 1, tensors(), STATE)
    assert str(caught.value).startswith("cannot save the checkpoint: No such file or directory (")
    assert list(tmp_path.iterdir()) == []


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, {"w": torch.zeros(2)}, {"try": 1})
    path = save_checkpoint(tmp_path, 5, {"w": torch.ones(2)}, {"try": 2})
    assert load_checkpoint(path).state == {"try": 2}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("leftover", ["old only", "both"])
def test_a_kill_while_replacing_leaves_a_readable_step_that_the_next_save_cleans(tmp_path: Path, leftover: str) -> None:
    path = save_checkpoint(tmp_path, 5, {}, {"try": 1})
    backup = path.with_name("step-00000005.old")
    path.rename(backup)
    if leftover == "both":
        save_checkpoint(tmp_path / "elsewhere", 5, {}, {"try": 2}).rename(path)
        (tmp_path / "elsewhere").rmdir()
    expected = {"try": 2 if leftover == "both" else 1}
    assert load_checkpoint(path).state == expected
    newest, rejected = newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.step, newest.state, rejected) == (5, expected, ())
    save_checkpoint(tmp_path, 5, {}, {"try": 3})
    assert load_checkpoint(path).state == {"try": 3}
    assert list(tmp_path.iterdir()) == [path]


def test_first_non_finite_names_the_first() -> None:
    bad = {"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")]), "c": torch.tensor(float("nan"))}
    assert first_non_finite(bad) == "b"
    assert first_non_finite({"c": torch.tensor([complex(0, float("nan"))])}) == "c"
    assert first_non_finite({"h": torch.tensor([float("nan")], dtype=torch.bfloat16)}) == "h"
    assert first_non_finite(tensors()) is None


def test_list_is_newest_first_and_ignores_the_rest(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "missing") == []
    for step in (2, 10, 100_000_000, 1):
        save_checkpoint(tmp_path, step, {}, {})
    (tmp_path / storage.temporary_name()).mkdir()
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-00000099").write_bytes(b"a file")
    (tmp_path / "step-00000098").symlink_to(tmp_path / "step-00000001")
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000010.old")
    names = ["step-100000000", "step-00000010", "step-00000010.old", "step-00000002", "step-00000001"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    assert names[0] == step_name(100_000_000)


def test_newest_falls_back_and_says_so(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == (None, ())
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"w": torch.ones(4)}, {})
    (tmp_path / "step-00000003" / "MANIFEST.json").unlink()
    with (tmp_path / "step-00000002" / "tensors.safetensors").open("ab") as file:
        file.write(b"x")
    newest, rejected = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert len(rejected) == 2
    assert rejected[0] == (
        f"passed over step-00000003: MANIFEST.json is missing ({tmp_path / 'step-00000003'}): "
        "delete this checkpoint or restore it from a copy"
    )
    assert rejected[1].startswith("passed over step-00000002: size differs: ")
    (tmp_path / "step-00000001" / "state.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError) as caught:
        newest_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"none of 3 checkpoints is valid ({tmp_path}): passed over step-00000003: ")


def test_newest_lists_again_when_a_writer_pruned_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, {}, {})
    real, calls = list_checkpoints, []

    def stale_once(directory: Path) -> list[Path]:
        found = real(directory)
        calls.append(found)
        if len(calls) == 1:  # the writer commits step 2 and prunes step 1 right after the reader listed
            save_checkpoint(tmp_path, 2, {}, {})
            shutil.rmtree(tmp_path / "step-00000001")
        return found

    monkeypatch.setattr(checkpoint, "list_checkpoints", stale_once)
    newest, rejected = newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.step, rejected) == (2, ())


def test_newest_says_nothing_of_what_was_pruned_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {}, {})
    listed = list_checkpoints(tmp_path)
    shutil.rmtree(tmp_path / "step-00000002")
    monkeypatch.setattr(checkpoint, "list_checkpoints", lambda directory: listed)
    newest, rejected = newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.step, rejected) == (1, ())


def test_prune_keeps_what_it_is_told_to(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, {}, {})
    shutil.copytree(tmp_path / "step-00000004", tmp_path / "step-00000004.old")
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000002.old")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    prune_checkpoints(tmp_path, keep={2, 4})
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002.old", "step-00000004", "notes.txt"}
    prune_checkpoints(tmp_path / "missing", keep=())


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "newer": ({"schema_version": 2}, "checkpoint has the newer schema version 2 ("),
    "older": ({"schema_version": 0}, "not a manifest ("),
    "bool version": ({"schema_version": True}, "not a manifest ("),
    "no files": ({"files": []}, "not a manifest ("),
    "extra key": ({"note": "x"}, "not a manifest ("),
    "traversal": ({"files": {"../../etc/passwd": {"size": 1, "sha256": "0"}}}, "manifest names other files"),
    "absolute": (
        {"files": {name: {"size": 1, "sha256": "0"} for name in ("/etc/passwd", "state.json", "tensors.safetensors")}},
        "manifest names other files",
    ),
    "entries": ({"files": {"state.json": 1, "tensors.safetensors": {}}}, "manifest entry of tensors.safetensors"),
    "bomb": (
        {"files": {"state.json": {"size": 1, "sha256": "0"}, "tensors.safetensors": {"size": 2**50, "sha256": "0"}}},
        f"tensors.safetensors has {2**50} bytes, more than {2**33}",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_manifests_are_refused(tmp_path: Path, name: str) -> None:
    changes, message = MALFORMED[name]
    path = save_checkpoint(tmp_path, 1, tensors(), STATE)
    edit_manifest(path, **changes)
    assert error_of(path).startswith(message)


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "gone") == f"checkpoint does not exist ({tmp_path / 'gone'})"
    for name in ("MANIFEST.json", "state.json", "tensors.safetensors"):
        path = save_checkpoint(tmp_path, 1, tensors(), STATE)
        (path / name).unlink()
        assert error_of(path).startswith(f"{name} is missing ({path})")
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint_digest(tmp_path)


def test_a_renamed_checkpoint_is_refused_and_a_named_copy_is_not(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, tensors(), STATE)
    shutil.copytree(path, tmp_path / "best")
    assert load_checkpoint(tmp_path / "best").step == 1
    path.rename(tmp_path / "step-00000009")
    assert error_of(tmp_path / "step-00000009").startswith("directory was renamed, it holds step 1 (")


@pytest.mark.parametrize("state", [b"{}", b'{"step": -1, "state": {}}', b'{"step": 1, "state": []}', b"[]", b"\xff"])
def test_a_forged_state_is_refused(tmp_path: Path, state: bytes) -> None:
    path = save_checkpoint(tmp_path, 1, {}, {})
    rehash(path, state__json=state)
    assert str(path / "state.json") in error_of(path)


def test_each_file_is_opened_once_so_the_bytes_used_are_those_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(tmp_path, 1, {"w": torch.ones(2)}, {})
    real, opened = os.open, []

    def recorded(file: Path, *arguments: int) -> int:
        opened.append(file.name)
        return real(file, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", recorded)
        load_checkpoint(path)
    assert sorted(opened) == ["MANIFEST.json", "state.json", "tensors.safetensors"]
