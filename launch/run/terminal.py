"""What goes to a terminal: a model's own text, which must not steer it; commands; what is done."""

from __future__ import annotations

import shlex
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def shown(text: str, out: TextIO) -> str:
    """The text as it goes to `out`: visible on a terminal, as it is into a file or a pipe."""
    return visible(text) if out.isatty() else text


def visible(text: str) -> str:
    """Control characters as the symbols that stand for them, except new line and tab."""
    return "".join(
        chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else "\u2421" if c == "\x7f" else c
        for c in text
        if not "\x80" <= c < "\xa0"
    )


def command(module: str, *words: str | Path) -> str:
    """A line for a shell that runs a module by this Python, whatever its words contain."""
    return shlex.join([sys.executable, "-m", module, *map(str, words)])


PATIENCE = 1.0
"""Seconds after which is said what is being done."""
_in_program = False


@contextmanager
def announcing(here: bool = True) -> Iterator[None]:
    """A program of ours runs inside, on rank 0: it says what takes long. A library does not."""
    global _in_program
    before, _in_program = _in_program, here
    try:
        yield
    finally:
        _in_program = before


@contextmanager
def announced(
    line: str, *, speak: bool | None = None, after: float | None = None
) -> Iterator[None]:
    """Say what is being done when it takes longer than `after` seconds; what is quick is silent.

    Args:
        line: what is being done.
        speak: None: where a program of ours does it.
        after: None: PATIENCE.
    """
    after, log = PATIENCE if after is None else after, log_of(Path(sys.argv[0]).stem)
    timer = threading.Timer(after, lambda: print(f"{line} …", file=log, flush=True))
    timer.daemon = True
    if _in_program if speak is None else speak:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def log_of(program: str) -> TextIO:
    """Where a program says what it does: not where it writes the text that is its product."""
    return sys.stderr if program == "generate" else sys.stdout
