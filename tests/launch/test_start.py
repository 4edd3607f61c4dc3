"""What a start needs to know: hostfiles, figures for the eye, and where signals go."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch.run.errors import BadInput
from launch.start import count_ranks


def hostfile(folder: Path, text: str) -> argparse.Namespace:
    path = folder / "hosts"
    path.write_text(text)
    return argparse.Namespace(hostfile=str(path), ranks=None)


def test_ranks_of_several_nodes_are_those_of_the_hostfile(tmp_path: Path) -> None:
    text = "node-1 slots=8\n# spare\n\nnode-2 slots=4  # half\n"
    assert count_ranks(hostfile(tmp_path, text), gpus=2) == 12


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("node-1 8\n", "hosts:1: must be HOST slots=COUNT"),
        ("node-1 slots=8\nnode-2 slots=x\n", "hosts:2: must be HOST slots=COUNT"),
        ("# nobody\n", "hosts: names no host"),
    ],
)
def test_a_wrong_hostfile_is_one_line(text: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=re.escape(line)):
        count_ranks(hostfile(tmp_path, text), gpus=2)


# A launcher and a rank that listens, one that does not listen yet, and a launcher without ranks.
RANK = "print('ready', flush=True); time.sleep(60)"
LISTENING = f"import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); {RANK}"
DEAF = f"import time; {RANK}"
STAND_IN = """
import subprocess, sys
sys.exit(subprocess.Popen([sys.executable, "-c", sys.argv[1], "--local_rank=0"]).wait())
"""
# Its rank has ended, itself not yet.
ENDING = """
import subprocess, sys, time
subprocess.run([sys.executable, "-c", sys.argv[1], "--local_rank=0"])
print("ended", flush=True)
time.sleep(3)
"""


class Supervised:
    """A process that supervises a stand-in for the launcher; it has said `ready`."""

    def __init__(self, launcher: str, rank: str = "", *, until: str = "ready") -> None:
        command = ["sys.executable", "'-c'", repr(launcher), repr(rank)]
        program = (
            "import sys; from launch.start import supervise;"
            f"sys.exit(supervise([{', '.join(command)}]))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )
        assert self.process.stdout is not None
        while self.process.stdout.readline() != f"{until}\n":
            assert self.process.poll() is None
        self.started = psutil.Process(self.process.pid).children(recursive=True)
        assert self.started

    def end(self, number: int) -> tuple[int, str]:
        """Signal it; its exit code and what it said. Nothing that it started is left."""
        try:
            self.process.send_signal(number)
            said, _ = self.process.communicate(timeout=30)
            _, alive = psutil.wait_procs(self.started, timeout=10)
        finally:
            self.process.kill()
            for process in self.started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        assert not alive
        return self.process.returncode, said


def test_a_signal_reaches_the_ranks_and_not_the_launcher() -> None:
    """A launcher that is signalled kills its ranks and exits 1; a rank saves and exits 0."""
    assert Supervised(STAND_IN, LISTENING).end(signal.SIGINT) == (0, "")


@pytest.mark.parametrize(
    ("launcher", "rank", "number"),
    [(DEAF, "", signal.SIGINT), (STAND_IN, DEAF, signal.SIGTERM)],
    ids=["before ranks", "before ranks listen"],
)
def test_a_run_that_is_stopped_while_it_starts_is_ended(
    launcher: str, rank: str, number: int
) -> None:
    """A rank that SIGTERM would kill has trained nothing: the run ends as asked, not as failed."""
    code, said = Supervised(launcher, rank).end(number)
    assert (code, said) == (0, "stopped before the first step; the same command starts the run\n")


def test_a_request_after_the_last_step_changes_nothing() -> None:
    rank = "import signal, time; signal.signal(15, print); time.sleep(1)"
    assert Supervised(ENDING, rank, until="ended").end(signal.SIGTERM) == (0, "")


def test_nothing_outlives_a_killed_start() -> None:
    code, _ = Supervised(STAND_IN, LISTENING).end(signal.SIGKILL)
    assert code == -signal.SIGKILL
