"""Weights and pickles that somebody made to do harm: nothing in them is run, changed or believed."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesnet import weights
from bayesnet.errors import CheckpointError, DataError

Entry = tuple[bytes, int, int, int]
"""Name, CRC, size and offset of an entry of a zip archive."""

LARGE = 2**22


def archive(body: bytes, entries: list[Entry]) -> bytes:
    """Return a zip archive: a body, and a list of what is in it."""
    table = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\1\2", *[0] * 6, crc, size, size, len(name), *[0] * 5, offset) + name
        for name, crc, size, offset in entries
    )
    num = len(entries)
    return body + table + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, num, num, len(table), len(body), 0)


def saved(*, shared: bool) -> tuple[bytes, list[Entry]]:
    """Return three tensors of 4 MiB as torch saves them: body and list; with ``shared``, of one tensor's bytes."""
    buffer = io.BytesIO()
    torch.save({f"k{number}": torch.zeros(LARGE // 4) for number in range(3)}, buffer)
    data, body, entries = buffer.getvalue(), b"", []
    with zipfile.ZipFile(buffer) as whole:
        found = whole.infolist()
    places: list[int] = []
    for entry in found:
        name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
        place = len(body)
        if entry.file_size == LARGE:
            places.append(place)
        if shared and places and entry.file_size == LARGE and place != places[0]:
            place = places[0]
        else:
            body += data[entry.header_offset :][: 30 + name + extra + entry.file_size]
        entries.append((entry.filename.encode(), entry.CRC, entry.file_size, place))
    assert len(places) == 3
    return body, entries


def test_archives_that_hold_more_than_their_bytes(tmp_path: Path) -> None:
    body, entries = saved(shared=False)
    path = tmp_path / "w.pth"
    path.write_bytes(archive(body, entries))
    assert len(weights.read_state_dict(path)) == 3  # such an archive is read where it is an honest one
    overlapping = archive(*saved(shared=True))
    assert len(overlapping) < 2 * LARGE
    cases = {
        "overlapping": overlapping,
        "twice": archive(body, [*entries, entries[0]]),
        "comment": archive(body, entries)[:-2] + b"\x05\x00hello",
        "another list": archive(body, entries) + archive(b"", entries),
    }
    what = "entries of the archive overlap, or are not listed as torch.save lists them"
    for name, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            weights.read_state_dict(path)
        assert str(caught.value) == f"{what} ({path})", name


def test_a_second_list_that_only_some_readers_find(tmp_path: Path) -> None:
    """Two records of the end: the pointer to one leads elsewhere than the place where Python looks for it."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer)
    data = bytearray(buffer.getvalue())
    assert data[-42:-38] == b"PK\6\7"  # torch writes the long form
    [pointer] = struct.unpack_from("<Q", data, len(data) - 34)
    assert data[pointer : pointer + 4] == b"PK\6\6"
    struct.pack_into("<Q", data, len(data) - 34, 0)
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"^entries of the archive overlap, or are not listed"):
        weights.read_state_dict(tmp_path / "w.pth")


def short(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def pickled(kind: str) -> bytes:
    """Return a pickle of a few bytes for which torch would allocate a gigabyte or more."""
    if kind == "bytes":
        made = b"cbuiltins\nbytearray\nJ" + struct.pack("<i", 2**30) + b"\x85R"
    elif kind == "text":
        made = b"c_codecs\nencode\n" + short("a") + short("latin1") + b"\x86R"
        for _ in range(30):  # twice as many bytes each time
            made = b"c_codecs\nencode\n" + made + short("hex") + b"\x86R"
    else:
        storage = b"(" + short("storage") + b"ctorch\nFloatStorage\n" + short("0") + short("cpu") + b"K\x01tQ"
        view = (
            b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00J" + struct.pack("<i", 2**28) + b"\x85K\x00\x85"
        )
        view += b"\x89ccollections\nOrderedDict\n)RtR"
        made = b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n(" + view
        made += b"ctorch\nfloat64\n" + short("cpu") + b"\x89tR"
    return b"\x80\x02}" + short("x") + made + b"s."


@pytest.mark.parametrize("kind", ["bytes", "text", "device"])
def test_a_few_bytes_that_would_be_a_gigabyte(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as whole:
        whole.writestr("archive/data.pkl", pickled(kind))
        whole.writestr("archive/version", "3\n")
        whole.writestr("archive/data/0", bytes(4))
    (tmp_path / "w.pth").write_bytes(buffer.getvalue())
    monkeypatch.setattr(torch, "load", None)  # it is not asked
    with pytest.raises(CheckpointError) as caught:
        weights.read_state_dict(tmp_path / "w.pth")
    path = tmp_path / "w.pth"
    assert str(caught.value) == f"holds bytes or tensors of another device ({path}): save weights alone"


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
UINT8 = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def array(shape: bytes, data: bytes, dtype: bytes = UINT8) -> bytes:
    """Return the opcodes with which Python 2 pickles an array."""
    return RECONSTRUCT + b"(K\x01(" + shape + b"t" + dtype + b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"


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


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


ENCODE = b"c_codecs\nencode\n"
DTYPE = b"cnumpy\ndtype\n"
# An `encode` that always gives "M8[s]" by its defaults, and a dtype that has it as its method.
DEFAULTS = ENCODE + b"N}" + text("__defaults__") + text("M8[s]") + text("latin1") + b"\x86s\x86b"
NO_TYPE = DTYPE + b"}" + text("resolve") + DEFAULTS + b"sb"


@pytest.mark.parametrize(
    "data",
    {
        "defaults of a function": DEFAULTS + b".",
        "a method of a type": DTYPE + b"}" + text("resolve") + ENCODE + b"sb.",
        "a type that is none": array(b"K\x01", b"12345678", NO_TYPE) + b".",
        "a state without slots": DTYPE + b"N}" + text("x") + b"K\x01s\x86b.",
        "a function as a type": array(b"K\x01", b"a", DTYPE) + b".",
        "a text as a type": array(b"K\x01", b"a", text("u1")) + b".",
        "attributes of an array": RECONSTRUCT + b"}" + text("array") + b"K\x01sb.",
        "attributes of a type": UINT8 + b"N}" + text("_code") + text("O") + b"s\x86b.",
        "a call of a type": UINT8 + b"(tR.",
        "a call of an array": RECONSTRUCT + b"(tR.",
        "too many arguments": ENCODE + b"(" + text("a") + text("latin1") * 2 + b"tR.",
        "no text": ENCODE + b"(](tR.",
    }.values(),
)
def test_nothing_can_be_changed_or_called(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^not a pickle of arrays"):
        weights.read_arrays(b"\x80\x03" + data)


@pytest.mark.parametrize("code", ["M8[s]", "m8", "c16", "U4", "S3", "O", "V8", "i3", "f2", ">i4"])
def test_only_plain_numbers_come_out(code: str) -> None:
    dtype = DTYPE + text(code) + b"K\x00K\x01\x87R"
    with pytest.raises(DataError, match="only numbers are read"):
        weights.read_arrays(b"\x80\x03" + array(b"K\x01", b"12345678", dtype) + b".")


def test_frames_of_newer_protocols_are_passed_over() -> None:
    assert weights.read_arrays(b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"](K\x01K\x02e.") == [1, 2]


def test_many_small_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights._Opcodes, "_left", 1000)
    assert weights.read_arrays(b"](" + b"K\x01" * 400 + b"e.") == [1] * 400
    for data in (b"]" * 1001 + b".", b"\x80\x04\x95" + struct.pack("<Q", 2000) + b"}" * 2000 + b"."):
        with pytest.raises(DataError, match=r"^not a pickle of arrays \(.* opcodes\): it holds too many objects$"):
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
