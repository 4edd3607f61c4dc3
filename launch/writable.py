"""Whether a folder or file can be written, found out before the work that it is for."""

from __future__ import annotations

import tempfile
from pathlib import Path

from launch.errors import BadInput


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
    folder = existing = Path(path).absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            where = "is a file" if existing == folder else f"{existing} is a file"
            raise BadInput(f"{name}={path}: {where}, must be a folder")
        _probe(existing)
    except OSError as error:
        raise BadInput(f"{name}={path}: {existing} cannot be written: {error.strerror}") from None


def check_file(name: str, path: str | Path) -> None:
    """Check that a file can be written into a folder that is there.

    Args:
        name: of the option, for the message.
        path: the file; it may exist.

    Raises:
        BadInput: one line.
    """
    file = Path(path)
    try:
        if not str(path).strip() or file.is_dir():
            raise BadInput(f"{name}={path}: must name a file")
        if not file.absolute().parent.is_dir():
            raise BadInput(f"{name}={path}: its folder does not exist")
        _probe(file.absolute().parent)
    except OSError as error:
        where = file.absolute().parent
        raise BadInput(f"{name}={path}: {where} cannot be written: {error.strerror}") from None


def _probe(folder: Path) -> None:
    # Permissions do not tell: root has them all on a read-only disk and in /proc.
    with tempfile.TemporaryFile(dir=folder):
        pass
