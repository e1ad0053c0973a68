"""The posterior predictive: one backbone pass, draws of the logits, one summary per image.

    p(k | x) = 1/S sum_s softmax(logits_s)_k          predictive entropy H[p],  expected entropy 1/S sum_s H[softmax_s]
    mutual information = H[p] - expected entropy, between 0 and log K

Probabilities are averaged in log space (log-mean-exp of log-softmax, float64): a probability of 1e-60 stays one. Images
are computed in chunks padded to one size that the run records, so a prediction does not depend on its companions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesnet.calibration import Calibrator
from bayesnet.calibration.identity import Identity
from bayesnet.data import Examples, Preprocessing
from bayesnet.data.loading import read_batches
from bayesnet.engine import Engine
from bayesnet.errors import DivergedError
from bayesnet.inference.base import Posterior
from bayesnet.types import Summary

_LARGE_CHUNK, _LARGE_CHUNK_NUMBERS = 256, 2**19  # images, and their pixels in all channels: memory grows with both


def log_mean_exp(log_values: Tensor, dim: int) -> Tensor:
    """Return log(mean(exp(log_values))) along ``dim``, without overflow or underflow.

    Example:
        >>> log_mean_exp(torch.tensor([-1000.0, -1000.0]), dim=0)
        tensor(-1000.)
    """
    log_sum: Tensor = torch.logsumexp(_rows(log_values, dim), -1)
    return log_sum.sub(math.log(log_values.shape[dim]))


def entropy(log_probabilities: Tensor) -> Tensor:
    """Return -sum p log p over the last dimension, nats, with 0 log 0 = 0."""
    # The clamp keeps 0 x -inf from being NaN and changes no term: exp(-1000) is 0.
    terms: Tensor = log_probabilities.exp() * log_probabilities.clamp_min(-1000)
    return 0.0 - terms.sum(-1)  # never -0.0


class Decomposition(NamedTuple):
    """Mean prediction and uncertainty of each image, nats: the mutual information is entropy less expected entropy.

    Attributes:
        log_mean_BK: Logarithms of the mean probabilities.
        entropy_B: Entropy of the mean.
        expected_entropy_B: Mean entropy of the draws, at most that.
    """

    log_mean_BK: Tensor
    entropy_B: Tensor
    expected_entropy_B: Tensor


def decompose(log_probabilities_SBK: Tensor) -> Decomposition:
    """Return the mean of the draws, and its entropy in total and within draws."""
    log_mean_BK = log_mean_exp(log_probabilities_SBK, 0)
    entropy_B = entropy(log_mean_BK)
    # Jensen's inequality makes the mutual information non-negative; rounding may not.
    expected_B = torch.minimum(_rows(entropy(log_probabilities_SBK), 0).mean(-1), entropy_B)
    return Decomposition(log_mean_BK, entropy_B, expected_B)


def on_host(values: Tensor) -> NDArray[np.float64]:
    """Return the values in float64 on the host."""
    host: NDArray[np.float64] = values.double().cpu().numpy()
    return host


def probabilities_on_host(probabilities_BK: Tensor) -> NDArray[np.float64]:
    """Return the probabilities (B, K) in float64 on the host, where looking at them waits for nothing.

    Raises:
        DivergedError: NaN for some image.
    """
    host_BK = on_host(probabilities_BK)
    _check_numbers(host_BK)
    return host_BK


def _check_numbers(values_NK: NDArray[np.floating]) -> None:
    """Raise DivergedError where values (..., N, K) are NaN: a network can overflow on an image unlike its own."""
    wrong_N = np.isnan(values_NK).any(-1)
    if wrong_N.any():
        num_wrong = int(wrong_N.reshape(-1, wrong_N.shape[-1]).any(0).sum())
        what = f"the model gives NaN for {num_wrong} of {wrong_N.shape[-1]} images"
        raise DivergedError(what, hint="look at these images, or train again at a lower optimizer.learning_rate")


def interval_kind(num_draws: int, level: float) -> str:
    """Return what the interval is: quantiles need at least 2 / (1 - level) draws, else it is the range of the draws.

    Example:
        >>> interval_kind(256, 0.9), interval_kind(1, 0.9)
        ('equal-tailed, contains mean', 'range of 1 draw')
    """
    if num_draws < 2 / (1 - level) - 1e-9:
        return f"range of {num_draws} draw{'s' if num_draws != 1 else ''}"
    return "equal-tailed, contains mean"


class Description(NamedTuple):
    """What `Summary` says, as tensors, which a tracer can follow."""

    mean_BK: Tensor
    lower_BK: Tensor
    upper_BK: Tensor
    entropy_B: Tensor
    expected_entropy_B: Tensor
    mutual_information_B: Tensor
    widened_BK: Tensor


def describe(log_probabilities_SBK: Tensor, level: float) -> Description:
    """Return mean, interval, entropies and mutual information of each image.

    Args:
        log_probabilities_SBK: Log-probabilities of each draw, after calibration; float64 for full accuracy.
        level: Mass of the intervals, such as 0.9.

    The interval is the equal-tailed one of the class probability under the posterior (quantiles by linear
    interpolation), widened where needed to contain the mean: with skewed draws a mean often lies outside.
    """
    num_draws = log_probabilities_SBK.shape[0]
    log_mean_BK, entropy_B, expected_B = decompose(log_probabilities_SBK)
    mean_BK = log_mean_BK.exp()
    tail = 0.0 if interval_kind(num_draws, level).startswith("range") else (1 - level) / 2
    lower_BK, upper_BK = _quantiles(log_probabilities_SBK, (tail, 1 - tail))
    return Description(
        mean_BK=mean_BK,
        lower_BK=torch.minimum(lower_BK, mean_BK),
        upper_BK=torch.maximum(upper_BK, mean_BK),
        entropy_B=entropy_B,
        expected_entropy_B=expected_B,
        mutual_information_B=entropy_B - expected_B,
        widened_BK=(mean_BK < lower_BK) | (mean_BK > upper_BK),
    )


def summarize(log_probabilities_SBK: Tensor, level: float) -> Summary:
    """Return what `describe` does, on the host.

    Raises:
        DivergedError: NaN for some image.
    """
    described = describe(log_probabilities_SBK, level)
    return Summary(
        probability_BK=probabilities_on_host(described.mean_BK),
        lower_BK=on_host(described.lower_BK),
        upper_BK=on_host(described.upper_BK),
        entropy_B=on_host(described.entropy_B),
        expected_entropy_B=on_host(described.expected_entropy_B),
        mutual_information_B=on_host(described.mutual_information_B),
        widened_BK=described.widened_BK.cpu().numpy(),
    )


class RawPass(NamedTuple):
    """What a posterior gives for a chunk of images, before anything is made of it.

    Attributes:
        logits_SBK: Draws of the logits, float64.
        features_BD: What all draws share, or None where they share none.
    """

    logits_SBK: Tensor
    features_BD: Tensor | None


class Predictor:
    """A trained posterior, ready to answer for uint8 images.

    Args:
        posterior: The posterior, moved to the engine's device and set to evaluation mode.
        preprocessing: How its training images were normalised.
        engine: Where to run.
        num_samples: S, draws per image (finite posteriors give at most their own).
        chunk_size: Images per backbone pass; shorter chunks are padded to it.
        calibrator: Map on every draw's log-probabilities.
        workers: Processes that read images ahead.
    """

    def __init__(
        self,
        posterior: Posterior,
        preprocessing: Preprocessing,
        *,
        engine: Engine,
        num_samples: int = 256,
        chunk_size: int = 32,
        calibrator: Calibrator | None = None,
        workers: int = 0,
    ) -> None:
        self.posterior = posterior.to(engine.device).eval()
        self.preprocessing = preprocessing
        self.engine = engine
        self.num_samples = min(num_samples, posterior.max_draws or num_samples)
        self.chunk_size = chunk_size
        self.calibrator = calibrator or Identity()
        self.workers = workers

    def in_large_chunks(self, num_images: int) -> Predictor:
        """Return a predictor of few large chunks: faster, and equal to this one but for rounding.

        Args:
            num_images: How many it will be given; chunks share them evenly.
        """
        most = max(self.chunk_size, min(_LARGE_CHUNK, _LARGE_CHUNK_NUMBERS // math.prod(self.preprocessing.shape)))
        return Predictor(
            self.posterior,
            self.preprocessing,
            engine=self.engine,
            num_samples=self.num_samples,
            chunk_size=math.ceil(num_images / math.ceil(num_images / most)),
            calibrator=self.calibrator,
            workers=self.workers,
        )

    @property
    def num_draws(self) -> int:
        """How many draws an answer is made of: the calibrator may give each a spread of its own."""
        return self.calibrator.num_draws(self.num_samples)

    def log_probabilities(self, x_BCHW: Tensor) -> Tensor:
        """Return calibrated log-probabilities (S, B, K), float64, of at most ``chunk_size`` uint8 images."""
        return self.calibrator(self.raw_log_probabilities(x_BCHW))

    def raw_log_probabilities(self, x_BCHW: Tensor) -> Tensor:
        """Return log-probabilities (S, B, K) before calibration, float64, of at most ``chunk_size`` uint8 images."""
        return self.raw_pass(x_BCHW).logits_SBK.log_softmax(-1)

    @torch.inference_mode()
    def raw_pass(self, x_BCHW: Tensor) -> RawPass:
        """Return the logits as the posterior gives them, with the features, of at most ``chunk_size`` uint8 images."""
        num_images = len(x_BCHW)
        assert 0 < num_images <= self.chunk_size
        if num_images < self.chunk_size:
            padding = x_BCHW[-1:].expand(self.chunk_size - num_images, *x_BCHW.shape[1:])
            x_BCHW = torch.cat([x_BCHW, padding])
        normalized_BCHW = self.preprocessing.normalize(self.engine.put(x_BCHW))
        draws_SBK, features_BD = self.posterior.draws_and_features(normalized_BCHW, self.num_samples)
        draws_SBK = draws_SBK[:, :num_images]
        if draws_SBK.device.type == "mps":  # no float64 there
            draws_SBK = draws_SBK.cpu()
        return RawPass(draws_SBK.double(), None if features_BD is None else features_BD[:num_images])

    def chunks(self, examples: Examples, indices_N: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the uint8 images (or some, by their indices), in order, ``chunk_size`` at a time."""
        chosen = torch.arange(len(examples)) if indices_N is None else indices_N
        with contextlib.closing(read_batches(examples, chosen.split(self.chunk_size), workers=self.workers)) as batches:
            yield from batches

    def probabilities(self, examples: Examples) -> NDArray[np.float64]:
        """Return the mean calibrated probabilities (N, K) of all examples, in order."""
        return self.probabilities_under(examples, [self.calibrator])[0]

    def probabilities_under(
        self, examples: Examples, calibrators: Sequence[Calibrator], indices_N: Tensor | None = None
    ) -> list[NDArray[np.float64]]:
        """Return the mean probabilities (N, K) under each calibrator, from one pass over the examples (or some)."""
        rows: list[list[NDArray[np.float64]]] = [[] for _ in calibrators]
        for x_BCHW in self.chunks(examples, indices_N):
            raw_SBK = self.raw_log_probabilities(x_BCHW)
            for calibrator, parts in zip(calibrators, rows, strict=True):
                parts.append(probabilities_on_host(log_mean_exp(calibrator(raw_SBK), 0).exp()))
        return [np.concatenate(parts) for parts in rows]

    def raw_draws(self, examples: Examples, indices_N: Tensor) -> Tensor:
        """Return the uncalibrated log-probabilities (S, N, K) of some examples, float32 on the host.

        Raises:
            DivergedError: NaN for some image.
        """
        parts = [self.raw_log_probabilities(x).float().cpu() for x in self.chunks(examples, indices_N)]
        draws_SNK = torch.cat(parts, 1)
        _check_numbers(draws_SNK.numpy())
        return draws_SNK

    def summaries(self, examples: Examples, level: float) -> Iterator[Summary]:
        """Yield the summary of each chunk of examples, in order.

        Args:
            examples: Images; their labels are not looked at.
            level: Mass of the intervals.
        """
        for x_BCHW in self.chunks(examples):
            yield summarize(self.log_probabilities(x_BCHW), level)

    def mean_nll(self, examples: Examples) -> float:
        """Return the mean negative log-likelihood of the examples' labels under the mean probability, nats."""
        total, start = 0.0, 0
        for x_BCHW in self.chunks(examples):
            log_mean_BK = log_mean_exp(self.log_probabilities(x_BCHW), 0).cpu()
            labels_B = examples.labels_N[start : start + len(x_BCHW)]
            total -= float(log_mean_BK.gather(1, labels_B[:, None]).sum())
            start += len(x_BCHW)
        return total / len(examples)


