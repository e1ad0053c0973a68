"""Options of training: all of them on at once, interrupted 20 times; early stopping, soft labels, balance, a trace."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bayesnet.backbones import BackboneConfig, build_backbone
from bayesnet.batches import TrainingData
from bayesnet.bsam import BSAM
from bayesnet.checkpoint import newest_checkpoint
from bayesnet.data import ArrayExamples, Preprocessing
from bayesnet.data.augment import Augmentation
from bayesnet.data.sampling import effective_size
from bayesnet.errors import CheckpointError, ConfigError, InterruptedRunError, StorageError
from bayesnet.inference import build_inference_config, build_posterior
from bayesnet.inference.base import Parts, Posterior
from bayesnet.optim import OptimizerConfig, OptimizerFactory
from bayesnet.progress import FitResult, TrainingConfig
from bayesnet.training import Listener, fit
from tests.engines import SpyEngine

NUM_IMAGES, NUM_CLASSES, NUM_INTERRUPTIONS = 41, 3, 20
CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(1, 8, 8, mean=(0.5,), std=(0.3,))
EVERYTHING = TrainingConfig(
    epochs=2,
    batch_size=8,
    kl_warmup_epochs=1.5,
    balanced=True,
    label_smoothing=0.1,
    mixup=0.4,
    accumulation=2,
    clip_norm=0.05,
    sam_rho=0.05,
    patience=2,
)
PLAIN_TRAINING = TrainingConfig(epochs=2, batch_size=8)


class SlowExamples(ArrayExamples):
    """Images that worker processes are worth having for: they say that they are not in memory."""

    @property
    def in_memory(self) -> bool:
        """Whether reading is a copy of memory."""
        return False


class Fitted(NamedTuple):
    """What a fit left."""

    result: FitResult
    posterior: Posterior
    spy: SpyEngine


def examples() -> SlowExamples:
    """Return uneven classes, each with one bright third."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.tensor([0] * 25 + [1] * 10 + [2] * 6)
    images_NCHW = torch.randint(0, 100, (NUM_IMAGES, 1, 8, 8), generator=generator)
    for label in range(NUM_CLASSES):
        images_NCHW[labels_N == label, :, 2 * label : 2 * label + 3] += 100
    return SlowExamples(images_NCHW.to(torch.uint8), labels_N)


def run_fit(
    directory: Path,
    training: TrainingConfig,
    *,
    optimizer: OptimizerConfig | None = None,
    workers: int = 0,
    resume: bool = False,
    validate: Callable[[Posterior], float] = lambda posterior: float(next(posterior.parameters()).detach().sum()),
    stop_after: int | None = None,
    factory: OptimizerFactory | None = None,
    profile: Path | None = None,
    family: str = "mean_field",
    listener: Listener | None = None,
) -> Fitted:
    data = examples()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = build_backbone(BackboneConfig(width=2), channels=1, height=8, width=8)
        parts = Parts(backbone, NUM_CLASSES, effective_size(data.labels_N, balanced=training.balanced))
        posterior = build_posterior(parts, build_inference_config({"family": family}))
    calls = iter(range(1, 10**6))
    spy = SpyEngine()
    result = fit(
        posterior,
        TrainingData(data, PREPROCESSING, Augmentation(crop_padding=1, flip=True), workers),
        validate,
        directory,
        engine=spy,
        optimizer=optimizer or OptimizerConfig(learning_rate=0.01),
        training=training,
        metadata={},
        resume=newest_checkpoint(directory)[0] if resume else None,
        stop_signal=lambda: 15 if next(calls) == stop_after else None,
        optimizer_factory=factory,
        profile=profile,
        listener=listener,
    )
    return Fitted(result, posterior, spy)


def reports(fitted: Fitted) -> list[object]:
    return [report._replace(seconds=0.0) for report in fitted.result.reports]


