"""Arrays in .npy files, whoever wrote them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from launch.run.errors import BadInput


def mapped_array(file: Path, *, named: str | None = None) -> np.ndarray:
    """The array of numbers in a .npy, memory-mapped.

    Args:
        file: the .npy.
        named: what to call it in the message; None: by its path.

    Raises:
        BadInput: it holds no such array.
    """
    named = str(file) if named is None else named
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a parser meets anything in a damaged file
        raise BadInput(f"{named}: is no .npy array: {error}") from None
    if not isinstance(array, np.ndarray):
        raise BadInput(f"{named}: is no .npy array: holds several, as .npz does")
    if array.dtype.kind not in "biuf":
        raise BadInput(f"{named}: holds {array.dtype}, must hold numbers")
    return array
