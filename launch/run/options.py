"""What the options of several programs must be."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable
from typing import Any

from launch.run.errors import BadInput
from launch.run.sections import LARGEST_WHOLE


def refuse_empty_values(overrides: Iterable[str]) -> None:
    """Refuse `section.key=`, which YAML reads as null: an unset shell variable leaves it.

    Raises:
        BadInput: names the first.
    """
    for override in overrides:
        key, equals, value = override.partition("=")
        if key and equals and not value.strip():
            raise BadInput(f"{key}=: has no value; for null write {key}=null")


def check_seed(seed: int) -> None:
    """Refuse a `--seed` that random generators do not hold, as section train does.

    Raises:
        BadInput: one line.
    """
    if not 0 <= seed <= LARGEST_WHOLE:
        raise BadInput(f"--seed={seed}: must be between 0 and {LARGEST_WHOLE}")


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Refuse options that are given and below 1.

    Raises:
        BadInput: names the first.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name.replace('_', '-')}={value}: must be at least 1")


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Refuse options that are given and not finite numbers above 0.

    Raises:
        BadInput: names the first.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"--{name.replace('_', '-')}={value}: must be a number above 0")


def parse_mesh(text: str) -> dict[str, Any]:
    """`tensor=2,sequence_parallel=true` as arguments of `Mesh.create`.

    Raises:
        BadInput: an unknown axis or a value that is none.
    """
    mesh: dict[str, Any] = {}
    for word in text.split(","):
        name, _, value = word.partition("=")
        if name == "sequence_parallel" and value in ("true", "false"):
            mesh[name] = value == "true"
        elif name == "context_attention" and value in ("ulysses", "ring"):
            mesh[name] = value
        elif name in ("data", "tensor", "context", "expert") and re.fullmatch(
            r"[1-9]\d{0,5}", value
        ):
            mesh[name] = int(value)
        else:
            raise BadInput(
                f"mesh {text!r}: {word!r} must be data, tensor, context or expert=NUMBER from 1, "
                "sequence_parallel=true or context_attention=ring"
            )
    return mesh
