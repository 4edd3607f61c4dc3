"""BadInput: what the user gave is wrong; said in one line, exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class BadInput(ValueError):  # noqa: N818 -- named for what it says to the user
    """A value that the user gave breaks a rule. The message is one line: `value: rule`."""


@contextmanager
def exit_on_bad_input(*, speak: bool = True) -> Iterator[None]:
    """End the program with exit code 2 and the one line, without a traceback.

    Args:
        speak: False on ranks whose error rank 0 prints as well.
    """
    try:
        yield
    except BadInput as error:
        if speak:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong command line as every other bad input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(message)
