"""Figures of the statistical tests, shown at the end of the session."""

from __future__ import annotations

import pytest

FIGURES = pytest.StashKey[dict[str, list[str]]]()


@pytest.fixture
def figures(pytestconfig: pytest.Config) -> dict[str, list[str]]:
    """Give a table from a title to lines; what a test puts there is printed when all are done."""
    return pytestconfig.stash.setdefault(FIGURES, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, lines in config.stash.get(FIGURES, {}).items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
