"""How programs read a command line and end: 0 done, 2 bad input, anything else a failure."""

from __future__ import annotations

import argparse
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from launch.run.terminal import announcing

BAD_INPUT = 2
"""Exit code of a program that was given bad input."""


class BadInput(ValueError):  # noqa: N818 -- named for what it says to the user
    """A value that the user gave breaks a rule. The message is one line: `value: rule`."""


class Failed(RuntimeError):  # noqa: N818 -- named for what it says to the user
    """The work cannot be done, or not to its end. The message is one line for the user."""


@contextmanager
def as_bad_input(about: object) -> Iterator[None]:
    """Turn a library's ValueError into BadInput about a file or an option that the user gave."""
    try:
        yield
    except ValueError as error:
        raise BadInput(f"{about}: {error}") from None


@contextmanager
def exit_on_bad_input(*, speak: bool = True) -> Iterator[None]:
    """End the program with exit code 2 for BadInput, 1 for Failed: one line, no traceback.

    Args:
        speak: False on ranks whose error rank 0 prints as well.
    """
    try:
        yield
    except (BadInput, Failed) as error:
        if speak:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(BAD_INPUT if isinstance(error, BadInput) else 1) from None


def program(main: Callable[[list[str] | None], int | None]) -> Callable[..., None]:
    """The `main` of a program, which ends as every other.

    Args:
        main: takes the words after the program's name (None: those of this process) and returns
            an exit code (None: 0).
    """

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> None:
        with exit_on_bad_input(), announcing(), _leaving_when_terminated():
            code = main(arguments)
        if code:
            raise SystemExit(code)

    return run


@contextmanager
def _leaving_when_terminated() -> Iterator[None]:
    """Let SIGTERM unwind the program, where it would end it at once.

    What it has started is ended then, stopped processes too, and what is half written removed.
    """
    number = signal.SIGTERM
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(number) is not signal.SIG_DFL:
        yield
        return
    signal.signal(number, leave)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL)


def leave(number: int, _: object) -> NoReturn:
    """A handler of signals that ends the program as they do, by way of its contexts."""
    raise SystemExit(128 + number)


class OneLineParser(argparse.ArgumentParser):
    """The parser of every program: a wrong command line is bad input, and so one line.

    Options are spelt with hyphens, in full; underscores in their names are taken for hyphens.
    """

    def __init__(self, **given: Any) -> None:
        given.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**{**given, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise BadInput(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(self._with_hyphens(args), namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._subparsers is not None:  # argparse mixes no words of these
            return self.parse_known_args(args, namespace)
        return super().parse_known_intermixed_args(self._with_hyphens(args), namespace)

    def _with_hyphens(self, words: Sequence[str] | None) -> list[str]:
        words = list(sys.argv[1:] if words is None else words)
        for place, word in enumerate(words):
            if word == "--":
                break
            name, equals, value = word.partition("=")
            hyphens = name.replace("_", "-")
            if name.startswith("--") and hyphens in self._option_string_actions:
                words[place] = hyphens + equals + value
        return words
