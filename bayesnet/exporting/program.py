"""The program: normalisation, network, draws, calibrator and summary as one module, and its trace.

It is made of the very functions that `predict` calls, traced once: there is no second implementation of any formula.
What differs is rounding: a program takes batches of any size, where `predict` pads to one.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bayesnet.calibration import Calibrator
from bayesnet.data import Preprocessing
from bayesnet.errors import ConfigError
from bayesnet.inference.base import Posterior
from bayesnet.predictive import describe

INPUT = "images"
OUTPUTS = ("mean", "lower", "upper", "entropy", "mutual_information")
_TRACED_IMAGES = 3  # any number but 0 and 1, which a tracer takes for constants


class Program(nn.Module):
    """From pixels to what is predicted.

    Args:
        posterior: On the CPU; it is set to evaluation mode, and its parameters will ask for no gradient.
        preprocessing: Of its training images.
        calibrator: Map on every draw's log-probabilities.
        num_samples: S, draws of the posterior.
        level: Mass of the intervals.
    """

    def __init__(
        self,
        posterior: Posterior,
        preprocessing: Preprocessing,
        calibrator: Calibrator,
        *,
        num_samples: int,
        level: float,
    ) -> None:
        super().__init__()
        self.posterior = posterior.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.calibrator = calibrator
        self.num_samples = num_samples
        self.level = level

    @property
    def input_dtype(self) -> torch.dtype:
        """Type of the pixels: uint8, or float32 for models that were trained on floating-point arrays."""
        return torch.uint8 if self.preprocessing.pixel_scale == 255 else torch.float32

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return mean, lower and upper (N, K), entropy and mutual_information (N,), float64, of pixels (N, C, H, W)."""
        normalized_BCHW = self.preprocessing.normalize(images)
        draws_SBK = self.posterior.predict_draws(normalized_BCHW, self.num_samples)
        described = describe(self.calibrator(draws_SBK.double().log_softmax(-1)), self.level)
        return {
            "mean": described.mean_BK,
            "lower": described.lower_BK,
            "upper": described.upper_BK,
            "entropy": described.entropy_B,
            "mutual_information": described.mutual_information_B,
        }


@torch.no_grad()
def trace(program: Program, family: str) -> ExportedProgram:
    """Return the program as a graph of torch's operators for any number of images.

    Args:
        program: What to trace.
        family: Name of the posterior's family, for the error.

    Raises:
        ConfigError: Something in the posterior or the network cannot be traced; names the family and the reason.
    """
    images = torch.zeros(_TRACED_IMAGES, *program.preprocessing.shape, dtype=program.input_dtype)
    try:
        with warnings.catch_warnings(), program.posterior.fixed_draws(program.num_samples):
            warnings.simplefilter("ignore")  # the tracer's own, of which a user could do nothing about
            program(images)
            traced = torch.export.export(program, (images,), dynamic_shapes={INPUT: {0: Dim("N")}}, strict=False)
    except Exception as error:  # whatever a network or a tracer can raise
        hint = f"the tracer says: {_reason(error)}"
        raise ConfigError("the family cannot be exported", where=family, hint=hint) from error
    for module in traced.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # lines and paths of the machine that it was traced on
    return traced


def _reason(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
