"""What a model takes is said before it is trained, in numbers that can be checked; what cannot fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bayesnet import workflows
from bayesnet.data import ImageData, load_data
from bayesnet.engine import Engine
from bayesnet.errors import ConfigError
from bayesnet.settings import Settings, build_settings
from bayesnet.workflows import TrainListener, costs
from bayesnet.workflows.trained import NO_USER_CODE, new_posterior

SMALL = ("backbone.width=2", "training.batch_size=16")


class Order(TrainListener):
    """Remembers what came when."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_note(self, text: str) -> None:
        """Remember it."""
        self.events.append(text)

    def on_step(self, step: int, num_steps: int) -> None:
        """Remember that training began."""
        self.events.append("step")


def given(folder: Path, **sections: dict[str, Any]) -> tuple[Settings, ImageData]:
    defaults = {"data": {"spec": f"folder:{folder}"}, "backbone": {"width": 2}, "training": {"batch_size": 16}}
    settings = build_settings({**defaults, **sections})
    return settings, load_data(settings.data)


def test_each_model_says_what_it_takes_before_it_is_trained(folder_data: Path, tmp_path: Path) -> None:
    listener = Order()
    workflows.train(
        family="nuts",
        data=f"folder:{folder_data}",
        epochs=1,
        overrides=(*SMALL, "inference.draws=20", "inference.warmup=20", "inference.chains=2", "inference.max_draws=40"),
        out=tmp_path / "run",
        listener=listener,
    )
    before = listener.events[: listener.events.index("step")]
    assert any(event.startswith("Deterministic (deterministic): ") and "ms a step" in event for event in before)
    assert any(event.startswith("Bayesian (nuts): ") and " to finalize." in event for event in before)
    # And what was found is said after it.
    assert any("max rhat" in event and "num divergences" in event for event in listener.events)


def test_bytes_and_steps_are_counted(folder_data: Path) -> None:
    settings, data = given(folder_data, inference={"family": "ensemble", "members": 3})
    posterior = new_posterior(settings, data.preprocessing, len(data.classes), len(data.train), NO_USER_CODE)
    cost = costs.count_cost(posterior, settings, len(data.train))
    member = sum(parameter.numel() for parameter in posterior.members()[0].parameters())
    stored = sum(tensor.nbytes for tensor in posterior.state_dict().values())
    assert (cost.num_trained, cost.stored_bytes) == (member, stored)
    assert cost.training_bytes == stored + 3 * 4 * member
    assert cost.num_steps == 3 * settings.training.epochs * -(-len(data.train) // 16)


def test_a_step_is_timed_and_leaves_no_trace(folder_data: Path) -> None:
    settings, data = given(folder_data)
    posterior = new_posterior(settings, data.preprocessing, len(data.classes), len(data.train), NO_USER_CODE)
    before = [parameter.detach().clone() for parameter in posterior.parameters()]
    seconds = costs.time_step(posterior, settings, data, Engine(torch.device("cpu")))
    assert seconds > 0
    assert any(not torch.equal(old, new) for old, new in zip(before, posterior.parameters(), strict=True))


def test_a_run_does_not_depend_on_it(folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that are thrown away draw noise: training must not see that they did."""
    ends = []
    for name in ("timed", "untimed"):
        if name == "untimed":
            monkeypatch.setattr("bayesnet.workflows.preparing.time_step", lambda *arguments: 0.0)
        torch.manual_seed(0)
        summary = workflows.train(
            bayesian=True, data=f"folder:{folder_data}", epochs=1, overrides=SMALL, out=tmp_path / name
        )
        ends.append((summary["models"]["bayesian"]["nll"], float(torch.rand(()))))
    assert ends[0] == ends[1]


def test_what_cannot_fit_is_refused(folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "physical_memory", lambda: 10_000)
    with pytest.raises(ConfigError, match=r"training takes .* KiB, of 9.8 KiB that there are \(inference.family = det"):
        workflows.train(bayesian=True, data=f"folder:{folder_data}", overrides=SMALL, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
