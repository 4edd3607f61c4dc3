"""Whose code may be imported: what the user's own command names, or anything by --trust-code.

A checkpoint may come from anybody. The task and the plugins that its run.yaml names are imported
only where the user names the same ones. What is trusted stands in the environment, which the ranks
that a program starts inherit.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from launch.run.errors import BadInput

_VARIABLE = "ADAPTIVE_TRUSTED_CODE"
_EVERYTHING = "*"
_OURS = ("launch", "adaptive")


class UntrustedCode(BadInput):
    """A file names code that the user did not."""


def trust(names: Iterable[str]) -> None:
    """Let these be imported, `module` or `module:attribute`; "*": whatever a file names."""
    os.environ[_VARIABLE] = ",".join(dict.fromkeys([*_trusted(), *names]))


def imported(key: str, name: str) -> Any:
    """The module `module`, or what `module:attribute` names in one.

    Args:
        key: of the configuration, for the message.
        name: what to import.

    Raises:
        UntrustedCode: neither the command nor the recipe of the user names it.
        BadInput: nothing importable there.
    """
    module, _, attribute = name.partition(":")
    ours = module.partition(".")[0] in _OURS
    if not ours and not {name, _EVERYTHING} & set(_trusted()):
        raise UntrustedCode(
            f"{key}={name}: is code that a checkpoint names, not imported; "
            "name it in the recipe, or say --trust-code"
        )
    # Ranks start as a script, whose own folder is searched in place of the current one.
    if not ours and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = import_module(module)
        return getattr(found, attribute) if attribute else found
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise BadInput(f"{key}={name}: cannot be imported: {error}") from None


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """--trust-code, of every program that reads a checkpoint."""
    parser.add_argument(
        "--trust-code",
        action=_TrustCode,
        nargs=0,
        help="import the task and plugins that a checkpoint names: they run as you",
    )


class _TrustCode(argparse.Action):
    def __call__(self, _: Any, namespace: argparse.Namespace, *__: Any) -> None:
        setattr(namespace, self.dest, True)
        trust([_EVERYTHING])


def _trusted() -> list[str]:
    return [name for name in os.environ.get(_VARIABLE, "").split(",") if name]