def assert_same_end(left: Path, right: Path) -> None:
    one, two = newest_checkpoint(left)[0], newest_checkpoint(right)[0]
    assert one is not None
    assert two is not None
    assert one.tensors.keys() == two.tensors.keys()
    assert [name for name, tensor in one.tensors.items() if not torch.equal(tensor, two.tensors[name])] == []


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_20_of_20_interruptions_at_random_steps_end_bit_equal(tmp_path: Path, workers: int) -> None:
    """Every option on: parameters, optimizers, random state, logged losses, sample order and augmentation agree.

    No false alarm is possible; with 20 of 20 the chance of a failure is below 14 % at 95 %. The nightly kill tests have
    more.
    """
    straight = run_fit(tmp_path / "straight", EVERYTHING)
    num_steps = len(straight.spy.seen)
    generator = random.Random(workers)
    for number in range(NUM_INTERRUPTIONS):
        directory = tmp_path / f"resumed-{number}"
        stop = generator.randrange(1, num_steps + 1)
        torch.manual_seed(number)  # what the caller's random state is must not matter
        with pytest.raises(InterruptedRunError):
            run_fit(directory, EVERYTHING, workers=workers, stop_after=stop)
        resumed = run_fit(directory, EVERYTHING, workers=workers, resume=True)
        assert resumed.spy.seen == straight.spy.seen[stop:], f"stopped after step {stop}"
        assert reports(resumed) == reports(straight)
        assert_same_end(tmp_path / "straight", directory)


@pytest.mark.parametrize(
    "change",
    [
        {"balanced": False},
        {"label_smoothing": 0.0},
        {"mixup": 0.0},
        {"clip_norm": 0.0},
        {"sam_rho": 0.0},
        {"accumulation": 1},
    ],
    ids=str,
)
def test_each_option_changes_the_training(tmp_path: Path, change: dict[str, Any]) -> None:
    """What the test above could not see: an option that is read nowhere."""
    ends: list[Tensor] = []
    for training in (EVERYTHING, replace(EVERYTHING, **change)):
        posterior = run_fit(tmp_path / str(len(ends)), replace(training, epochs=1)).posterior
        ends.append(torch.cat([p.detach().flatten() for p in posterior.parameters()]))
    assert not torch.equal(*ends)


def scripted(*values: float) -> Callable[[Posterior], float]:
    remaining = iter(values)
    return lambda posterior: next(remaining)


def test_early_stopping_waits_for_its_patience(tmp_path: Path) -> None:
    training = replace(PLAIN_TRAINING, epochs=9, patience=2)
    result = run_fit(tmp_path, training, validate=scripted(0.5, 0.3, 0.4, math.nan)).result
    assert [report.epoch for report in result.reports] == [1, 2, 3, 4]
    assert result.epoch == 2
    with_no_patience = run_fit(tmp_path / "b", replace(training, patience=0, epochs=4), validate=scripted(0.1, 1, 1, 1))
    assert len(with_no_patience.result.reports) == 4


def test_a_resumed_fit_stops_early_too(tmp_path: Path) -> None:
    training = replace(PLAIN_TRAINING, epochs=9, patience=2)
    with pytest.raises(InterruptedRunError):
        run_fit(tmp_path, training, validate=scripted(0.5, 0.3, 0.4), stop_after=5 * 3 + 1)
    resumed = run_fit(tmp_path, training, resume=True, validate=scripted(0.6))
    assert len(resumed.result.reports) == 4
    again = run_fit(tmp_path, training, resume=True, validate=scripted())
    assert len(again.result.reports) == 4
    assert again.spy.seen == []


def test_the_best_epoch_comes_after_the_warm_up_of_the_kl(tmp_path: Path) -> None:
    training = replace(PLAIN_TRAINING, epochs=4, kl_warmup_epochs=2)
    result = run_fit(tmp_path / "a", training, validate=scripted(0.1, 0.4, 0.3, 0.35)).result
    assert result.epoch == 3
    only_warm_up = replace(training, kl_warmup_epochs=9)
    assert run_fit(tmp_path / "b", only_warm_up, validate=scripted(0.5, 0.4, 0.45, 0.6)).result.epoch == 2


