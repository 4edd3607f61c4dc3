"""Whether a checkpoint can be read at all: asked before anything in it is used.

The manifest tells what was damaged on a disk. A file may also be whole and still no use: of a
later version, or written by a stranger (docs/security.md).
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from launch.checkpoint.engine_files import problem_with_shard
from launch.checkpoint.state import RunState
from launch.run.config import load_saved
from launch.run.errors import BadInput
from launch.run.plain_data import read_json
from launch.run.trust import UntrustedCode
from parallel.checkpoint import newest_intact, problem_with

WEIGHTS, OPTIMIZER, TASK_STATE = "model.safetensors", "optimizer.safetensors", "task.safetensors"
_LATER = ("left_out", "rollbacks", "loss_mean", "loss_variance")
STATE, CONFIG, ENGINE = "state.json", "run.yaml", "engine"


def problem_with_checkpoint(folder: Path, *, checksums: bool = True) -> str | None:
    """Why a folder is not a checkpoint that this version reads; None when it is one.

    Args:
        folder: perhaps a checkpoint.
        checksums: False trusts the sizes of its files.

    Raises:
        UntrustedCode: it names a task or plugin that the user does not: nothing is wrong with it,
            and an older one is no way out.
    """
    return problem_with(folder, checksums=checksums) or _inside(folder)


def newest_checkpoint(root: Path, *, checksums: bool = True) -> Path | None:
    """The newest checkpoint in `root` that can be read; others are warned about and passed over.

    Not collective: call it on one rank and tell the others.

    Raises:
        UntrustedCode: as `problem_with_checkpoint`.
    """
    return newest_intact(root, checksums=checksums, accept=_inside)


def read_state(folder: Path) -> RunState:
    """Where the run was that wrote the checkpoint.

    Raises:
        OSError, ValueError: what is wrong with its state.json.
    """
    content = read_json(folder / STATE)
    if not isinstance(content, dict):
        raise ValueError("must be a mapping")
    fields = dataclasses.fields(RunState)
    # Every version has written all but these.
    content = {name: getattr(RunState, name) for name in _LATER} | content
    missing = [field.name for field in fields if field.name not in content]
    if missing:
        raise ValueError(f"{missing[0]}: is missing")
    for field in fields:
        value = content[field.name]
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = whole or (isinstance(value, float) and isinstance(field.default, float))
        least = -float("inf") if field.name == "loss_mean" else 0.0
        if not fits or value < least or not math.isfinite(value):
            raise ValueError(f"{field.name}={value!r}: must be a count")
    foreign = set(content) - {field.name for field in fields}
    if foreign:
        raise ValueError(f"{min(foreign)}: is not of this version")
    return RunState(**content)


def _inside(folder: Path) -> str | None:
    problem = _problem_inside(folder)
    return None if problem is None else " ".join(problem.split())


def _problem_inside(folder: Path) -> str | None:
    for path in sorted(folder.rglob("*")):
        if path.exists() and not path.is_file() and not path.is_dir():
            return f"{path.relative_to(folder)} is no regular file"
    try:
        read_state(folder)
    except (OSError, ValueError) as error:
        return f"{STATE} cannot be read: {error}"
    try:
        load_saved(folder)
    except UntrustedCode:
        raise
    except BadInput as error:
        return f"{CONFIG} cannot be read: {error}"
    shapes: dict[str, dict[str, list[int]]] = {}
    for name in (WEIGHTS, OPTIMIZER, TASK_STATE):
        if name != WEIGHTS and not (folder / name).is_file():
            continue
        try:
            with safe_open(folder / name, framework="pt") as file:
                shapes[name] = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            return f"{name} cannot be read: {error}"
    for key, shape in shapes.get(OPTIMIZER, {}).items():
        kind, _, name = key.partition("/")
        if kind not in ("exp_avg", "exp_avg_sq") or shapes[WEIGHTS].get(name) != shape:
            return f"{OPTIMIZER}: {key} {shape} is no moment of a weight"
    for shard in sorted((folder / ENGINE).rglob("*.pt")):
        problem = problem_with_shard(shard)
        if problem is not None:
            return f"{shard.relative_to(folder)} {problem}"
    return None
