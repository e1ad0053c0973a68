"""The one door for what others made: downloads, weights that `torch.save` wrote, and arrays in pickles.

A download is taken over https only and checked against a pinned SHA-256; the bytes that were hashed are those that are
parsed. Weights are read once by the restricted loader of torch and then kept as safetensors. Pickled arrays are read by
an unpickler that calls nothing: it knows four names and builds arrays itself. Nowhere else in the library is anything
unpickled. What comes out of a file of weights has no more bytes than the file; torch's loader may use more meanwhile.
"""

from __future__ import annotations

import enum
import hashlib
import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesnet import storage
from bayesnet.download import Fetched, cache_folder, fetch, plain_name
from bayesnet.errors import BayesnetError, CheckpointError, DataError
from bayesnet.strict_json import parse_json

__all__ = ["Fetched", "cache_folder", "fetch", "pretrained", "read_arrays", "read_state_dict"]

MAX_WEIGHTS_BYTES = 8 * 2**30
MAX_ARRAYS_BYTES = 2**28
MAX_HEADER_BYTES = 10_000_000
MAX_OPCODE_BYTES = 2**21
MAX_REPEATED_BYTES = 2**20

_MAX_DEPTH = 8
_WRAPPINGS = ("state_dict", "model_state_dict", "model")
_PREFIX = "module."
# What makes objects, refers to something outside, or allocates what a pickle states.
_REFUSED = (
    pickle.INST + pickle.OBJ + pickle.NEWOBJ + pickle.NEWOBJ_EX + pickle.EXT1 + pickle.EXT2 + pickle.EXT4
    + pickle.PERSID + pickle.BINPERSID + pickle.BYTEARRAY8 + pickle.NEXT_BUFFER + pickle.READONLY_BUFFER
)  # fmt: skip
_SCALARS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8")
# What torch's loader would call, and what makes something of any size out of a few bytes; no weights need it.
_ALLOCATING = (b"\nbytearray\n", b"\n_rebuild_device_tensor_from_", b"c_codecs\nencode\n")
_ZIP_END, _ZIP64_END, _ZIP64_LOCATOR = b"PK\5\6", b"PK\6\6", b"PK\6\7"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the weights in a file by name, on the CPU; no code in it is run.

    The file is safetensors, or a state dict that `torch.save` wrote: a dictionary of dense tensors, by itself or as the
    entry ``state_dict``, ``model_state_dict`` or ``model`` of another dictionary, whose other entries are ignored. If
    all names begin with ``module.``, which data-parallel training puts there, that is taken off.

    Reading an honest file takes up to twice its size in memory.

    Args:
        path: The file; a link to it will do.

    Raises:
        CheckpointError: It is missing, larger than 8 GiB, or anything else, such as a whole pickled model; or its
            tensors have together more bytes than the file, as tensors that repeat the same numbers do.
    """
    try:
        data = storage.read_bytes(path.resolve(), max_bytes=MAX_WEIGHTS_BYTES)
    except RuntimeError as error:  # a loop of links
        raise CheckpointError("cannot read the file: too many links", where=path) from error
    return _state_dict(data, path)


def pretrained(url: str, *, sha256: str, name: str) -> dict[str, Tensor]:
    """Return published weights, from the cache once they have been fetched.

    The file is fetched into ``cache_folder()/weights`` and read once; what it holds is written beside it as
    ``NAME.safetensors``, with ``NAME.json`` that records both full hashes, and is read from there afterwards.

    Args:
        url: Where they are published, https only.
        sha256: The pinned hash of the published file, as `fetch` takes it.
        name: What to call them in the cache, such as ``resnet18-imagenet``.

    Raises:
        CheckpointError: They cannot be had, are not the pinned ones, or the copy in the cache is damaged.
        StorageError: The cache cannot be written.
        ValueError: ``name`` or ``sha256`` is malformed.
    """
    folder = cache_folder() / "weights"
    converted = folder / f"{plain_name(name)}.safetensors"
    record_path = folder / f"{name}.json"
    if converted.exists() and record_path.exists():
        record = storage.read_json(record_path)
        if record.get("url") == url and str(record.get("source_sha256")).startswith(sha256):
            data = storage.read_bytes(converted, max_bytes=MAX_WEIGHTS_BYTES)
            if hashlib.sha256(data).hexdigest() != record.get("sha256"):
                raise CheckpointError("SHA-256 differs from the recorded one", where=converted, hint="delete it")
            return _from_safetensors(data, converted)
    source = fetch(url, folder, sha256=sha256, error=CheckpointError)
    hashes = {"source_sha256": source.sha256}
    tensors = _state_dict(source.data, source.path)
    del source  # its bytes, before as many are made for the copy
    data = safetensors.torch.save(tensors)
    hashes["sha256"] = hashlib.sha256(data).hexdigest()
    storage.write_bytes(converted, data)
    storage.write_json(record_path, {"url": url, **hashes})  # last: without it the conversion does not count
    return tensors


def read_arrays(data: bytes) -> object:
    r"""Return what a pickle of plain NumPy arrays, numbers, strings and containers holds; it can call nothing.

    Text that Python 2 pickled comes back as bytes, and arrays are read-only views of ``data``'s contents.

    Args:
        data: The pickle, at most 256 MiB.

    Raises:
        DataError: It names anything but a NumPy array (such as a function), is damaged, too large or too deep.

    Example:
        >>> read_arrays(b"(lp0\nI1\naI2\na.")
        [1, 2]
        >>> read_arrays(b"cos\nsystem\n(S'ls'\ntR.")
        Traceback (most recent call last):
        bayesnet.errors.DataError: not a pickle of arrays (os.system): it names something that is no array
    """
    if len(data) > MAX_ARRAYS_BYTES:
        raise DataError(f"pickle has {len(data)} bytes, more than {MAX_ARRAYS_BYTES}")
    try:
        return _plain(_ArrayUnpickler(data).load(), {}, _MAX_DEPTH)
    except (MemoryError, BayesnetError):
        raise
    except Exception as error:  # damaged opcodes end in errors of any type
        raise DataError("not a pickle of arrays", hint=f"{type(error).__name__}: {error}") from error


def _state_dict(data: bytes, where: Path) -> dict[str, Tensor]:
    """Return the weights in the contents of a file."""
    tensors = _from_safetensors(data, where) if data[8:9] == b"{" else _from_torch(data, where)
    if tensors and all(name.startswith(_PREFIX) for name in tensors):
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    return tensors


def _from_safetensors(data: bytes, where: Path) -> dict[str, Tensor]:
    """Return the tensors, sorted by name; the header must name none twice (safetensors takes the last)."""
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES or len(data) < 8 + length:
        raise CheckpointError("header of the safetensors file is too long or cut off", where=where)
    parse_json(data[8 : 8 + length], where=where)
    try:
        return dict(sorted(safetensors.torch.load(data).items()))  # it gives them in a random order
    except MemoryError:
        raise
    except Exception as error:  # the decoder's errors are of many types, none of them documented
        raise CheckpointError("not valid safetensors", where=where, hint=f"{type(error).__name__}: {error}") from error


def _from_torch(data: bytes, where: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict."""
    try:
        if data[:4] == b"PK\x03\x04":
            _check_archive(data, where)
        if any(name in data for name in _ALLOCATING):
            raise CheckpointError("holds bytes or tensors of another device", where=where, hint="save weights alone")
        with warnings.catch_warnings():  # of a protocol that torch does not write: what matters is whether it reads it
            warnings.simplefilter("ignore")
            loaded: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:  # as above
        hint = "it must be safetensors, or a state dict that torch.save wrote"
        raise CheckpointError("not a file of weights", where=where, hint=hint) from error
    return _tensors_of(loaded, len(data), where)


