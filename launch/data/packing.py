"""Whole documents packed into rows of one length, first where they fit best, the longest first.

Shape legend: D documents, P pieces, R rows, S tokens of a row.

A row is inputs and targets: of a document of n tokens every one is a target once, and the inputs
are the end of text and the document without its last token. So no piece needs another's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from launch.data.token_files import Tokens
from launch.run.errors import BadInput


class Row(NamedTuple):
    """A row of several documents.

    Attributes:
        input_ids: int64 [S], 0 at padding.
        targets: int64 [S], -1 where none is to be learnt.
        documents: int64 [S], the number of the token's document in the row, -1 at padding.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    documents: np.ndarray


@dataclass(frozen=True)
class PackedRows:
    """Which pieces lie in which row.

    Attributes:
        starts: int64 [P], the first target of each piece, row after row.
        lengths: int32 [P], its targets.
        begins: bool [P], whether a document begins with it.
        rows: int64 [R + 1], the first piece of each row.
        cut, dropped: documents that were cut, and that were left out.
    """

    starts: np.ndarray
    lengths: np.ndarray
    begins: np.ndarray
    rows: np.ndarray
    cut: int
    dropped: int

    def __len__(self) -> int:
        return len(self.rows) - 1

    def tokens(self, row: int) -> int:
        """Tokens of a row that are no padding."""
        return int(self.lengths[self.rows[row] : self.rows[row + 1]].sum())

    def targets(self, row: int, tokens: Tokens) -> int:
        """Targets of a row that are learnt."""
        if tokens.counts is None:
            return self.tokens(row)
        return sum(
            int(tokens.counts[start : start + length].sum())
            for start, length, _ in self._pieces(row)
        )

    def padding(self, span: int) -> float:
        """Share of padding in all rows of `span` tokens."""
        return 1 - float(self.lengths.sum(dtype=np.int64)) / (max(len(self), 1) * span)

    def row(self, row: int, tokens: Tokens, *, span: int, end: int) -> Row:
        """A row of `span` tokens; `end` begins each document."""
        out = Row(*(np.full(span, fill, np.int64) for fill in (0, -1, -1)))
        place = 0
        for number, (start, length, begins) in enumerate(self._pieces(row)):
            stop = place + length
            ids = tokens.ids[start : start + length].astype(np.int64)
            out.input_ids[place] = end if begins else tokens.ids[start - 1 : start][0]
            out.input_ids[place + 1 : stop] = ids[:-1]
            if tokens.counts is not None:
                ids = np.where(tokens.counts[start : start + length], ids, -1)
            out.targets[place:stop] = ids
            out.documents[place:stop] = number
            place = stop
        return out

    def _pieces(self, row: int) -> list[tuple[int, int, bool]]:
        where = slice(int(self.rows[row]), int(self.rows[row + 1]))
        return list(
            zip(
                self.starts[where].tolist(),
                self.lengths[where].tolist(),
                self.begins[where].tolist(),
                strict=True,
            )
        )


