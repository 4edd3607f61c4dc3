"""Token ids in files: Megatron's pairs of .bin and .idx, and .npy.

Shape legend: N tokens, D documents.

An .idx holds a header (magic, version 1, code of the dtype, counts of sequences and documents), the
lengths of the sequences (int32), where each begins in the .bin (int64, bytes) and the first
sequence of each document (int64). Here a sequence is a document.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, overload

import numpy as np

from launch.data.arrays import mapped_array
from launch.run.errors import BadInput
from parallel.megatron import indexed_dataset

_MAGIC = b"MMIDIDX\x00\x00"
_CODES = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_HEADER = len(_MAGIC) + 25
_CHUNK = 1 << 22


class Sliced(Protocol):
    """An array of one axis, of which slices are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, wanted: slice, /) -> np.ndarray: ...


class JoinedArrays:
    """Arrays end to end as one: slices of it are copied together where they cross a border."""

    def __init__(self, parts: Sequence[Sliced]) -> None:
        self.parts = list(parts)
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0][:0].dtype

    def __getitem__(self, wanted: slice) -> np.ndarray:
        start, stop, _ = wanted.indices(len(self))
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        while start < stop:  # not a loop over all parts: there may be thousands
            begin, end = int(self._starts[number]), int(self._starts[number + 1])
            pieces.append(self.parts[number][start - begin : stop - begin])
            start, number = end, number + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, self.parts[0][:0]])


class PartOfArray:
    """Some of an array, a slice of which is a slice of the array."""

    def __init__(self, array: Sliced, start: int, stop: int) -> None:
        self._array, self._start, self._stop = array, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, wanted: slice) -> np.ndarray:
        start, stop, _ = wanted.indices(len(self))
        return self._array[self._start + start : self._start + stop]

    @property
    def dtype(self) -> np.dtype:
        return self._array[:0].dtype


class Ends:
    """Where documents end, int64 [D], of which only what is asked for is read.

    Args:
        count: D.
        between: gives those of some documents: (the first, behind the last) -> an array.
    """

    def __init__(self, count: int, between: Callable[[int, int], np.ndarray]) -> None:
        self._count, self._between = count, between

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, wanted: int) -> int: ...
    @overload
    def __getitem__(self, wanted: slice) -> np.ndarray: ...

    def __getitem__(self, wanted: int | slice) -> int | np.ndarray:
        if isinstance(wanted, slice):
            start, stop, _ = wanted.indices(self._count)
            return self._between(start, max(stop, start))
        place = range(self._count)[wanted]
        return int(self._between(place, place + 1)[0])

    def part(self, start: int, stop: int, *, shift: int = 0) -> Ends:
        """Some of them, each `shift` further."""
        return Ends(stop - start, lambda a, b: self._between(start + a, start + b) + shift)

    @staticmethod
    def of(array: Sliced) -> Ends:
        """Those that an array holds."""
        return Ends(len(array), lambda start, stop: array[start:stop])


