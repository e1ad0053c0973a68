"""Checkpoints: a directory per step with safetensors, JSON and a manifest of hashes, whole or absent.

    step-00001200/tensors.safetensors   every tensor
                  state.json            {"step": 1200, "state": {...}}
                  MANIFEST.json         schema version; size and SHA-256 of the other two; written last

The three files are written into a temporary directory, synced and renamed into place. Loading reads each file once,
compares those bytes with the manifest and decodes the same bytes. Nothing is ever unpickled. The hashes detect damage,
not forgery: for that, compare the digest of the manifest with one that you kept elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from bayesnet import storage, strict_json
from bayesnet.errors import CheckpointError
from bayesnet.types import JsonObject

SCHEMA_VERSION = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "MANIFEST.json"
MAX_TENSORS_BYTES = 8 * 2**30
MAX_HEADER_BYTES = 10_000_000
MAX_MANIFEST_BYTES = 10_000

_LIMITS = {TENSORS: MAX_TENSORS_BYTES, STATE: strict_json.MAX_JSON_BYTES}
_NAME = re.compile(r"step-([0-9]{8,18})(\.old)?")
_DAMAGED = "delete this checkpoint or restore it from a copy"
_RELISTINGS = 5
_LEVELS = 3  # models/NAME/checkpoints


class Checkpoint(NamedTuple):
    """A checkpoint that was verified and read.

    Attributes:
        path: Its directory.
        step: The training step that it was saved after.
        tensors: Name to tensor, on the CPU.
        state: The JSON object that was saved with them.
        digest: SHA-256 of MANIFEST.json, which stands for the whole contents.
    """

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: JsonObject
    digest: str


def save_checkpoint(directory: Path, step: int, tensors: Mapping[str, Tensor], state: JsonObject) -> Path:
    """Write a checkpoint so that a kill at any moment leaves it whole or absent, and the earlier ones as they were.

    A checkpoint of the same step is replaced; at each moment the old or the new one is there and valid.

    Args:
        directory: Where the checkpoints of one model live, ``RUN/models/NAME/checkpoints``. Up to three levels are
            created where missing, not more: a run directory that is deleted while in use must be an error, not be born
            again without its configuration.
        step: Training step, at least 0.
        tensors: Name to dense tensor on any device; no two may share storage.
        state: JSON values; NaN and infinity come back as None, tuples as lists.

    Returns:
        The directory of the new checkpoint.

    Raises:
        StorageError: The file system refused. Earlier checkpoints stand and no temporary file is left.
        ValueError: Tensors share storage or have an unsupported dtype, or a limit or the rules of ``state`` are broken.
    """
    state_bytes = strict_json.json_bytes({"step": step, "state": strict_json.json_ready(state)})
    files = {TENSORS: _serialise(tensors), STATE: state_bytes}
    for name, data in files.items():
        if len(data) > _LIMITS[name]:
            raise ValueError(f"{name} would have {len(data)} bytes, more than {_LIMITS[name]}")
    final = directory / step_name(step)
    temporary = directory / storage.temporary_name()
    with storage.storage_errors("cannot save the checkpoint", final):
        storage.make_directories(directory, levels=_LEVELS)
        try:
            temporary.mkdir()
            for name, data in (*files.items(), (MANIFEST, _manifest(files))):
                storage.write_new(temporary / name, data)
            storage.sync_directory(temporary)
            _publish(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return final


def load_checkpoint(path: Path, *, digest: str | None = None) -> Checkpoint:
    """Verify a checkpoint and read it to the CPU, from the very bytes that were verified.

    Args:
        path: The directory of one checkpoint; ``PATH.old`` is read where a kill while replacing it left only that.
        digest: Expected SHA-256 of MANIFEST.json, to be sure that it is the one that was meant.

    Raises:
        CheckpointError: It is missing, damaged, of a newer schema, too large, or not the one that was meant.
    """
    backup = path.with_name(f"{path.name}.old")
    if not path.exists() and backup.is_dir():
        path = backup
    manifest_bytes = _read_manifest(path)
    found = hashlib.sha256(manifest_bytes).hexdigest()
    if digest is not None and found != digest:
        raise CheckpointError(
            "checkpoint does not match the expected digest", where=path, hint=f"its digest is {found}"
        )
    sizes_and_hashes = _parse_manifest(manifest_bytes, path / MANIFEST)
    data = {name: _read_verified(path / name, *entry) for name, entry in sizes_and_hashes.items()}
    record = strict_json.parse_json(data[STATE], where=path / STATE)
    step, state = record.get("step"), record.get("state")
    if type(step) is not int or step < 0 or not isinstance(state, dict) or len(record) != 2:
        raise CheckpointError("not a checkpoint's state", where=path / STATE, hint=_DAMAGED)
    match = _NAME.fullmatch(path.name)
    if match is not None and int(match[1]) != step:
        raise CheckpointError(f"directory was renamed, it holds step {step}", where=path, hint=_DAMAGED)
    return Checkpoint(path, step, _deserialise(data[TENSORS], path / TENSORS), state, found)


def checkpoint_digest(path: Path) -> str:
    """Return the SHA-256 of a checkpoint's MANIFEST.json, which stands for its whole contents (not verified here).

    Raises:
        CheckpointError: The directory does not hold a checkpoint.
    """
    return hashlib.sha256(_read_manifest(path)).hexdigest()


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoint directories, newest step first, unverified; an empty list where there is no ``directory``.

    ``step-N.old``, which a kill in the middle of replacing step N leaves behind, comes after ``step-N``.

    Raises:
        CheckpointError: ``directory`` cannot be listed.
    """
    found: list[tuple[int, bool, Path]] = []
    with storage.read_errors("cannot list the checkpoints", directory):
        for path in directory.iterdir() if directory.is_dir() else ():
            match = _NAME.fullmatch(path.name)
            if match is not None and path.is_dir() and not path.is_symlink():
                found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def newest_checkpoint(directory: Path) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """Return the newest checkpoint that verifies, and one sentence for each newer one that did not.

    A writer may replace and prune meanwhile: what vanished between listing and reading is listed again.

    Returns:
        The checkpoint, or None where there is none at all; the sentences, newest first.

    Raises:
        CheckpointError: There are checkpoints, but none verifies.
    """
    for _ in range(_RELISTINGS):
        candidates = list_checkpoints(directory)
        rejected: list[str] = []
        for path in candidates:
            try:
                return load_checkpoint(path), tuple(rejected)
            except CheckpointError as error:
                if path.exists():
                    rejected.append(f"passed over {path.name}: {error}")
        if list_checkpoints(directory) == candidates:
            break
    if candidates:
        raise CheckpointError(
            f"none of {len(candidates)} checkpoints is valid", where=directory, hint="; ".join(rejected[:1])
        )
    return None, ()


