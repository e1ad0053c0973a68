"""Fixtures of the command line's tests: commands run in this process, in an empty directory."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from bayesnet_cli.main import main

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give an empty directory and make it the current one."""
    path = tmp_path / "workplace"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str], workplace: Path) -> RunCli:
    """Give a function from a command line, its words quoted as in a shell, to (exit code, stdout, stderr)."""

    def run(line: str, **places: object) -> tuple[int, str, str]:
        capsys.readouterr()
        arguments = shlex.split(line.format(**{name: shlex.quote(str(value)) for name, value in places.items()}))
        with pytest.raises(SystemExit) as leave:
            main(arguments)
        out, err = capsys.readouterr()
        assert isinstance(leave.value.code, int)
        return leave.value.code, out, err

    return run
