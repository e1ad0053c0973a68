"""The two formats of a program: how it is written, and how what was written is run again.

ONNX and its runtime are an extra, ``pip install 'bayesnet[export]'``, imported when one of the functions is called.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import ExportedProgram

from bayesnet.errors import ConfigError
from bayesnet.exporting.decompositions import FOR_ONNX
from bayesnet.exporting.program import INPUT, OUTPUTS

METADATA = "bayesnet"
"""Under which name both files hold the text of the file model.json that is beside them."""

_QUIET = 3  # of onnxruntime: errors alone

Run = Callable[[Tensor], dict[str, NDArray[np.float64]]]
"""From pixels (N, C, H, W) to the outputs by name."""


class Format(NamedTuple):
    """A way to keep a program.

    Attributes:
        file: Its name.
        packages: What has to be installed besides torch.
        write: Writes a traced program, and a text that goes with it, to a path.
        load: Reads it back as a function, as whoever gets the file would.
    """

    file: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path, str], None]
    load: Callable[[Path], Run]


def missing_packages(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the packages that cannot be imported.

    Example:
        >>> missing_packages(("torch", "no_such_package"))
        ('no_such_package',)
    """
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    return tuple(missing)


def _write_torch(traced: ExportedProgram, path: Path, text: str) -> None:
    """Write what `torch.export.load` reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(traced, path, extra_files={f"{METADATA}.json": text})


def _load_torch(path: Path) -> Run:
    """Read a program with torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(path).module()

    def run(images: Tensor) -> dict[str, NDArray[np.float64]]:
        with torch.no_grad():
            return {name: value.numpy() for name, value in module(images).items()}

    return run


def _write_onnx(traced: ExportedProgram, path: Path, text: str) -> None:
    """Write an ONNX model; numbers beyond the 2 GB of a protocol buffer go to a file beside it.

    Raises:
        ConfigError: The network has an operator that ONNX has no counterpart of.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            written = torch.onnx.export(traced.run_decompositions(FOR_ONNX), (), dynamo=True, verbose=False)
        except Exception as error:  # torch has no one type for what cannot be converted
            cause = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            hint = f"write --format torch; the converter says: {cause[-1][:200]}"
            raise ConfigError("the network cannot be written as ONNX", where=path.name, hint=hint) from error
        assert written is not None
        _name(written.model)
        written.model.metadata_props[METADATA] = text
        written.save(path)


def _name(model: Any) -> None:  # noqa: ANN401 - an onnxscript model, which need not be installed
    """Name input, outputs and the dimension of images; torch would call inner values as it calls the outputs."""
    graph = model.graph
    [dimension] = {str(value.shape[0]) for value in graph.inputs}
    values = [*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.name in (INPUT, *OUTPUTS):
            value.name = f"inner_{value.name}"
        for axis, size in enumerate(value.shape or ()):
            if str(size) == dimension:
                value.shape[axis] = "N"
    for value, name in zip((*graph.inputs, *graph.outputs), (INPUT, *OUTPUTS), strict=True):
        value.name = name


def _load_onnx(path: Path) -> Run:
    """Read a program with onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> dict[str, NDArray[np.float64]]:
        return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {INPUT: images.numpy()}), strict=True))

    return run


FORMATS = {
    "torch": Format("model.pt2", (), _write_torch, _load_torch),
    "onnx": Format("model.onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx),
}
