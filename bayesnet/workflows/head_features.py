"""Features of a data set for a head: one pass of a backbone, more with augmentation, standardised, or cross-fitted.

Cross-fitting: for each of F folds a backbone is trained on the other folds, and the fold's images get the features of
the backbone that has not seen them. Backbones trained apart have features of their own, so these are mapped onto the
twin's by ridge regression on the images that both have seen. What the map leaves unexplained, of images left out of it,
is lost, and reported.
Reference: Chernozhukov et al. 2018, "Double/debiased machine learning for treatment and structural parameters".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bayesnet.backbones.features import StandardizedFeatures
from bayesnet.batches import TrainingData, ordered_batches
from bayesnet.checkpoint import load_checkpoint
from bayesnet.config import require
from bayesnet.data import Examples, ImageData
from bayesnet.data.augment import Augmentation
from bayesnet.data.examples import SubsetExamples
from bayesnet.data.features import FeatureExamples, feature_preprocessing
from bayesnet.data.sampling import effective_size
from bayesnet.data.splits import stratified_split
from bayesnet.errors import CheckpointError, ConfigError
from bayesnet.inference.base import Posterior
from bayesnet.settings import Settings
from bayesnet.training import restore_model
from bayesnet.workflows.costs import physical_memory, size
from bayesnet.workflows.fitting import RunContext, Slot, fit_part, model_metadata
from bayesnet.workflows.trained import new_posterior

NOT_AUGMENTED = Augmentation()

MAX_MEMORY_SHARE = 0.5
"""Most of the machine's memory that stored features may take."""

COPIES = 3
"""Copies of the features that are in memory at once while they are standardised and mapped."""

PENALTIES = tuple(10.0**exponent for exponent in range(-8, 3))
"""Of the ridge regression between features, in units of their mean squared singular value."""


def backbone_of(posterior: Posterior) -> nn.Module:
    """Return the backbone of a posterior, without a standardisation of its own, frozen and in evaluation mode.

    Raises:
        CheckpointError: It has none, or several.
    """
    owner = getattr(posterior, "model", posterior)
    backbone = getattr(owner, "backbone", None)
    if isinstance(backbone, StandardizedFeatures):
        backbone = backbone.backbone
    if not isinstance(backbone, nn.Module):
        raise CheckpointError("the model has no single backbone to lend", where=type(posterior).__name__)
    return backbone.requires_grad_(requires_grad=False).eval()


def feature_data(
    name: str, settings: Settings, context: RunContext, backbone: nn.Module
) -> tuple[StandardizedFeatures, ImageData]:
    """Return the backbone with its standardisation, and the data as features: the training and validation splits.

    Args:
        name: Of the model, for the checkpoints of folds.
        settings: Of the model.
        context: Of the run.
        backbone: Images to features (B, D).

    Raises:
        ConfigError: The features take more memory than there is, or a class has too few images to be cross-fitted.
    """
    data, head = context.data, settings.head
    standardized = StandardizedFeatures(backbone).to(context.engine.device).eval()
    backbone = standardized.backbone
    if head.folds:
        versions = _cross_fitted(name, settings, context, backbone)
    else:
        plain = compute_features(backbone, data.train, settings, context)
        versions = [plain, *_augmented(backbone, data.train, settings, context)]
    if head.standardize:
        standardized.measure(versions[0].to(context.engine.device))
    train, *passes = (_standardize(standardized, each_ND) for each_ND in versions)
    held_out = _standardize(standardized, compute_features(backbone, data.validation, settings, context))
    validation = FeatureExamples(held_out, data.validation.labels_N)
    stored = sum(each_ND.nbytes for each_ND in (train, *passes, held_out))
    times = f", and {len(passes)} augmented passes" if passes else ""
    context.listener.on_note(
        f"Features: {len(train)} training images x {train.shape[1]}{times}, {size(stored)}"
        f"{', standardised' if head.standardize else ''}."
    )
    examples = FeatureExamples(train, data.train.labels_N, passes)
    preprocessing = feature_preprocessing(standardized.num_features)
    return standardized, data._replace(preprocessing=preprocessing, train=examples, validation=validation)


