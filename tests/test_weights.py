"""The door for what others made: weights are tensors alone, and no pickle runs anything."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from bayesnet import storage, weights
from bayesnet.errors import CheckpointError

Serve = Callable[[dict[str, bytes]], list[str]]


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


LARGE = torch.zeros(2**18)


def no_weights() -> dict[str, tuple[object, str]]:
    return {
        "whole model": (nn.Linear(2, 2), "not a file of weights"),
        "list": ([torch.ones(2)], "not a state dict"),
        "empty": ({}, "not a state dict"),
        "number": ({"a": torch.ones(2), "b": 3}, "entry of the state dict is not a dense tensor"),
        "key": ({3: torch.ones(2)}, "entry of the state dict is not a dense tensor"),
        "sparse": ({"a": torch.ones(2, 2).to_sparse()}, "entry of the state dict is not a dense tensor"),
        "bomb": (
            {"a": torch.zeros(1).expand(2**40)},
            "weights have 4398046511104 bytes, more than the file, which has",
        ),
        "small bomb": (
            {"a": torch.zeros(1).expand(2**19)},
            "weights have 2097152 bytes, more than the file, which has",
        ),
        "many views": (
            {str(n): torch.zeros(2**16).view(-1) for n in range(2)} | dict.fromkeys("abcdef", LARGE),
            "weights",
        ),
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


def test_small_views_and_ties_get_memory_of_their_own(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    held = {"whole": whole, "tied": whole, "row": whole.view(3, 4)[1], "spread": whole[:1].expand(5)}
    torch.save(held, tmp_path / "w.pth")
    found = weights.read_state_dict(tmp_path / "w.pth")
    assert all(torch.equal(found[name], tensor) for name, tensor in held.items())
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 4
    assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in found.values())


def test_plain_weights_are_not_copied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and its tensors are in memory, nothing third."""
    torch.save({"a": torch.ones(3, 4), "b": torch.ones(5)}, tmp_path / "w.pth")

    def refuse(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("a copy")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", refuse)
        assert weights.read_state_dict(tmp_path / "w.pth").keys() == {"a", "b"}
        torch.save({"a": torch.ones(3, 4).T}, tmp_path / "w.pth")
        with pytest.raises(AssertionError, match="a copy"):
            weights.read_state_dict(tmp_path / "w.pth")


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


def test_what_is_hashed_is_what_is_parsed(
    tmp_path: Path, published: tuple[list[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody puts another file in the place of the download as soon as it has been checked."""
    _, sha256 = published
    fetch = weights.fetch

    def fetch_and_swap(url: str, folder: Path, *, sha256: str, error: type[CheckpointError]) -> object:
        fetched = fetch(url, folder, sha256=sha256, error=error)
        torch.save({"conv.weight": torch.zeros(1)}, folder / "net.pth")
        return fetched

    monkeypatch.setattr(weights, "fetch", fetch_and_swap)
    for _ in range(2):  # parsed, and from the copy
        assert_same(weights.pretrained("https://example.org/net.pth", sha256=sha256, name="net"))
    record = storage.read_json(tmp_path / "cache" / "weights" / "net.json")
    assert record["source_sha256"] == sha256


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
