"""Labels from Python: any hashables become class indices, and each index gives its label back."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesnet.errors import DataError


def class_labels(labels: Iterable[Hashable]) -> tuple[Hashable, ...]:
    """Return the distinct labels in class order, NumPy's and scikit-learn's: numbers by value, others by their text.

    Raises:
        DataError: Two different labels have the same text.

    Example:
        >>> class_labels([10, 2, 10]), class_labels(["b10", "b2"])
        ((2, 10), ('b10', 'b2'))
    """
    distinct = list(dict.fromkeys(labels))
    texts: dict[str, Hashable] = {}
    for label in distinct:
        if str(label) in texts:
            pair = f"{texts[str(label)]!r} and {label!r}"
            raise DataError("two labels have the same text", where=pair, hint="make all labels of one type")
        texts[str(label)] = label
    if all(isinstance(label, int | float) for label in distinct):
        return tuple(sorted(distinct, key=lambda label: float(label)))  # type: ignore[arg-type]
    return tuple(texts[text] for text in sorted(texts))


def encode_labels(values: object, classes: Sequence[Hashable] | None = None) -> tuple[Tensor, tuple[Hashable, ...]]:
    """Return labels as class indices, and the label that each index stands for.

    Args:
        values: Array, tensor or sequence of N labels; NumPy and torch scalars become the Python objects they hold.
        classes: The labels in class order; by default those of ``values``.

    Returns:
        int64 indices (N,), and the labels in class order.

    Raises:
        DataError: The values are no labels, or some are not among ``classes``.

    Example:
        >>> encode_labels(np.array(["cat", "ant", "cat"]))
        (tensor([1, 0, 1]), ('ant', 'cat'))
    """
    labels = label_list(values, "labels")
    originals = class_labels(labels) if classes is None else tuple(classes)
    return index_labels(labels, originals, "y"), originals


def label_list(values: Any, where: str) -> list[Hashable]:  # noqa: ANN401 - what users give
    """Return labels as Python objects."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    elif not isinstance(values, np.ndarray) and hasattr(values, "__array__"):
        values = np.asarray(values)
    if isinstance(values, Tensor | np.ndarray):
        if values.ndim != 1:
            hint = "give class labels of shape (N,), not one-hot rows"
            raise DataError("expected one label per image", where=f"{where}, shape {tuple(values.shape)}", hint=hint)
        values = values.tolist()
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise DataError("expected a sequence of labels", where=where, hint=f"got {type(values).__name__}")
    return [_label(value, f"{where}[{index}]") for index, value in enumerate(values)]


def _label(value: Any, where: str) -> Hashable:  # noqa: ANN401
    """Return one label as a Python object."""
    value = plain_label(value)
    if isinstance(value, Tensor | np.ndarray):
        raise DataError("expected one label per image", where=where, hint=f"got shape {tuple(value.shape)}")
    try:
        hash(value)
    except TypeError as error:
        hint = f"got {type(value).__name__}; give numbers or strings"
        raise DataError("a label cannot be hashed", where=where, hint=hint) from error
    if value is None or value != value:
        raise DataError("a label is missing", where=where, hint=f"got {value}")
    return value  # type: ignore[no-any-return]


def index_labels(labels: Sequence[Hashable], classes: Sequence[Hashable], split: str) -> Tensor:
    """Return class indices (N,)."""
    index_of = {label: index for index, label in enumerate(classes)}
    extra = [label for label in dict.fromkeys(labels) if label not in index_of]
    if extra:
        hint = ", ".join(f"+{label}" for label in extra[:5]) + (", ..." if len(extra) > 5 else "")
        raise DataError(f"{split} has other classes than train", where=f"{split} labels", hint=hint)
    return torch.tensor([index_of[label] for label in labels], dtype=torch.int64)


def plain_label(label: Any) -> Any:  # noqa: ANN401
    """Return a scalar of NumPy or torch as the Python object that it holds, anything else as it is."""
    return label.item() if isinstance(label, Tensor | np.ndarray | np.generic) and label.ndim == 0 else label
