"""fit(): the only optimisation loop, for every family and for the twin.

Everything random is a function of the seed, the epoch and the image, or of a generator whose state is in the
checkpoint, so a run that was interrupted at any step continues bit-equal on a CPU. Sums stay on the device until an
epoch ends.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bayesnet.batches import TrainingData, batch_bounds, epoch_batches
from bayesnet.checkpoint import Checkpoint, first_non_finite, prune_checkpoints, save_checkpoint
from bayesnet.data.sampling import effective_size
from bayesnet.engine import Engine
from bayesnet.errors import CheckpointError, ConfigError, DivergedError, InterruptedRunError
from bayesnet.inference.base import Posterior
from bayesnet.optim import (
    OptimizerConfig,
    OptimizerFactory,
    build_optimizers,
    group_entries,
    optimizer_tensors,
    restore_groups,
    restore_optimizers,
    schedule_factor,
)
from bayesnet.profiling import StepProfiler, profiled
from bayesnet.progress import EpochReport, FitResult, Progress, TrainingConfig, check_together
from bayesnet.step import random_state, set_random_state
from bayesnet.types import JsonObject

MODEL_PREFIX = "model/"


class Listener:
    """Hears of progress; the default does nothing."""

    def on_note(self, text: str) -> None:
        """Called with a plain sentence that the user should see."""

    def on_step(self, step: int, num_steps: int) -> None:
        """Called after each optimisation step."""

    def on_epoch(self, report: EpochReport, num_epochs: int) -> None:
        """Called after each epoch, its checkpoint committed."""

    def on_fitted(self, num_epochs: int) -> None:
        """Called when the last epoch is done, which early stopping may make earlier than planned."""


def fit(
    posterior: Posterior,
    data: TrainingData,
    validate: Callable[[Posterior], float],
    directory: Path,
    *,
    engine: Engine,
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    metadata: JsonObject,
    resume: Checkpoint | None = None,
    listener: Listener | None = None,
    stop_signal: Callable[[], int | None] = lambda: None,
    optimizer_factory: OptimizerFactory | None = None,
    profile: Path | None = None,
) -> FitResult:
    """Train a posterior and keep its best and last checkpoints.

    Args:
        posterior: Changed in place; afterwards it holds the last epoch's state, not the best.
        data: Training images.
        validate: Gives the validation NLL of the posterior, nats per example; lowest is best.
        directory: Where the step-... checkpoints go.
        engine: Where to run.
        optimizer: Optimizers and schedule.
        training: Epochs, batch size, seed, temperature, KL warm-up.
        metadata: Added to every checkpoint's state.json: what is needed to use the model.
        resume: The checkpoint to go on from.
        listener: Hears of progress.
        stop_signal: Asked after each step; a number ends the run with a committed checkpoint.
        optimizer_factory: Makes the optimizer of all parameters that are not variational, in place of
            ``optimizer.name``.
        profile: File for a trace of a few steps.

    Raises:
        ConfigError: Settings exclude each other or do not fit the posterior.
        DivergedError: The loss or a parameter is not finite; the last finite checkpoint stays.
        InterruptedRunError: ``stop_signal`` gave a number; the checkpoint is committed.
        StorageError: A checkpoint could not be written.
    """
    check_together(optimizer, training)
    check_temperature(posterior, training.temperature)
    trainer = _Trainer(posterior, data, directory, engine, optimizer, training, metadata, optimizer_factory)
    # The caller's random state is left as it was: a fit is a function of its seed.
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        trainer.start(resume)
        listener = listener or Listener()
        with profiled(profile, engine.device, listener.on_note) as profiler:
            trainer.run(validate, listener, stop_signal, profiler)
    return trainer.result()


def check_temperature(posterior: Posterior, temperature: float) -> None:
    """Raise ConfigError unless the temperature is 1 or training fits a spread, which is what it acts on.

    A mode does not depend on it: p(w | y)^(1 / T) has the same one for every T.
    """
    if temperature != 1 and not posterior.scale_parameters():
        raise ConfigError(
            "the family fits no spread by its KL, and a mode does not depend on the temperature",
            where=f"training.temperature = {temperature}",
            hint="set it to 1, or take a variational family such as mean_field",
        )


class _Trainer:
    """The state of one fit: parameters, optimizers, progress, and how they are saved."""

    def __init__(
        self,
        posterior: Posterior,
        data: TrainingData,
        directory: Path,
        engine: Engine,
        optimizer: OptimizerConfig,
        training: TrainingConfig,
        metadata: JsonObject,
        optimizer_factory: OptimizerFactory | None,
    ) -> None:
        self.posterior = posterior.to(engine.device)
        self.data, self.directory, self.engine = data, directory, engine
        self.optimizer_config, self.training, self.metadata = optimizer, training, metadata
        self.num_examples = effective_size(data.examples.labels_N, balanced=training.balanced)
        self.optimizers = build_optimizers(posterior, optimizer, optimizer_factory, num_examples=self.num_examples)
        self.peak_rates = [float(group["lr"]) for group in self.param_groups]
        self.bounds = batch_bounds(len(data.examples), training.batch_size)
        self.num_steps = training.epochs * len(self.bounds)
        self.progress = Progress()
        # Running values of the current epoch, on the device until the epoch ends or a checkpoint is due.
        sum_dtype = torch.float32 if engine.device.type == "mps" else torch.float64  # there is no float64 on MPS
        self.nll_sum = torch.zeros((), dtype=sum_dtype)
        self.kl = torch.zeros(())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups as they are now: restoring an optimizer replaces its groups by new ones."""
        return [group for each in self.optimizers for group in each.param_groups]

    def start(self, resume: Checkpoint | None) -> None:
        """Seed a new fit, or restore an interrupted one."""
        if resume is None:
            torch.manual_seed(self.training.seed)
            self.progress.initial_scale = median_scale(self.posterior)
            return
        self.progress = Progress.from_json(resume.state.get("progress", {}))
        self.nll_sum.fill_(self.progress.nll_sum)
        self.kl.fill_(self.progress.kl)
        restore_model(self.posterior, resume)
        restore_optimizers(self.posterior, self.optimizers, resume.tensors)
        restore_groups(self.optimizers, resume.state.get("optimizers"))
        self.set_schedule(self.progress.step - 1)  # for the report, where the epoch's last step was the last one taken
        device = self.engine.device
        if f"rng/{device.type}" in resume.tensors:
            set_random_state(device, resume.tensors[f"rng/{device.type}"])
        else:  # begun on another kind of device: its own noise, but the same at every resumption from here
            torch.manual_seed(self.training.seed + self.progress.step)

    def run(
        self,
        validate: Callable[[Posterior], float],
        listener: Listener,
        stop_signal: Callable[[], int | None],
        profiler: StepProfiler | None = None,
    ) -> None:
        """Run the remaining epochs; after each, validate, note the best, commit, and drop what is no longer needed."""
        clock = _Clock(self.progress.seconds)
        while not self.progress.is_finished(self.training):
            with contextlib.closing(self.epoch_steps()) as steps:  # which ends worker processes however it is left
                for _ in steps:
                    if profiler is not None:
                        profiler.step()
                    listener.on_step(self.progress.step, self.num_steps)
                    if (number := stop_signal()) is not None:
                        self.progress.seconds = clock.seconds()
                        self.save()
                        raise InterruptedRunError(number)
            self.check_finite()
            report = self.finish_epoch(validate(self.posterior), clock)
            listener.on_epoch(report, self.training.epochs)
        listener.on_fitted(self.progress.epoch)

    def epoch_steps(self) -> Generator[None, None, None]:
        """Take the remaining steps of the current epoch, yielding after each."""
        progress = self.progress
        self.posterior.train()
        bounds = self.bounds[progress.batch :]
        batches = epoch_batches(self.data, self.training, self.engine, epoch=progress.epoch, bounds=bounds)
        plan = self.training.plan
        with contextlib.closing(batches):
            for x_BCHW, y in batches:
                kl_weight = self.set_schedule(progress.step)
                loss = self.engine.train_step(self.posterior, self.optimizers, x_BCHW, y, kl_weight, plan)
                self.nll_sum = self.nll_sum + len(x_BCHW) * loss.nll
                self.kl = loss.kl
                progress.batch += 1
                progress.step += 1
                yield

    def set_schedule(self, step: int) -> float:
        """Set every learning rate for a step counted from 0; return the weight of the KL."""
        steps_per_epoch = len(self.bounds)
        factor = schedule_factor(self.optimizer_config, step, self.num_steps, steps_per_epoch)
        for group, rate in zip(self.param_groups, self.peak_rates, strict=True):
            group["lr"] = rate * factor
        warmup_steps = self.training.kl_warmup_epochs * steps_per_epoch
        share = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        return self.training.temperature * share

    def finish_epoch(self, validation_nll: float, clock: _Clock) -> EpochReport:
        """Record the epoch, note whether it is the best, and commit its checkpoint."""
        progress, training = self.progress, self.training
        previous_step = progress.reports[-1].step if progress.reports else 0
        progress.seconds = clock.seconds()
        report = EpochReport(
            epoch=progress.epoch + 1,
            step=progress.step,
            # Mixed images have no label of their own, so there is no plain NLL to report.
            train_nll=None if training.mixup else float(self.nll_sum) / len(self.data.examples),
            kl=float(self.kl),
            kl_per_example=float(self.kl) / self.num_examples,
            validation_nll=validation_nll,
            learning_rate=float(self.param_groups[0]["lr"]),
            posterior_scale=median_scale(self.posterior),
            seconds=progress.seconds,
        )
        progress.reports.append(report)
        progress.epoch, progress.batch = report.epoch, 0
        self.nll_sum = torch.zeros_like(self.nll_sum)
        # What the checkpoint before this one would fall back to must outlive it.
        earlier = {previous_step, progress.best_step}
        if self.is_best(validation_nll):
            progress.best_epoch, progress.best_step, progress.best_nll = report.epoch, report.step, validation_nll
        self.save()
        prune_checkpoints(self.directory, keep={*earlier, progress.best_step, progress.step})
        return report

    def is_best(self, validation_nll: float) -> bool:
        """Return whether the epoch that ends is the best so far; during the KL's warm-up it is only a makeshift."""
        progress = self.progress
        warmup_steps = self.training.kl_warmup_epochs * len(self.bounds)
        if 0 < progress.best_step < warmup_steps <= progress.step and math.isfinite(validation_nll):
            return True
        return validation_nll < progress.best_nll  # false for NaN, so a NaN is never the best

    def check_finite(self) -> None:
        """Raise DivergedError unless the loss and all parameters are finite.

        Raises:
            DivergedError: Naming the epoch, and the parameter where one is to blame.
        """
        name = first_non_finite(self.posterior.state_dict())
        if name is not None or not bool(torch.isfinite(self.nll_sum + self.kl)):
            kept = "; earlier checkpoints are kept" if self.progress.epoch else ""
            raise DivergedError(
                "training diverged",
                where=f"epoch {self.progress.epoch + 1}, {name or 'loss'}",
                hint=f"lower optimizer.learning_rate, or what else is large; raise optimizer.warmup_epochs{kept}",
            )

    def save(self) -> Path:
        """Commit a checkpoint of everything that the rest of the fit depends on; nothing that is not finite."""
        self.check_finite()
        self.progress.nll_sum, self.progress.kl = float(self.nll_sum), float(self.kl)
        tensors = {MODEL_PREFIX + name: tensor for name, tensor in self.posterior.state_dict().items()}
        tensors |= optimizer_tensors(self.posterior, self.optimizers)
        device = self.engine.device
        tensors[f"rng/{device.type}"] = random_state(device)
        optimizers = group_entries(self.optimizers)
        state = {**self.metadata, "progress": self.progress.to_json(), "optimizers": optimizers}
        return save_checkpoint(self.directory, self.progress.step, tensors, state)

    def result(self) -> FitResult:
        """Return how the fit ended.

        Raises:
            DivergedError: No epoch had a finite validation NLL.
        """
        return self.progress.result(self.directory, self.training.selection)


class _Clock:
    """Seconds of training, those before an interruption included."""

    def __init__(self, earlier: float) -> None:
        self.started = time.perf_counter() - earlier

    def seconds(self) -> float:
        """Return the seconds so far."""
        return time.perf_counter() - self.started


def median_scale(posterior: Posterior) -> float | None:
    """Return the median posterior standard deviation, or None for a point estimate."""
    scale = posterior.posterior_scale()
    return None if scale is None else float(scale.median())


def restore_model(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the model tensors of a checkpoint into a module built from the same configuration.

    Raises:
        CheckpointError: Names, shapes or types differ from the module's.
    """
    saved = {n.removeprefix(MODEL_PREFIX): t for n, t in checkpoint.tensors.items() if n.startswith(MODEL_PREFIX)}
    expected = module.state_dict()
    for name in sorted(saved.keys() ^ expected.keys()):
        what = "missing" if name in expected else "unexpected"
        raise CheckpointError(f"{what} tensor in the checkpoint", where=f"{name} in {checkpoint.path}")
    for name, tensor in saved.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise CheckpointError("tensor does not fit the model", where=f"{name} in {checkpoint.path}")
    module.load_state_dict(saved)
