"""What starts the ranks stays beside them: hands on requests to stop, watches, says how it ended.

The exit code is 0 when rank 0 says that the run finished or stopped as asked, and never otherwise:
DeepSpeed's launcher exits 0 too when a signal has ended one of its processes.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from launch.run.children import Child, ask
from launch.run.errors import BAD_INPUT
from launch.run.failures import PEER, read_errors
from launch.run.hangs import Watch, describe
from launch.run.marks import ENDS, FAILED, FINISHED, STOPPED, Mark, read_marks, this_host
from launch.run.starting import REQUESTS, UNBEGUN

# Of the seconds that a run has to end in: for the system, to end what was killed.
_SPARE = 3.0
# Seconds from the last rank's end that the launcher has to end by itself, with that rank's code.
_EXIT_SECONDS = 10.0
# Seconds between looks at the marks of many ranks, which a network may be between.
_EVERY = 5.0


@dataclass
class Supervised:
    """How a run is supervised.

    Attributes:
        output: the run's folder, where ranks leave their marks; None: they leave none.
        hang_seconds: without any rank's progress after which the run is ended; 0: never.
        stop_seconds: that ranks have to save and end as asked before they are killed.
        several_nodes: whether ranks run on other nodes too.
    """

    output: Path | None = None
    hang_seconds: float = 300.0
    stop_seconds: float = 30.0
    several_nodes: bool = False
    earlier: dict[int, Mark] = field(init=False)

    def __post_init__(self) -> None:
        self.earlier = self._all_marks()

    def _all_marks(self) -> dict[int, Mark]:
        return {} if self.output is None else read_marks(self.output)

    def marks(self) -> dict[int, Mark]:
        """Of this run's ranks, not of an earlier run's in the same folder."""
        return {
            rank: mark
            for rank, mark in self._all_marks().items()
            if rank not in self.earlier or mark.begun != self.earlier[rank].begun
        }


Start = tuple[list[str], Supervised]
"""A launcher's command, and how it is supervised."""


def supervise(
    command: list[str],
    run: Supervised | None = None,
    again: Callable[[int, bool], Start | None] | None = None,
) -> int:
    """Run the launcher; hand requests to stop to the ranks, so that they save.

    Before some rank listens nothing has been trained, and a request ends the launcher. Ranks of
    several nodes are not this process's: DeepSpeed's launcher is asked to end them.

    Args:
        command: the launcher's.
        run: how it is supervised.
        again: what to start when a run has failed that was not asked to stop, and whose input was
            not bad, given its exit code and whether its ranks had begun; None: nothing.

    Returns:
        The exit code; 0 when the run finished, or was stopped as asked.
    """
    run = Supervised() if run is None else run
    environment = dict(os.environ)
    if not uses_cuda():
        environment["DS_ACCELERATOR"] = "cpu"
        # Two ranks with two threads each on two cores are slower than with one each.
        environment.setdefault("OMP_NUM_THREADS", "1")
    # Before the launcher, so that no request is lost.
    asked: list[int] = []
    for number in REQUESTS:
        signal.signal(number, lambda number, _: asked.append(number))
    while True:
        with Child(command, env=environment) as launcher:
            code = _Supervision(launcher, run, asked).code()
        code = code if code >= 0 else 128 - code
        if again is None or asked or code in (0, BAD_INPUT):
            return code
        launcher.kill()
        begun = run.marks()
        _wait_until_gone(begun)
        following = again(code, bool(begun))
        if following is None:
            return code
        command, run = following


def _wait_until_gone(marks: dict[int, Mark]) -> None:
    """Wait for ranks of this machine that were killed: one of them holds the folder's lock."""
    deadline = time.monotonic() + _EXIT_SECONDS
    here = [mark for mark in marks.values() if mark.host == this_host()]
    while any(runs_here(mark) for mark in here) and time.monotonic() < deadline:
        time.sleep(0.1)


def follow(child: Child, run: Supervised, ended: Callable[[], bool]) -> int:
    """Wait for a run that another program has started; its exit code.

    As `supervise`, it ends a run that hangs, says what no rank has said, and believes rank 0 alone.

    Args:
        child: the run.
        run: how it is supervised.
        ended: whether that program ends it by now: then nothing is left to be said.
    """
    return _Supervision(child, run, [], ended).code()


