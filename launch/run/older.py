"""Keys of configurations that were written before: what each is called now.

A recipe, a checkpoint's run.yaml and what a run's folder remembers are read with either name; on
the command line only today's is taken, which the error tells.
"""

from __future__ import annotations

import copy
from typing import Any

from launch.run.errors import BadInput

MOVED = {
    "diffusion": {
        "data.average": "average",
        "data.sampling": "sampling",
        "data.samples_per_class": "sampling.per_class",
    }
}
"""task -> key before -> key now."""


def with_todays_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """Plain data of a configuration, its phases included, by the keys that they have now.

    Raises:
        BadInput: a key is given by both names.
    """
    moved = MOVED.get(str(tree.get("task")), {})
    tree = copy.deepcopy(tree)
    phases = tree.get("phases")
    for part in (tree, *(phases if isinstance(phases, list) else ())):
        for before, now in moved.items():
            section, _, key = before.partition(".")
            held = part.get(section) if isinstance(part, dict) else None
            if isinstance(held, dict) and key in held:
                _put(part, now, held.pop(key), before)
    return tree


def _put(tree: dict[str, Any], path: str, value: Any, before: str) -> None:
    section, _, key = path.partition(".")
    place, name = (tree.setdefault(section, {}), key) if key else (tree, section)
    if name in place:
        raise BadInput(f"{before} and {path}: give {path} alone")
    place[name] = value


def refuse_older_keys(task: str, overrides: list[str]) -> None:
    """Refuse overrides by a key's older name.

    Raises:
        BadInput: one line with the name that it has now.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        for before, now in MOVED.get(task, {}).items():
            start, found, rest = key.rpartition(before)
            if found and (not start or start.endswith(".")) and (not rest or rest[0] == "."):
                raise BadInput(f"{key}: is {start}{now}{rest} now; give {start}{now}{rest}={value}")
