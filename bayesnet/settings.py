"""All settings of a run in one place, and the recipes that they start from.

A recipe is a complete TOML file, ``configs/<data set>/<family>.toml``. Settings are made of a recipe or a user's file,
then ``section.key=value`` overrides, then named flags; a run's ``config.toml`` is itself a valid configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from bayesnet.backbones import BackboneConfig, resolve
from bayesnet.config import build_section, merge, parse_override, read_toml, require, to_mapping
from bayesnet.data import DATASETS, DataConfig
from bayesnet.engine import EngineConfig
from bayesnet.errors import ConfigError
from bayesnet.inference import FAMILIES, build_inference_config
from bayesnet.inference.base import FamilyConfig
from bayesnet.optim import OptimizerConfig
from bayesnet.progress import TrainingConfig
from bayesnet.registry import unknown_name

DEFAULT_FAMILY = "mean_field"
TWIN = "deterministic"
TWIN_BACKBONE = "twin"
HEAD_BACKBONES = (TWIN_BACKBONE, "weights")
"""What ``head.backbone`` can be besides the directory of a run."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How predictions are made; recorded with the run, so that they are the same for everybody.

    Attributes:
        samples: S, draws per image, a power of two up to 256.
        chunk_size: Images per backbone pass; shorter chunks are padded to it.
    """

    samples: int = 256
    chunk_size: int = 32

    def __post_init__(self) -> None:
        valid = 1 <= self.samples <= 256 and self.samples & (self.samples - 1) == 0
        require(valid, "must be a power of two from 1 to 256", where=f"predict.samples = {self.samples}")
        require(1 <= self.chunk_size <= 4096, "must be from 1 to 4096", where="predict.chunk_size")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """How the head is fitted: together with its backbone, or on the stored features of one that is there already.

    Attributes:
        mode: "joint" trains backbone and head together; "head" fits the head alone, each image passing through the
            backbone once.
        backbone: Whose features, in mode "head": "twin" (the run's own deterministic model), "weights" (those that
            ``backbone.weights`` names), or the directory of a finished run.
        standardize: Whether features are shifted and scaled to mean 0 and variance 1 over the training images.
        augmented_passes: K passes of augmented training images, which epochs train on in turn; 0 trains on the images
            as they are. Passes after training (Laplace, NUTS, SWAG) use the images as they are.
        folds: F backbones are trained, each without one fold, whose images it then gives their features: none of the
            head's features is of an image that its backbone was trained on. 0 does not cross-fit.
    """

    mode: Literal["joint", "head"] = "joint"
    backbone: str = "twin"
    standardize: bool = True
    augmented_passes: int = 0
    folds: int = 0

    def __post_init__(self) -> None:
        require(self.backbone != "", "must be twin, weights or a run directory", where="head.backbone")
        passes, folds = self.augmented_passes, self.folds
        require(0 <= passes <= 1000, "must be from 0 to 1000", where=f"head.augmented_passes = {passes}")
        require(folds == 0 or 2 <= folds <= 20, "must be 0, or from 2 to 20", where=f"head.folds = {folds}")
        hint = "a backbone that others trained has not seen your images"
        require(folds == 0 or self.backbone == "twin", "only the twin is cross-fitted", where="head.folds", hint=hint)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a run does, one field per section of its config.toml."""

    data: DataConfig
    backbone: BackboneConfig
    inference: FamilyConfig
    head: HeadConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    engine: EngineConfig
    predict: PredictConfig

    def to_mapping(self) -> dict[str, Any]:
        """Return the settings as a mapping of sections, as TOML and JSON hold them."""
        return {field.name: to_mapping(getattr(self, field.name)) for field in fields(self)}

    def twin(self) -> Settings:
        """Return the same settings for the deterministic twin; it trains the backbone that a head takes from it."""
        mapping = self.to_mapping() | {"inference": {"family": TWIN}}
        mapping["training"] = mapping["training"] | {"temperature": 1.0}  # it has no posterior
        if self.head.backbone == TWIN_BACKBONE:
            mapping["head"] = {}
        return build_settings(mapping)


def build_settings(mapping: Mapping[str, Any]) -> Settings:
    """Return the settings that a mapping of sections describes; absent sections and keys take their defaults.

    Raises:
        ConfigError: Unknown section or key (with a suggestion), wrong type, or a value out of range.
    """
    known = [field.name for field in fields(Settings)]
    for section in mapping:
        if section not in known:
            raise unknown_name("configuration section", section, known)
    settings = Settings(
        data=build_section(DataConfig, mapping.get("data", {}), section="data"),
        backbone=build_section(BackboneConfig, mapping.get("backbone", {}), section="backbone"),
        inference=build_inference_config(mapping.get("inference", {"family": DEFAULT_FAMILY})),
        head=build_section(HeadConfig, mapping.get("head", {}), section="head"),
        optimizer=build_section(OptimizerConfig, mapping.get("optimizer", {}), section="optimizer"),
        training=build_section(TrainingConfig, mapping.get("training", {}), section="training"),
        engine=build_section(EngineConfig, mapping.get("engine", {}), section="engine"),
        predict=build_section(PredictConfig, mapping.get("predict", {}), section="predict"),
    )
    resolve(settings.backbone.name)  # raises for an unknown name, before any work
    _check_head(settings)
    return settings