def prune_checkpoints(directory: Path, keep: Collection[int]) -> None:
    """Delete the checkpoints of all steps but ``keep``, and what dead processes of this host left unfinished.

    A checkpoint is renamed before it is deleted, so that none is ever half there.

    Raises:
        StorageError: The file system refused.
        CheckpointError: ``directory`` cannot be listed.
    """
    with storage.storage_errors("cannot delete old checkpoints", directory):
        for path in list_checkpoints(directory):
            match = _NAME.fullmatch(path.name)
            superseded = path.suffix == ".old" and path.with_suffix("").exists()
            if superseded or match is None or int(match[1]) not in keep:
                _delete(path)
    storage.remove_stale(directory)


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first floating or complex tensor that holds NaN or infinity, or None.

    Example:
        >>> first_non_finite({"step": torch.tensor(3), "weight": torch.tensor([1.0, float("nan")])})
        'weight'
    """
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def verified_tensors(data: bytes, *, sha256: str, where: object) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file, given its bytes and the hash that they must have.

    Args:
        data: Contents of the file.
        sha256: Their expected SHA-256, in hexadecimal.
        where: What to call the file in errors.

    Raises:
        CheckpointError: The bytes are others, or no safetensors.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CheckpointError("SHA-256 differs from the expected one", where=where, hint=f"it is {found}")
    return _deserialise(data, where)


def step_name(step: int) -> str:
    """Return the name of a step's directory.

    Raises:
        ValueError: ``step`` is negative.

    Example:
        >>> step_name(1200)
        'step-00001200'
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, not {step}")
    return f"step-{step:08d}"


def _serialise(tensors: Mapping[str, Tensor]) -> bytes:
    """Return safetensors bytes. They are made before any file is touched, so that a full disk is a plain OSError."""
    owners: dict[tuple[str, int], str] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            place = (str(tensor.device), tensor.untyped_storage().data_ptr())
            if place in owners:
                raise ValueError(f"tensors {owners[place]!r} and {name!r} share storage: clone one of them")
            owners[place] = name
    on_host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        data = safetensors.torch.save(on_host)
        _check_header(data, TENSORS)  # what could not be loaded again must not be saved
    except (KeyError, ValueError, RuntimeError, safetensors.SafetensorError, CheckpointError) as error:
        raise ValueError(f"cannot serialise the tensors: {error}") from error
    return data


def _deserialise(data: bytes, where: object) -> dict[str, Tensor]:
    """Return the tensors; safetensors checks that they tile the file without holes, overlaps or overflow."""
    _check_header(data, where)
    try:
        return safetensors.torch.load(data)
    except MemoryError:
        raise
    except Exception as error:  # the decoder's errors are of many types, none of them documented
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError("not valid safetensors", where=where, hint=reason) from error


