"""What goes to a terminal: a model's own text, which must not steer it, and commands to copy."""

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


@contextmanager
def announced(line: str, *, speak: bool = True, after: float = 1.0) -> Iterator[None]:
    """Say what is being done when it takes longer than `after` seconds; what is quick is silent."""
    timer = threading.Timer(after, lambda: print(f"{line} …", flush=True))
    timer.daemon = True
    if speak:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
