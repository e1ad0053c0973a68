"""The size and power of T15, with an exact sampler of a model that may be wrong in the place of NUTS."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bayesnet.battery import geweke
from bayesnet.battery.seeding import seeded
from bayesnet.model import linear_logits

NUM_RUNS = 100


def simulated(prior_scale: float) -> Tensor:
    """Return the largest |z| of many runs of the test (R,) whose sampler believes in this prior sd.

    Twenty proposals from that prior, each taken with the ratio of likelihoods, are almost an independent draw.
    """
    with seeded(0):
        marginal_SF = geweke.functions(*geweke.marginal_draws(geweke.NUM_MARGINAL))
        weight_SKD, y_SN = geweke.marginal_draws(NUM_RUNS * geweke.NUM_CHAINS)
        steps = []
        for _ in range(geweke.NUM_STEPS):
            for _ in range(20):
                proposed_SKD = prior_scale * torch.randn_like(weight_SKD)
                gain_S = log_likelihood(proposed_SKD, y_SN) - log_likelihood(weight_SKD, y_SN)
                taken_S = gain_S.exp() > torch.rand(len(y_SN), dtype=torch.float64)
                weight_SKD = torch.where(taken_S[:, None, None], proposed_SKD, weight_SKD)
            steps.append(geweke.functions(weight_SKD, y_SN))
            y_SN = geweke.draw_labels(weight_SKD)
    runs_RCSF = torch.stack(steps, 1).unflatten(0, (NUM_RUNS, geweke.NUM_CHAINS))
    return torch.stack([geweke.z_scores(run_CSF, marginal_SF).abs().max() for run_CSF in runs_RCSF])


def log_likelihood(weight_SKD: Tensor, y_SN: Tensor) -> Tensor:
    log_probability_SNK = linear_logits(geweke.FEATURES_ND, weight_SKD).log_softmax(-1)
    return log_probability_SNK.gather(2, y_SN.unsqueeze(2)).sum((1, 2))


@pytest.mark.slow
def test_the_right_sampler_passes() -> None:
    largest_R = simulated(1.0)
    assert float(largest_R.max()) < geweke.cut()
    assert 1.5 < float(largest_R.median()) < 2.2, "the median of the largest of ten |z| is 1.8"


@pytest.mark.slow
def test_the_stated_power() -> None:
    for prior_scale in (0.92, 1.1):
        rejected = float((simulated(prior_scale) > geweke.cut()).double().mean())
        assert rejected >= 0.97