def _check_archive(data: bytes, where: Path) -> None:
    """Refuse a zip archive that holds more than its own bytes: compressed, overlapping or listed twice.

    Readers of zip look for the list of entries in different ways. So that torch finds the one that is checked here, it
    has to be where `torch.save` puts it: followed by the end records, and these by nothing.
    """
    end = len(data) - 22
    is_plain = data[end : end + 4] == _ZIP_END and data[-2:] == b"\0\0"  # no comment
    size, offset = struct.unpack_from("<II", data, end + 12)
    if data[end - 20 : end - 16] == _ZIP64_LOCATOR:
        [pointer] = struct.unpack_from("<Q", data, end - 12)
        end -= 20 + 56
        size, offset = struct.unpack_from("<QQ", data, end + 40)
        is_plain &= pointer == end and data[end : end + 4] == _ZIP64_END
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError("archive is compressed, torch.save makes no such files", where=where)
    total, names = sum(entry.file_size for entry in entries), {entry.filename for entry in entries}
    if not is_plain or offset + size != end or len(names) < len(entries) or total > len(data):
        what = "entries of the archive overlap, or are not listed as torch.save lists them"
        raise CheckpointError(what, where=where)


def _tensors_of(loaded: object, num_bytes: int, where: Path) -> dict[str, Tensor]:
    """Return the state dict in what was loaded from so many bytes: every entry a dense tensor with its own memory."""
    for wrapping in _WRAPPINGS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapping), Mapping):
            loaded = loaded[wrapping]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError("not a state dict", where=where, hint=f"it holds {type(loaded).__name__}")
    size = 0
    for name, tensor in loaded.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not isinstance(name, str) or not dense or tensor.device.type != "cpu":
            raise CheckpointError("entry of the state dict is not a dense tensor", where=where, hint=repr(name)[:80])
        size += tensor.numel() * tensor.element_size()  # what a copy takes: a view of one number can have any shape
    if size > num_bytes + MAX_REPEATED_BYTES:
        what = f"weights have {size} bytes, more than the file, which has {num_bytes}"
        raise CheckpointError(what, where=where, hint="tensors in it repeat or share numbers; save copies of them")
    taken: set[int] = set()
    return {name: _own(tensor.detach(), taken) for name, tensor in loaded.items()}