def feature_digest(features: ImageData) -> str:
    """Return the SHA-256 of training features: it tells another backbone, other folds and other augmentation."""
    train = features.train
    if not isinstance(train, FeatureExamples):
        raise TypeError(f"not stored features: {type(train).__name__}")
    return train.digest()


@torch.no_grad()
def _standardize(standardized: StandardizedFeatures, features_ND: Tensor) -> Tensor:
    return standardized.standardize(features_ND.to(standardized.shift_D.device)).cpu()


@torch.no_grad()
def compute_features(
    backbone: nn.Module,
    examples: Examples,
    settings: Settings,
    context: RunContext,
    *,
    augmentation: Augmentation = NOT_AUGMENTED,
    epoch: int = 0,
) -> Tensor:
    """Return features (N, D) on the CPU, float32, of images in their own order.

    Args:
        backbone: In evaluation mode, on the engine's device.
        examples: The images.
        settings: Batch size, and the seed of the augmentation.
        context: Engine, workers and preprocessing.
        augmentation: What is done to the images.
        epoch: Which draws of the augmentation: those that joint training has in this epoch.
    """
    seed = settings.training.seed
    data = TrainingData(examples.for_epoch(seed, epoch), context.data.preprocessing, augmentation, context.workers)
    batches = ordered_batches(data, context.engine, batch_size=settings.training.batch_size, seed=seed, epoch=epoch)
    with contextlib.closing(batches):
        return torch.cat([backbone(batch.x_BCHW).float().cpu() for batch in batches])


def _augmented(backbone: nn.Module, examples: Examples, settings: Settings, context: RunContext) -> list[Tensor]:
    """Return the features (N, D) of each augmented pass that the settings ask for."""
    augmentation = Augmentation.from_config(settings.data)
    return [
        compute_features(backbone, examples, settings, context, augmentation=augmentation, epoch=number)
        for number in range(settings.head.augmented_passes)
    ]


def check_features(settings: Settings, data: ImageData, num_features: int) -> None:
    """Raise ConfigError where features take more than half of the machine's memory, or a class has no image per fold.

    Args:
        settings: Of the model.
        data: The images.
        num_features: D.
    """
    folds, num_passes = settings.head.folds, settings.head.augmented_passes
    alone = folds > 0 and int(torch.bincount(data.train.labels_N).min()) < 2
    require(not alone, "a class has one training image", where=f"head.folds = {folds}", hint="head.folds = 0")
    num_images = len(data.train) + len(data.validation)
    needed = 4 * num_images * num_features * (COPIES + num_passes)
    available = MAX_MEMORY_SHARE * physical_memory()
    if needed > available:
        text = f"features of {num_images:,} images x {num_features:,} x {1 + num_passes} passes take"
        what = f"{text} {size(needed)}, of {size(int(available))} at most"
        raise ConfigError(what, where="head.mode = head", hint="fewer head.augmented_passes, or head.mode = joint")


# Cross-fitting.


