"""What becomes of a run whose ranks are signalled, hang, die or end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

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

    def __init__(
        self, launcher: str, rank: str = "", *, until: str = "ready", **options: Any
    ) -> None:
        command = ["sys.executable", "'-c'", repr(launcher), repr(rank)]
        program = (
            "import sys; from pathlib import Path, PosixPath;"
            "from launch.run.supervisor import Supervised, supervise;"
            f"sys.exit(supervise([{', '.join(command)}], Supervised(**{options!r})))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "DS_ACCELERATOR": "cpu", "RUN": str(options.get("output"))},
        )
        assert self.process.stdout is not None
        while self.process.stdout.readline() != f"{until}\n":
            assert self.process.poll() is None
        self.started = psutil.Process(self.process.pid).children(recursive=True)
        assert self.started

    def end(self, number: int = 0) -> tuple[int, str]:
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


# A rank that leaves marks as `launch.train` does, then hangs, fails, ends or goes on as it is told.
MARKING = """
import os, pathlib, signal, sys, time
from launch.run import marks as of
signal.signal(15, lambda *_: None)
marks = of.Marks()
marks.open(pathlib.Path(os.environ["RUN"]), 0)
def what_hangs():
    print("ready", flush=True)
    time.sleep(60)
"""
HANGING = MARKING + "marks('forward', step=3); what_hangs()"
FROZEN = MARKING + (
    "marks('forward', step=3); print('ready', flush=True); os.kill(os.getpid(), signal.SIGSTOP)\n"
    "what_hangs()"
)
WORKING = MARKING + (
    "print('ready', flush=True)\n"
    "for step in range(12):\n    marks('evaluation', step=5); time.sleep(0.25)\n"
    "marks(of.FINISHED)"
)
COMPILING = MARKING + (
    "print('ready', flush=True); marks('forward', slow=True); time.sleep(2.5); marks(of.FINISHED)"
)
DYING = MARKING + (
    "marks('backward', step=7); print('ready', flush=True); time.sleep(1); os.kill(os.getpid(), 9)"
)
ENDED = MARKING + "marks(of.FINISHED); print('ready', flush=True); time.sleep(1)"
QUIET = "import time; print('ready', flush=True); time.sleep(1)"
# As DeepSpeed's does: a process that a signal ended counts as one that ended well.
FORGIVING = STAND_IN.replace("sys.exit(", "print(")


@pytest.mark.parametrize(
    ("rank", "state", "where"),
    [(HANGING, "", "in what_hangs"), (FROZEN, ", is stopped (SIGSTOP)", "in <module>")],
    ids=["sleeps", "is stopped"],
)
def test_a_rank_that_hangs_is_named_with_its_stack_and_ended(
    rank: str, state: str, where: str, tmp_path: Path
) -> None:
    code, said = Supervised(STAND_IN, rank, output=tmp_path, hang_seconds=1.0).end()
    assert code == 1, said
    assert "made progress for train.hang_seconds=1: hanging: rank 0" in said
    assert re.search(rf"rank 0: step 3, forward \(process \d+ on .*\){re.escape(state)}\n", said)
    assert where in said
    assert "step 3, forward" in (tmp_path / "errors" / "rank-0.txt").read_text()


@pytest.mark.parametrize("rank", [WORKING, COMPILING], ids=["evaluates", "compiles"])
def test_what_takes_long_does_not_hang(rank: str, tmp_path: Path) -> None:
    process = Supervised(STAND_IN, rank, output=tmp_path, hang_seconds=1.0)
    assert process.end() == (0, "")


def test_a_launcher_that_forgives_a_kill_is_not_believed(tmp_path: Path) -> None:
    """DeepSpeed's counts a process that a signal ended as one that ended well."""
    code, said = Supervised(FORGIVING, DYING, output=tmp_path).end()
    assert code == 1
    assert "error: rank 0 (process " in said
    assert "was killed, or ended without a word, at step 7 (backward)" in said


def test_a_launcher_that_lingers_is_ended(tmp_path: Path) -> None:
    """A rank that was killed does not hang."""
    lingering = STAND_IN + "time.sleep(60)"
    lingering = lingering.replace("import subprocess", "import time, subprocess")
    lingering = lingering.replace("sys.exit(", "print(")
    code, said = Supervised(lingering, DYING, output=tmp_path, hang_seconds=1.0).end()
    assert code == 1
    assert "was killed, or ended without a word, at step 7 (backward)" in said


def test_what_an_earlier_run_said_is_not_believed(tmp_path: Path) -> None:
    assert Supervised(STAND_IN, ENDED, output=tmp_path).end()[0] == 0
    code, said = Supervised(QUIET, output=tmp_path).end()
    assert code == 1
    assert "error: the launcher of the ranks ended before the run did" in said


def test_ranks_that_do_not_save_in_time_are_killed(tmp_path: Path) -> None:
    code, said = Supervised(STAND_IN, FROZEN, output=tmp_path, stop_seconds=5.0).end(signal.SIGTERM)
    assert code == 1
    assert "did not save and end within train.stop_seconds=5 and were killed" in said