def _own(tensor: Tensor, taken: set[int]) -> Tensor:
    """Return a contiguous tensor with memory of its own: itself, where it is all of a memory not yet taken."""
    memory = tensor.untyped_storage()
    is_all = tensor.is_contiguous() and memory.nbytes() == tensor.numel() * tensor.element_size()
    if not is_all or memory.data_ptr() in taken:
        return tensor.clone(memory_format=torch.contiguous_format)
    taken.add(memory.data_ptr())
    return tensor


class _Name(enum.Enum):
    """What the names in a pickle stand for. None of them can be called, whatever the pickle does with it."""

    RECONSTRUCT = enum.auto()
    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    ENCODE = enum.auto()


_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,
    ("numpy", "ndarray"): _Name.NDARRAY,
    ("numpy", "dtype"): _Name.DTYPE,
    ("_codecs", "encode"): _Name.ENCODE,
}


class _Dtype:
    """Stands for numpy.dtype while a pickle is read."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: str | bytes) -> None:
        self._code, self._order = _text(code), "|"
        if self._code not in _SCALARS:
            raise _refusal(self._code, "only numbers are read")

    def take(self, order: str | bytes, rest: Sequence[object]) -> None:
        """Take the byte order; names, fields and sub-arrays must not be there."""
        self._order = _text(order)
        if self._order not in ("|", "<", ">", "=") or any(each is not None for each in rest[:3]):
            raise _refusal(self._order, "only numbers are read")

    def resolve(self) -> np.dtype[Any]:
        """Return the type that it stands for."""
        return np.dtype(f"{self._order}{self._code}")


class _Array:
    """Stands for numpy.ndarray while a pickle is read; it allocates nothing, whatever shape the pickle states."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: NDArray[Any] | None = None

    def take(self, shape: Sequence[object], dtype: _Dtype, fortran: object, data: bytes) -> None:
        """Take the shape, type and bytes."""
        sides = [side for side in shape if type(side) is int and side >= 0]
        if len(sides) < len(shape):
            raise _refusal(shape, "a shape is numbers of at least 0")
        self.array = np.frombuffer(data, dtype.resolve()).reshape(sides, order="F" if fortran else "C")


