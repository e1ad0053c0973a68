"""Before a run: what the settings leave open is decided, and what could fail hours later is tried now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bayesnet.backbones import expected_preprocessing
from bayesnet.config import require
from bayesnet.data import ImageData, Preprocessing
from bayesnet.data.augment import Augmentation
from bayesnet.data.features import feature_preprocessing
from bayesnet.data.sampling import effective_size
from bayesnet.engine import Engine
from bayesnet.errors import BayesnetError, CheckpointError, ConfigError
from bayesnet.inference.base import HeadPosterior, Posterior
from bayesnet.inference.deterministic import Deterministic
from bayesnet.progress import check_together
from bayesnet.rundir import RunDirectory
from bayesnet.settings import HEAD_BACKBONES, HeadConfig, Settings
from bayesnet.training import check_temperature
from bayesnet.workflows.costs import Cost, check_fits, count_cost, time_step
from bayesnet.workflows.finalizing import has_finalize
from bayesnet.workflows.fitting import TrainListener
from bayesnet.workflows.head_features import backbone_of, check_features
from bayesnet.workflows.head_fitting import num_features_of, on_features
from bayesnet.workflows.trained import NO_USER_CODE, UserCode, load_model, model_name, new_posterior, source_model

FILE_DATASETS = ("folder",)


def decided(settings: Settings, listener: TrainListener) -> Settings:
    """Return the settings with paths made absolute and the preset decided, telling what was decided for the user."""
    root = settings.data.root
    absolute = str(Path(root).expanduser().absolute()) if root else ""
    settings = replace(settings, data=replace(settings.data, root=absolute))
    if settings.backbone.freeze and settings.backbone.weights == "none" and settings.backbone.name != "custom":
        listener.on_note("The backbone is frozen at random weights: give --weights, or it knows nothing of images.")
    return _with_preset(settings, listener)


def _with_preset(settings: Settings, listener: TrainListener) -> Settings:
    """Return the settings with ``data.preset`` decided: image files are prepared as published weights expect them."""
    data = settings.data
    if data.preset != "auto":
        return settings
    data = replace(data, preset="none")
    untold = data.spec.partition(":")[0] in FILE_DATASETS and not (data.image_size or data.mean)
    expected = expected_preprocessing(settings.backbone) if untold else None
    if expected is not None:
        size, resize, mean, std = expected
        data = replace(data, image_size=size, channels=data.channels or 3, resize=resize, mean=mean, std=std)
        listener.on_note(
            "Images are prepared as for the published weights (data.resize, image_size, mean and std): a short side of "
            f"{resize or size}, the central {size} x {size} pixels, the publisher's statistics."
        )
    elif untold and settings.backbone.weights != "none":
        listener.on_note(
            "Size and statistics come from your images: what your weights were trained with is not known. "
            "ImageNet's are --set data.preset=imagenet."
        )
    return replace(settings, data=data)


def with_source(settings: Settings, user: UserCode, listener: TrainListener) -> tuple[Settings, Preprocessing | None]:
    """Return the settings with the backbone of the run that ``head.backbone`` names, and how its images are prepared.

    Args:
        settings: Where they name no run, they come back as they are, and None.
        user: The caller's own backbone, where the run has it.
        listener: Is told where the run's backbone is another than the settings'.

    Raises:
        CheckpointError: The run is missing, not finished, or damaged.
    """
    head = settings.head
    if head.mode == "joint" or head.backbone in HEAD_BACKBONES:
        return settings, None
    path = Path(head.backbone).expanduser().absolute()
    if not path.is_dir():
        what, hint = "the run whose backbone is used is not there", "name a finished run, or put it back"
        raise CheckpointError(what, where=path, hint=hint)
    run = RunDirectory.open(path)
    trained = load_model(run, source_model(run), user)
    backbone = replace(trained.settings.backbone, weights="none", freeze=False)
    plain = replace(trained.settings.twin(), head=HeadConfig(), backbone=backbone)
    sizes = trained.preprocessing, len(trained.classes), trained.num_examples
    expected = backbone_of(new_posterior(plain, *sizes, user, load_weights=False)).state_dict().keys()
    if backbone_of(trained.posterior).state_dict().keys() != expected:
        hint = "name a run of another family; its deterministic twin would do"
        raise CheckpointError("the run's backbone is not a network of its own", where=path, hint=hint)
    channels, height, width = trained.preprocessing.shape
    listener.on_note(
        f"Backbone and preprocessing are those of {head.backbone}: {backbone.name}, images of {height} x {width} "
        f"pixels in {channels} channel{'s' * (channels > 1)}."
    )
    head = replace(head, backbone=str(run.path.absolute()))
    return replace(settings, head=head, backbone=backbone), trained.preprocessing


def check_models(
    variants: Sequence[Settings], data: ImageData, user: UserCode, engine: Engine, listener: TrainListener
) -> None:
    """Build every model of a run once, so that what is wrong with the last one is not found after the first is trained.

    Args:
        variants: Settings of each model.
        data: What they will be trained on.
        user: The caller's own code; it is tried on two black images.
        engine: Where they will be trained; each takes two steps there, which are thrown away.
        listener: Is told what each will take.

    Raises:
        ConfigError: A value is out of range, a model does not fit into memory, or the caller's own code does not fit.
    """
    own = user != NO_USER_CODE
    for settings in variants:
        Augmentation.from_config(settings.data).check(data.preprocessing)
        num_examples = effective_size(data.train.labels_N, balanced=settings.training.balanced)
        sizes = data.preprocessing, len(data.classes), num_examples
        try:
            with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
                posterior = new_posterior(settings, *sizes, user, load_weights=False)
                check_together(settings.optimizer, settings.training)
                check_temperature(posterior, settings.training.temperature)
                _check_balanced(settings)
                _check_head(posterior, settings)
                _check_storage(posterior)
                if own:
                    _try_loss(posterior, data)
                cost = _cost(posterior, settings, data, user, engine)
                folds = f"; before it {settings.head.folds} backbones, each as long as the twin" * bool(
                    settings.head.folds
                )
                listener.on_note(f"{model_name(settings).capitalize()} ({settings.inference.family}): {cost}{folds}.")
        except BayesnetError:
            raise
        except Exception as error:
            if not own:
                raise
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise ConfigError("the code that was given fails", where=settings.inference.family, hint=reason) from error


def _cost(posterior: Posterior, settings: Settings, data: ImageData, user: UserCode, engine: Engine) -> Cost:
    """Return what a model takes, made sure to fit; a head is timed on features, the backbone's pass not counted.

    Raises:
        ConfigError: It takes more memory than there is.
    """
    cost = count_cost(posterior, settings, len(data.train))
    check_fits(cost, settings.inference.family, engine.device)
    if settings.head.mode == "head":
        num_features, num_examples = num_features_of(posterior), len(data.train)
        check_features(settings, data, num_features)
        posterior = on_features(settings, num_features, len(data.classes), num_examples, user)
        data = data._replace(preprocessing=feature_preprocessing(num_features))
        cost = count_cost(posterior, settings, len(data.train))
    seconds = time_step(posterior.to(engine.device), settings, data, engine, user.optimizer)
    return cost._replace(step_seconds=seconds)


def _check_balanced(settings: Settings) -> None:
    """Raise ConfigError where training is balanced but the pass after it would count every image once."""
    family = settings.inference.family
    counted_once = settings.training.balanced and has_finalize(settings)
    what = "the family's pass after training sees the classes as often as they are"
    require(not counted_once, what, where=f"training.balanced, inference.family = {family}", hint="use mean_field")


def _check_head(posterior: Posterior, settings: Settings) -> None:
    """Raise ConfigError where the head alone is to be fitted, but the family is not over the head alone."""
    if settings.head.mode == "head":
        alone = isinstance(posterior, HeadPosterior | Deterministic) and len(posterior.members()) == 1
        what = "only a posterior over the last layer can be fitted on stored features"
        require(alone, what, where=f"inference.family = {settings.inference.family}", hint="head.mode = joint")


def _check_storage(posterior: Posterior) -> None:
    """Raise ConfigError where two tensors share memory, as tied weights do: a checkpoint holds each tensor once."""
    seen: dict[int, str] = {}
    for name, tensor in posterior.state_dict().items():
        if tensor.numel():
            first = seen.setdefault(tensor.untyped_storage().data_ptr(), name)
            what = "two tensors of the model share memory (tied weights)"
            require(first == name, what, where=f"{first}, {name}", hint="use a copy in one of the places")


def _try_loss(posterior: Posterior, data: ImageData) -> None:
    """Run one loss and its gradient on two black images."""
    pixels_2CHW = torch.zeros(2, *data.preprocessing.shape, dtype=data.train.read([0]).dtype)
    loss = posterior.train().loss(data.preprocessing.normalize(pixels_2CHW), torch.tensor([0, 1]))
    torch.autograd.backward(loss.total)


def check_same_settings(run: Settings, given: Settings, where: Path) -> None:
    """Raise ConfigError where a run that is to go on was begun with other settings than are given now.

    Args:
        run: Its settings.
        given: Those of the caller; devices, workers and where the data lie may differ.
        where: The run directory.

    Raises:
        ConfigError: Naming the first key that differs.
    """
    ours, theirs = _comparable(run), _comparable(given)
    for section, values in ours.items():
        keys = values.keys() | theirs[section].keys()
        for key in sorted(keys, key=lambda key: (key not in ("family", "name"), key)):  # what explains the others first
            old, new = values.get(key), theirs[section].get(key)
            what = f"the run was begun with another {section}.{key}"
            require(old == new, what, where=f"{where}", hint=f"it has {old!r}, given is {new!r}")


def _comparable(settings: Settings) -> dict[str, dict[str, object]]:
    mapping = settings.to_mapping()
    mapping.pop("engine", None)
    for key in ("spec", "root", "workers", "preset"):
        mapping["data"].pop(key, None)
    return mapping
