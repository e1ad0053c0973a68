"""Posterior families: the table FAMILIES, and the settings that pick from it."""

from __future__ import annotations

from collections.abc import Mapping

from bayesnet.config import build_section
from bayesnet.errors import ConfigError
from bayesnet.inference import (
    deterministic,
    ensemble,
    full_rank,
    guide,
    laplace,
    low_rank,
    matrix_normal,
    mc_dropout,
    mean_field,
    mean_field_all,
    nuts,
    swag,
    vbll,
)
from bayesnet.inference.base import Family, FamilyConfig, Parts, Posterior
from bayesnet.registry import Registry

FAMILIES: Registry[Family] = Registry(
    "family",
    {
        "deterministic": deterministic.FAMILY,
        "mean_field": mean_field.FAMILY,
        "matrix_normal": matrix_normal.FAMILY,
        "low_rank": low_rank.FAMILY,
        "full_rank": full_rank.FAMILY,
        "laplace": laplace.FAMILY,
        "vbll": vbll.FAMILY,
        "nuts": nuts.FAMILY,
        "mc_dropout": mc_dropout.FAMILY,
        "ensemble": ensemble.FAMILY,
        "swag": swag.FAMILY,
        "mean_field_all": mean_field_all.FAMILY,
        "guide": guide.FAMILY,
    },
)


def build_inference_config(mapping: object) -> FamilyConfig:
    """Return the settings of the family that ``mapping["family"]`` names, checked against that family's own keys.

    Raises:
        ConfigError: Unknown family or key, or no family at all.
    """
    name = mapping.get("family") if isinstance(mapping, Mapping) else None
    if not isinstance(name, str):
        raise ConfigError("no family is named", where="inference.family", hint=f"one of {', '.join(FAMILIES)}")
    config: FamilyConfig = build_section(FAMILIES[name].config, mapping, section="inference")
    return config


def build_posterior(parts: Parts, config: FamilyConfig) -> Posterior:
    """Return the untrained posterior that ``config`` describes, initialised from torch's current random state."""
    return FAMILIES[config.family].build(parts, config)
