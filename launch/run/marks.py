"""Where every rank of a run is: one small file a rank, written over at each sign of progress.

    OUTPUT/ranks/rank-0         the newest Mark of rank 0
    OUTPUT/ranks/rank-0.stack   where its threads were when SIGUSR2 last asked

What starts the ranks reads them (`launch.run.supervisor`): a rank that hangs or is killed says
nothing itself. A mark is one write of 200 bytes into a file that is there already: some
microseconds, and no process waits for a disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import shutil
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

RANKS = "ranks"
FINISHED, STOPPED, FAILED = "finished", "stopped as asked", "failed"
ENDS = (FINISHED, STOPPED, FAILED)
_SIZE = 256


@dataclass(frozen=True)
class Mark:
    """A sign of progress.

    Attributes:
        at: what the rank began then, or one of ENDS.
        step: optimizer steps that the run has taken.
        slow: whether that may take long without another sign: compilation, files, pictures.
        pid, host: of the rank.
        begun: time at which its process opened the file, by its own clock.
        count: signs before this one.
    """

    at: str = "starting"
    step: int = 0
    slow: bool = True
    pid: int = 0
    host: str = ""
    begun: float = 0.0
    count: int = 0


class Marks:
    """Leaves one rank's marks; nowhere before `open`."""

    def __init__(self) -> None:
        self._mark = Mark(pid=os.getpid(), host=this_host(), begun=time.time())
        self._file: BinaryIO | None = None

    def open(self, output: Path, rank: int) -> None:
        """Leave them in the folder of the run, which must be this run's by now.

        Raises:
            OSError: the files cannot be made. Later ones, of a full disk, are dropped.
        """
        folder = output / RANKS
        folder.mkdir(exist_ok=True)
        # Open as long as the process is: signals write to them, and what handles errors.
        self._file = open(folder / f"rank-{rank}", "wb", buffering=0)  # noqa: SIM115
        self._stack = open(folder / f"rank-{rank}.stack", "wb")  # noqa: SIM115
        # In C: it answers while the interpreter is held, and stopped processes once continued.
        faulthandler.register(signal.SIGUSR2, self._stack, all_threads=True)
        self._write()

    @property
    def opened(self) -> bool:
        return self._file is not None

    def __call__(self, at: str, *, step: int | None = None, slow: bool = False) -> None:
        """Say that this rank now begins `at`."""
        old = self._mark
        step = old.step if step is None else step
        at = at[:40]
        self._mark = dataclasses.replace(old, at=at, step=step, slow=slow, count=old.count + 1)
        self._write()

    @property
    def last(self) -> Mark:
        return self._mark

    def _write(self) -> None:
        if self._file is not None:
            line = json.dumps(vars(self._mark)).ljust(_SIZE - 1) + "\n"
            with contextlib.suppress(OSError):
                os.pwrite(self._file.fileno(), line.encode(), 0)


def this_host() -> str:
    return socket.gethostname()[:64]


def clear(output: Path) -> None:
    """Remove the marks of an earlier run. For the rank that holds the folder's lock."""
    shutil.rmtree(output / RANKS, ignore_errors=True)


def read_marks(output: Path) -> dict[int, Mark]:
    """The newest mark of each rank that has one."""
    found = {}
    for path in sorted((output / RANKS).glob("rank-*")):
        number = path.name.removeprefix("rank-")
        if number.isdigit():
            with contextlib.suppress(OSError, ValueError, TypeError):
                found[int(number)] = Mark(**json.loads(path.read_text(encoding="utf-8")))
    return found
