"""Processes that a program starts, which end when it does, however it ends.

A child is a session of its own, in which a shell waits at a pipe that the program alone holds open:
when the program is gone, killed with -9 too, the shell ends all of the child's process group. A
parent-death signal would reach the child and not what that has started, and would come when the
*thread* that started it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from launch.run.errors import leave

# The first shell becomes the command.
_WATCHED = 'exec 3<&0; { cat <&3; kill -9 0; } >/dev/null 2>&1 & exec "$@" </dev/null 3<&-'
# Exported by a script of several stages: its process, whose end is a request to stop.
SCRIPT = "LAUNCHED_BY"


class Child(subprocess.Popen[Any]):
    """`subprocess.Popen` of a command that has no input and ends with this program.

    Whatever it leaves behind is ended when it is left as a context, killed or collected.
    """

    def __init__(self, command: list[str], **options: Any) -> None:
        there, here = os.pipe()
        try:
            super().__init__(
                ["sh", "-c", _WATCHED, "sh", *command],
                stdin=there,
                # Ctrl-C reaches only this program, which decides what becomes of the others.
                start_new_session=True,
                **options,
            )
        except BaseException:
            os.close(here)
            raise
        finally:
            os.close(there)
        self._let_go = weakref.finalize(self, os.close, here)

    def kill(self) -> None:
        """End it and all of its process group now, stopped ones too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, error, at)
        self._let_go()


def end(children: Iterable[Child], *, seconds: float) -> None:
    """Ask children to end (SIGTERM); `seconds` later kill what is left of them."""
    deadline = time.monotonic() + seconds
    children = list(children)
    for child in children:
        if child.poll() is None:
            ask(child.pid)
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
        child.kill()


def ask(pid: int) -> None:
    """SIGTERM to a process; one that was stopped hears it too."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)


class Children:
    """Commands that run in several threads of a program, until it is asked to end.

    As a context it ends them when the program leaves it, and SIGTERM and Ctrl-C make it leave.

    Args:
        seconds: that a child has to end as asked before it is killed.
    """

    def __init__(self, *, seconds: float = 25.0) -> None:
        self._seconds, self._lock = seconds, threading.Lock()
        self._running: set[Child] = set()
        self.ended = False

    def run(
        self, command: list[str], *, wait: Callable[[Child], int] = Child.wait, **options: Any
    ) -> int:
        """The exit code of a command, which `wait` tells; -SIGTERM when it was not begun."""
        with self._lock:
            if self.ended:
                return -signal.SIGTERM
            child = Child(command, **options)
            self._running.add(child)
        with child:
            code = wait(child)
        with self._lock:
            self._running.discard(child)
        return code

    def end(self) -> None:
        """End all that run; none is begun any more."""
        with self._lock:
            self.ended = True
            running = list(self._running)
        end(running, seconds=self._seconds)

    def __enter__(self) -> Children:
        self._handlers = {
            number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.end()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def stop_with_script() -> None:
    """When a script started this program and ends, by a signal or killed with -9: SIGTERM here.

    A script exports its process id as LAUNCHED_BY. What this program starts does not see it.
    """
    word = os.environ.pop(SCRIPT, "")
    script = int(word) if word.isdigit() else 0
    if script in (0, os.getpid()):  # nobody's, or the script became this program
        return
    is_parent = os.getppid() == script

    def watch() -> None:
        while _runs(script) and not (is_parent and os.getppid() != script):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="script").start()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
