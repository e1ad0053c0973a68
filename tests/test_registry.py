"""Registries: tables whose error says which name was probably meant."""

from __future__ import annotations

import pytest

from bayesnet.errors import ConfigError
from bayesnet.registry import Registry, unknown_name

COLOURS = Registry("colour", {"red": 1, "green": 2, "blue": 3})


def test_a_table() -> None:
    assert list(COLOURS) == ["red", "green", "blue"]
    assert len(COLOURS) == 3
    assert COLOURS["green"] == 2
    assert dict(COLOURS) == {"red": 1, "green": 2, "blue": 3}
    assert "red" in COLOURS
    assert "gren" not in COLOURS
    assert [] not in COLOURS  # type: ignore[comparison-overlap]


def test_a_near_miss_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError) as caught:
        COLOURS["gren"]
    assert str(caught.value) == "unknown colour (gren): did you mean 'green'? Known: red, green, blue"


def test_a_far_miss_gets_the_table() -> None:
    with pytest.raises(ConfigError) as caught:
        COLOURS["xylophone"]
    assert str(caught.value) == "unknown colour (xylophone): Known: red, green, blue"


def test_the_table_is_a_copy() -> None:
    entries = {"a": 1}
    table = Registry("letter", entries)
    entries["b"] = 2
    assert list(table) == ["a"]


def test_the_error_is_returned() -> None:
    assert (
        str(unknown_name("letter", "aa", iter(["ab", "cd"]))) == "unknown letter (aa): did you mean 'ab'? Known: ab, cd"
    )
