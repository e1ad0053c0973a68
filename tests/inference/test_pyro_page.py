"""docs/pyro.md runs as it stands, in one interpreter of its own, with warnings as errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "pyro.md"


def test_every_example_of_the_page_runs() -> None:
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE.read_text("utf-8"))
    assert len(blocks) >= 7
    code = "\n".join(blocks) + "\nassert len(losses) == 6 and all(loss == loss for loss in losses)\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=PAGE.parents[1])
    assert run.returncode == 0, run.stderr
