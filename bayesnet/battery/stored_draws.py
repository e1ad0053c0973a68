"""Two softmax regressions with their posteriors as long NUTS runs know them, kept in the folder `reference`.

A script of the repository, benchmarks/nuts_reference.py, made them: ten chains of 2,000 draws, R-hat below 1.002,
effective sample sizes above 24,000, no divergences. Files are read only if they have the SHA-256 written here.
"""

from __future__ import annotations

from importlib import resources
from typing import NamedTuple

from torch import Tensor

from bayesnet.checkpoint import verified_tensors
from bayesnet.testing import ToyProblem

HASHES = {
    "softmax-k3-d4": "efbfa6cd6fb5be344b0cdf4a598fab90831dae6bfd4c34e549085ecc309ec969",
    "softmax-k10-d8": "60080c3b7b65ce4241a90597571fa84453e095ccffb95e1baa8614eecbec2a75",
}
"""SHA-256 of the files; the script that makes them prints these."""


class Reference(NamedTuple):
    """A problem, and its posterior as NUTS knows it.

    Attributes:
        problem: The training set.
        x_new_BCHW: New images.
        probability_BK: Their mean class probabilities, float64.
        mean_KD: Means of the weights, float64.
        scale_KD: Their standard deviations, float64.
        draws_SKD: Some of the draws, float32.
    """

    problem: ToyProblem
    x_new_BCHW: Tensor
    probability_BK: Tensor
    mean_KD: Tensor
    scale_KD: Tensor
    draws_SKD: Tensor


def load(name: str) -> Reference:
    """Return a stored reference.

    Args:
        name: A key of HASHES.

    Raises:
        CheckpointError: The file is not the one that was made.
    """
    file = resources.files("bayesnet.battery") / "reference" / f"{name}.safetensors"
    found = verified_tensors(file.read_bytes(), sha256=HASHES[name], where=file)
    problem = ToyProblem(found["x_ND"][:, None, None], found["y_N"], found["mean_KD"].float())
    x_new_BCHW = found["x_new_BD"][:, None, None]
    return Reference(
        problem, x_new_BCHW, found["probability_BK"], found["mean_KD"], found["scale_KD"], found["draws_SKD"]
    )
