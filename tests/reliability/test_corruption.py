"""Damage and malice in checkpoints: always one CheckpointError, never other contents, never foreign code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from bayesnet import strict_json
from bayesnet.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from bayesnet.errors import CheckpointError

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "MANIFEST.json"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "weight": torch.randn(10, 40, generator=generator),
        "scale": torch.randn(10, generator=generator).to(torch.float16),
        "rng": torch.randint(0, 255, (500,), generator=generator, dtype=torch.uint8),
    }
    state = {"epoch": 3, "classes": [f"class {index}" for index in range(10)], "reports": [[1, 0.5, None]] * 5}
    return save_checkpoint(tmp_path / "checkpoints", 1200, tensors, state)


def refused(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except CheckpointError:
        return True
    return False


def undetected(path: Path, flips: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return those (file, bit) whose flip is not detected."""
    missed = []
    for name, bit in flips:
        with (path / name).open("r+b", buffering=0) as file:
            file.seek(bit // 8)
            [byte] = file.read(1)
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))
            if not refused(path):
                missed.append((name, bit))
            file.seek(bit // 8)
            file.write(bytes([byte]))
    return missed


def bits(path: Path, *names: str) -> list[tuple[str, int]]:
    return [(name, bit) for name in names for bit in range(8 * (path / name).stat().st_size)]


@pytest.mark.parametrize("name", [TENSORS, STATE, MANIFEST])
def test_every_truncation_is_detected(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    for size in reversed(range(len(data))):
        os.truncate(path / name, size)
        assert refused(path), size
    (path / name).write_bytes(data)
    assert load_checkpoint(path).step == 1200


def test_every_flipped_bit_of_the_manifest_is_detected(path: Path) -> None:
    assert undetected(path, bits(path, MANIFEST)) == []


def test_flipped_bits_are_detected(path: Path) -> None:
    assert sum(file.stat().st_size for file in path.iterdir()) <= 16_000
    assert undetected(path, random.Random(0).sample(bits(path, TENSORS, STATE), 2_000)) == []
    assert load_checkpoint(path).step == 1200


@pytest.mark.nightly
def test_every_flipped_bit_is_detected(path: Path) -> None:
    assert undetected(path, bits(path, TENSORS, STATE, MANIFEST)) == []


def test_without_the_hashes_most_flips_would_pass(path: Path) -> None:
    """The control: what the tests above detect is real damage that safetensors itself takes."""
    data, silent = (path / TENSORS).read_bytes(), 0
    for _, bit in random.Random(0).sample(bits(path, TENSORS), 200):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            safetensors.torch.load(bytes(damaged))
            silent += 1
        except (safetensors.SafetensorError, KeyError):
            pass
    assert silent > 100


def forge(path: Path, tensors: bytes | None = None, state: bytes | None = None) -> None:
    """Replace contents and write a manifest that fits them, as somebody with intent would."""
    for name, data in ((TENSORS, tensors), (STATE, state)):
        if data is not None:
            (path / name).write_bytes(data)
    contents = {name: (path / name).read_bytes() for name in (STATE, TENSORS)}
    files = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    (path / MANIFEST).write_bytes(strict_json.json_bytes({"schema_version": 1, "files": files}))


def message(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    return str(caught.value)


def test_the_forger_s_tools_work(path: Path) -> None:
    """The control: an honest file passes `forge`, so the refusals below are about the contents."""
    forge(path, safetensors.torch.save({"w": torch.ones(2)}), b'{"step": 1200, "state": {"forged": true}}')
    loaded = load_checkpoint(path)
    assert isinstance(loaded, Checkpoint)
    assert loaded.state == {"forged": True}


def with_header(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


BAD_TENSORS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header is cut off"),
    "header of 2**63 bytes": (struct.pack("<Q", 2**63) + b"{}", f"header has {2**63} bytes, more than 10000000"),
    "header over the limit": (with_header(b" " * 10_000_001), "header has 10000001 bytes"),
    "header over the end": (struct.pack("<Q", 1000) + b"{}", "header is cut off"),
    "header not JSON": (with_header(b"\x80\x02."), "not valid JSON"),
    "header a bomb": (with_header(b'{"a":' * 1_000_000), "JSON is nested too deeply"),
    "truncated data": (with_header({"a": entry("F32", [2], 0, 8)}, b"\0" * 7), "not valid safetensors"),
    "extra data": (with_header({"a": entry("F32", [2], 0, 8)}, b"\0" * 9), "not valid safetensors"),
    "a hole": (with_header({"a": entry("F32", [2], 4, 12)}, b"\0" * 12), "not valid safetensors"),
    "overlap": (
        with_header({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, b"\0" * 12),
        "not valid safetensors",
    ),
    "alias": (with_header({"a": entry("U8", [8], 0, 8), "b": entry("U8", [8], 0, 8)}, b"\0" * 8), "not valid safe"),
    "overflow": (with_header({"a": entry("F32", [2**62, 4], 0, 16)}, b"\0" * 16), "not valid safetensors"),
    "negative": (with_header({"a": entry("F32", [-1], 0, 4)}, b"\0" * 4), "not valid safetensors"),
    "unknown type": (with_header({"a": entry("F8_E8M0", [4], 0, 4)}, b"\0" * 4), "not valid safetensors"),
    "named twice": (
        with_header(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[0],'
                    b'"data_offsets":[1,1]}}', b"\0"),
        "not valid JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_malformed_safetensors_are_refused(path: Path, name: str) -> None:
    data, expected = BAD_TENSORS[name]
    forge(path, data)
    text = message(path)
    assert text.startswith(expected)
    assert f"({path / TENSORS})" in text


@pytest.mark.parametrize(
    "state",
    [b"[" * 1_000_000, b'{"a":' * 1_000_000, b'{"step": 1200, "state": ' + b'{"a":' * 100 + b"1" + b"}" * 101, b"null"],
)
def test_json_bombs_are_refused(path: Path, state: bytes) -> None:
    forge(path, state=state)
    assert str(path / STATE) in message(path)


def symlinked(path: Path) -> None:
    (path / TENSORS).rename(path.parent / "elsewhere")
    (path / TENSORS).symlink_to(path.parent / "elsewhere")


def piped(path: Path) -> None:
    (path / STATE).unlink()
    os.mkfifo(path / STATE)


def endless(path: Path) -> None:
    (path / MANIFEST).unlink()
    (path / MANIFEST).symlink_to("/dev/zero")


def crowded(path: Path) -> None:
    for index in range(40):
        (path / f"{index}").write_bytes(b"")


def misnamed(path: Path) -> None:
    (path / STATE).rename(path / "STATE.json")


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (symlinked, "is a symbolic link, not a file"),
        (piped, "size differs: 0 bytes"),
        (endless, "is a symbolic link, not a file"),
        (crowded, "unexpected file in a checkpoint"),
        (misnamed, "state.json is missing"),
        (lambda path: (path / "code.py").write_bytes(b""), "unexpected file in a checkpoint"),
        (lambda path: (path / "sub").mkdir(), "unexpected file in a checkpoint"),
    ],
)
def test_planted_files_are_refused(path: Path, plant: Callable[[Path], object], expected: str) -> None:
    plant(path)
    assert message(path).startswith(expected)


def test_paths_in_the_manifest_are_refused_and_not_read(path: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    digest = hashlib.sha256(b"s").hexdigest()
    for name in ("../../secret", str(tmp_path / "secret"), "secret\0", "sub/../state.json"):
        files = {name: {"size": 1, "sha256": digest}, STATE: {"size": 1, "sha256": digest}}
        (path / MANIFEST).write_bytes(strict_json.json_bytes({"schema_version": 1, "files": files}))
        assert message(path).startswith("manifest names other files than a checkpoint has (")


def test_a_pickle_is_never_executed(path: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = b"cposix\nsystem\n(S'touch " + os.fsencode(canary) + b"'\ntR."
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", payload)
        file.writestr("archive/version", "3\n")
    for data in (payload, b"\x80\x02" + payload, archive.getvalue(), with_header(payload), with_header({}, payload)):
        forge(path, tensors=data)
        assert refused(path)
        forge(path, tensors=BAD_TENSORS["empty"][0], state=data)
        assert refused(path)
        (path / MANIFEST).write_bytes(data)
        assert refused(path)
    assert not canary.exists()
    (tmp_path / "payload").write_bytes(payload)
    control = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-I", "-c", control, str(tmp_path / "payload")], check=True, timeout=60)
    assert canary.exists()  # the payload does fire where something unpickles it