def _cross_fitted(
    name: str,
    settings: Settings,
    context: RunContext,
    backbone: nn.Module,
) -> list[Tensor]:
    """Return features (N, D), plain and of each augmented pass, each image's from a backbone that has not seen it."""
    data, num_folds = context.data, settings.head.folds
    folds = stratified_split(data.train.labels_N, [1.0] * num_folds, seed=settings.training.seed)
    target_ND = compute_features(backbone, data.train, settings, context)
    result: list[Tensor] = []
    explained = []
    for number, fold_n in enumerate(folds, 1):
        keep_N = torch.ones(len(data.train), dtype=torch.bool)
        keep_N[fold_n] = False
        others_m = keep_N.nonzero().squeeze(1)
        context.listener.on_note(f"Fold {number} of {num_folds}: a backbone that does not see {len(fold_n)} images.")
        other = _fold_backbone(name, number, others_m, settings, context)
        plain_ND = compute_features(other, data.train, settings, context)
        align, share = least_squares(plain_ND[others_m], target_ND[others_m])
        explained.append(share)
        augmented = _augmented(other, SubsetExamples(data.train, fold_n), settings, context)
        versions = [plain_ND[fold_n], *augmented]
        result = result or [torch.empty_like(target_ND) for _ in versions]
        for whole_ND, each_nD in zip(result, versions, strict=True):
            whole_ND[fold_n] = align(each_nD)
    context.listener.on_note(
        f"Cross-fitted: the folds' features explain {min(explained):.1%} or more of the variance of the twin's, of "
        "images left out of the regression between them."
    )
    return result


def _fold_backbone(
    name: str,
    number: int,
    others_m: Tensor,
    settings: Settings,
    context: RunContext,
) -> nn.Module:
    """Return the twin's backbone, trained on these images alone."""
    data = context.data._replace(train=SubsetExamples(context.data.train, others_m))
    twin = settings.twin()
    num_examples = effective_size(data.train.labels_N, balanced=twin.training.balanced)
    described = model_metadata(name, twin, context.data, num_examples)
    posterior = new_posterior(twin, data.preprocessing, len(data.classes), num_examples, context.user)
    slot = Slot(
        {"model": name, "fold": f"{number} of {settings.head.folds}"},
        context.run.model_checkpoints(name, f"fold-{number}"),
        twin.training.seed,
    )
    fitted = fit_part(posterior, slot, twin, context._replace(data=data), described)
    restore_model(posterior, load_checkpoint(fitted.chosen))
    return backbone_of(posterior).to(context.engine.device)


def least_squares(inputs_ND: Tensor, targets_NE: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
    """Return an affine ridge regression, and the share of the targets' variance that it explains of left-out rows.

    The penalty is the one of `PENALTIES` with the lowest leave-one-out error, which is exact from one decomposition:
    residual_i / (1 - leverage_i).

    Args:
        inputs_ND: Features.
        targets_NE: What they should become.

    Example:
        >>> inputs = torch.linspace(0, 1, 20)[:, None]
        >>> align, explained = least_squares(inputs, 2 * inputs + 1)
        >>> round(float(align(torch.tensor([[3.0]]))), 3), explained > 0.999
        (7.0, True)
    """
    inputs, targets = inputs_ND.double(), targets_NE.double()
    shift_D, shift_E = inputs.mean(0), targets.mean(0)
    left_NR, size_R, right_RD = torch.linalg.svd(inputs - shift_D, full_matrices=False)
    inner_RE = left_NR.T @ (targets - shift_E)
    scale = size_R.square().mean().clamp(min=1e-300)
    best: tuple[float, Tensor] | None = None
    for penalty in PENALTIES:
        shrink_R = size_R.square() / (size_R.square() + penalty * scale)
        leverage_N = (left_NR.square() @ shrink_R + 1 / len(inputs)).clamp(max=1 - 1e-9)
        residual_NE = (targets - shift_E - left_NR @ (shrink_R[:, None] * inner_RE)) / (1 - leverage_N[:, None])
        error = float(residual_NE.square().sum())
        if best is None or error < best[0]:
            inverse_R = torch.where(size_R > 0, shrink_R / size_R, 0.0)
            best = error, right_RD.T @ (inverse_R[:, None] * inner_RE)
    assert best is not None
    error, map_DE = best
    total = float((targets - shift_E).square().sum())

    def align(features_BD: Tensor) -> Tensor:
        aligned_BE: Tensor = (features_BD.double() - shift_D) @ map_DE + shift_E
        return aligned_BE.float()

    return align, 1 - error / total if total > 0 else 1.0
