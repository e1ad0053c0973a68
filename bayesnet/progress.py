"""What a fit knows about itself: its settings, its progress (which every checkpoint holds) and its reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Literal, NamedTuple

from bayesnet.checkpoint import step_name
from bayesnet.config import require
from bayesnet.errors import CheckpointError, DivergedError
from bayesnet.optim import OptimizerConfig
from bayesnet.step import StepPlan
from bayesnet.types import JsonObject


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, in what batches, from which seed.

    Attributes:
        epochs: Passes over the training split.
        batch_size: Images per step; a last batch of one joins the batch before it (batch norm needs two).
        seed: Of initial weights, order, augmentation and posterior noise. Splits have their own, data.seed.
        temperature: T of the posterior: the loss is fit + T KL / N. 1 is the evidence bound itself; below 1 the
            posterior is narrower than Bayes' rule says, above 1 wider. Not for families that fit no spread.
        kl_warmup_epochs: Epochs over which the KL's weight rises linearly from 0 to T.
        selection: Which epoch's model the run uses: "best" has the lowest validation NLL, "last" is the end of the
            schedule, the better choice where the validation split is too small to rank epochs. Both are kept.
        patience: Epochs without a better validation NLL after which training stops; 0 never stops early.
        balanced: Show each class equally often. The classifier then takes classes to be equally probable beforehand,
            and N in KL / N is the sample's effective size.
        label_smoothing: Share of the label that is spread over all classes. Reported NLLs are those of plain labels.
        mixup: alpha of mixup's Beta(alpha, alpha); 0 mixes nothing. There is then no training NLL to report.
        accumulation: Parts that a batch is computed in, to save memory. Batch norm sees each part by itself.
        clip_norm: Largest norm of the gradient of all parameters together; 0 does not clip.
        twin: Train the deterministic twin beside a Bayesian model; `bayesnet calibrate` compares the two.
        sam_rho: Radius of sharpness-aware training (SAM), such as 0.1; 0 is ordinary training. It doubles the cost.
    """

    epochs: int = 20
    batch_size: int = 64
    seed: int = 0
    temperature: float = 1.0
    kl_warmup_epochs: float = 0.0
    selection: Literal["best", "last"] = "best"
    patience: int = 0
    balanced: bool = False
    label_smoothing: float = 0.0
    mixup: float = 0.0
    accumulation: int = 1
    clip_norm: float = 0.0
    sam_rho: float = 0.0
    twin: bool = True

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "must be at least 1", where=f"training.epochs = {self.epochs}")
        require(self.batch_size >= 2, "must be at least 2", where=f"training.batch_size = {self.batch_size}")
        require(0 <= self.seed < 2**31, "must be from 0 to 2^31 - 1", where=f"training.seed = {self.seed}")
        where = f"training.temperature = {self.temperature}"
        require(0 < self.temperature < math.inf, "must be positive and finite", where=where)
        for key in ("kl_warmup_epochs", "patience", "mixup", "clip_norm", "sam_rho"):
            value = getattr(self, key)
            require(0 <= value < math.inf, "must not be negative", where=f"training.{key} = {value}")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "must be in [0, 1)", where=f"training.label_smoothing = {smoothing}")
        parts = self.accumulation
        fits = 1 <= parts <= max(1, self.batch_size // 2)
        hint = "a part has at least 2 images"
        require(
            fits, "must be from 1 to half of training.batch_size", where=f"training.accumulation = {parts}", hint=hint
        )

    @property
    def plan(self) -> StepPlan:
        """How a batch's gradient is computed."""
        return StepPlan(self.accumulation, self.clip_norm, self.sam_rho)


def check_together(optimizer: OptimizerConfig, training: TrainingConfig) -> None:
    """Raise ConfigError where the settings of the optimizer and those of training exclude each other."""
    both = optimizer.name == "bsam" and training.sam_rho > 0
    where = f"optimizer.name = bsam, training.sam_rho = {training.sam_rho}"
    require(not both, "bSAM and SAM are two forms of one thing", where=where, hint="set training.sam_rho = 0")


class EpochReport(NamedTuple):
    """One line of metrics.jsonl.

    Attributes:
        epoch: From 1.
        step: Optimisation steps so far.
        train_nll: Mean negative log-likelihood over the epoch, as trained (augmented, one draw), nats per example; None
            under mixup, whose images have no label of their own.
        kl: Divergence from the prior at the epoch's last step, nats.
        kl_per_example: KL / N, nats per example.
        validation_nll: Mean NLL of the posterior predictive on the validation split, nats per example.
        learning_rate: Of the first parameter group at the last step.
        posterior_scale: Median posterior standard deviation, or None.
        seconds: Training time since the model's first step, validation included, interruptions not.
    """

    epoch: int
    step: int
    train_nll: float | None
    kl: float
    kl_per_example: float
    validation_nll: float
    learning_rate: float
    posterior_scale: float | None
    seconds: float


class FitResult(NamedTuple):
    """How a fit ended.

    Attributes:
        chosen: Directory of the checkpoint that the run uses.
        epoch: Its epoch, from 1; the sum of the members' for several.
        reports: One per epoch, in order, those of several members one after the other.
        initial_scale: Median posterior standard deviation before the first step, or None.
        whole: The report of what the run uses, where it is no epoch of one fit: several members, or a finalized one.
        members: How the fit of each member ended, where ``whole`` is given.
    """

    chosen: Path
    epoch: int
    reports: tuple[EpochReport, ...]
    initial_scale: float | None
    whole: EpochReport | None = None
    members: tuple[FitResult, ...] = ()

    @property
    def report(self) -> EpochReport:
        """The report of what the run uses: of the chosen epoch, or of the whole."""
        return self.reports[self.epoch - 1] if self.whole is None else self.whole

    @property
    def seconds(self) -> float:
        """Seconds of training and finalizing, interruptions not counted."""
        return self.reports[-1].seconds if self.whole is None else self.whole.seconds


def whole_fit(
    chosen: Path,
    members: Sequence[FitResult],
    *,
    validation_nll: float,
    posterior_scale: float | None,
    finalize_seconds: float,
) -> FitResult:
    """Return how the fit of a posterior of several members, or of a finalized one, ended.

    Epochs, steps and seconds are those of all members together; training NLL and KL are the members' means, since their
    mean loss is what the whole minimises.

    Args:
        chosen: Directory of the checkpoint of the whole.
        members: How the fit of each ended.
        validation_nll: Of the whole, after finalizing, nats per example.
        posterior_scale: Median posterior standard deviation of the whole, after finalizing, or None.
        finalize_seconds: Time that finalizing took.
    """
    reports = [member.report for member in members]
    train_nlls = [report.train_nll for report in reports if report.train_nll is not None]
    scales = [member.initial_scale for member in members if member.initial_scale is not None]
    whole = EpochReport(
        epoch=sum(report.epoch for report in reports),
        step=sum(report.step for report in reports),
        train_nll=fmean(train_nlls) if train_nlls else None,
        kl=fmean(report.kl for report in reports),
        kl_per_example=fmean(report.kl_per_example for report in reports),
        validation_nll=validation_nll,
        learning_rate=reports[-1].learning_rate,
        posterior_scale=posterior_scale,
        seconds=sum(member.seconds for member in members) + finalize_seconds,
    )
    every_report = tuple(report for member in members for report in member.reports)
    return FitResult(chosen, whole.epoch, every_report, median(scales) if scales else None, whole, tuple(members))


@dataclass
class Progress:
    """Where a fit stands: all of it goes into each checkpoint's state.json.

    Attributes:
        epoch: Finished epochs.
        batch: Finished batches of the current epoch.
        step: Finished steps in all.
        nll_sum: Sum of the current epoch's per-example NLLs.
        kl: Divergence from the prior at the last step, nats.
        seconds: Time spent so far.
        best_epoch: Epoch with the lowest validation NLL, 0 before the first.
        best_step: Step of its checkpoint.
        best_nll: Its validation NLL.
        initial_scale: Median posterior standard deviation at the start.
        reports: Finished epochs.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    nll_sum: float = 0.0
    kl: float = 0.0
    seconds: float = 0.0
    best_epoch: int = 0
    best_step: int = 0
    best_nll: float = math.inf
    initial_scale: float | None = None
    reports: list[EpochReport] = field(default_factory=list)

    def is_finished(self, training: TrainingConfig) -> bool:
        """Return whether all epochs are done, or none of the last ``training.patience`` was better.

        While the KL is warmed up, nobody gets impatient: those epochs are judged by another bound.
        """
        since = max(self.best_epoch, math.ceil(training.kl_warmup_epochs))
        out_of_patience = 0 < training.patience <= self.epoch - since
        return self.epoch >= training.epochs or out_of_patience

    def to_json(self) -> JsonObject:
        """Return the progress as plain JSON; an infinite best_nll becomes None."""
        values = {**vars(self), "reports": [list(report) for report in self.reports]}
        return values | {"best_nll": self.best_nll if math.isfinite(self.best_nll) else None}

    @classmethod
    def from_json(cls, values: JsonObject) -> Progress:
        """Return the progress that `to_json` wrote.

        Raises:
            CheckpointError: Keys are missing, unknown or of the wrong type.
        """
        try:
            progress = cls(**values)
            progress.reports = [_report(values) for values in progress.reports]
            progress.best_nll = math.inf if values["best_nll"] is None else float(values["best_nll"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError("malformed progress in the checkpoint", hint=str(error)) from error
        return progress

    def result(self, directory: Path, selection: str) -> FitResult:
        """Return how the fit ended, its checkpoints being in ``directory``.

        Args:
            directory: Where the checkpoints are.
            selection: "best" or "last".

        Raises:
            DivergedError: No epoch had a finite validation NLL.
        """
        if not self.best_epoch:
            raise DivergedError("no epoch had a finite validation loss", where=directory)
        epoch, step = (self.best_epoch, self.best_step) if selection == "best" else (self.epoch, self.step)
        return FitResult(directory / step_name(step), epoch, tuple(self.reports), self.initial_scale)


def _report(values: Sequence[float | None]) -> EpochReport:
    """Return a report from JSON, where a validation NLL that is no number was written as null."""
    report = EpochReport(*values)  # type: ignore[arg-type]
    return report._replace(validation_nll=math.nan if report.validation_nll is None else report.validation_nll)
