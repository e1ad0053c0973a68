"""`bayesnet list`: tables for a person, one JSON object for a program, one line for what does not exist."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from bayesnet.backbones import BACKBONES

RunCli = Callable[..., tuple[int, str, str]]


def test_backbones(run_cli: RunCli) -> None:
    code, out, err = run_cli("list backbones")
    assert (code, err) == (0, "")
    assert all(f"│ {name} " in out for name in BACKBONES)
    assert "23,508,032" in out
    assert "accuracy: top-1 on ImageNet-1k of the published weights" in out
    assert "torchvision:NAME: torchvision's classification networks; 80" in out
    assert "see `bayesnet list backbones 'timm:*'`" in out


def test_pattern(run_cli: RunCli) -> None:
    code, out, _ = run_cli("list backbones 'torchvision:squeezenet*' --json")
    assert code == 0
    record = json.loads(out)
    assert [row["num_features"] for row in record["rows"]] == [512, 512]
    assert record["collections"] == []


@pytest.mark.parametrize(("what", "name"), [("families", "mean_field"), ("datasets", "folder:PATH")])
def test_families_and_data_sets(run_cli: RunCli, what: str, name: str) -> None:
    code, out, err = run_cli(f"list {what}")
    assert (code, err) == (0, "")
    assert f" {name} " in out
    assert json.loads(run_cli(f"list {what} --json")[1]).keys() == {"rows"}


def test_many_backbones(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesnet.workflows.listing.MAX_COUNTED", 3)
    code, out, _ = run_cli("list backbones 'torchvision:vgg*'")
    assert code == 0
    assert out.endswith("parameters are counted where at most 3 backbones match: narrow the pattern\n")


def test_wrong_input(run_cli: RunCli) -> None:
    code, out, err = run_cli("list families mean_feild")
    assert (code, out) == (2, "")
    assert err.startswith("bayesnet: error: unknown family (mean_feild): did you mean 'mean_field'?")
    code, _, err = run_cli("list families 'x*'")
    assert (code, err) == (
        2,
        "bayesnet: error: no family matches (x*): quote the pattern, and see the list without it\n",
    )
    code, _, err = run_cli("list heads")
    assert code == 2
    assert "'heads' is not one of 'backbones', 'families', 'datasets'" in err
