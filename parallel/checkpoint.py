"""Checkpoint folders that are whole or not there: written aside, checksummed, renamed.

    ROOT/step-00000180/            a checkpoint
        …                          whatever the writer put there, by any rank
        manifest.json              size and SHA-256 of every file; written last
    ROOT/.writing-step-00000180/   one being written, or left behind by a killed run
    ROOT/stale-step-00000360/      of a line that was left: a checkpoint below it was written later

A folder without a manifest, or whose files disagree with it, is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

MANIFEST = "manifest.json"
_PREFIX = "step-"
_WRITING = ".writing-"
_REMOVED = ".removed-"
_STALE = "stale-"


def save_atomically(
    root: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint of step `step`; a killed run leaves the ones before untouched.

    Collective. `root` must be a folder that every rank of the group sees.

    Args:
        root: folder of the run's checkpoints.
        step: steps taken.
        write: called on every rank with the folder to write into.
        keep: checkpoints that stay, this one and the nearest below it; those above it are of a line
            that was left, or damaged, and are set aside as `stale-…`. None: all stay.
        group: the ranks that write; None: all ranks, or one process without a process group.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: what writing raised, on the rank where it happened; the others raise RuntimeError.
    """
    final = root / f"{_PREFIX}{step:08d}"
    writing = root / f"{_WRITING}{final.name}"
    rank, size = _rank_and_size(group)
    if rank == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    _barrier(group)
    write(writing)
    _barrier(group)
    # Every rank reads back a part of the files: checksums of large shards take time.
    files = sorted(p for p in writing.rglob("*") if p.is_file())
    entries = {p.relative_to(writing).as_posix(): _entry(p) for p in files[rank::size]}
    merged = _gathered(entries, group)
    if rank == 0:
        _write_synced(writing / MANIFEST, json.dumps({"step": step, "files": merged}, indent=1))
        for folder in {p.parent for p in files} | {writing}:
            _sync(folder)
        _remove(final)
        writing.rename(final)
        _sync(root)
        if keep is not None:
            _prune(final, keep)
    _barrier(group)
    return final


def problem_with(folder: Path, *, checksums: bool = True) -> str | None:
    """Why `folder` is not an intact checkpoint, in a few words; None when it is one.

    Args:
        folder: perhaps a checkpoint.
        checksums: False compares names and sizes only, which reads no file but the manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    # Sizes first: they find a truncated file without reading anything.
    for name, entry in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            return f"{name} is missing"
        if size != entry["bytes"]:
            return f"{name} has {size} bytes, {entry['bytes']} were written"
    for name, entry in files.items() if checksums else ():
        if _checksum(folder / name) != entry["sha256"]:
            return f"{name} has another checksum than was written"
    return None


def newest_intact(root: Path, *, checksums: bool = True) -> Path | None:
    """The newest checkpoint that is intact; damaged ones are warned about and passed over.

    Not collective: call it on one rank and tell the others. For `checksums` see `problem_with`.
    """
    for folder in sorted(_checkpoints(root), reverse=True):
        problem = problem_with(folder, checksums=checksums)
        if problem is None:
            return folder
        warnings.warn(f"{folder}: skipped, {problem}", stacklevel=2)
    return None


def set_aside_above(folder: Path) -> list[Path]:
    """Rename the checkpoints of later steps beside `folder` to `stale-…`: nothing takes them then.

    Returns:
        Their new names, which can still be read by whoever asks for one.
    """
    aside = []
    for above in sorted(p for p in _checkpoints(folder.parent) if p.name > folder.name):
        target = above.with_name(f"{_STALE}{above.name}")
        shutil.rmtree(target, ignore_errors=True)
        aside.append(above.rename(target))
    return aside


def step_of(folder: Path) -> int:
    """The step that a checkpoint was made at."""
    return int(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["step"])


def _checkpoints(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (p for p in root.glob(f"{_PREFIX}*") if p.is_dir())


def _prune(newest: Path, keep: int) -> None:
    """Leave `newest`, just written, and the `keep - 1` below it; it is newest whatever its step."""
    root = newest.parent
    set_aside_above(newest)
    for folder in sorted(_checkpoints(root))[:-keep]:
        _remove(folder)
    for left_behind in root.glob(f"{_REMOVED}*"):
        shutil.rmtree(left_behind, ignore_errors=True)


def _remove(folder: Path) -> None:
    # Renamed first, so that a kill in between leaves no half checkpoint.
    doomed = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.is_dir():
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _entry(path: Path) -> dict[str, int | str]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _checksum(path)}


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def _barrier(group: dist.ProcessGroup | None) -> None:
    if dist.is_initialized():
        dist.barrier(group)


def _gathered(
    entries: dict[str, dict[str, int | str]], group: dist.ProcessGroup | None
) -> dict[str, dict[str, int | str]]:
    if not dist.is_initialized():
        return entries
    parts: list[dict[str, dict[str, int | str]]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(parts, entries, group=group)
    return {name: entry for part in parts for name, entry in sorted(part.items())}
