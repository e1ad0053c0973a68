"""What stands beside the code (conda environment, citation, guide for contributors) says what the code says."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import bayesnet

ROOT = Path(__file__).parents[1]
ENVIRONMENT = (ROOT / "environment.yml").read_text("utf-8")
CITATION = (ROOT / "CITATION.cff").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
CI = (ROOT / ".ci" / "run").read_text("utf-8")
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
PROJECT_PATH = re.compile(r"\.?[\w.-]+(?:/[\w.-]+)+|[A-Za-z_]+\.(?:md|toml|yml|cff)|LICENSE|configs")


def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings: dict[str, Any] = tomllib.load(file)
    return settings


def split(requirement: str) -> tuple[str, str]:
    """Return the name of a requirement, as pip compares names, and its range."""
    found = re.fullmatch(r"([A-Za-z0-9._-]+?)\s*([<>=!~][^;]*)?", requirement)
    assert found is not None, requirement
    return re.sub(r"[-_.]+", "-", found[1]).lower(), (found[2] or "").replace(" ", "")


def conda_requirements(text: str) -> dict[str, str]:
    """Return name to range of an environment file, by conda or by pip, under the names that pip uses."""
    entries = re.findall(r"(?m)^ +- ([^-\s].*?):?$", text.split("dependencies:\n")[1])
    pairs = [split(entry) for entry in entries if entry != "pip"]
    return {CONDA_NAMES.get(name, name): version for name, version in pairs}


def drift(environment: str) -> set[tuple[str, str]]:
    """Return the requirements, as (name, range), that are in only one of the two files."""
    settings = project()["project"]
    wanted = [*settings["dependencies"], *settings["optional-dependencies"]["test"]]
    expected = {*map(split, wanted), ("python", settings["requires-python"])}
    return expected ^ set(conda_requirements(environment).items())


def test_conda_and_pip_ask_for_the_same() -> None:
    assert drift(ENVIRONMENT) == set()


@pytest.mark.parametrize(
    ("line", "planted", "found"),
    [
        ("  - pytorch>=2.10\n", "  - pytorch>=2.9\n", {("torch", ">=2.10"), ("torch", ">=2.9")}),
        ("  - rich\n", "", {("rich", "")}),
        ("  - rich\n", "  - rich\n  - pandas\n", {("pandas", "")}),
        ("      - -e .\n", "      - tqdm>=4\n      - -e .\n", {("tqdm", ">=4")}),
        ("python>=3.11", "python>=3.12", {("python", ">=3.11"), ("python", ">=3.12")}),
    ],
)
def test_a_drift_of_the_two_is_noticed(line: str, planted: str, found: set[tuple[str, str]]) -> None:
    assert ENVIRONMENT.count(line) == 1
    assert drift(ENVIRONMENT.replace(line, planted)) == found


def test_the_environment_is_named_and_installs_the_library() -> None:
    assert re.search(r"(?m)^name: (.*)$", ENVIRONMENT)[1] == "bayesnet"  # type: ignore[index]
    assert re.search(r"(?m)^channels:\n((?:  - .*\n)+)", ENVIRONMENT)[1].split() == [  # type: ignore[index]
        *("-", "conda-forge"),
        *("-", "nodefaults"),
    ]
    assert ENVIRONMENT.endswith("  - pip:\n      - -e .\n")


def citation_fields() -> dict[str, str]:
    """Return the top-level entries of the citation file: key to the text of its line."""
    return dict(re.findall(r"(?m)^([a-z-]+): *(.*)$", CITATION))


def test_the_citation_is_that_of_this_version() -> None:
    fields, settings = citation_fields(), project()["project"]
    assert fields["version"] == bayesnet.__version__ == settings["version"]
    assert fields["license"] == settings["license"]
    assert fields["title"] == settings["name"]
    assert re.findall(r"(?m)^  - (.*)$", CITATION.split("keywords:\n")[1]) == settings["keywords"]


def test_the_citation_has_what_the_format_requires() -> None:
    fields = citation_fields()
    assert fields.keys() >= {"cff-version", "message", "title", "authors"}
    assert fields["cff-version"] == "1.2.0"
    assert "authors:\n  - name: The bayesnet developers\n" in CITATION
    assert "://" not in CITATION, "there is no address yet that a citation could name"


def paths_named(text: str) -> list[str]:
    """Return the paths of the project that a text names in backticks."""
    return [name for name in re.findall(r"`([^`\s]+)`", text) if PROJECT_PATH.fullmatch(name)]


def missing_paths(text: str) -> list[str]:
    return [name for name in paths_named(text) if not (ROOT / name).exists()]


def test_every_path_that_the_guide_names_exists() -> None:
    assert missing_paths(CONTRIBUTING) == []
    assert {".ci/run", "README.md", "LICENSE", "notebooks/tour.ipynb", "docs/pyro.md"} <= set(paths_named(CONTRIBUTING))


def test_a_path_that_is_gone_is_noticed() -> None:
    text = "see `bayesnet/inference/mean_feild.py`, `.ci/walk`, `CHANGES.md` and `logits_SBK`"
    assert missing_paths(text) == ["bayesnet/inference/mean_feild.py", ".ci/walk", "CHANGES.md"]


def test_the_guide_names_every_marker_and_no_other() -> None:
    markers = {line.partition(":")[0] for line in project()["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(re.findall(r"`pytest -q -m (\w+)`", CONTRIBUTING)) == markers


def test_the_guide_names_the_tables_of_parts_where_they_are() -> None:
    rows = re.findall(r"(?m)^\| [a-z ]+ \| `([\w/]+)` \| `([A-Z]+)` \|", CONTRIBUTING)
    assert len(rows) == 6
    for folder, table in rows:
        assert len(getattr(importlib.import_module(folder.replace("/", ".")), table)) > 1
    adding = (ROOT / "ARCHITECTURE.md").read_text("utf-8").split("## Adding\n")[1].split("\n## ")[0]
    assert {table for _, table in rows} == set(re.findall(r"`([A-Z]+)`", adding))


@pytest.mark.parametrize(
    "tool", ["pytest -q", "pytest -q -m slow", "pytest -q -m oracle", "pytest -q -m extra", "ruff", "mypy"]
)
def test_what_the_guide_runs_by_hand_is_what_ci_runs(tool: str) -> None:
    commands = [command for command in re.findall(r"(?m)^\| `([^`]+)` \|", CONTRIBUTING) if command.startswith(tool)]
    assert commands
    if tool in ("ruff", "mypy"):
        assert [command for command in commands if f".venv/bin/{command}\n" not in CI] == []
    else:
        assert f".venv/bin/{tool}" in CI


def test_the_guide_and_the_readme_run_the_tests_alike() -> None:
    command = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest -n auto\n"
    assert command in (ROOT / "README.md").read_text("utf-8")
    assert command in CONTRIBUTING
    extras = set(re.findall(r"'\.\[([\w,]+)\]'", CONTRIBUTING))
    assert {extra for names in extras for extra in names.split(",")} <= set(
        project()["project"]["optional-dependencies"]
    )
