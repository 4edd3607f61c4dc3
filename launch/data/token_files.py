"""Token ids in files: Megatron's pairs of .bin and .idx, and .npy.

Shape legend: N tokens, D documents.

An .idx holds a header (magic, version 1, code of the dtype, counts of sequences and documents), the
lengths of the sequences (int32), where each begins in the .bin (int64, bytes) and the first
sequence of each document (int64). Here a sequence is a document.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.run.errors import BadInput
from parallel.megatron import indexed_dataset

_MAGIC = b"MMIDIDX\x00\x00"
_CODES = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_CHUNK = 1 << 22


class JoinedArrays:
    """Arrays end to end as one: slices of it are copied together where they cross a border."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def __getitem__(self, wanted: slice) -> np.ndarray:
        start, stop, _ = wanted.indices(len(self))
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        for part, begin in zip(self.parts[first:], self._starts[first:].tolist(), strict=False):
            if begin >= stop:
                break
            pieces.append(part[max(start - begin, 0) : stop - begin])
        return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, self.parts[0][:0]])


class PartOfArray:
    """Some of an array, a slice of which is a slice of the array."""

    def __init__(self, array: np.ndarray | JoinedArrays, start: int, stop: int) -> None:
        self._array, self._start, self._stop = array, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, wanted: slice) -> np.ndarray:
        start, stop, _ = wanted.indices(len(self))
        return self._array[self._start + start : self._start + stop]

    @property
    def dtype(self) -> np.dtype:
        return self._array.dtype


@dataclass(frozen=True)
class Tokens:
    """Documents as token ids.

    Attributes:
        ids: unsigned or signed integers [N]; a slice of it is an array.
        ends: int64 [D], where each document ends.
        counts: uint8 [N], 0 where a token is not to be learnt; None: all are.
    """

    ids: np.ndarray | JoinedArrays | PartOfArray
    ends: np.ndarray
    counts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


def write_index(path: Path, lengths: Path, dtype: np.dtype) -> None:
    """Write the .idx of documents whose lengths, int32 [D], lie in a file. Constant memory.

    Raises:
        OSError: it cannot be written.
    """
    count = lengths.stat().st_size // 4
    with open(path, "wb") as out:
        out.write(_MAGIC + struct.pack("<QBQQ", 1, _CODES[dtype], count, count + 1))
        with open(lengths, "rb") as source:
            while chunk := source.read(_CHUNK):
                out.write(chunk)
        begin = 0
        for lengths_d in _chunks(lengths):
            pointers = np.cumsum(lengths_d, dtype=np.int64) * dtype.itemsize + begin
            out.write(np.concatenate([[begin], pointers[:-1]]).astype(np.int64).tobytes())
            begin = int(pointers[-1])
        for first in range(0, count + 1, _CHUNK):
            out.write(np.arange(first, min(first + _CHUNK, count + 1), dtype=np.int64).tobytes())
        out.flush()
        os.fsync(out.fileno())


def _chunks(lengths: Path) -> list[np.ndarray]:
    if not lengths.stat().st_size:
        return []
    whole = np.memmap(lengths, dtype=np.int32, mode="r")
    return [whole[start : start + _CHUNK] for start in range(0, len(whole), _CHUNK)]


def read_own(prefix: Path) -> Tokens:
    """What `write_index` and its .bin hold, without megatron-core (its import takes seconds)."""
    with open(prefix.with_suffix(".idx"), "rb") as source:
        head = source.read(len(_MAGIC) + 25)
        _, code, count, _ = struct.unpack("<QBQQ", head[len(_MAGIC) :])
        lengths = np.fromfile(source, dtype=np.int32, count=count)
    dtype = next(dtype for dtype, known in _CODES.items() if known == code)
    ends = np.cumsum(lengths, dtype=np.int64)
    file = prefix.with_suffix(".bin")
    ids = np.memmap(file, dtype=dtype, mode="r") if len(lengths) and ends[-1] else None
    return Tokens(np.zeros(0, dtype) if ids is None else ids, ends)