class _Supervision:
    """One launcher while it runs."""

    def __init__(
        self,
        launcher: Child,
        run: Supervised,
        asked: list[int],
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        self._launcher, self._run, self._asked, self._ended = launcher, run, asked, ended
        self._watch = Watch(run.hang_seconds)
        self._gone: dict[int, Mark] = {}
        self._failing = self._empty = 0.0

    def code(self) -> int:
        launcher, run, asked = self._launcher, self._run, self._asked
        begun, heeded, deadline, look = False, 0, float("inf"), 0.0
        while (code := launcher.poll()) is None:
            requests = asked[heeded:]
            if requests or not begun:
                listening = list(_listening_ranks(launcher.pid))
                begun = begun or bool(listening)
            if requests:
                heeded += len(requests)
                if not begun and not run.several_nodes:
                    launcher.kill()
                    print(UNBEGUN, flush=True)
                    return 0
                if heeded > 1 and signal.SIGINT in requests:
                    launcher.kill()
                    continue
                if run.several_nodes:
                    launcher.terminate()
                for pid in listening:
                    ask(pid)
                deadline = min(deadline, time.monotonic() + run.stop_seconds - _SPARE)
            if time.monotonic() > deadline:
                launcher.kill()
                _print_error(
                    f"the ranks did not save and end within train.stop_seconds={run.stop_seconds:g}"
                    " and were killed; the same command continues from the newest checkpoint"
                )
                return 1
            if run.output is not None and time.monotonic() > look:
                look = time.monotonic() + (_EVERY if run.several_nodes else 0)
                marks = run.marks()
                self._record_ended(marks)
                if self._is_over(marks):
                    launcher.kill()
                    return self._verdict(1)
                if not self._failing and self._watch.hangs(marks):
                    said = describe(run.output, marks, self._watch.seconds)
                    launcher.kill()
                    _print_error(said)
                    return 1
            time.sleep(0.2)
        return self._verdict(code)

    def _is_over(self, marks: dict[int, Mark]) -> bool:
        """Whether a rank failed, and what is left has had its time to end."""
        now = time.monotonic()
        if not self._gone and not any(mark.at == FAILED for mark in marks.values()):
            return False
        self._failing = self._failing or now
        if any(runs_here(mark) for mark in marks.values()):
            return now > self._failing + self._run.stop_seconds
        self._empty = self._empty or now
        return now > self._empty + _EXIT_SECONDS

    def _record_ended(self, marks: dict[int, Mark]) -> None:
        """Remember ranks that ended without saying so, the first first: others end after it."""
        for rank, mark in marks.items():
            if mark.at not in ENDS and rank not in self._gone and not runs_here(mark):
                self._gone[rank] = mark

    def _verdict(self, code: int) -> int:
        """The exit code of a launcher that ended with `code`; says what no rank has said."""
        run = self._run
        if run.output is None:
            return code
        marks = run.marks()
        self._record_ended(marks)
        ended = marks[0].at if 0 in marks else None
        if code == 0 and ended in (FINISHED, STOPPED):
            return 0
        if self._ended():
            return code or 1
        errors = read_errors(run.output) if marks else []
        own = [rank for rank, said in errors if PEER not in said.split("\n")[0]]
        where = f"tracebacks of the ranks: {run.output / 'errors'}"
        if own:
            first = own[0]
            _print_error(f"rank {first} failed first, at step {marks[first].step}; {where}")
        elif self._gone:
            first, mark = next(iter(self._gone.items()))
            _print_error(
                f"rank {first} (process {mark.pid}) was killed, or ended without a word, at step "
                f"{mark.step} ({mark.at}); the same command continues from the newest checkpoint"
            )
        elif code <= 0:
            _print_error(
                "the launcher of the ranks ended before the run did"
                f"{f', by signal {-code}' if code else ''}; "
                "the same command continues from the newest checkpoint"
            )
        return code or 1


def runs_here(mark: Mark) -> bool:
    """Whether the process of a mark runs; True for one of another machine."""
    import psutil

    if mark.host != this_host():
        return True
    try:
        return bool(psutil.Process(mark.pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _print_error(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


def _listening_ranks(launcher: int) -> Iterator[int]:
    """Ranks that SIGTERM asks to save; it kills one that has not got so far."""
    import psutil

    for process in psutil.Process(launcher).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if any(word.startswith("--local_rank") for word in words) and _listens(process.pid):
            yield process.pid


def _listens(pid: int) -> bool:
    """Whether a process handles SIGTERM (`StopRequest`), where the system says so."""
    if not Path("/proc/self/status").exists():
        return True
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def uses_cuda() -> bool:
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