@dataclass(frozen=True)
class Tokens:
    """Documents as token ids.

    Attributes:
        ids: unsigned or signed integers [N]; a slice of it is an array.
        ends: where each document ends; a document may be empty.
        counts: uint8 [N], 0 where a token is not to be learnt; None: all are.
    """

    ids: Sliced
    ends: Ends
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
    """What `write_index` and its .bin hold, without megatron-core (its import takes seconds).

    Raises:
        ValueError: they are not whole.
    """
    file, index = prefix.with_suffix(".bin"), prefix.with_suffix(".idx")
    code, count, _ = _header(index)
    if code not in _DTYPES or index.stat().st_size != _HEADER + 20 * count + 8:
        raise ValueError(f"{index.name} is not whole: encode it anew")
    dtype = _DTYPES[code]
    if not count:
        return Tokens(np.zeros(0, dtype), Ends.of(np.zeros(0, np.int64)))
    lengths = np.memmap(index, np.int32, "r", _HEADER, (count,))
    pointers = np.memmap(index, np.int64, "r", _HEADER + 4 * count, (count,))
    ends = Ends(count, lambda a, b: pointers[a:b] // dtype.itemsize + lengths[a:b])
    if file.stat().st_size != ends[-1] * dtype.itemsize:
        raise ValueError(f"{file.name} is not whole: encode it anew")
    return Tokens(np.memmap(file, dtype, "r"), ends)


def _header(index: Path) -> tuple[int, int, int]:
    """(code of the dtype, sequences, entries of documents) of an .idx.

    Raises:
        ValueError: it is none.
    """
    with open(index, "rb") as source:
        head = source.read(_HEADER)
    if len(head) < _HEADER or not head.startswith(_MAGIC):
        raise ValueError("is no index of Megatron's .bin files")
    version, code, sequences, documents = struct.unpack("<QBQQ", head[len(_MAGIC) :])
    if version != 1 or not 1 <= code <= 8:
        raise ValueError(f"has version {version} and dtype {code}: must be 1, and 1 to 8")
    return code, sequences, documents


def read_bin(file: Path, *, checked: bool) -> Tokens:
    """A .bin of Megatron's, by its own IndexedDataset.

    Args:
        file: the .bin.
        checked: trust the order of its sequences, which takes the longest to look at.

    Raises:
        BadInput: no .idx beside it, another's, or damaged.
    """
    index = file.with_suffix(".idx")
    if not index.is_file():
        raise BadInput(
            f"{file}: has no {index.name} beside it: both make one dataset of Megatron's"
        )
    try:
        _, sequences, entries = _header(index)
        needed = _HEADER + 12 * sequences + 8 * entries
        if index.stat().st_size < needed:
            raise ValueError(f"has {index.stat().st_size} bytes, must have {needed}: cut short")
        if not file.stat().st_size and not sequences:
            return Tokens(np.zeros(0, np.uint8), Ends.of(np.zeros(0, np.int64)))
        dataset = indexed_dataset(file.with_suffix(""))
    except ImportError:
        raise BadInput(f"{file}: needs megatron-core (pip install megatron-core)") from None
    except ValueError as error:
        raise BadInput(f"{index}: {error}") from None
    except Exception as error:  # Megatron meets anything in a damaged file
        said = str(error) or type(error).__name__
        raise BadInput(f"{index}: is no intact index: {said}") from None
    lengths, pointers = dataset.index.sequence_lengths, dataset.index.sequence_pointers
    dtype = np.dtype(dataset.index.dtype)
    if not np.issubdtype(dtype, np.integer):
        raise BadInput(f"{index}: says {dtype.name}, token ids must be integers")
    size = file.stat().st_size
    if not checked:
        written = 0
        for start in range(0, sequences, _CHUNK):
            stop = np.cumsum(lengths[start : start + _CHUNK], dtype=np.int64) * dtype.itemsize
            begins = np.concatenate([[0], stop[:-1]]) + written
            if not np.array_equal(pointers[start : start + _CHUNK], begins):
                raise BadInput(
                    f"{index}: its sequences do not lie in the order of the file: write it anew"
                )
            written += int(stop[-1])
        if written != size:
            raise BadInput(
                f"{file}: has {size} bytes, its {index.name} speaks of {written}: not one dataset"
            )

        for start in range(0, entries, _CHUNK):
            borders = np.asarray(dataset.index.document_indices[start : start + _CHUNK + 1])
            if (np.diff(borders) < 0).any() or borders.min() < 0 or borders.max() > sequences:
                raise BadInput(f"{index}: its documents do not follow one another: write it anew")

    def between(start: int, stop: int) -> np.ndarray:
        # A document may be several sequences, or none; the last entry ends the last one. The
        # dataset unmaps its index when it goes.
        behind = dataset.index.document_indices[start + 1 : stop + 1]
        last = np.maximum(behind - 1, 0)
        ends = pointers[last] // dtype.itemsize + lengths[last]
        return np.where(behind > 0, ends, 0)

    return Tokens(np.memmap(file, dtype=dtype, mode="r"), Ends(max(entries - 1, 0), between))


def read_npy(file: Path, end: int) -> Tokens:
    """Token ids of a .npy: [N], where `end` ends documents, or [D, S], a document a row.

    Raises:
        BadInput: no such array.
    """
    array = mapped_array(file)
    if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2):
        shape = " x ".join(map(str, array.shape))
        raise BadInput(f"{file}: is {shape} of {array.dtype}, must be one or two axes of integers")
    if array.ndim == 2:
        width = array.shape[1]
        ends = Ends(len(array), lambda a, b: np.arange(a + 1, b + 1, dtype=np.int64) * width)
        return Tokens(array.reshape(-1), ends)
    found = [
        np.flatnonzero(array[start : start + _CHUNK] == end) + start + 1
        for start in range(0, len(array), _CHUNK)
    ]
    # What follows the last end is a document too.
    return Tokens(array, Ends.of(np.concatenate([*found, [len(array)]])))


def check_ids(file: Path, tokens: Tokens, vocab_size: int) -> None:
    """Look at every id.

    Raises:
        BadInput: names the first that the vocabulary does not have, and its document.
    """
    if np.iinfo(tokens.ids.dtype).max < vocab_size:
        return
    for start in range(0, len(tokens), _CHUNK):
        ids = tokens.ids[start : start + _CHUNK]
        if int(ids.max()) < vocab_size and int(ids.min()) >= 0:
            continue
        place = start + int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
        document = bisect_right(tokens.ends, place)
        raise BadInput(
            f"{file}: document {document + 1} has id {tokens.ids[place : place + 1][0]}: must be "
            f"below {vocab_size}, the vocabulary of data.tokenizer"
        )