def _check_header(data: bytes, where: object) -> None:
    """Refuse a header that is too long, runs over the end, or names a tensor twice (safetensors takes the last)."""
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"header has {length} bytes, more than {MAX_HEADER_BYTES}", where=where)
    if len(data) < 8 + length:
        raise CheckpointError("header is cut off", where=where)
    strict_json.parse_json(data[8 : 8 + length], where=where)


def _manifest(files: Mapping[str, bytes]) -> bytes:
    """Return the bytes of MANIFEST.json for the contents of the other files."""
    entries = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sorted(files.items())
    }
    return strict_json.json_bytes({"schema_version": SCHEMA_VERSION, "files": entries})


def _read_manifest(path: Path) -> bytes:
    """Return MANIFEST.json, having checked that the directory holds the three files and nothing else."""
    with storage.read_errors("cannot open the checkpoint", path):
        if not path.is_dir():
            raise CheckpointError("checkpoint does not exist", where=path)
        with os.scandir(path) as entries:  # lazily: a planted directory may hold millions
            names = {entry.name for entry in itertools.islice(entries, 16)}
    for name in (MANIFEST, STATE, TENSORS):
        if name not in names and len(names) < 16:
            raise CheckpointError(f"{name} is missing", where=path, hint=_DAMAGED)
    for name in sorted(names - {MANIFEST, STATE, TENSORS}):
        raise CheckpointError("unexpected file in a checkpoint", where=path / name, hint="remove it")
    return storage.read_bytes(path / MANIFEST, max_bytes=MAX_MANIFEST_BYTES)


def _parse_manifest(data: bytes, where: Path) -> dict[str, tuple[int, str]]:
    """Return name to (size, SHA-256) for exactly the two expected files."""
    record = strict_json.parse_json(data, where=where)
    version, files = record.get("schema_version"), record.get("files")
    if type(version) is int and version > SCHEMA_VERSION:
        hint = f"upgrade bayesnet: this one reads versions up to {SCHEMA_VERSION}"
        raise CheckpointError(f"checkpoint has the newer schema version {version}", where=where, hint=hint)
    if type(version) is not int or version != SCHEMA_VERSION or not isinstance(files, dict) or len(record) != 2:
        raise CheckpointError("not a manifest", where=where, hint=_DAMAGED)
    if set(files) != set(_LIMITS):
        raise CheckpointError("manifest names other files than a checkpoint has", where=where, hint=_DAMAGED)
    entries = {}
    for name, limit in _LIMITS.items():
        entry = files[name] if isinstance(files[name], dict) else {}
        size, sha256 = entry.get("size"), entry.get("sha256")
        if type(size) is not int or not isinstance(sha256, str) or len(entry) != 2:
            raise CheckpointError(f"manifest entry of {name} is malformed", where=where, hint=_DAMAGED)
        if size > limit:
            raise CheckpointError(f"{name} has {size} bytes, more than {limit}", where=where)
        entries[name] = (size, sha256)
    if strict_json.json_bytes(record) != data:  # one spelling only, so that any changed byte shows
        raise CheckpointError("manifest was edited", where=where, hint=_DAMAGED)
    return entries


def _read_verified(path: Path, size: int, sha256: str) -> bytes:
    """Return the contents after comparing size, before reading, and hash with the manifest's."""
    with storage.read_errors("cannot read the file", path):
        actual = path.lstat().st_size
    if not path.is_symlink() and actual != size:
        raise CheckpointError(f"size differs: {actual} bytes, manifest says {size}", where=path, hint=_DAMAGED)
    data = storage.read_bytes(path, max_bytes=size)
    if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError("SHA-256 differs from the manifest's", where=path, hint=_DAMAGED)
    return data


def _publish(temporary: Path, final: Path) -> None:
    """Rename a finished directory into place; an older one of the same step steps aside first.

    No portable call exchanges two directories. Between the two renames the old one is therefore ``step-N.old``, a name
    that the readers know. If that name is taken, a kill came there earlier and it is itself the fallback.
    """
    backup = final.with_name(f"{final.name}.old")
    aside = final.with_name(storage.temporary_name()) if backup.exists() else backup
    try:
        if final.exists():
            final.rename(aside)
        temporary.rename(final)
    except BaseException:
        if aside.exists() and not final.exists():
            with contextlib.suppress(OSError):  # the reader knows the other name too
                aside.rename(final)
        raise
    storage.sync_directory(final.parent)
    for path in (aside, backup):
        if path.exists():
            with contextlib.suppress(OSError):  # the new one is committed; prune_checkpoints tries again
                _delete(path)


def _delete(path: Path) -> None:
    """Delete a directory under a temporary name, so that a kill leaves no half of it under its own."""
    doomed = path.with_name(storage.temporary_name())
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
