"""The door for what others made: weights are tensors alone, and no pickle runs anything."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from bayesnet import download, weights
from bayesnet.errors import CheckpointError, DataError

Serve = Callable[[dict[str, bytes]], list[str]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Give a function that puts files on a pretended network and returns the list of what is then asked for."""

    def start(files: dict[str, bytes]) -> list[str]:
        asked: list[str] = []

        def open_url(url: str) -> IO[bytes]:
            asked.append(url)
            if url not in files:
                raise urllib.error.URLError("Name or service not known")
            return io.BytesIO(files[url])

        monkeypatch.setattr(download, "_open_url", open_url)
        return asked

    return start


def state_dict() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 2, 2, generator=generator).transpose(0, 1),
        "bn.num_batches_tracked": torch.tensor(7),
        "half": torch.ones(2, dtype=torch.float16),
    }


def assert_same(found: dict[str, Tensor]) -> None:
    expected = state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert found[name].is_contiguous()
        assert not found[name].requires_grad


@pytest.mark.parametrize("wrapping", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("is_zip", [True, False])
def test_state_dicts_of_torch(tmp_path: Path, wrapping: str | None, prefix: str, is_zip: bool) -> None:
    held: object = {f"{prefix}{name}": nn.Parameter(t) if t.dim() == 4 else t for name, t in state_dict().items()}
    if wrapping is not None:
        held = {"epoch": 3, wrapping: held}
    torch.save(held, tmp_path / "w.pth", _use_new_zipfile_serialization=is_zip)
    assert_same(weights.read_state_dict(tmp_path / "w.pth"))


def test_safetensors_and_links(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in state_dict().items()}
    (tmp_path / "w.safetensors").write_bytes(safetensors.torch.save(tensors))
    (tmp_path / "link").symlink_to(tmp_path / "w.safetensors")
    assert_same(weights.read_state_dict(tmp_path / "link"))


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_with_a_command_runs_nothing(tmp_path: Path, is_zip: bool) -> None:
    canary, path = tmp_path / "canary", tmp_path / "w.pth"
    torch.save({"state_dict": state_dict(), "x": Evil(canary)}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError) as caught:
        weights.read_state_dict(path)
    hint = "it must be safetensors, or a state dict that torch.save wrote"
    assert str(caught.value) == f"not a file of weights ({path}): {hint}"
    assert not canary.exists()
    function, arguments = Evil(canary).__reduce__()
    function(*arguments)  # the canary can sing
    assert canary.exists()


def no_weights() -> dict[str, tuple[object, str]]:
    return {
        "whole model": (nn.Linear(2, 2), "not a file of weights"),
        "list": ([torch.ones(2)], "not a state dict"),
        "empty": ({}, "not a state dict"),
        "number": ({"a": torch.ones(2), "b": 3}, "entry of the state dict is not a dense tensor"),
        "key": ({3: torch.ones(2)}, "entry of the state dict is not a dense tensor"),
        "sparse": ({"a": torch.ones(2, 2).to_sparse()}, "entry of the state dict is not a dense tensor"),
        "bomb": ({"a": torch.zeros(1).expand(2**40)}, "weights have 4398046511104 bytes, more than"),
    }


@pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")
@pytest.mark.parametrize("kind", no_weights())
def test_what_holds_no_weights(tmp_path: Path, kind: str) -> None:
    held, message = no_weights()[kind]
    torch.save(held, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        weights.read_state_dict(tmp_path / "w.pth")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    named_twice = (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    )
    cases = {
        b"": "not a file of weights",
        b"hello": "not a file of weights",
        whole[: len(whole) // 2]: "not a file of weights",
        packed.getvalue(): "archive is compressed",
        len(named_twice).to_bytes(8, "little") + named_twice: "not valid JSON",
        (2**40).to_bytes(8, "little") + b"{}": "header of the safetensors file is too long or cut off",
        (2).to_bytes(8, "little") + b"{}trailing": "not valid safetensors",
    }
    for data, message in cases.items():
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            weights.read_state_dict(tmp_path / "bad")
        assert str(caught.value).startswith(message)
    with pytest.raises(CheckpointError, match="file is missing"):
        weights.read_state_dict(tmp_path / "none")
    with pytest.raises(CheckpointError, match="not a regular file"):
        weights.read_state_dict(tmp_path)


@pytest.fixture
def published(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], str]:
    """Put weights on the pretended network; give what is asked for and their hash."""
    monkeypatch.setenv("BAYESNET_CACHE", str(tmp_path / "cache"))
    buffer = io.BytesIO()
    torch.save(state_dict(), buffer)
    return serve({"https://example.org/net.pth": buffer.getvalue()}), hashlib.sha256(buffer.getvalue()).hexdigest()


def test_published_weights_are_fetched_and_converted_once(tmp_path: Path, published: tuple[list[str], str]) -> None:
    asked, sha256 = published
    folder = tmp_path / "cache" / "weights"
    for _ in range(2):
        assert_same(weights.pretrained("https://example.org/net.pth", sha256=sha256[:8], name="net"))
        assert sorted(path.name for path in folder.iterdir()) == ["net.json", "net.pth", "net.safetensors"]
    (folder / "net.pth").unlink()  # it is not looked at again
    assert_same(weights.pretrained("https://example.org/net.pth", sha256=sha256, name="net"))
    assert asked == ["https://example.org/net.pth"]


def test_damaged_and_changed_weights(tmp_path: Path, published: tuple[list[str], str]) -> None:
    _, sha256 = published
    url = "https://example.org/net.pth"
    weights.pretrained(url, sha256=sha256, name="net")
    with pytest.raises(CheckpointError, match="the file is not the one that is expected"):
        weights.pretrained(url, sha256="0" * 64, name="net")
    with pytest.raises(CheckpointError, match="cannot download the file: Name or service not known"):
        weights.pretrained("https://example.org/other.pth", sha256=sha256, name="net")
    path = tmp_path / "cache" / "weights" / "net.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"SHA-256 differs from the recorded one \(.*net.safetensors\): delete it"
    ):
        weights.pretrained(url, sha256=sha256, name="net")
    path.unlink()
    assert_same(weights.pretrained(url, sha256=sha256, name="net"))
    with pytest.raises(ValueError, match="not a plain file name"):
        weights.pretrained(url, sha256=sha256, name="../net")


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
UINT8 = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
# What Python 3 writes in protocol 2 for np.array([[1, 2], [3, 200]], dtype="<i2", order="F").
FORTRAN = (
    b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85c_codecs\nencode\n"
    b"X\x01\x00\x00\x00bX\x06\x00\x00\x00latin1\x86R\x87R(K\x01K\x02K\x02\x86cnumpy\ndtype\nX\x02\x00\x00\x00i2\x89\x88"
    b"\x87R(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x88"
    b"c_codecs\nencode\nX\x09\x00\x00\x00\x01\x00\x03\x00\x02\x00\xc3\x88\x00X\x06\x00\x00\x00latin1\x86Rtb."
)


def array(shape: bytes, data: bytes, dtype: bytes = UINT8) -> bytes:
    """Return the opcodes with which Python 2 pickles an array."""
    return RECONSTRUCT + b"(K\x01(" + shape + b"t" + dtype + b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"


def test_arrays_of_python_2() -> None:
    batch = (
        b"\x80\x02}(U\x04data" + array(b"K\x02K\x03", b"abcdef") + b"U\x06labels](K\x05K\x07e"
        b"U\x05names(U\x01xG?\xe0\x00\x00\x00\x00\x00\x00N\x88tu."
    )
    found = weights.read_arrays(batch)
    assert isinstance(found, dict)
    assert {key: value for key, value in found.items() if key != b"data"} == {
        b"labels": [5, 7],
        b"names": (b"x", 0.5, None, True),
    }
    assert np.array_equal(found[b"data"], np.frombuffer(b"abcdef", np.uint8).reshape(2, 3))


def test_arrays_of_python_3_in_columns() -> None:
    found = weights.read_arrays(FORTRAN)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.dtype("<i2")
    assert found.tolist() == [[1, 2], [3, 200]]


def command(canary: Path) -> dict[str, bytes]:
    text = f"'touch {canary}'".encode()
    python = f'\'open("{canary}", "w")\''.encode()
    unicode = f"touch {canary}".encode()
    short = b"\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(unicode)]) + unicode + b"\x85R."
    return {
        "os.system": b"cos\nsystem\n(S" + text + b"\ntR.",
        "posix.system": b"cposix\nsystem\n(S" + text + b"\ntR.",
        "__builtin__.eval": b"c__builtin__\neval\n(S" + python + b"\ntR.",
        "builtins.exec": b"cbuiltins\nexec\n(S" + python + b"\ntR.",
        "builtins.getattr": b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
        "os.system ": b"\x80\x04" + short,
        "numpy.load": b"cnumpy\nload\n(S" + text + b"\ntR.",
        "numpy.ndarray.tofile": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        "numpy.core.multiarray._reconstruct.__globals__": (
            b"\x80\x04\x8c\x15numpy.core.multiarray\x8c\x18_reconstruct.__globals__\x93."
        ),
        "builtins.bytearray": b"cbuiltins\nbytearray\n(I1\ntR.",
        "subprocess.Popen": b"csubprocess\nPopen\n(S" + text + b"\ntR.",
    }


@pytest.mark.parametrize("name", command(Path("x")))
def test_a_pickle_that_names_a_function_runs_nothing(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(DataError) as caught:
        weights.read_arrays(command(canary)[name])
    hint = "it names something that is no array"
    assert str(caught.value) == f"not a pickle of arrays ({name.strip()}): {hint}"
    assert not canary.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"(S'touch /tmp/x'\nios\nsystem\n.",  # INST
        b"(cnumpy\nndarray\no.",  # OBJ
        b"\x80\x02cnumpy\nndarray\n)\x81.",  # NEWOBJ
        b"\x80\x04cnumpy\nndarray\n)}\x92.",  # NEWOBJ_EX
        b"Pid\n.",
        b"S'id'\nQ.",  # BINPERSID
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b".",  # BYTEARRAY8 of a petabyte
        b"\x80\x05\x97.",  # NEXT_BUFFER
        RECONSTRUCT + b".",  # an array that got no bytes
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR.",
        b"cnumpy\ndtype\n.",
        b"cnumpy\ndtype\n(U\x01OK\x00K\x01tR.",
        b"cnumpy\ndtype\n(U\x03V16K\x00K\x01tR.",
        b"cnumpy\nndarray\n}S'a'\nI1\nsb.",
        b"cnumpy\ndtype\n}S'__code__'\nI1\nsb.",
        b"c_codecs\nencode\n(VS'a'\nS'rot13'\ntR.",
        array(b"K\x02K\x04", b"abcdef") + b".",
        array(b"J\xff\xff\xff\xffK\x03", b"abcdef") + b".",
        array(b"K\x06", b"abcdef", UINT8.replace(b"NNN", b"NN}")) + b".",
        b"(" * 20 + b"l" * 20 + b".",
        b"\x80\x02]\x94h\x00a.",
        b"",
        b".",
        b"I1",
        b"\xff\xff",
    ],
)
def test_other_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^(not a pickle of arrays|pickle is nested too deeply)"):
        weights.read_arrays(data)


