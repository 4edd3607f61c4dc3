"""Whether the ranks of a run hang, and what is said of those that do."""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import signal
import time
from pathlib import Path

from launch.run.failures import error_file
from launch.run.marks import ENDS, RANKS, Mark, this_host

# As often: while a rank compiles, reads or writes, which it cannot say anything of meanwhile.
SLOW = 4
# Seconds at least for the ranks to start, which they cannot say anything of either.
_START = 600.0
# For a rank to write its stack.
_ANSWER = 6.0


class Watch:
    """Notices that no rank makes progress. One that hangs alone soon holds up all others.

    Progress is a new mark; where a rank reads or writes files, bytes too.

    Args:
        seconds: without progress that make a hang, `SLOW` times as many while some rank is at what
            may take long; 0: never.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._seen: object = None
        self._since = time.monotonic()

    def hangs(self, marks: dict[int, Mark]) -> bool:
        """Whether it does by now. To be asked again and again."""
        slow = not marks or any(mark.slow for mark in marks.values())
        bytes_moved = {mark.pid: _bytes_moved(mark.pid) for mark in marks.values() if mark.slow}
        seen = (marks, bytes_moved)
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        patience = self.seconds * (SLOW if slow else 1)
        if not marks and patience:
            patience = max(patience, _START)
        return 0 < patience < time.monotonic() - self._since


def describe(output: Path, marks: dict[int, Mark], seconds: float) -> str:
    """What hangs where; keeps the stack of every rank of this machine in its error file."""
    local = {rank: mark for rank, mark in marks.items() if mark.host == this_host()}
    stopped = {rank for rank, mark in local.items() if _is_stopped(mark.pid)}
    stacks = _stacks(output, local)
    collectives = {rank: _collective(stack) for rank, stack in stacks.items()}
    for rank, stack in stacks.items():
        with contextlib.suppress(OSError):
            path = error_file(output, rank)
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"rank {rank}, {_place(marks[rank])}\n{stack}", encoding="utf-8")
    running = [rank for rank, mark in marks.items() if mark.at not in ENDS]
    earliest = min((marks[rank].step for rank in running), default=0)
    guilty = (
        sorted(stopped)
        or [rank for rank in running if rank in local and collectives[rank] is None]
        or [rank for rank in running if marks[rank].step == earliest]
    )
    lines = [
        f"no rank has made progress for train.hang_seconds={seconds:g}: "
        + (f"hanging: rank {', '.join(map(str, guilty))}" if marks else "no rank has begun")
    ]
    for rank, mark in marks.items():
        state = "is stopped (SIGSTOP)" if rank in stopped else ""
        if not state and collectives.get(rank):
            state = f"waits in {collectives[rank]}"
        lines.append(f"  rank {rank}: {_place(mark)}{f', {state}' if state else ''}")
    for rank in guilty[:1]:
        lines.append(f"stack of rank {rank}, innermost first:")
        lines.append(_main_thread(stacks.get(rank, "")) or "  it did not answer")
    lines.append(f"stacks of all ranks: {error_file(output, 0).parent}")
    return "\n".join(lines)


def _place(mark: Mark) -> str:
    return f"step {mark.step}, {mark.at} (process {mark.pid} on {mark.host})"


def _stacks(output: Path, marks: dict[int, Mark]) -> dict[int, str]:
    """Ask each rank where its threads are; a stopped one tells before it goes on."""
    paths = {rank: output / RANKS / f"rank-{rank}.stack" for rank in marks}
    for mark in marks.values():
        with contextlib.suppress(OSError):
            os.kill(mark.pid, signal.SIGUSR2)
            os.kill(mark.pid, signal.SIGCONT)
    deadline, stacks = time.monotonic() + _ANSWER, dict.fromkeys(paths, "")
    while time.monotonic() < deadline:
        time.sleep(0.3)
        before, stacks = stacks, {rank: _read(path) for rank, path in paths.items()}
        # Thread by thread, the one that computes last: complete when it grows no more.
        if stacks == before and all(_main_thread(stack) for stack in stacks.values()):
            break
    return stacks


def _main_thread(stack: str) -> str:
    """The thread that computes: the process's first, which is written last.

    Which thread is "current" depends on which one the system gave the signal to, and may be none
    that Python knows.
    """
    threads = [part for part in stack.split("\n\n") if "hread 0x" in part]
    return (
        "\n".join(line for line in threads[-1].splitlines()[1:] if line.strip()) if threads else ""
    )


def _collective(stack: str) -> str | None:
    """The collective that a rank waits in; None: it waits in none.

    The thread that computes, or one of autograd's, which runs what hooks of gradients call.
    """
    for part in (_main_thread(stack), stack):
        frames = re.findall(r'File "([^"]+)", line (\d+) in (\w+)', part)
        for file, _, function in reversed(frames):  # the outermost is the one that was called
            if file.endswith("distributed_c10d.py") and not function.startswith("_"):
                return str(function)
        if frames and ".wait(" in linecache.getline(frames[0][0], int(frames[0][1])):
            return f"a collective of {frames[0][2]}"
    return None


def _is_stopped(pid: int) -> bool:
    # "T" by a signal; "t" is a debugger's.
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1] == ["T"]


def _bytes_moved(pid: int) -> list[str]:
    """What a process has read and written, where the system says so."""
    return re.findall(r"^[rw]char: (\d+)$", _read(Path(f"/proc/{pid}/io")), re.MULTILINE)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