def _check_head(settings: Settings) -> None:
    """Raise ConfigError where the head has no backbone to be fitted on."""
    if settings.head.mode == "joint":
        for field in fields(HeadConfig):
            value = getattr(settings.head, field.name)
            where, hint = f"head.{field.name} = {value}", "give --mode head"
            require(value == field.default, "only a head on stored features has it", where=where, hint=hint)
        return
    if settings.head.backbone == TWIN_BACKBONE:
        trained = settings.training.twin and settings.inference.family != TWIN
        hint = "a Bayesian family with training.twin = true, or head.backbone = weights or a run"
        require(trained, "the run trains no twin whose features could be used", where="head.backbone = twin", hint=hint)
    if settings.head.backbone == "weights":
        given = settings.backbone.weights != "none"
        require(given, "no weights are given", where="head.backbone = weights", hint="give --weights")


def recipe_names() -> tuple[str, ...]:
    """Return the names of the built-in recipes, such as "digits/mean_field"."""
    root = resources.files("bayesnet.configs")
    folders = sorted((entry for entry in root.iterdir() if entry.is_dir()), key=lambda entry: entry.name)
    return tuple(
        f"{folder.name}/{recipe.name.removesuffix('.toml')}"
        for folder in folders
        for recipe in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if recipe.name.endswith(".toml")
    )


def read_config(name: str) -> dict[str, Any]:
    """Return the mapping of a recipe by name, or of a TOML file by path.

    Raises:
        ConfigError: There is no such recipe or file, or it cannot be read.
    """
    known = recipe_names()
    if name in known:
        folder, _, stem = name.partition("/")
        with resources.as_file(resources.files("bayesnet.configs") / folder / f"{stem}.toml") as path:
            return read_toml(path)
    if name.endswith(".toml") or Path(name).is_file():
        return read_toml(Path(name))
    raise unknown_name("recipe", name, known)


def _recipe(data_set: str, family: str) -> dict[str, Any]:
    """Return the recipe of a data set and family, or that of the default family with this one's own defaults."""
    if f"{data_set}/{family}" in recipe_names():
        return read_config(f"{data_set}/{family}")
    return {**read_config(f"{data_set}/{DEFAULT_FAMILY}"), "inference": {"family": family}}


def resolve_settings(
    *,
    config: str | None = None,
    data: str | None = None,
    family: str | None = None,
    bayesian: bool = False,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Mapping[str, Any]] | None = None,
) -> Settings:
    """Return the settings of a training run from a recipe, overrides and named flags, in this order.

    Args:
        config: A recipe or TOML file; without it the recipe of the data set and family.
        data: Data set specification, such as "digits" or "folder:PATH".
        family: Name of the posterior family; implies ``bayesian`` unless it is the twin.
        bayesian: Whether a Bayesian family is wanted; "mean_field" unless another one is named.
        overrides: Texts ``section.key=value``.
        flags: Sections of values that the caller set by name.

    Raises:
        ConfigError: Anything in it is unknown, contradictory or out of range.
    """
    if family is not None:
        FAMILIES[family]
    if bayesian and family == TWIN:
        raise ConfigError("--bayesian needs a Bayesian family", where=family, hint=f"try --family {DEFAULT_FAMILY}")
    override: dict[str, Any] = {}
    for text in overrides:
        override = merge(override, parse_override(text))
    if config is None:
        section = override.get("data", {})
        named_spec = section.get("spec") if isinstance(section, Mapping) else None
        kind = str(data or named_spec or DataConfig().spec).partition(":")[0]
        DATASETS[kind]
        mapping = _recipe(kind, family or (DEFAULT_FAMILY if bayesian else TWIN))
    else:
        mapping = read_config(config)
        inference = mapping.get("inference", {})
        require(isinstance(inference, Mapping), "expected a table", where="inference", hint=f"got {inference!r}")
        named = inference.get("family")
        family = family or (DEFAULT_FAMILY if bayesian and named in (None, TWIN) else None)
        if family is not None and family != named:
            mapping = {**mapping, "inference": {"family": family}}
    mapping = merge(merge(mapping, override), flags or {})
    if data is not None:
        mapping = merge(mapping, {"data": {"spec": data}})
    settings = build_settings(mapping)
    if bayesian and settings.inference.family == TWIN:
        raise ConfigError("--bayesian needs a Bayesian family", where=TWIN, hint=f"try --family {DEFAULT_FAMILY}")
    return settings
