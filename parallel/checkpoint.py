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
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
Entries = dict[str, dict[str, int | str]]
MANIFEST = "manifest.json"
_PREFIX = "step-"
_WRITING = ".writing-"
_REMOVED = ".removed-"
_STALE = "stale-"
# A rank that failed waits this long for the others, then ends, so that the launcher ends them.
_PATIENCE = timedelta(seconds=60)


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
        OSError: or whatever writing raised, on the rank where it happened.
        FailedElsewhere: on the other ranks. Nothing of this checkpoint stays, the ones before do.
            A rank that waits in a collective of `write` itself is not reached: a `write` of
            several parts puts each that can fail on one rank alone inside `together`.
    """
    final = root / f"{_PREFIX}{step:08d}"
    writing = root / f"{_WRITING}{final.name}"
    rank, size = _rank_and_size(group)
    try:
        collectively(lambda: _make_empty(writing) if rank == 0 else None, group=group)
        collectively(lambda: write(writing), group=group)
        # Every rank reads back a part of the files: checksums of large shards take time.
        entries = collectively(lambda: _entries(writing, rank, size), group=group)
        merged = _gathered(entries, group)
        collectively(lambda: _finish(writing, final, merged) if rank == 0 else None, group=group)
    except Exception:
        if rank == 0:
            shutil.rmtree(writing, ignore_errors=True)
        raise
    if rank == 0 and keep is not None:
        try:
            _prune(final, keep)
        except OSError as error:  # the new one is there all the same
            warnings.warn(f"{root}: old checkpoints stay, {error}", stacklevel=2)
    _barrier(group)
    return final


class FailedElsewhere(RuntimeError):  # noqa: N818 -- named for what it says
    """Another rank could not do its part; the message names it and what it met."""


def collectively(action: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """`action()`, if no rank's fails. Collective; in place of a barrier behind the action.

    Raises:
        FailedElsewhere: on every rank whose own action did not raise, when another rank's did.
    """
    try:
        result = action()
    except Exception as error:
        # This rank's own error, whatever becomes of the others.
        with suppress(RuntimeError):
            _first_failure(error, group)
        raise
    failure = _first_failure(None, group)
    if failure is not None:
        raise FailedElsewhere(failure)
    return result


def _first_failure(error: Exception | None, group: dist.ProcessGroup | None) -> str | None:
    """The first rank that failed and why; None: none did."""
    if not dist.is_initialized():
        return None
    rank, size = _rank_and_size(group)
    device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    # The lowest rank that failed has the largest mark.
    mark = torch.tensor([0 if error is None else size - rank], device=device)
    work = dist.all_reduce(mark, dist.ReduceOp.MAX, group=group, async_op=True)
    if error is None:
        work.wait()
    else:
        work.wait(_PATIENCE)
    first = size - int(mark)
    if first == size:
        return None
    box = [str(error)]
    source = first if group is None else dist.get_global_rank(group, first)
    dist.broadcast_object_list(box, src=source, group=group)
    return f"rank {first}: {box[0]}"


def problem_with(folder: Path, *, checksums: bool = True) -> str | None:
    """Why `folder` is not an intact checkpoint, in a few words; None when it is one.

    Args:
        folder: perhaps a checkpoint.
        checksums: False compares names and sizes only, which reads no file but the manifest.
    """
    try:
        files = _manifest(folder)["files"]
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
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked to be one.

    Raises:
        OSError, ValueError: what is wrong with it.
    """
    path = folder / MANIFEST
    if path.exists() and not path.is_file():
        raise ValueError("is no regular file")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(manifest, dict):
        raise ValueError("must be a mapping")
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or step < 0:
        raise ValueError(f"step={step!r}: must be a count")
    named = re.search(rf"{_PREFIX}(\d+)$", folder.name)
    if named is not None and step != int(named[1]):
        raise ValueError(f"step={step}: is not that of {folder.name}")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"files={files!r}: must name the files")
    for name, entry in files.items():
        if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"files: {name!r} is outside the checkpoint")
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise ValueError(f"files: {name} must have its bytes and its sha256")
        size, digest = entry["bytes"], entry["sha256"]
        if type(size) is not int or not re.fullmatch("[0-9a-f]{64}", str(digest)):
            raise ValueError(f"files: {name} has {size!r} bytes and the checksum {digest!r}")
    return manifest


def newest_intact(
    root: Path,
    *,
    checksums: bool = True,
    accept: Callable[[Path], str | None] | None = None,
) -> Path | None:
    """The newest checkpoint that is intact; damaged ones are warned about and passed over.

    Not collective: call it on one rank and tell the others.

    Args:
        root: folder of checkpoints.
        checksums: see `problem_with`.
        accept: why an intact one is of no use all the same; None: it is of use.
    """
    for folder in sorted(_checkpoints(root), reverse=True):
        problem = problem_with(folder, checksums=checksums)
        if problem is None and accept is not None:
            problem = accept(folder)
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
    return int(_manifest(folder)["step"])


def _checkpoints(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (p for p in root.glob(f"{_PREFIX}*") if p.is_dir())


def _prune(newest: Path, keep: int) -> None:
    """Leave `newest`, just written, and the `keep - 1` below it; it is newest whatever its step."""
    root = newest.parent
    set_aside_above(newest)
    for folder in sorted(_checkpoints(root))[:-keep]:
        shutil.rmtree(_hidden(folder), ignore_errors=True)
    for left_behind in root.glob(f"{_REMOVED}*"):
        shutil.rmtree(left_behind, ignore_errors=True)


def _hidden(folder: Path) -> Path:
    """New name of a folder to be removed: a kill in between leaves no half checkpoint."""
    hidden = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.is_dir():
        folder.rename(hidden)
    return hidden


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(writing: Path, final: Path, entries: Entries) -> None:
    """Write the manifest and give the folder its name."""
    step = int(final.name.removeprefix(_PREFIX))
    _write_synced(writing / MANIFEST, json.dumps({"step": step, "files": entries}, indent=1))
    for folder in {(writing / name).parent for name in entries} | {writing}:
        _sync(folder)
    older = _hidden(final)
    writing.rename(final)
    _sync(final.parent)
    shutil.rmtree(older, ignore_errors=True)


def _entries(folder: Path, rank: int, size: int) -> Entries:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): _entry(p) for p in files[rank::size]}


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


def _gathered(entries: Entries, group: dist.ProcessGroup | None) -> Entries:
    if not dist.is_initialized():
        return entries
    parts: list[Entries] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(parts, entries, group=group)
    return {name: entry for part in parts for name, entry in sorted(part.items())}