def read_bin(file: Path) -> Tokens:
    """A .bin of Megatron's, by its own IndexedDataset.

    Raises:
        BadInput: no .idx beside it, another's, or damaged.
    """
    index = file.with_suffix(".idx")
    if not index.is_file():
        raise BadInput(
            f"{file}: has no {index.name} beside it: both make one dataset of Megatron's"
        )
    head = index.open("rb").read(len(_MAGIC) + 25)
    if len(head) < len(_MAGIC) + 25 or not head.startswith(_MAGIC):
        raise BadInput(f"{index}: is no index of Megatron's .bin files")
    _, _, sequences, documents = struct.unpack("<QBQQ", head[len(_MAGIC) :])
    needed = len(head) + 12 * sequences + 8 * documents
    if index.stat().st_size < needed:
        raise BadInput(f"{index}: has {index.stat().st_size} bytes, must have {needed}: cut short")
    try:
        dataset = indexed_dataset(file.with_suffix(""))
    except ImportError:
        raise BadInput(f"{file}: needs megatron-core (pip install megatron-core)") from None
    except (ValueError, AssertionError, KeyError, RuntimeError) as error:
        raise BadInput(f"{index}: {error}") from None
    lengths = np.asarray(dataset.index.sequence_lengths, dtype=np.int64)
    dtype = np.dtype(dataset.index.dtype)
    if not np.issubdtype(dtype, np.integer):
        raise BadInput(f"{index}: says {dtype.name}, token ids must be integers")
    written, size = int(lengths.sum()) * dtype.itemsize, file.stat().st_size
    if written != size:
        raise BadInput(
            f"{file}: has {size} bytes, its {index.name} speaks of {written}: not one dataset"
        )
    starts = np.asarray(dataset.index.sequence_pointers, dtype=np.int64) // dtype.itemsize
    if not np.array_equal(starts, np.cumsum(lengths) - lengths):
        raise BadInput(f"{index}: its sequences do not lie in the order of the file: write it anew")
    # A document may be several sequences; the last entry ends the last one.
    border = np.asarray(dataset.index.document_indices, dtype=np.int64)[1:]
    border = border[border > 0]
    ends = np.cumsum(lengths)[border - 1] if len(border) else np.cumsum(lengths)
    ids = np.memmap(file, dtype=dtype, mode="r") if size else np.zeros(0, dtype)
    return Tokens(ids, ends[np.diff(ends, prepend=0) > 0])


def read_npy(file: Path, end: int) -> Tokens:
    """Token ids of a .npy: [N], where `end` ends documents, or [D, S], a document a row.

    Raises:
        BadInput: no such array.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BadInput(f"{file}: is no .npy array: {error}") from None
    if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2):
        shape = " x ".join(map(str, array.shape))
        raise BadInput(f"{file}: is {shape} of {array.dtype}, must be one or two axes of integers")
    if array.ndim == 2:
        return Tokens(array.reshape(-1), np.arange(1, len(array) + 1) * array.shape[1])
    ends = [
        np.flatnonzero(array[start : start + _CHUNK] == end) + start + 1
        for start in range(0, len(array), _CHUNK)
    ]
    # What follows the last end is a document too.
    return Tokens(array, np.unique(np.concatenate([*ends, [len(array)]])).astype(np.int64))


def check_ids(file: Path, tokens: Tokens, vocab_size: int) -> None:
    """Look at every id.

    Raises:
        BadInput: names the first that the vocabulary does not have, and its document.
    """
    for start in range(0, len(tokens), _CHUNK):
        ids = tokens.ids[start : start + _CHUNK]
        if int(ids.max()) < vocab_size and int(ids.min()) >= 0:
            continue
        place = start + int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
        document = int(np.searchsorted(tokens.ends, place, side="right"))
        raise BadInput(
            f"{file}: document {document + 1} has id {tokens.ids[place : place + 1][0]}: must be "
            f"below {vocab_size}, the vocabulary of data.tokenizer"
        )
