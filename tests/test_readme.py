"""README's Python runs as it stands, and what it says of commands and exit codes is so."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")


def block(heading: str) -> str:
    """Return the first indented block below a heading."""
    section = README.split(f"## {heading}\n")[1]
    found = re.search(r"(?m)^(?:    .*\n|\n)+", section.split("\n", 1)[1] if section.startswith("\n") else section)
    assert found is not None
    return textwrap.dedent(found.group()).strip()


def test_python_in_ten_lines(folder_data: Path, tmp_path: Path) -> None:
    code = block("Python in ten lines")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    quick = f'data="folder:{folder_data}", out="{tmp_path / "run"}", epochs=1, overrides=["backbone.width=4"]'
    code = code.replace('data="folder:photos"', quick).replace('"new_photos"', f'"{next(folder_data.rglob("*.png"))}"')
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["deterministic", "bayesian"]
    path, label, lower, probability, upper = lines[-1].rsplit(maxsplit=4)
    assert Path(path).suffix == ".png"
    assert label in {"red", "green", "blue"}
    assert 0 <= float(lower) <= float(probability) <= float(upper) <= 1


def test_every_command_of_the_eight_exists() -> None:
    from bayesnet_cli.main import cli

    lines = block("The command line in eight").splitlines()
    assert len(lines) == 8
    for line in lines:
        words = line.split("#")[0].split()
        command = cli.commands[words[1]]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options
