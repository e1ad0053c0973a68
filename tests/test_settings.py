"""Settings: recipe, then overrides, then named flags; written and read back as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from bayesnet.config import read_toml
from bayesnet.data import DataConfig
from bayesnet.errors import ConfigError
from bayesnet.inference import FAMILIES
from bayesnet.inference.mean_field import MeanFieldConfig
from bayesnet.settings import (
    DEFAULT_FAMILY,
    PredictConfig,
    build_settings,
    read_config,
    recipe_names,
    resolve_settings,
)


def refusal(**arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_settings(**arguments)  # type: ignore[arg-type]
    return str(caught.value)


def test_the_defaults() -> None:
    assert resolve_settings() == resolve_settings(config="digits/deterministic")
    assert resolve_settings(bayesian=True) == resolve_settings(config="digits/mean_field")
    assert resolve_settings(family="mean_field") == resolve_settings(config="digits/mean_field")
    assert resolve_settings(data="folder:photos").data.spec == "folder:photos"
    assert FAMILIES[DEFAULT_FAMILY].bayesian


@pytest.mark.parametrize("name", recipe_names())
def test_settings_survive_toml(tmp_path: Path, name: str) -> None:
    settings = resolve_settings(config=name, overrides=["data.fractions=[0.7, 0.1, 0.1, 0.1]"])
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(settings.to_mapping()))
    assert build_settings(read_toml(path)) == settings
    assert resolve_settings(config=str(path)) == settings


def test_what_comes_later_wins(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[training]\nepochs = 2\nbatch_size = 16\nseed = 5\n[inference]\nfamily = "mean_field"\n')
    settings = resolve_settings(
        config=str(path),
        overrides=["training.epochs=3", "training.epochs=4", "training.batch_size=32"],
        flags={"training": {"epochs": 6}},
    )
    assert (settings.training.epochs, settings.training.batch_size, settings.training.seed) == (6, 32, 5)
    assert settings.data == DataConfig()
    spec = resolve_settings(config=str(path), overrides=["data.spec=a"], data="folder:b").data.spec
    assert spec == "folder:b"


def test_the_family_of_a_configuration(tmp_path: Path) -> None:
    bayesian = "digits/mean_field"
    assert resolve_settings(config=bayesian, bayesian=True).inference.family == "mean_field"
    assert resolve_settings(config=bayesian, family="deterministic").inference.family == "deterministic"
    assert isinstance(resolve_settings(config="digits/deterministic", bayesian=True).inference, MeanFieldConfig)
    bare = tmp_path / "bare.toml"
    bare.write_text("[training]\nepochs = 2\n")
    assert resolve_settings(config=str(bare)).inference.family == DEFAULT_FAMILY


def test_the_twin_differs_in_its_head_alone() -> None:
    settings = resolve_settings(bayesian=True, overrides=["training.seed=3", "backbone.width=4"])
    twin, mapping = settings.twin().to_mapping(), settings.to_mapping()
    assert twin.pop("inference") == {"family": "deterministic"}
    assert mapping.pop("inference")["family"] == "mean_field"
    assert twin == mapping


def test_what_is_refused() -> None:
    assert refusal(family="mean_feild").startswith("unknown family (mean_feild): did you mean 'mean_field'?")
    assert refusal(data="digts").startswith("unknown data set (digts): did you mean 'digits'?")
    assert refusal(config="digit/mean_field").startswith("unknown recipe (digit/mean_field): did you mean 'digits/mean")
    assert refusal(config="mine.toml").startswith("cannot read the configuration (mine.toml): ")
    expected = "--bayesian needs a Bayesian family (deterministic): try --family mean_field"
    assert refusal(bayesian=True, family="deterministic") == expected
    assert refusal(overrides=["optimiser.name=sgd"]).startswith("unknown configuration section (optimiser)")
    assert refusal(overrides=["training.epoch=3"]).startswith("unknown configuration key (training.epoch)")
    assert refusal(overrides=["inference.prior_scale=1"]).startswith(
        "unknown configuration key (inference.prior_scale)"
    )
    assert refusal(overrides=["inference.family=3"]).startswith("no family is named (inference.family): one of ")
    assert refusal(overrides=["backbone.name=vgg"]).startswith("unknown backbone (vgg)")
    assert refusal(flags={"training": {"epochs": 0}}) == "must be at least 1 (training.epochs = 0)"


@pytest.mark.parametrize("content", ["inference = 3", "training = 3", "[[training]]\nepochs = 1", "inference = []"])
def test_a_section_that_is_no_table(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content)
    refusal(config=str(path))
    refusal(config=str(path), bayesian=True)


def test_recipes_by_name() -> None:
    assert set(recipe_names()) >= {"digits/deterministic", "digits/mean_field"}
    assert read_config("digits/mean_field")["inference"]["family"] == "mean_field"


@pytest.mark.parametrize("samples", [0, -1, 3, 512])
def test_draws_are_a_power_of_two(samples: int) -> None:
    with pytest.raises(ConfigError, match=r"must be a power of two from 1 to 256 \(predict.samples = "):
        PredictConfig(samples=samples)


@pytest.mark.parametrize("chunk_size", [0, 4097])
def test_chunks_in_range(chunk_size: int) -> None:
    with pytest.raises(ConfigError, match=r"must be from 1 to 4096 \(predict.chunk_size\)"):
        PredictConfig(chunk_size=chunk_size)
