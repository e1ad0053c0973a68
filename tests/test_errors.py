"""Errors are one printable line: what, where, what to do; each kind with its exit code."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bayesnet.errors import BayesnetError, ConfigError, InterruptedRunError, StopRequest, printable


@pytest.mark.parametrize(
    ("where", "hint", "line"),
    [
        (None, None, "it broke"),
        ("here", None, "it broke (here)"),
        (None, "mend it", "it broke: mend it"),
        ("here", "mend it", "it broke (here): mend it"),
        (0, "mend it", "it broke (0): mend it"),
    ],
)
def test_the_line(where: object, hint: str | None, line: str) -> None:
    error = ConfigError("it broke", where=where, hint=hint)
    assert str(error) == line
    assert isinstance(error, BayesnetError)


def test_an_interrupted_run() -> None:
    saved = InterruptedRunError(15, where="runs/a", hint="continue with `bayesnet train --resume runs/a`")
    assert str(saved) == "interrupted, checkpoint saved (runs/a): continue with `bayesnet train --resume runs/a`"
    assert not isinstance(StopRequest(2), Exception), "a decoder's error handling would swallow it"
    assert (str(StopRequest(15)), StopRequest(15).exit_code) == ("interrupted", 143)
    assert (saved.exit_code, InterruptedRunError(2).exit_code, InterruptedRunError.exit_code) == (143, 130, 1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("right\u202eleft", r"right\u202eleft"),
        ("not \udcff UTF-8", r"not \udcff UTF-8"),
        ("café 猫", "café 猫"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_any_name_becomes_one_printable_line(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown.encode("utf-8").decode() == shown
    assert shown == text or not text.isprintable()
