r"""T28: images whose Bayes posterior is known, from rendering to prediction.

    pixels = 128 + 32 (prototype of the class + noise), 4 x 4, rounded to uint8;  noise ~ Normal(0, I)
    p(k | x) = softmax_k(m_k . x - |m_k|^2 / 2),   prototypes m_k ~ Normal(0, 0.6^2 I),  3 classes alike often

A linear head on the pixels can represent this posterior exactly, so nothing but the number of training images stands
between a fit and the truth. Heads are trained with the optimizers and the step of `fit`, predictions come from
`Predictor`, and both go through `Preprocessing`. Measured, over worlds (prototypes and images of their own): the mean
of KL(p || prediction) over 1,000 new images, and the difference of a Bayesian head's NLL to the twin's.

| mean KL, nats, four worlds | 20 images | 80 | 320 | 1,280 |
|---|---|---|---|---|
| mean_field | .276 | .132 | .066 | .019 |
| matrix_normal | .287 | .136 | .068 | .019 |
| bound | .5 | .25 | .12 | .04 |

The seed is fixed and the bounds are no test of noise: they are 1.8 to 2.1 times what was measured, and a divergence
beyond that is the smallest fault caught for certain. The NLL's difference is held to 3 standard errors over worlds, at
20 and 80 images (measured: -1.8 to -1.5); the KL must fall with every fourfold of the images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesnet.battery.base import Check, Findings, Outcome
from bayesnet.battery.faults import LABELS_ROLLED, LOCAL_KL_TIMES_BATCH
from bayesnet.battery.fitted import OTHER_CLASSES
from bayesnet.data import ArrayExamples, Preprocessing
from bayesnet.engine import Engine
from bayesnet.inference import FAMILIES
from bayesnet.predictive import Predictor
from bayesnet.testing import ToyProblem, build, train_toy

SIDE, NUM_CLASSES, NUM_TEST = 4, 3, 1000
PROTOTYPE_SCALE, CENTRE, CONTRAST = 0.6, 128, 32
NUM_STEPS = 400
NUM_WORLDS = 4
SIZES = (20, 80, 320, 1280)
FEW = 80
BAYESIAN = ("mean_field", "matrix_normal")
DIVERGENCE_BOUNDS = {20: 0.5, 80: 0.25, 320: 0.12, 1280: 0.04}
"""Largest mean KL from the Bayes posterior, nats, by the number of training images."""
PREPROCESSING = Preprocessing(1, SIDE, SIDE, mean=(CENTRE / 255,), std=(CONTRAST / 255,))


class World(NamedTuple):
    """Prototypes, and the images that they make.

    Attributes:
        prototypes_KD: In units of the noise.
        pixels_NCHW: Images, uint8.
        y_N: Their classes.
    """

    prototypes_KD: Tensor
    pixels_NCHW: Tensor
    y_N: Tensor

    def bayes(self) -> NDArray[np.float64]:
        """Return the Bayes posterior of each image (N, K)."""
        x_ND = (self.pixels_NCHW.flatten(1).double() - CENTRE) / CONTRAST
        logits_NK = x_ND @ self.prototypes_KD.T - self.prototypes_KD.square().sum(1) / 2
        posterior_NK: NDArray[np.float64] = logits_NK.softmax(1).numpy()
        return posterior_NK

    def part(self, start: int, stop: int) -> World:
        """Return the same world with some of the images."""
        return World(self.prototypes_KD, self.pixels_NCHW[start:stop], self.y_N[start:stop])


def world(num_images: int, *, seed: int) -> World:
    """Return prototypes and images drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = NUM_CLASSES, SIDE * SIDE
    prototypes_KD = PROTOTYPE_SCALE * torch.randn(shape, generator=generator, dtype=torch.float64)
    y_N = torch.randint(NUM_CLASSES, (num_images,), generator=generator)
    x_ND = prototypes_KD[y_N] + torch.randn(num_images, SIDE * SIDE, generator=generator, dtype=torch.float64)
    pixels_ND = (CENTRE + CONTRAST * x_ND).round().clamp(0, 255).to(torch.uint8)
    return World(prototypes_KD, pixels_ND.view(-1, 1, SIDE, SIDE), y_N)


