"""Strict configuration: nothing is ignored, nothing is guessed, and each message names the key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bayesnet.config import (
    MAX_CONFIG_BYTES,
    MAX_CONFIG_DEPTH,
    build_section,
    merge,
    parse_override,
    read_toml,
    require,
    to_mapping,
)
from bayesnet.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Oven:
    """A section with every type that a field may have."""

    mode: Literal["bake", "grill"] = "bake"
    degrees: float = 180.0
    minutes: int = 20
    fan: bool = False
    name: str = "mine"
    shelves: tuple[int, ...] = (1, 2)
    timer: int | None = None

    def __post_init__(self) -> None:
        require(self.minutes >= 0, "must not be negative", where="oven.minutes", hint="wait")


def test_a_section_from_a_mapping() -> None:
    oven = build_section(Oven, {"mode": "grill", "degrees": 200, "shelves": [3], "timer": 5}, section="oven")
    assert oven == Oven(mode="grill", degrees=200.0, shelves=(3,), timer=5)
    assert isinstance(oven.degrees, float)
    assert build_section(Oven, {}, section="oven") == Oven()


def test_and_back() -> None:
    assert to_mapping(Oven()) == {
        "mode": "bake",
        "degrees": 180.0,
        "minutes": 20,
        "fan": False,
        "name": "mine",
        "shelves": [1, 2],
    }
    assert build_section(Oven, to_mapping(Oven(timer=3)), section="oven") == Oven(timer=3)
    with pytest.raises(TypeError):
        to_mapping({"mode": "bake"})


@pytest.mark.parametrize(
    ("mapping", "line"),
    [
        ({"minuets": 3}, "unknown configuration key (oven.minuets): did you mean 'oven.minutes'? Known: oven.mode, "),
        ({"mode": "gril"}, "unknown value of oven.mode (gril): did you mean 'grill'? Known: bake, grill"),
        ({"mode": 3}, "unknown value of oven.mode (3): "),
        ({"minutes": 1.5}, "expected int (oven.minutes): got 1.5"),
        ({"minutes": True}, "expected int (oven.minutes): got True"),
        ({"minutes": "20"}, "expected int (oven.minutes): got '20'"),
        ({"degrees": "hot"}, "expected float (oven.degrees): got 'hot'"),
        ({"degrees": True}, "expected float (oven.degrees): got True"),
        ({"fan": 1}, "expected bool (oven.fan): got 1"),
        ({"name": 3}, "expected str (oven.name): got 3"),
        ({"shelves": 3}, "expected a list (oven.shelves): got 3"),
        ({"shelves": [1, "two"]}, "expected int (oven.shelves): got 'two'"),
        ({"timer": "soon"}, "expected int (oven.timer): got 'soon'"),
        ({"minutes": {"a": 1}}, "expected int (oven.minutes): got {'a': 1}"),
        ({"minutes": -1}, "must not be negative (oven.minutes): wait"),
        ([1], "expected a table (oven): got [1]"),
        ("bake", "expected a table (oven): got 'bake'"),
    ],
    ids=str,
)
def test_what_a_section_refuses(mapping: Any, line: str) -> None:  # noqa: ANN401 - wrong on purpose
    with pytest.raises(ConfigError) as caught:
        build_section(Oven, mapping, section="oven")
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=1", 1),
        ("a.b=1e-3", 1e-3),
        ("a.b=true", True),
        ("a.b=[1, 2]", [1, 2]),
        ("a.b='1'", "1"),
        ("a.b=sgd", "sgd"),
        ("a.b=x=y", "x=y"),
        ("a.b=", ""),
        ("a.b=nan", math.nan),
        ("a.b=folder:C:\\photos", "folder:C:\\photos"),
        (" a . b =1", 1),
        ("a.b=1\nc = 2", "1\nc = 2"),
    ],
)
def test_an_override(text: str, value: object) -> None:
    parsed = parse_override(text)["a"]["b"]
    assert parsed == value or (value != value and parsed != parsed)
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["a.b", "a=1", "=1", ".b=1", "a..b=1", "", "a. =1"])
def test_what_is_no_override(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the override") as caught:
        parse_override(text)
    assert str(caught.value).endswith("write section.key=value")


def test_an_override_of_any_depth_is_one_line_or_an_error() -> None:
    assert parse_override(".".join("abcdefgh") + "=1")
    with pytest.raises(ConfigError, match="override is nested too deeply"):
        parse_override(".".join(["a"] * (MAX_CONFIG_DEPTH + 1)) + "=1")
    deep = "[" * 100_000
    assert parse_override(f"a.b={deep}") == {"a": {"b": deep}}


TABLES = st.recursive(
    st.dictionaries(st.sampled_from("abc"), st.integers()),
    lambda inner: st.dictionaries(st.sampled_from("abc"), st.integers() | inner),
    max_leaves=6,
)


@given(TABLES, TABLES)
def test_merge_lays_one_over_the_other(base: dict[str, Any], override: dict[str, Any]) -> None:
    before = repr(base), repr(override)
    merged = merge(base, override)
    assert (repr(base), repr(override)) == before
    assert merge(merged, override) == merged
    assert merged.keys() == base.keys() | override.keys()
    assert {key: value for key, value in merged.items() if key not in override} == {
        key: value for key, value in base.items() if key not in override
    }


def test_reading_toml(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[oven]\nname = "é"\n', "utf-8")
    assert read_toml(path) == {"oven": {"name": "é"}}


@pytest.mark.parametrize(
    "data", [b"a = ", b"a = 1\na = 2\n", b"\xff\xfe", b"a = " + b"[" * 100_000, b"x" * (MAX_CONFIG_BYTES + 1), None]
)
def test_what_cannot_be_read(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "a.toml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_toml(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_toml(tmp_path)