def _quantiles(log_values_SBK: Tensor, probabilities: Sequence[float]) -> list[Tensor]:
    """Return quantiles over the draws of exp(values), linearly interpolated as NumPy does by default.

    Two draws around each quantile decide it, so on a CPU the rest stays unsorted, but for tracers: these know no NumPy.
    """
    last = len(log_values_SBK) - 1
    positions = [probability * last for probability in probabilities]
    ranks = sorted({min(math.floor(position) + step, last) for position in positions for step in (0, 1)})
    if log_values_SBK.device.type == "cpu" and not torch.compiler.is_exporting():
        rows_BKS = np.partition(_rows(log_values_SBK, 0).numpy(), ranks, axis=-1)
        chosen = {rank: torch.from_numpy(rows_BKS[..., rank]).exp() for rank in ranks}
    else:
        ordered_SBK = log_values_SBK.sort(0).values
        chosen = {rank: ordered_SBK[rank].exp() for rank in ranks}
    below = [math.floor(position) for position in positions]
    return [
        torch.lerp(chosen[rank], chosen[min(rank + 1, last)], position - rank)
        for rank, position in zip(below, positions, strict=True)
    ]


def _rows(values: Tensor, dim: int) -> Tensor:
    """Return the values with ``dim`` last and contiguous.

    A sum along other dimensions is vectorised across images, in an order that depends on how many there are.
    """
    return values.movedim(dim, -1).contiguous()