def test_stated_sizes_allocate_nothing() -> None:
    # Index 2**31 - 1 of the memo, and an array of a shape that no memory holds, made without its bytes.
    assert weights.read_arrays(b"\x80\x02K\x05r\xff\xff\xff\x7f.") == 5
    huge = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(\x8a\x06" + b"\xff" * 5 + b"\x00tU\x01btR"
    whole = huge + array(b"K\x01", b"a").removeprefix(RECONSTRUCT) + b"."
    assert np.array_equal(weights.read_arrays(whole), [97])  # type: ignore[arg-type]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_ARRAYS_BYTES", 100)
    with pytest.raises(DataError, match=r"^pickle has 101 bytes, more than 100$"):
        weights.read_arrays(b"0" * 101)
    # One text of 30 letters, kept and encoded again and again: three times are 90 bytes, four are too many.
    first = b"]c_codecs\nencode\nq\x00(X\x1e\x00\x00\x00" + b"a" * 30 + b"U\x06latin1tq\x01Ra"
    again = b"h\x00h\x01Ra"
    assert weights.read_arrays(first + 2 * again + b".") == [b"a" * 30] * 3
    with pytest.raises(DataError, match="only latin1 is encoded, of the size that a pickle may have"):
        weights.read_arrays(first + 3 * again + b".")