@pytest.mark.parametrize("family", ["deterministic", "mean_field"])
def test_the_reported_nll_is_that_of_plain_labels(tmp_path: Path, family: str) -> None:
    """With a learning rate of nearly 0 the weights stay, so a smoothed run must report what a plain one does."""
    still = OptimizerConfig(learning_rate=1e-12, variational_learning_rate=1e-12, weight_decay=0.0)
    plain = run_fit(tmp_path / "plain", PLAIN_TRAINING, optimizer=still, family=family)
    smooth_training = replace(PLAIN_TRAINING, label_smoothing=0.5)
    smooth = run_fit(tmp_path / "smooth", smooth_training, optimizer=still, family=family)
    nll = plain.result.reports[0].train_nll
    assert nll is not None
    assert smooth.result.reports[0].train_nll == pytest.approx(nll, rel=1e-5)
    assert smooth.spy.labels[0].shape == (8, NUM_CLASSES)
    mixed = run_fit(tmp_path / "mixed", replace(PLAIN_TRAINING, mixup=1.0), optimizer=still, family=family)
    assert [report.train_nll for report in mixed.result.reports] == [None, None]


def test_balanced_batches_and_their_effective_size(tmp_path: Path) -> None:
    fitted = run_fit(tmp_path, replace(PLAIN_TRAINING, balanced=True))
    shown_K = torch.cat(fitted.spy.labels[:5]).bincount()
    assert shown_K.tolist() == [14, 14, 13]
    report = fitted.result.reports[0]
    size = effective_size(examples().labels_N, balanced=True)
    assert size == round(9 / (1 / 25 + 1 / 10 + 1 / 6))
    assert report.kl_per_example == pytest.approx(report.kl / size)


def test_a_users_optimizer_trains_resumes_and_keeps_its_numbers(tmp_path: Path) -> None:
    """Adadelta's state holds tensors, Counting's a Python number: both come back as what they were."""

    class Counting(torch.optim.SGD):
        """Scales its step by how often it stepped, counted in Python."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override] # noqa: ANN401 - as torch has it
            """Step."""
            for group in self.param_groups:
                for parameter in group["params"]:
                    count = self.state[parameter].get("count", 0) + 1
                    self.state[parameter]["count"] = count
                    assert isinstance(count, int)
                    if parameter.grad is not None:
                        with torch.no_grad():
                            parameter -= group["lr"] / count * parameter.grad

    factories: list[OptimizerFactory] = [
        lambda groups: torch.optim.Adadelta(groups, lr=0.1),
        lambda groups: Counting(groups, lr=0.1),
    ]
    for number, factory in enumerate(factories):
        straight, directory = tmp_path / f"straight-{number}", tmp_path / f"resumed-{number}"
        run_fit(straight, PLAIN_TRAINING, factory=factory)
        with pytest.raises(InterruptedRunError):
            run_fit(directory, PLAIN_TRAINING, factory=factory, stop_after=3)
        run_fit(directory, PLAIN_TRAINING, factory=factory, resume=True)
        assert_same_end(straight, directory)


def test_an_optimizer_that_cannot_be_resumed_or_forgets_parameters_is_refused(tmp_path: Path) -> None:
    class Hoarder(torch.optim.SGD):
        """Keeps a list."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override] # noqa: ANN401 - as torch has it
            """Step nowhere."""
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["history"] = []

    with pytest.raises(ConfigError, match=r"state that a checkpoint cannot hold \(Hoarder, history: list\)"):
        run_fit(tmp_path / "a", PLAIN_TRAINING, factory=lambda groups: Hoarder(groups, lr=0.1))
    with pytest.raises(ConfigError, match=r"must give a torch\.optim\.Optimizer"):
        run_fit(tmp_path / "b", PLAIN_TRAINING, factory=lambda groups: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match="must own the parameters that it was given, each once"):
        run_fit(tmp_path / "c", PLAIN_TRAINING, factory=lambda groups: torch.optim.SGD(groups[:1], lr=0.1))
    factories: dict[str, OptimizerFactory] = {
        r"the optimizer needs a closure, which training has not \(LBFGS\)": lambda groups: torch.optim.LBFGS(
            [p for group in groups for p in group["params"]]
        ),
        r"an entry that a checkpoint cannot hold \(SGD, odd: object\)": lambda groups: torch.optim.SGD(
            [{**group, "odd": object()} for group in groups], lr=0.1
        ),
    }
    for text, factory in factories.items():
        with pytest.raises(ConfigError, match=text):
            run_fit(tmp_path / "d", PLAIN_TRAINING, factory=factory)


