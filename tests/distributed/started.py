"""A run in processes of its own, as users start it, that a test can follow and end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launch.run.marks import read_marks


class Started:
    """A run that `launch.start` has started, and a way to see how far it is.

    Args:
        holds: rank that waits once so many steps are done: what follows is no race.
        fails: rank that fails there.
        options: further words of the command line.
    """

    def __init__(
        self,
        tree: dict[str, Any],
        folder: Path,
        *,
        holds: tuple[int, int] | None = None,
        fails: tuple[int, int] | None = None,
        options: tuple[str, ...] = ("--ranks", "2"),
    ) -> None:
        recipe = folder / f"{Path(tree['output']).name}.yaml"
        recipe.write_text(yaml.safe_dump(tree))
        command = [sys.executable, "-m", "launch.start", *options, "--config", str(recipe)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        for name, at in (("HOLDS", holds), ("FAILS", fails)):
            if at is not None:
                environment[name] = f"{at[0]}:{first_row(*at, batch=tree['train']['batch_size'])}"
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self.lines: list[str] = []
        self._output, self._holds = Path(tree["output"]), holds

    def wait_for(self, prefix: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith(prefix):
                return
        pytest.fail("".join(self.lines))

    def wait_until_held(self) -> None:
        """The rank that `holds` has no batch: it says that a step is done before it ends it."""
        assert self._holds is not None
        rank, steps = self._holds
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            mark = read_marks(self._output).get(rank)
            if mark is not None and (mark.at, mark.step) == ("batch", steps):
                return
            time.sleep(0.02)
        pytest.fail(f"rank {rank} does not wait behind step {steps}\n" + "".join(self.lines))

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def rank(self, number: int) -> psutil.Process:
        wanted = f"--local_rank={number}"
        return next(p for p in self.descendants() if wanted in p.cmdline())

    def launcher(self) -> psutil.Process:
        """The one that starts the ranks, not the one that starts it."""
        return next(p for p in self.descendants() if "deepspeed.launcher.launch" in p.cmdline())

    def end(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=200)
        return self.process.returncode, "".join(self.lines) + out

    def close(self) -> None:
        if self.process.poll() is None:
            for process in [*self.descendants(), psutil.Process(self.process.pid)]:
                process.kill()
            self.process.wait()


def first_row(rank: int, steps: int, *, batch: int = 8) -> int:
    """The first row of a rank's part of the batch that follows so many steps."""
    return batch * steps + batch // 2 * rank
