"""Devices by name, and the one training step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bayesnet.engine import Engine, available_devices, resolve_devices
from bayesnet.errors import DeviceError
from bayesnet.inference.base import Posterior
from bayesnet.types import Loss

CPU = torch.device("cpu")


class Quadratic(Posterior):
    """A "posterior" with one parameter w: NLL w^2 / 2, KL 10 w, N = 5."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0))

    def loss(self, x_BCHW: Tensor, y_B: Tensor) -> Loss:
        """Return the three parts."""
        nll, kl = self.w**2 / 2, 10 * self.w
        return Loss(nll + kl / 5, nll, kl, nll)

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return nothing of use."""
        return x_BCHW

    def predict_draws(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        """Return nothing of use."""
        return x_BCHW


def test_the_cpu_is_always_there_and_last() -> None:
    assert available_devices()[-1] == "cpu"
    assert resolve_devices("cpu") == (CPU,)
    assert resolve_devices(" cpu , cpu ") == (CPU, CPU)


def test_auto_takes_the_accelerator_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesnet.engine.available_devices", lambda: ("cuda:0", "cuda:1", "cpu"))
    assert resolve_devices("auto") == (torch.device("cuda:0"),)
    assert resolve_devices("cuda") == (torch.device("cuda:0"),)
    assert resolve_devices("cuda:1,cpu") == (torch.device("cuda:1"), CPU)
    with pytest.raises(DeviceError) as caught:
        resolve_devices("cpu,cuda:2")
    assert str(caught.value) == "no such device (cuda:2): this machine has cuda:0, cuda:1, cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:0", "cuda:-1", "auto,cpu", "meta"])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(DeviceError, match="no such device") as caught:
        resolve_devices(name)
    assert caught.value.exit_code == 5
    assert "this machine has " in str(caught.value)


@pytest.mark.parametrize("name", ["", "cpu,", " , "])
def test_empty_device_names(name: str) -> None:
    with pytest.raises(DeviceError) as caught:
        resolve_devices(name)
    assert str(caught.value).startswith(f"empty device name ({name!r}): this machine has ")


def test_one_device_at_a_time() -> None:
    with pytest.raises(DeviceError, match="one device at a time"):
        Engine.for_one("cpu,cpu")
    assert Engine.for_one("cpu").device == CPU


@pytest.mark.parametrize(("kl_weight", "gradient"), [(1.0, 3 + 2.0), (0.0, 3.0), (0.5, 3 + 1.0)])
def test_a_step_minimises_nll_plus_weighted_kl(kl_weight: float, gradient: float) -> None:
    """d/dw (w^2 / 2 + weight * 10 w / 5) = w + 2 weight, at w = 3."""
    posterior, x_B = Quadratic(), torch.zeros(1)
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
    posterior.w.grad = torch.tensor(100.0)  # of an earlier step: must not be added
    loss = Engine(CPU).train_step(posterior, [optimizer], x_B, x_B, torch.tensor(kl_weight))
    assert posterior.w.item() == pytest.approx(3 - 0.1 * gradient)
    # The parts as they were before the step, the objective unweighted, and no graph kept alive.
    assert [part.item() for part in loss] == pytest.approx([4.5 + 6.0, 4.5, 30.0, 4.5])
    assert not any(part.requires_grad for part in loss)


def test_put_keeps_what_is_there_already() -> None:
    tensor = torch.zeros(2)
    assert Engine(CPU).put(tensor) is tensor
    Engine(CPU).synchronize()