class GroupState(torch.optim.SGD):
    """Counts its steps in the parameter group, as schedule-free optimizers do, and slows down by the count."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override] # noqa: ANN401 - as torch has it
        """Step."""
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    with torch.no_grad():
                        parameter -= group["lr"] / group["k"] * parameter.grad


@pytest.mark.parametrize(
    "factory",
    [
        lambda groups: torch.optim.Adafactor(groups, lr=0.01),
        lambda groups: torch.optim.NAdam(groups, lr=0.01),
        lambda groups: GroupState(groups, lr=0.1),
        lambda groups: BSAM(groups, lr=0.01, num_examples=NUM_IMAGES),
    ],
    ids=["state of another shape", "NAdam", "state in groups", "bSAM"],
)
def test_optimizers_of_every_kind_resume_bit_equal(tmp_path: Path, factory: OptimizerFactory) -> None:
    training = replace(EVERYTHING, sam_rho=0.0)
    run_fit(tmp_path / "straight", training, factory=factory)
    with pytest.raises(InterruptedRunError):
        run_fit(tmp_path / "resumed", training, factory=factory, stop_after=7)
    run_fit(tmp_path / "resumed", training, factory=factory, resume=True)
    assert_same_end(tmp_path / "straight", tmp_path / "resumed")


def test_another_optimizer_cannot_go_on(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        run_fit(tmp_path, PLAIN_TRAINING, factory=lambda groups: torch.optim.Adam(groups, lr=0.01), stop_after=3)
    for factory in (None, lambda groups: torch.optim.RMSprop(groups, lr=0.01)):
        with pytest.raises(CheckpointError, match="the checkpoint was made by another optimizer"):
            run_fit(tmp_path, PLAIN_TRAINING, factory=factory, resume=True)


def test_patience_waits_for_the_end_of_the_warm_up(tmp_path: Path) -> None:
    training = replace(PLAIN_TRAINING, epochs=9, patience=1, kl_warmup_epochs=3)
    result = run_fit(tmp_path, training, validate=scripted(0.1, 0.2, 0.3, 0.5, 0.6)).result
    assert [report.epoch for report in result.reports] == [1, 2, 3, 4]
    assert result.epoch == 3


def test_a_trace_that_cannot_be_written_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ears(Listener):
        """Remembers notes."""

        def __init__(self) -> None:
            self.notes: list[str] = []

        def on_note(self, text: str) -> None:
            """Remember."""
            self.notes.append(text)

    ears = Ears()
    long_batches = replace(PLAIN_TRAINING, epochs=1, batch_size=20)
    run_fit(tmp_path / "short", long_batches, profile=tmp_path / "short.json", listener=ears)
    assert ears.notes == ["No trace was written: there were 2 steps, and the first 3 are not traced."]
    assert not (tmp_path / "short.json").exists()

    def full(path: Path, data: bytes) -> None:
        raise StorageError("no space left on device", where=path)

    monkeypatch.setattr("bayesnet.profiling.storage.write_bytes", full)
    run_fit(tmp_path / "full", PLAIN_TRAINING, profile=tmp_path / "full.json", listener=ears)
    assert ears.notes[1].startswith("No trace was written: no space left on device")


def test_a_trace_of_ten_steps(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    run_fit(tmp_path / "run", replace(PLAIN_TRAINING, epochs=3), profile=path)
    events = json.loads(path.read_text())["traceEvents"]
    assert len([event for event in events if event.get("name") == "aten::convolution"]) == 4 * 10
    short = tmp_path / "short.json"
    run_fit(tmp_path / "short", replace(PLAIN_TRAINING, epochs=1), profile=short)
    assert json.loads(short.read_text())["traceEvents"]
    with pytest.raises(ConfigError, match="the folder of the trace does not exist"):
        run_fit(tmp_path / "none", PLAIN_TRAINING, profile=tmp_path / "missing" / "trace.json")
    with pytest.raises(ConfigError, match="the trace needs a regular file"):
        run_fit(tmp_path / "none", PLAIN_TRAINING, profile=tmp_path)
