"""The tour is committed without outputs, uses every public name, and runs from its first cell to its last."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bayesnet

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "notebooks" / "tour.ipynb"
TITLES = (
    "1. Data: loading and preprocessing",
    "2. Backbones",
    "3. Loss and optimizers",
    "4. Train and validate",
    "5. Save, load, resume",
    "6. Inference",
    "7. Calibration",
    "8. Performance",
    "9. Several devices and search",
    "10. Pyro",
)

# What Jupyter does, without Jupyter: one namespace, cells in order. A figure has nowhere to be shown.
RUNNER = """
import json, sys, warnings
import matplotlib
matplotlib.use("Agg")
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".* is non-interactive, and thus cannot be shown", category=UserWarning)
with open(sys.argv[1], encoding="utf-8") as file:
    cells = json.load(file)["cells"]
namespace = {"__name__": "__main__"}
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
print("ran to the end")
"""


def read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return notebook


def cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in read(TOUR)["cells"] if cell["cell_type"] == kind]


def committed_outputs(notebook: dict[str, Any]) -> list[int]:
    """Return the numbers of the cells that hold what a run left."""
    return [
        number
        for number, cell in enumerate(notebook["cells"])
        if cell.get("outputs") or cell.get("execution_count") is not None
    ]


def names_used() -> set[str]:
    """Return every NAME that the code takes from the package as ``bayesnet.NAME``."""
    trees = [ast.parse("".join(cell["source"])) for cell in cells("code")]
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bayesnet"
    }


def run(notebook: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Execute the code cells of a notebook in a fresh process, in a folder of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", RUNNER, str(notebook)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env=environment,
        check=False,
    )


def test_nothing_of_a_run_is_committed() -> None:
    assert committed_outputs(read(TOUR)) == []


def test_an_output_would_be_noticed() -> None:
    notebook = read(TOUR)
    of_code = [number for number, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "code"]
    notebook["cells"][of_code[0]]["execution_count"] = 1
    notebook["cells"][of_code[1]]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["1\n"]}]
    assert committed_outputs(notebook) == of_code[:2]


def test_the_sections_of_the_tour() -> None:
    lines = [line for cell in cells("markdown") for line in "".join(cell["source"]).splitlines()]
    assert tuple(line.removeprefix("## ") for line in lines if line.startswith("## ")) == TITLES


def test_cells_are_what_jupyter_expects() -> None:
    notebook = read(TOUR)
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len(set(identifiers)) == len(identifiers)


def test_every_public_name_is_used() -> None:
    assert set(bayesnet.__all__) - names_used() == set()


def test_its_words_on_limits_are_those_of_the_readme() -> None:
    """What is on its way is said in two places; where the README's words change, these have to."""
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    tour = " ".join(word for cell in cells("markdown") for word in "".join(cell["source"]).split())
    assert "One device trains at a time" in readme
    assert "One device trains at a time" in tour
    assert "search" in readme.split("are on their way")[0].rsplit(". ", 1)[-1]
    assert "A search over settings is on its way" in tour


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path) -> None:
    done = run(TOUR, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "ran to the end"
    assert list(tmp_path.iterdir()) == [], "the tour leaves something behind"


def test_a_cell_that_fails_would_be_noticed(tmp_path: Path) -> None:
    broken = tmp_path / "broken.ipynb"
    first = {"cell_type": "code", "source": ["number = 1\n"]}
    second = {"cell_type": "code", "source": ["assert number == 2\n"]}
    broken.write_text(json.dumps({"cells": [first, second]}), "utf-8")
    done = run(broken, tmp_path)
    assert done.returncode != 0
    assert 'File "cell 1", line 1' in done.stderr
