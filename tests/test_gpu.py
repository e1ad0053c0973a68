"""The same code on a CUDA device: agreement with the CPU, exact resume, no host synchronisation in a step."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesnet import workflows
from bayesnet.backbones import BackboneConfig, build_backbone
from bayesnet.engine import Engine
from bayesnet.errors import InterruptedRunError
from bayesnet.inference import FAMILIES, build_inference_config, build_posterior
from bayesnet.inference.base import Parts
from bayesnet.optim import OptimizerConfig, build_optimizers
from bayesnet.step import StepPlan, take_step

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_step_never_waits_for_the_device(family: str) -> None:
    torch.manual_seed(0)
    new = partial(build_backbone, BackboneConfig(width=8), channels=1, height=8, width=8)
    parts = Parts(new(), 10, 1000, new_backbone=new)
    posterior = build_posterior(parts, build_inference_config({"family": family})).to(CUDA)
    optimizers = build_optimizers(posterior.train(), OptimizerConfig())
    engine = Engine(CUDA)
    x_BCHW, y_B = torch.randn(16, 1, 8, 8, device=CUDA), torch.randint(10, (16,), device=CUDA)
    engine.train_step(posterior, optimizers, x_BCHW, y_B)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.train_step(posterior, optimizers, x_BCHW, y_B)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("plan", [StepPlan(sam_rho=0.1), StepPlan(accumulation=2), StepPlan(clip_norm=1.0)], ids=str)
def test_no_option_of_a_step_waits_for_the_device(plan: StepPlan) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(width=8), channels=1, height=8, width=8)
    posterior = build_posterior(Parts(backbone, 10, 1000), build_inference_config({"family": "mean_field"})).to(CUDA)
    optimizers = build_optimizers(posterior.train(), OptimizerConfig())
    x_BCHW, y_B = torch.randn(16, 1, 8, 8, device=CUDA), torch.randint(10, (16,), device=CUDA)
    take_step(posterior, optimizers, x_BCHW, y_B, plan=plan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_step(posterior, optimizers, x_BCHW, y_B, plan=plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("devices", [("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:0")], ids=str)
def test_an_interrupted_run_goes_on_elsewhere(tmp_path: Path, devices: tuple[str, str]) -> None:
    calls = iter(range(1, 10**6))
    with pytest.raises(InterruptedRunError):
        workflows.train(
            bayesian=True,
            epochs=2,
            devices=devices[0],
            overrides=("training.sam_rho=0.05", "data.rotate=10", "data.colour=0.2"),
            out=tmp_path / "run",
            stop_signal=lambda: 15 if next(calls) == 20 else None,
        )
    summary = workflows.train(resume=tmp_path / "run", devices=devices[1])
    assert summary["models"]["bayesian"]["accuracy"] > 0.5


def test_predictions_agree_with_the_cpu(calibrated_run: Path) -> None:
    images = [calibrated_run / "examples"]
    found = {}
    for device in ("cpu", "cuda:0"):
        rows = workflows.predict(images, run=calibrated_run, devices=device)["predictions"]
        found[device] = np.array([[entry["probability"] for entry in row["classes"]] for row in rows])
    np.testing.assert_allclose(found["cuda:0"], found["cpu"], atol=1e-3)  # convolutions may run in TF32


def test_train_calibrate_and_bench_on_the_device(tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = workflows.train(bayesian=True, epochs=5, devices="cuda:0", out=run)
    assert summary["models"]["bayesian"]["accuracy"] > 0.9
    assert workflows.calibrate(run, devices="cuda:0")["models"]["bayesian"]["after"]["accuracy"] > 0.9
    rows = workflows.bench(run, devices="cuda:0", seconds=1)["rows"]
    assert all(row["peak_memory_bytes"] > 0 for row in rows)
