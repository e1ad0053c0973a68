"""The statistical battery as a command."""

from __future__ import annotations

from bayesnet import strict_json
from bayesnet.battery.base import Check
from bayesnet.battery.running import run_battery
from bayesnet.config import require
from bayesnet.types import JsonObject
from bayesnet.workflows.environment import versions


class SelftestListener:
    """Hears of progress; does nothing."""

    def on_check(self, check: Check, number: int, total: int) -> None:
        """Called before each check runs."""


def selftest(*, full: bool = False, seed: int = 0, listener: SelftestListener | None = None) -> JsonObject:
    """Run the statistical battery on this machine's installation: exact answers, frozen references, planted faults.

    Args:
        full: Whether to run the checks that take minutes too: simulation-based calibration and the like.
        seed: Of the noise of tests that are not frozen at seed 0.
        listener: Hears of progress.

    Returns:
        ``passed``, ``tests``, ``planted``, ``families``: see `bayesnet.battery.running.run_battery`; and ``versions``.

    Raises:
        ConfigError: ``seed`` is out of range.
    """
    require(0 <= seed < 2**31, "must be from 0 to 2147483647", where=f"--seed {seed}")
    heard = listener or SelftestListener()
    record = run_battery(full=full, seed=seed, on_check=heard.on_check) | {"versions": versions()}
    ready: JsonObject = strict_json.json_ready(record)
    return ready
