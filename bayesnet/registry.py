"""Registry: a table from public names to entries, whose error says which name was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from bayesnet.errors import ConfigError

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """An immutable table of named entries.

    Args:
        kind: What the entries are, for error messages, such as "family".
        entries: Name to entry. The table is the overview: nothing is discovered or imported by name.

    Example:
        >>> colours = Registry("colour", {"red": 1, "green": 2})
        >>> colours["red"], list(colours)
        (1, ['red', 'green'])
        >>> colours["gren"]
        Traceback (most recent call last):
        bayesnet.errors.ConfigError: unknown colour (gren): did you mean 'green'? Known: red, green
    """

    def __init__(self, kind: str, entries: Mapping[str, Entry]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Entry:
        """Return the entry, or raise ConfigError with a suggestion."""
        try:
            return self._entries[name]
        except KeyError:
            raise unknown_name(self.kind, name, self._entries) from None

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in table order."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        """Return whether the name is known (never raises)."""
        return isinstance(name, str) and name in self._entries


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return (not raise) the error for an unknown name, with the closest known one as a suggestion.

    Args:
        kind: What was looked up, such as "configuration key".
        name: The name that was given.
        known: The names that exist.
    """
    names = [str(entry) for entry in known]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    suggestion = f"did you mean '{close[0]}'? " if close else ""
    return ConfigError(f"unknown {kind}", where=name, hint=f"{suggestion}Known: {', '.join(names)}")
