"""Runs `elsewhere_cases.py` in a process of its own: a new device is known to all of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_all_that_a_gpu_runs_on_a_device_that_is_not_the_cpu() -> None:
    cases = [sys.executable, "-m", "pytest", "tests/adaptive/elsewhere_cases.py", "-p", "no:xdist"]
    done = subprocess.run(cases, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
