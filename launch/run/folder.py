"""A run's folder: what a run starts from, and what happens to a run that was there before.

OUTPUT/origin.json     what the run in it was started from, and its configuration
OUTPUT/earlier-1/…     an earlier run that this one replaced, whole: checkpoints, metrics, run.yaml
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.checkpoint.contents import newest_checkpoint
from launch.run.config import is_same
from launch.run.errors import BadInput
from launch.run.plain_data import read_json
from launch.run.preflight import starting_checkpoint
from launch.run.sections import RunConfig
from parallel.checkpoint import MANIFEST, set_aside_above

ORIGIN = "origin.json"
# What a run writes into its folder: an earlier run keeps it under another name.
_WRITTEN = (
    "checkpoints",
    "metrics.jsonl",
    "metrics.csv",
    "tensorboard",
    "wandb",
    "mlflow",
    "mlflow.db",
    "deepspeed",
    "run.yaml",
    ORIGIN,
)


def where_to_start(config: RunConfig) -> Path | None:
    """The checkpoint that a run starts from; None: from nothing. Says what it sets aside.

    `checkpoint.resume=PATH` means: from PATH, unless OUTPUT holds checkpoints of a run that the
    same configuration has started from the same checkpoint. Those are continued.

    Not collective: call it on one rank, which holds the folder's lock, and tell the others.

    Raises:
        BadInput: the checkpoint asked for is not there or damaged.
    """
    output, resume = Path(config.output), config.checkpoint.resume
    root = output / "checkpoints"
    source = starting_checkpoint(config)
    if resume == "auto" and source is not None:
        return source
    origin = _origin(config, source)
    recorded = _read(output / ORIGIN) or {}
    same = recorded.get("checkpoint") == origin["checkpoint"]
    if source is not None and same and is_same(recorded.get("configuration"), config):
        own = newest_checkpoint(root)
        if own is not None:
            return own
    if source is not None and _is_inside(source, root):
        # Back to one of its own: what it leaves behind must not be taken for the newest.
        for aside in set_aside_above(source):
            print(f"{aside}: set aside, the run goes back to {source}", flush=True)
    elif resume != "auto" and any(root.glob("step-*")):
        print(f"{output}: held another run, which is now {set_aside(output)}", flush=True)
    (output / ORIGIN).write_text(json.dumps(origin, indent=1), encoding="utf-8")
    return source


@contextmanager
def only_run_in(output: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which ends with this process, however it ends.

    Not collective: one rank holds it for all. Where the file system has no locks it warns.

    Raises:
        BadInput: another run holds it; names its process and machine.
    """
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise BadInput(
                f"output={output}: {owner} trains in it; wait for it or give another output="
            ) from None
        except OSError as error:  # a network file system without locks
            reason = f"cannot be locked ({error.strerror}); start no second run there"
            warnings.warn(f"{output}: {reason}", stacklevel=2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def how_to_continue(config: RunConfig) -> str:
    """What continues a run that was stopped."""
    resume = config.checkpoint.resume
    own = Path(config.output) / "checkpoints"
    if resume == "auto" or (resume != "never" and not _is_inside(Path(resume).expanduser(), own)):
        return "the same command continues"
    return f"the same command with checkpoint.resume=auto instead of {resume} continues"


def set_aside(output: Path) -> Path:
    """Move all that a run wrote into OUTPUT/earlier-N, which is then a run's folder itself."""
    earlier = free_name(output / "earlier")
    earlier.mkdir()
    for name in _WRITTEN:
        if (output / name).exists():
            (output / name).rename(earlier / name)
    return earlier


def free_name(path: Path) -> Path:
    """The first of PATH-1, PATH-2, … that does not exist."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _origin(config: RunConfig, source: Path | None) -> dict[str, Any]:
    checkpoint = None
    if source is not None:
        # A path may hold another checkpoint the next time.
        manifest = hashlib.sha256((source / MANIFEST).read_bytes()).hexdigest()
        checkpoint = {"path": str(source.resolve()), "manifest": manifest}
    plain = {"checkpoint": checkpoint, "configuration": config.resolved()}
    read_back: dict[str, Any] = json.loads(json.dumps(plain))
    return read_back


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
