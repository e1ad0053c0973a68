"""What a step costs, counted in dispatched operators and host synchronisations: exact on a CPU, no clock involved."""

from __future__ import annotations

import pytest
import torch

from bayesnet.backbones import BackboneConfig, build_backbone
from bayesnet.engine import Engine
from bayesnet.inference import build_inference_config, build_posterior
from bayesnet.inference.base import Parts, Posterior
from bayesnet.optim import OptimizerConfig, build_optimizers
from bayesnet.testing import OperatorCounter

BATCH = 16


def posterior(**inference: object) -> Posterior:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(width=8), channels=1, height=8, width=8)
    return build_posterior(Parts(backbone, 10, 1000), build_inference_config(inference))


def count_step(model: Posterior) -> OperatorCounter:
    engine = Engine(torch.device("cpu"))
    optimizers = build_optimizers(model.train(), OptimizerConfig())
    x_BCHW, y_B = torch.randn(BATCH, 1, 8, 8), torch.randint(10, (BATCH,))
    engine.train_step(model, optimizers, x_BCHW, y_B)  # the first step makes the optimizers' state
    with OperatorCounter() as counter:
        engine.train_step(model, optimizers, x_BCHW, y_B)
    return counter


@pytest.mark.parametrize(("estimator", "allowed"), [("local", 90), ("weight", 180)])
def test_a_bayesian_step_costs_few_operators_more_and_no_host_sync(estimator: str, allowed: int) -> None:
    twin = count_step(posterior(family="deterministic"))
    bayesian = count_step(posterior(family="mean_field", estimator=estimator))
    assert twin.num_host_syncs == bayesian.num_host_syncs == 0
    assert bayesian.num_operators <= twin.num_operators + allowed


def test_predicting_with_256_draws_costs_few_operators_more_than_the_backbone() -> None:
    model = posterior(family="mean_field").eval()
    counts = []
    for num_images in (2, 32):
        x_BCHW = torch.randn(num_images, 1, 8, 8)
        with torch.inference_mode(), OperatorCounter() as counter:
            model.predict_draws(x_BCHW, 256)
        counts.append((counter.num_operators, counter.num_host_syncs))
    with torch.inference_mode(), OperatorCounter() as forward:
        model.get_submodule("model.backbone")(torch.randn(2, 1, 8, 8))
    assert counts[0] == counts[1], "the cost depends on the batch"
    assert counts[0][0] <= forward.num_operators + 40
    assert counts[0][1] == 0


def test_the_counter_sees_a_host_sync() -> None:
    """Planted: reading the loss back, as stock estimators do."""
    with OperatorCounter() as counter:
        float(torch.ones(3).sum())
    assert counter.num_host_syncs == 1
