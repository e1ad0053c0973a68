"""`list`: the tables that are used, row by row, and patterns that pick from them."""

from __future__ import annotations

import sys

import pytest

from bayesnet.backbones import BACKBONES, timm_zoo
from bayesnet.data import DATASETS
from bayesnet.errors import ConfigError
from bayesnet.inference import FAMILIES
from bayesnet.workflows import listing
from bayesnet.workflows.listing import list_backbones, list_datasets, list_families

ROW = {"name", "description", "num_features", "parameters", "input_size", "accuracy"}


def test_backbones() -> None:
    record = list_backbones()
    assert [row["name"] for row in record["rows"]] == list(BACKBONES)
    assert all(row.keys() == ROW and row["parameters"] > 0 for row in record["rows"])
    assert [row["name"] for row in record["collections"]] == ["torchvision:NAME", "timm:NAME"]
    assert record["collections"][0]["num_names"] >= 80


def test_backbones_by_pattern() -> None:
    record = list_backbones("resnet*")
    assert [row["name"] for row in record["rows"]] == ["resnet18", "resnet34", "resnet50"]
    assert record["collections"] == []
    names = [row["name"] for row in list_backbones("torchvision:squeezenet?_?")["rows"]]
    assert names == ["torchvision:squeezenet1_0", "torchvision:squeezenet1_1"]
    [row] = list_backbones("torchvision:alexnet")["rows"]
    assert (row["num_features"], row["parameters"], row["input_size"]) == (4096, 57_003_840, 224)
    assert 0.5 < row["accuracy"] < 0.6


def test_many_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(listing, "MAX_COUNTED", 3)
    monkeypatch.setattr(listing, "describe", refuse)
    rows = list_backbones("torchvision:vgg*")["rows"]
    assert len(rows) == 8
    assert all(row.keys() == ROW and row["parameters"] is None and row["input_size"] == 224 for row in rows)
    with pytest.raises(AssertionError):
        list_backbones("torchvision:vgg11*")  # two of them


def test_a_collection_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    timm_zoo.names.cache_clear()
    assert list_backbones()["collections"][1]["num_names"] is None
    with pytest.raises(ConfigError, match=r"timm is not installed \(timm:NAME\): pip install 'bayesnet\[timm\]'"):
        list_backbones("timm:resnet*")
    timm_zoo.names.cache_clear()


def test_families_and_data_sets() -> None:
    families = list_families()["rows"]
    assert [row["name"] for row in families] == list(FAMILIES)
    assert {row["name"]: row["bayesian"] for row in families}["deterministic"] is False
    data_sets = {row["name"]: row for row in list_datasets()["rows"]}
    assert list(data_sets) == list(DATASETS)
    assert (data_sets["digits"]["spec"], data_sets["folder"]["spec"]) == ("digits", "folder:PATH")
    assert [row["name"] for row in list_datasets("fold*")["rows"]] == ["folder"]


def test_no_match() -> None:
    with pytest.raises(ConfigError, match=r"unknown family \(mean_feild\): did you mean 'mean_field'\?"):
        list_families("mean_feild")
    with pytest.raises(
        ConfigError, match=r"unknown backbone \(torchvision:resnet81\): did you mean 'torchvision:resnet18'"
    ):
        list_backbones("torchvision:resnet81")
    for pattern, look in (("x*", list_backbones), ("torchvision:x*", list_backbones), ("x?", list_datasets)):
        with pytest.raises(ConfigError, match=r"no (backbone|data set) matches \(.*\): quote the pattern"):
            look(pattern)
