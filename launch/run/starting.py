"""The first moments of a program: what it says, and what ends it, before torch is imported."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

from launch.run.terminal import log_of

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask a run to stop."""
UNBEGUN = "stopped before the first step; the same command starts the run"


def begin(program: str, words: Sequence[str]) -> None:
    """Say that `launch.PROGRAM` imports torch, which takes seconds; of a run, heed requests now.

    Args:
        program: a name.
        words: of its command line; where it only wants help nothing is said.
    """
    if not {"-h", "--help"} & set(words) and os.environ.get("RANK", "0") == "0":
        print(f"launch.{program}: importing torch …", file=log_of(program), flush=True)
    if program == "start":
        # Nothing is there to be cleared away, and imports swallow exceptions.
        end_when_asked(os._exit)


def end_when_asked(leave: Callable[[int], Any]) -> None:
    """End a run that has not begun when it is asked to stop; its supervisor takes that over."""

    def end(*_: object) -> None:
        print(UNBEGUN, flush=True)
        leave(0)

    for number in REQUESTS:
        signal.signal(number, end)
