"""A head fitted on stored features: the backbone is there already, and each image passes through it once.

    features_i = standardise(backbone(x_i))        i = 1 .. N, once; K times more with augmentation, if asked
    posterior over the head | features, labels     by the family's own objective, no image needed
    model = backbone, standardisation and head     one checkpoint, which needs nothing else

The backbone is the run's own twin, published weights, or that of another run. A backbone knows the images it was
trained on: their features separate the classes better than those of new images do, so a posterior given them is too
sure. ``head.folds`` gives each image features of a backbone that has not seen it (bayesnet/workflows/head_features.py).
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bayesnet.backbones.features import FeatureInput, StandardizedFeatures
from bayesnet.checkpoint import load_checkpoint
from bayesnet.data import ImageData
from bayesnet.data.augment import Augmentation
from bayesnet.errors import ConfigError
from bayesnet.inference import build_posterior
from bayesnet.inference.base import Parts, Posterior
from bayesnet.progress import FitResult
from bayesnet.rundir import RunDirectory
from bayesnet.settings import Settings
from bayesnet.training import restore_model
from bayesnet.types import JsonObject
from bayesnet.workflows.finalizing import finalize_posterior, has_finalize
from bayesnet.workflows.fitting import RunContext, Slot, commit_whole, fit_part, make_model_directory
from bayesnet.workflows.head_features import backbone_of, feature_data, feature_digest
from bayesnet.workflows.starting import fit_start
from bayesnet.workflows.trained import UserCode, load_model, new_posterior, source_model


def fit_head(
    name: str,
    settings: Settings,
    context: RunContext,
    metadata: JsonObject,
    num_examples: int,
    *,
    twin: FitResult | None = None,
    profile: Path | None = None,
) -> FitResult:
    """Fit a head on the features of a backbone, finalize it, and commit both as one model.

    Args:
        name: "deterministic" or "bayesian".
        settings: Of this model.
        context: Of the run.
        metadata: What the model's checkpoints say.
        num_examples: N of KL / N.
        twin: How the run's deterministic twin was fitted, where its backbone is used.
        profile: File for a trace of a few steps.

    Raises:
        CheckpointError: A checkpoint to go on from belongs to other settings, data or another backbone.
        ConfigError: The features take more memory than there is.
        DivergedError: See `bayesnet.training.fit`; or finalizing gave something that is not finite.
        InterruptedRunError: A signal arrived; the checkpoint is committed.
    """
    run, data, engine, listener = context.run, context.data, context.engine, context.listener
    begun = time.perf_counter()
    backbone = _source(settings, context, num_examples, twin)
    make_model_directory(run, name)
    standardized, features = feature_data(name, settings, context, backbone)
    passes = time.perf_counter() - begun
    feature_context = context._replace(data=features, workers=0)
    plain = Augmentation()  # the images were augmented before they became features

    def build(other: Settings) -> Posterior:
        return on_features(other, standardized.num_features, len(data.classes), num_examples, context.user)

    posterior = build(settings)

    slot = Slot({"model": name}, run.model_checkpoints(name, "head"), settings.training.seed)
    described = metadata | {"features": feature_digest(features)}
    first = fit_start(posterior, build, name, settings, feature_context, described, augmentation=plain)
    fitted = fit_part(posterior, slot, settings, feature_context, described, augmentation=plain, profile=profile)
    started = time.perf_counter() - first - passes
    restore_model(posterior, load_checkpoint(fitted.chosen))
    if has_finalize(settings):
        listener.on_note(f"Finalizing {name} ({settings.inference.family}) on the stored features.")
    finalize_posterior(posterior, settings, features, engine, workers=0)
    whole = _assembled(settings, data, num_examples, context.user, standardized, posterior).to(engine.device).eval()
    seconds = time.perf_counter() - started
    return commit_whole(whole, [fitted], name, settings, context, described, seconds=seconds)


def on_features(
    settings: Settings, num_features: int, num_classes: int, num_examples: int, user: UserCode
) -> Posterior:
    """Return the untrained posterior whose input is features, initialised from ``training.seed``."""
    with torch.random.fork_rng(devices=[]):
        seed = settings.training.seed
        torch.manual_seed(seed)
        parts = Parts(FeatureInput(num_features), num_classes, num_examples, seed, user.guide)
        return build_posterior(parts, settings.inference)


def _assembled(
    settings: Settings,
    data: ImageData,
    num_examples: int,
    user: UserCode,
    standardized: StandardizedFeatures,
    head: Posterior,
) -> Posterior:
    """Return the posterior over images: the head fitted on features, behind the backbone that made them."""
    sizes = data.preprocessing, len(data.classes), num_examples
    whole = new_posterior(settings, *sizes, user, load_weights=False)
    prefix = next(key for key, module in whole.named_modules() if isinstance(module, StandardizedFeatures))
    backbone = {f"{prefix}.{key}": tensor for key, tensor in standardized.state_dict().items()}
    whole.load_state_dict(head.state_dict() | backbone)
    return whole


def num_features_of(posterior: Posterior) -> int:
    """Return D of a posterior whose head was or is to be fitted on stored features."""
    return next(module.num_features for module in posterior.modules() if isinstance(module, StandardizedFeatures))


def _source(settings: Settings, context: RunContext, num_examples: int, twin: FitResult | None) -> nn.Module:
    """Return the backbone that ``head.backbone`` names.

    Raises:
        CheckpointError: The other run is gone, damaged, or its backbone does not fit.
        ConfigError: There is no twin.
    """
    data, where = context.data, settings.head.backbone
    sizes = data.preprocessing, len(data.classes), num_examples
    if where == "twin":
        if twin is None:
            raise ConfigError("the run trains no twin", where="head.backbone = twin", hint="name a run or weights")
        posterior = new_posterior(settings.twin(), *sizes, context.user, load_weights=False)
        checkpoint = load_checkpoint(twin.chosen)
        restore_model(posterior, checkpoint)
        return backbone_of(posterior)
    if where == "weights":
        joint = replace(settings, head=replace(settings.head, mode="joint"))
        posterior = new_posterior(joint, *sizes, context.user, load_weights=True)
        return backbone_of(posterior)
    run = RunDirectory.open(Path(where))
    trained = load_model(run, source_model(run), context.user)
    if run.read_summary().get("fingerprint") != data.fingerprint:
        context.listener.on_note(
            f"The backbone of {where} was trained on other data: if images of this run's test split were among them, "
            "its metrics are too good."
        )
    return backbone_of(trained.posterior)
