"""fit(): the only optimisation loop, for every family and for the twin.

Everything random is a function of the seed, the epoch and the image, or of a generator whose state is in the
checkpoint, so a run that was interrupted at any step continues bit-equal on a CPU. Sums stay on the device until an
epoch ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bayesnet.checkpoint import Checkpoint, first_non_finite, prune_checkpoints, save_checkpoint
from bayesnet.data import Examples, Preprocessing
from bayesnet.data.augment import Augmentation, augment, epoch_draws
from bayesnet.engine import Engine
from bayesnet.errors import CheckpointError, DivergedError, InterruptedRunError
from bayesnet.inference.base import Posterior
from bayesnet.optim import OptimizerConfig, build_optimizers, optimizer_tensors, restore_optimizers, schedule_factor
from bayesnet.progress import EpochReport, FitResult, Progress, TrainingConfig
from bayesnet.types import JsonObject

MODEL_PREFIX = "model/"


class TrainingData(NamedTuple):
    """What fit reads: training images and how they are normalised and augmented."""

    examples: Examples
    preprocessing: Preprocessing
    augmentation: Augmentation


class Listener:
    """Hears of progress; the default does nothing."""

    def on_step(self, step: int, num_steps: int) -> None:
        """Called after each optimisation step."""

    def on_epoch(self, report: EpochReport, num_epochs: int) -> None:
        """Called after each epoch, its checkpoint committed."""


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
) -> FitResult:
    """Train a posterior and keep its best and last checkpoints.

    Args:
        posterior: Changed in place; afterwards it holds the last epoch's state, not the best.
        data: Training images.
        validate: Gives the validation NLL of the posterior, nats per example; lowest is best.
        directory: Where the step-... checkpoints go.
        engine: Where to run.
        optimizer: Optimizers and schedule.
        training: Epochs, batch size, seed, KL warm-up.
        metadata: Added to every checkpoint's state.json: what is needed to use the model.
        resume: The checkpoint to go on from.
        listener: Hears of progress.
        stop_signal: Asked after each step; a number ends the run with a committed checkpoint.

    Raises:
        DivergedError: The loss or a parameter is not finite; the last finite checkpoint stays.
        InterruptedRunError: ``stop_signal`` gave a number; the checkpoint is committed.
        StorageError: A checkpoint could not be written.
    """
    trainer = _Trainer(posterior, data, directory, engine, optimizer, training, metadata)
    # The caller's random state is left as it was: a fit is a function of its seed.
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        trainer.start(resume)
        trainer.run(validate, listener or Listener(), stop_signal)
    return trainer.result()


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
    ) -> None:
        self.posterior = posterior.to(engine.device)
        self.data, self.directory, self.engine = data, directory, engine
        self.optimizer_config, self.training, self.metadata = optimizer, training, metadata
        self.optimizers = build_optimizers(posterior, optimizer)
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
        self.set_schedule(self.progress.step - 1)  # for the report, where the epoch's last step was the last one taken
        torch.set_rng_state(resume.tensors["rng/cpu"])
        if "rng/cuda" in resume.tensors and self.engine.device.type == "cuda":
            torch.cuda.set_rng_state(resume.tensors["rng/cuda"], self.engine.device)

    def run(
        self, validate: Callable[[Posterior], float], listener: Listener, stop_signal: Callable[[], int | None]
    ) -> None:
        """Run the remaining epochs; after each, validate, note the best, commit, and drop what is no longer needed."""
        clock = _Clock(self.progress.seconds)
        while self.progress.epoch < self.training.epochs:
            for _ in self.epoch_steps():
                listener.on_step(self.progress.step, self.num_steps)
                if (number := stop_signal()) is not None:
                    self.progress.seconds = clock.seconds()
                    self.save()
                    raise InterruptedRunError(number)
            self.check_finite()
            report = self.finish_epoch(validate(self.posterior), clock)
            listener.on_epoch(report, self.training.epochs)

    def epoch_steps(self) -> Iterator[None]:
        """Take the remaining steps of the current epoch, yielding after each."""
        progress, data, seed = self.progress, self.data, self.training.seed
        order = epoch_order(len(data.examples), seed=seed, epoch=progress.epoch)
        draws = epoch_draws(len(data.examples), data.augmentation, seed=seed, epoch=progress.epoch)
        self.posterior.train()
        for start, stop in self.bounds[progress.batch :]:
            indices = order[start:stop]
            pixels_BCHW = self.engine.put(data.examples.read(indices))
            if not data.augmentation.is_identity:
                pixels_BCHW = augment(pixels_BCHW, draws.select(indices).to(self.engine.device))
            x_BCHW = data.preprocessing.normalize(pixels_BCHW)
            y_B = self.engine.put(data.examples.labels_N[indices])
            kl_weight = self.set_schedule(progress.step)
            loss = self.engine.train_step(self.posterior, self.optimizers, x_BCHW, y_B, kl_weight)
            self.nll_sum = self.nll_sum + (stop - start) * loss.nll
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
        return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0

    def finish_epoch(self, validation_nll: float, clock: _Clock) -> EpochReport:
        """Record the epoch, note whether it is the best, and commit its checkpoint."""
        progress, num_examples = self.progress, len(self.data.examples)
        previous_step = progress.reports[-1].step if progress.reports else 0
        progress.seconds = clock.seconds()
        report = EpochReport(
            epoch=progress.epoch + 1,
            step=progress.step,
            train_nll=float(self.nll_sum) / num_examples,
            kl=float(self.kl),
            kl_per_example=float(self.kl) / num_examples,
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
        if validation_nll < progress.best_nll:  # false for NaN, so a NaN is never the best
            progress.best_epoch, progress.best_step, progress.best_nll = report.epoch, report.step, validation_nll
        self.save()
        prune_checkpoints(self.directory, keep={*earlier, progress.best_step, progress.step})
        return report

    def check_finite(self) -> None:
        """Raise DivergedError unless the loss and all parameters are finite.

        Raises:
            DivergedError: Naming the epoch, and the parameter where one is to blame.
        """
        name = first_non_finite(self.posterior.state_dict())
        if name is not None or not bool(torch.isfinite(self.nll_sum + self.kl)):
            raise DivergedError(
                "training diverged",
                where=f"epoch {self.progress.epoch + 1}, {name or 'loss'}",
                hint="lower optimizer.learning_rate or raise optimizer.warmup_epochs; earlier checkpoints are kept",
            )

    def save(self) -> Path:
        """Commit a checkpoint of everything that the rest of the fit depends on; nothing that is not finite."""
        self.check_finite()
        self.progress.nll_sum, self.progress.kl = float(self.nll_sum), float(self.kl)
        tensors = {MODEL_PREFIX + name: tensor for name, tensor in self.posterior.state_dict().items()}
        tensors |= optimizer_tensors(self.posterior, self.optimizers)
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.engine.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.engine.device)
        state = {**self.metadata, "progress": self.progress.to_json()}
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


def epoch_order(num_examples: int, *, seed: int, epoch: int) -> Tensor:
    """Return the order (N,) of the training images in an epoch: a function of seed and epoch alone."""
    # Not torch's generator: on a CPU it takes 32 bits of its seed, so that all seeds would give one order. The third
    # number keeps the stream apart from the augmentation's.
    return torch.from_numpy(np.argsort(np.random.PCG64([seed, epoch, 1]).random_raw(num_examples), kind="stable"))


def batch_bounds(num_examples: int, batch_size: int) -> list[tuple[int, int]]:
    """Return the (start, stop) of each batch; a last batch of one image joins the one before it.

    Example:
        >>> batch_bounds(9, 4)
        [(0, 4), (4, 9)]
    """
    starts = list(range(0, num_examples, batch_size))
    if len(starts) > 1 and num_examples - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_examples], strict=True))


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