def packed_rows(tokens: Tokens, span: int, *, long: str) -> PackedRows:
    """Pack the documents of `tokens` into rows of `span` tokens.

    Args:
        tokens: documents.
        span: S.
        long: what becomes of a document that is longer than a row: "split" into pieces, "cut" at
            the end of the row, "drop".
    """
    ends = tokens.ends[:]
    lengths = np.diff(ends, prepend=0)
    starts = ends - lengths
    del ends  # of 1e8 documents an array is 0.8 GB
    if not lengths.all():
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    begins = np.ones(len(starts), bool)
    longer = lengths > span
    cut = dropped = 0
    if not longer.any():
        pass
    elif long == "split":
        pieces = -(-lengths // span)
        index = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        begins = index == 0
        index *= span
        starts = np.repeat(starts, pieces)
        starts += index
        lengths = np.repeat(lengths, pieces)
        lengths -= index
        lengths = np.minimum(lengths, span)
        del pieces, index
        cut = int(longer.sum())
    elif long == "cut":
        cut = int(longer.sum())
        lengths = np.minimum(lengths, span)
    else:
        dropped = int(longer.sum())
        starts, lengths, begins = starts[~longer], lengths[~longer], begins[~longer]
    if tokens.counts is not None:
        # What was cut off may have been all that is learnt.
        learnt = np.ones(len(starts), bool)
        for place in np.flatnonzero(lengths == span).tolist():
            start = int(starts[place])
            learnt[place] = tokens.counts[start : start + span].any()
        dropped += int((~learnt).sum())
        starts, lengths, begins = starts[learnt], lengths[learnt], begins[learnt]
    del longer
    lengths = lengths.astype(np.int32)
    row_of_piece, rows = fit(lengths, span)
    order = np.argsort(row_of_piece, kind="stable")
    return PackedRows(
        starts[order],
        lengths[order],
        begins[order],
        np.searchsorted(row_of_piece[order], np.arange(rows + 1)),
        cut,
        dropped,
    )


def fit(lengths: np.ndarray, span: int) -> tuple[np.ndarray, int]:
    """The row of each piece, integers [P], and how many rows there are.

    Best fit, the longest first. All pieces of one length are placed together, so that the work is
    of the order of span**2 at most, however many pieces there are.
    """
    rows = np.zeros(len(lengths), np.int32 if len(lengths) < 1 << 31 else np.int64)
    if not len(lengths):
        return rows, 0
    # Small integers are sorted by their digits.
    space_behind = (span - lengths).astype(np.uint16 if span < 1 << 16 else np.int64)
    order = np.argsort(space_behind, kind="stable")
    counts = np.bincount(space_behind)
    there = np.flatnonzero(counts)
    first = np.cumsum(counts[there]) - counts[there]
    spaces: dict[int, list[np.ndarray]] = {}  # rows by how much still fits into them
    made = 0
    for length, pieces in zip((span - there).tolist(), np.split(order, first[1:]), strict=True):
        for space in sorted(space for space in spaces if space >= length):
            open_rows = _joined(spaces.pop(space))
            used, pieces = _place(rows, pieces, open_rows, length, space, spaces)
            if used < len(open_rows):
                spaces.setdefault(space, []).append(open_rows[used:])
            if not len(pieces):
                break
        if len(pieces):
            new = np.arange(made, made + -(-len(pieces) // (span // length)))
            made += len(new)
            _place(rows, pieces, new, length, span, spaces)
    return rows, made


def _place(
    rows: np.ndarray,
    pieces: np.ndarray,
    open_rows: np.ndarray,
    length: int,
    space: int,
    spaces: dict[int, list[np.ndarray]],
) -> tuple[int, np.ndarray]:
    """Put pieces of one length into rows of one space: (rows used, pieces left)."""
    each = space // length
    used = min(len(open_rows), -(-len(pieces) // each))
    count = min(len(pieces), used * each)
    rows[pieces[:count]] = np.repeat(open_rows[:used], each)[:count]
    in_last = count - (used - 1) * each
    for who, held in ((open_rows[: used - 1], each), (open_rows[used - 1 : used], in_last)):
        left = space - held * length
        if len(who) and left:
            spaces.setdefault(left, []).append(who)
    return used, pieces[count:]


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


_ARRAYS = ("starts", "lengths", "begins", "rows")


def save_rows(packed: PackedRows, folder: Path) -> None:
    """Write rows to a new folder, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(exist_ok=True)
    for name in _ARRAYS:
        np.save(part / f"{name}.npy", getattr(packed, name))
    np.save(part / "counts.npy", np.array([packed.cut, packed.dropped]))
    part.rename(folder)


def load_rows(folder: Path) -> PackedRows:
    """What `save_rows` wrote, memory-mapped.

    Raises:
        BadInput: it is damaged.
    """
    try:
        starts, lengths, begins, rows = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS
        )
        cut, dropped = np.load(folder / "counts.npy").tolist()
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{folder}: is damaged, delete it: {error}") from None
    return PackedRows(starts, lengths, begins, rows, cut, dropped)
