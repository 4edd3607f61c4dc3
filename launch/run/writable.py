"""Writing: whether one can, found out before the work; files whole; permissions by the umask."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.run.errors import BadInput


def check_folder(name: str, path: str | Path) -> None:
    """Check that a folder can be written, or made where it is not there. Leaves no trace.

    Args:
        name: of the option or key, for the message.
        path: the folder.

    Raises:
        BadInput: one line.
    """
    if not str(path).strip():
        raise BadInput(f"{name}={str(path)!r}: must name a folder")
    _probe(f"{name}={path}", Path(path).absolute())


def check_file(name: str, path: str | Path, *, makes_folder: bool = False) -> None:
    """Check that a file can be written. Leaves no trace.

    Args:
        name: of the option, for the message.
        path: the file; it may exist.
        makes_folder: the program makes the file's folder where it is not there.

    Raises:
        BadInput: one line.
    """
    said, file = f"{name}={path}", Path(path).absolute()
    with _as_bad_input(said, file):
        if not str(path).strip() or file.is_dir():
            raise BadInput(f"{said}: must name a file")
        if not makes_folder and not file.parent.is_dir():
            raise BadInput(f"{said}: its folder does not exist")
    _probe(said, file.parent)


def _probe(said: str, folder: Path) -> None:
    """Write into the folder, or into the nearest above it that exists."""
    existing = folder
    with _as_bad_input(said, folder):
        while not existing.exists():
            if existing.is_symlink():
                raise BadInput(f"{said}: {existing} is a link to nothing")
            existing = existing.parent
    if not existing.is_dir():
        which = "" if existing == folder else f"{existing} "
        raise BadInput(f"{said}: {which}is a file, must be a folder")
    # Permissions do not tell: root has them all on a read-only disk and in /proc.
    with _as_bad_input(said, existing), tempfile.TemporaryFile(dir=existing):
        pass


@contextmanager
def _as_bad_input(said: str, place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"{said}: {place} cannot be written: {error.strerror}") from None


def write_text_whole(path: Path, text: str) -> None:
    """Write all of a file or nothing: half of one would be taken for the whole."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def follow_umask(path: Path) -> None:
    """Give what was made for its owner alone the permissions of any new file or folder.

    Of `mkdtemp`, `mkstemp` and safetensors: a shared cache or checkpoint would be its first
    user's only.
    """
    # The mask can only be read by setting it: meanwhile a file is too private, never too open.
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextmanager
def scratch_folder(prefix: str, *, near: Path) -> Iterator[Path]:
    """A private folder of a name that nobody foresees, removed at the end.

    Args:
        prefix: of its name.
        near: where large files have room; the system's own place where it cannot be written.
    """
    try:
        scratch = tempfile.TemporaryDirectory(prefix=prefix, dir=near)
    except OSError:
        scratch = tempfile.TemporaryDirectory(prefix=prefix)
    with scratch as folder:
        yield Path(folder)
