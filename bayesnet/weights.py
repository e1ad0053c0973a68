"""The one door for what others made: downloads, weights that `torch.save` wrote, and arrays in pickles.

A download is taken over https only and checked against a pinned SHA-256 before it gets its name. Weights are read once
by the restricted loader of torch and then kept as safetensors. Pickled arrays are read by an unpickler that knows four
names and builds them itself. Nowhere else in the library is anything unpickled.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesnet import storage
from bayesnet.download import cache_folder, fetch, file_hash, plain_name
from bayesnet.errors import BayesnetError, CheckpointError, DataError
from bayesnet.strict_json import parse_json

__all__ = ["cache_folder", "fetch", "pretrained", "read_arrays", "read_state_dict"]

MAX_WEIGHTS_BYTES = 8 * 2**30
MAX_ARRAYS_BYTES = 2**28
MAX_HEADER_BYTES = 10_000_000

_MAX_DEPTH = 8
_WRAPPINGS = ("state_dict", "model_state_dict", "model")
_PREFIX = "module."
# What makes objects, refers to something outside, or allocates what a pickle states.
_REFUSED = (
    pickle.INST + pickle.OBJ + pickle.NEWOBJ + pickle.NEWOBJ_EX + pickle.EXT1 + pickle.EXT2 + pickle.EXT4
    + pickle.PERSID + pickle.BINPERSID + pickle.BYTEARRAY8 + pickle.NEXT_BUFFER + pickle.READONLY_BUFFER
)  # fmt: skip
_SCALARS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the weights in a file by name, on the CPU; no code in it is run.

    The file is safetensors, or a state dict that `torch.save` wrote: a dictionary of dense tensors, by itself or as the
    entry ``state_dict``, ``model_state_dict`` or ``model`` of another dictionary, whose other entries are ignored. If
    all names begin with ``module.``, which data-parallel training puts there, that is taken off.

    Args:
        path: The file; a link to it will do.

    Raises:
        CheckpointError: It is missing, larger than 8 GiB, or anything else, such as a whole pickled model.
    """
    try:
        data = storage.read_bytes(path.resolve(), max_bytes=MAX_WEIGHTS_BYTES)
    except RuntimeError as error:  # a loop of links
        raise CheckpointError("cannot read the file: too many links", where=path) from error
    tensors = _from_safetensors(data, path) if data[8:9] == b"{" else _from_torch(data, path)
    if tensors and all(name.startswith(_PREFIX) for name in tensors):
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    return tensors


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
    tensors = read_state_dict(source)
    data = safetensors.torch.save(tensors)
    hashes = {"source_sha256": file_hash(source), "sha256": hashlib.sha256(data).hexdigest()}
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


def _from_safetensors(data: bytes, where: Path) -> dict[str, Tensor]:
    """Return the tensors; the header must name none twice (safetensors takes the last)."""
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES or len(data) < 8 + length:
        raise CheckpointError("header of the safetensors file is too long or cut off", where=where)
    parse_json(data[8 : 8 + length], where=where)
    try:
        return safetensors.torch.load(data)
    except MemoryError:
        raise
    except Exception as error:  # the decoder's errors are of many types, none of them documented
        raise CheckpointError("not valid safetensors", where=where, hint=f"{type(error).__name__}: {error}") from error


def _from_torch(data: bytes, where: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict, as new memory of their own."""
    try:
        if data[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                # torch.save compresses nothing; something that is compressed could be of any size.
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise CheckpointError("archive is compressed, torch.save makes no such files", where=where)
        loaded: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:  # as above
        hint = "it must be safetensors, or a state dict that torch.save wrote"
        raise CheckpointError("not a file of weights", where=where, hint=hint) from error
    return _tensors_of(loaded, where)


def _tensors_of(loaded: object, where: Path) -> dict[str, Tensor]:
    """Return the state dict in what was loaded: every entry a dense tensor on the CPU, in all at most 8 GiB."""
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
    if size > MAX_WEIGHTS_BYTES:
        raise CheckpointError(f"weights have {size} bytes, more than {MAX_WEIGHTS_BYTES}", where=where)
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in loaded.items()}


class _Dtype:
    """Stands for numpy.dtype while a pickle is read."""

    def __init__(self, code: str | bytes, align: object, copy: object) -> None:
        self._code = _text(code)
        self._order: str = "|"
        if self._code not in _SCALARS:
            raise _refusal(self._code, "only numbers are read")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the byte order; names, fields and sub-arrays must not be there."""
        self._order = _text(state[1])
        if self._order not in ("|", "<", ">", "=") or any(each is not None for each in state[2:5]):
            raise _refusal(state, "only numbers are read")

    def resolve(self) -> np.dtype[Any]:
        """Return the type that it stands for."""
        return np.dtype(f"{self._order}{self._code}")


class _Array:
    """Stands for numpy.ndarray while a pickle is read; it allocates nothing, whatever shape the pickle states."""

    array: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the shape, type and bytes."""
        _, shape, dtype, fortran, data = state
        if not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"shape {shape!r}")
        self.array = np.frombuffer(data, dtype.resolve()).reshape(shape, order="F" if fortran else "C")


class _ArrayUnpickler(pickle._Unpickler):
    """Knows four names and gives stand-ins for them, made anew for each pickle.

    The unpickler in C would size its table by the largest index that a pickle states, which can be any number.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        opcode: load for opcode, load in pickle._Unpickler.dispatch.items() if opcode not in _REFUSED
    }

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._left = MAX_ARRAYS_BYTES

    def find_class(self, module: str, name: str) -> object:
        """Return the stand-in for a name.

        Raises:
            DataError: There is none.
        """
        match module, name:
            case (("numpy.core.multiarray" | "numpy._core.multiarray"), "_reconstruct"):
                return lambda subtype, shape, code: _Array()
            case "numpy", "ndarray":
                return "ndarray"  # _reconstruct is given it and needs it not
            case "numpy", "dtype":
                return lambda code, align, copy: _Dtype(code, align, copy)
            case "_codecs", "encode":
                return lambda text, codec: self._encode(text, codec)
        raise _refusal(f"{module}.{name}", "it names something that is no array")

    def _encode(self, text: str, codec: str | bytes) -> bytes:
        """Return the bytes that Python 3 writes as text in old protocols; in all no more than a pickle may have."""
        self._left -= len(text)
        if _text(codec) != "latin1" or self._left < 0:
            raise _refusal(codec, "only latin1 is encoded, of the size that a pickle may have")
        return text.encode("latin1")


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