class _Opcodes(io.BytesIO):
    """A pickle that is read one byte, as opcodes are, a limited number of times: one byte can make an object."""

    _left = MAX_OPCODE_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """Return that many bytes.

        Raises:
            DataError: The pickle is longer than any of arrays and labels.
        """
        self._left -= size == 1
        if self._left < 0:
            raise _refusal(f"{MAX_OPCODE_BYTES} opcodes", "it holds too many objects")
        return super().read(size)


class _ArrayUnpickler(pickle._Unpickler):
    """Knows four names and calls none of them: what may be made of them, it makes itself.

    The unpickler in C would size its table by the largest index that a pickle states, which can be any number.
    """

    stack: list[Any]
    read: Callable[[int], bytes]

    def __init__(self, data: bytes) -> None:
        super().__init__(_Opcodes(data), encoding="bytes")
        self._left = MAX_ARRAYS_BYTES

    def find_class(self, module: str, name: str) -> object:
        """Return the stand-in for a name.

        Raises:
            DataError: There is none.
        """
        if (module, name) not in _NAMES:
            raise _refusal(f"{module}.{name}", "it names something that is no array")
        return _NAMES[module, name]

    def _reduce(self) -> None:
        """Put what a name makes of arguments in their place, instead of calling what is there."""
        arguments: object = self.stack.pop()
        match self.stack[-1], arguments:
            case _Name.RECONSTRUCT, (_, _, _):
                made: object = _Array()
            case _Name.DTYPE, (str() | bytes() as code, _, _):
                made = _Dtype(code)
            case _Name.ENCODE, (str() as text, str() | bytes() as codec):
                made = self._encode(text, codec)
            case name, _:
                raise _refusal(name, "it calls something that is no array")
        self.stack[-1] = made

    def _build(self) -> None:
        """Give a stand-in its state; nothing else has any."""
        state: object = self.stack.pop()
        match self.stack[-1], state:
            case _Array() as array, (_, tuple() as shape, _Dtype() as dtype, fortran, bytes() as data):
                array.take(shape, dtype, fortran, data)
            case _Dtype() as dtype, (_, str() | bytes() as order, *rest):
                dtype.take(order, rest)
            case other, _:
                raise _refusal(other, "it changes something that is no array")

    def _encode(self, text: str, codec: str | bytes) -> bytes:
        """Return the bytes that Python 3 writes as text in old protocols; in all no more than a pickle may have."""
        self._left -= len(text)
        if _text(codec) != "latin1" or self._left < 0:
            raise _refusal(codec, "only latin1 is encoded, of the size that a pickle may have")
        return text.encode("latin1")

    dispatch: ClassVar[dict[int, Any]] = {
        **{opcode: load for opcode, load in pickle._Unpickler.dispatch.items() if opcode not in _REFUSED},
        pickle.REDUCE[0]: _reduce,
        pickle.BUILD[0]: _build,
        pickle.FRAME[0]: lambda self: self.read(8),  # a hint on how much to read ahead
    }


def _plain(value: object, done: dict[int, object], depth: int) -> object:
    """Return ``value`` with arrays in the place of their stand-ins; what occurs twice is looked at once."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if id(value) in done:
        return done[id(value)]
    if depth == 0:
        raise DataError("pickle is nested too deeply")
    if isinstance(value, _Array) and value.array is not None:
        plain: object = value.array
    elif isinstance(value, dict) and all(isinstance(key, str | bytes | int) for key in value):
        plain = {key: _plain(item, done, depth - 1) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        plain = type(value)(_plain(item, done, depth - 1) for item in value)
    else:
        raise _refusal(type(value).__name__, "it holds something that is no array")
    done[id(value)] = plain
    return plain


def _refusal(found: object, hint: str) -> DataError:
    """Return the error for a pickle that holds what it should not."""
    return DataError("not a pickle of arrays", where=str(found)[:80], hint=hint)


def _text(value: str | bytes) -> str:
    """Return text that Python 2 may have written as bytes."""
    return value.decode("ascii") if isinstance(value, bytes) else value