def predictions(family: str, train: World, test: World, *, seed: int) -> NDArray[np.float64]:
    """Return what a family, trained on some images, predicts for others (N, K)."""
    x_NCHW = PREPROCESSING.normalize(train.pixels_NCHW)
    problem = ToyProblem(x_NCHW.flatten(1)[:, None, None], train.y_N, torch.zeros(NUM_CLASSES, SIDE * SIDE + 1))
    posterior = build(FAMILIES[family], problem, seed=seed)
    train_toy(posterior, problem._replace(x_NCHW=x_NCHW), steps=NUM_STEPS, seed=seed)
    predictor = Predictor(posterior, PREPROCESSING, engine=Engine(torch.device("cpu")), chunk_size=200)
    return predictor.probabilities(ArrayExamples(test.pixels_NCHW, test.y_N))


class Score(NamedTuple):
    """What predictions cost on the new images of one world, nats: KL(Bayes posterior || prediction), and NLL."""

    divergence: float
    nll: float


def score(probability_NK: NDArray[np.float64], test: World) -> Score:
    """Return the scores of predictions (N, K)."""
    bayes_NK, log_NK = test.bayes(), np.log(probability_NK)
    divergence = float((bayes_NK * (np.log(bayes_NK) - log_NK)).sum(1).mean())
    return Score(divergence, -float(log_NK[np.arange(len(log_NK)), test.y_N.numpy()].mean()))


def scores(
    families: Sequence[str], sizes: Sequence[int], num_worlds: int, seed: int
) -> dict[tuple[str, int], list[Score]]:
    """Return the scores of families at each number of training images, by world."""
    found: dict[tuple[str, int], list[Score]] = {}
    for index in range(num_worlds):
        images = world(max(sizes) + NUM_TEST, seed=1000 * seed + index)
        test = images.part(max(sizes), max(sizes) + NUM_TEST)
        for size in sizes:
            for family in families:
                probability_NK = predictions(family, images.part(0, size), test, seed=index)
                found.setdefault((family, size), []).append(score(probability_NK, test))
    return found


def check_curve(seed: int) -> Findings:
    """Train two Bayesian heads and the twin on more and more images of four worlds."""
    return findings(scores((*BAYESIAN, "deterministic"), SIZES, NUM_WORLDS, seed))


def check_small(seed: int) -> Findings:
    """Train a mean-field head and the twin on few images of three worlds."""
    return findings(scores(("mean_field", "deterministic"), (80,), 3, seed))


def findings(found: Mapping[tuple[str, int], Sequence[Score]]) -> Findings:
    """Return divergences against their bounds, how they fall, and the NLL against the twin's where images are few."""
    outcomes = []
    divergences = {key: float(np.mean([each.divergence for each in values])) for key, values in found.items()}
    sizes = sorted({size for _, size in found})
    for family in [name for name in BAYESIAN if (name, sizes[0]) in found]:
        for size in sizes:
            what = f"{family}, {size} images: mean KL from the Bayes posterior, nats"
            outcomes.append(Outcome(what, divergences[family, size], DIVERGENCE_BOUNDS[size]))
        for fewer, more in itertools.pairwise(sizes):
            what = f"{family}: KL with {more} images over that with {fewer}"
            outcomes.append(Outcome(what, divergences[family, more] / divergences[family, fewer], 1.0))
        for size in [size for size in sizes if size <= FEW]:
            excess = excess_nll(found[family, size], found["deterministic", size])
            what = f"{family}, {size} images: NLL less the twin's, standard errors over worlds"
            outcomes.append(Outcome(what, excess, 3.0))
    return Findings(outcomes)


def excess_nll(bayesian: Sequence[Score], twin: Sequence[Score]) -> float:
    """Return the mean difference of the NLL over its standard error; worlds are what is independent."""
    difference = np.array([a.nll - b.nll for a, b in zip(bayesian, twin, strict=True)])
    return float(difference.mean() / (difference.std(ddof=1) / math.sqrt(len(difference))))


CHECKS: tuple[Check, ...] = (
    Check(
        "T28",
        "known Bayes posterior, few images",
        check_small,
        (LABELS_ROLLED, LOCAL_KL_TIMES_BATCH, OTHER_CLASSES),
    ),
    Check(
        "T28",
        "known Bayes posterior, KL against the number of images",
        check_curve,
        (LABELS_ROLLED, LOCAL_KL_TIMES_BATCH),
        full=True,
    ),
)
