"""Documents to token files: batches on all cores, in constant memory, continued where it stopped.

A folder of encoded text holds `train` and `validation`, each a .bin and .idx that Megatron reads
too, and meta.json. It is built under another name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.data.conversations import Conversations
from launch.data.sources import CACHE_TAG, PIECE, File, character_start, cut_text, read_rows
from launch.data.token_files import write_index
from launch.data.tokenizer import Tokenizer
from launch.run.errors import BadInput
from launch.run.writable import write_text_whole

SPLITS = ("train", "validation")
FORMAT = 6
_FEW = 20  # fewer documents than this are held out in part, not as a whole
_BATCH = 1 << 21  # bytes of text that are encoded together
_MARK_SECONDS = 5.0  # between notes of how far it is, which continue it


@dataclass(frozen=True)
class Encoding:
    """What is encoded, and how.

    Attributes:
        files: of documents.
        tokenizer: their tokenizer.
        text_field: the column of rows that is the text.
        conversations: rows are conversations, rendered so; None: texts.
        held_out: share of the documents that is held out, chosen by a hash of their name.
        ends: hold out the end of every document instead; decided by the documents if None.
    """

    files: list[File]
    tokenizer: Tokenizer
    text_field: str
    conversations: Conversations | None
    held_out: float
    ends: bool | None = None

    @property
    def key(self) -> str:
        """Names what comes out."""
        stats = [file.identity for file in self.files]
        how = [self.text_field, self.conversations and self.conversations.key, self.ends]
        tokens = [self.tokenizer.fingerprint, self.tokenizer.needed_end]
        identity = [FORMAT, stats, tokens, how, self.held_out]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]

    def meta(self, **found: Any) -> dict[str, Any]:
        tokenizer = {"fingerprint": self.tokenizer.fingerprint, "end": self.tokenizer.needed_end}
        return {"format": FORMAT, "key": self.key, "tokenizer": tokenizer, **found}


class Part(NamedTuple):
    """Some text of a document, for one of SPLITS.

    Attributes:
        split: "train" or "validation".
        text: in UTF-8.
        first, last: whether a document of the split begins and ends with it.
        learnt: (start, end) of the characters that are learnt; None: all of them.
    """

    split: str
    text: bytes
    first: bool = True
    last: bool = True
    learnt: list[tuple[int, int]] | None = None


@dataclass
class Mark:
    """How far an encoding is, in what has been written.

    Attributes:
        key: of the Encoding, with the way in which it holds out.
        file, row: read so far.
        open: tokens of the document that is being written, of each split.
        tokens, documents: written, of each split.
        sizes: bytes of each file.
        bytes: of text.
        dropped: conversations left out.
    """

    key: str
    file: int = 0
    row: int = 0
    open: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    sizes: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    dropped: int = 0


def encode_into(wanted: Encoding, folder: Path) -> None:
    """Make the folder of an Encoding, going on where a call before was interrupted.

    The caller sees to it that no other process does so.

    Raises:
        BadInput: names the file, and the row.
        OSError: it cannot be written.
    """
    building = folder.with_name(f"{folder.name}.part")
    building.mkdir(parents=True, exist_ok=True)
    ends = _few(wanted) if wanted.ends is None else wanted.ends
    found = _encode(wanted, building, ends=ends)
    total = sum(found.tokens.values())
    if not total:
        shutil.rmtree(building)
        what = "text" if wanted.conversations is None else "conversation with an answer"
        raise BadInput(f"data.path={_place(wanted)}: no {what} in it")
    if not ends and wanted.ends is None and not all(found.documents.values()):
        # Too few documents for their names to decide. Where these leave some for both splits, they
        # do decide, however unequal: a resumed run must find the split that it began with.
        found = _encode(wanted, building, ends=True)
    dtype = np.dtype(wanted.tokenizer.dtype)
    for split in SPLITS:
        lengths = building / f"{split}.lengths"
        write_index(building / f"{split}.idx", lengths, dtype)
        lengths.unlink()
    meta = wanted.meta(tokens=found.tokens, documents=found.documents, bytes=found.bytes)
    meta["dropped"] = found.dropped
    (building / "mark.json").unlink(missing_ok=True)
    (building / CACHE_TAG).write_text("Signature: 8a477f597d28d172789f06886806bc55\n")
    (building / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    building.rename(folder)


def _place(wanted: Encoding) -> Path:
    paths = [file.path for file in wanted.files]
    return paths[0] if len(paths) == 1 else Path(os.path.commonpath(paths))


def _few(wanted: Encoding) -> bool:
    """Whether there are too few documents to hold out whole ones."""
    count = 0
    for file in wanted.files:
        if file.kind == "text":
            count += file.bytes > 0
        else:
            for _ in read_rows(file, columns=_columns(wanted)):
                count += 1
                if count >= _FEW:
                    return False
        if count >= _FEW:
            return False
    return True


def _columns(wanted: Encoding) -> list[str]:
    return [wanted.text_field] if wanted.conversations is None else Conversations.COLUMNS


def _encode(wanted: Encoding, folder: Path, *, ends: bool) -> Mark:
    """Write what is not yet written of every split; the mark at its end."""
    mark = _begin(folder, f"{wanted.key}-{'ends' if ends else 'names'}")
    progress = _Progress(sum(file.bytes for file in wanted.files), mark.bytes)
    chat = wanted.conversations
    if chat is not None:
        chat.dropped = mark.dropped
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        outs = {
            split: _Out(
                folder, split, mark, stack, dtype=wanted.tokenizer.dtype, learnt=chat is not None
            )
            for split in SPLITS
        }
        waiting: deque[tuple[Future[list[Any]], _Batch]] = deque()

        def write_oldest() -> None:
            future, batch = waiting.popleft()
            ids_of_parts = future.result()
            state["whole"] = False
            for split, out in outs.items():
                out.write(
                    [
                        (ids, counts, part.last)
                        for part, (ids, counts) in zip(batch.parts, ids_of_parts, strict=True)
                        if part.split == split
                    ]
                )
            mark.file, mark.row = batch.file, batch.row
            mark.bytes += batch.bytes
            mark.dropped = batch.dropped
            state["whole"] = True
            progress.show(mark.bytes, sum(mark.tokens.values()))
            if time.monotonic() - state["noted"] > _MARK_SECONDS:
                _note(folder, mark, outs)
                state["noted"] = time.monotonic()

        state = {"noted": time.monotonic(), "whole": True}
        try:
            for batch in _batches(wanted, mark, ends=ends):
                # One is encoded while the one before is written and the next is read.
                waiting.append((pool.submit(_ids_of, wanted.tokenizer, batch.parts), batch))
                if len(waiting) > 2:
                    write_oldest()
            while waiting:
                write_oldest()
            mark.dropped = 0 if chat is None else chat.dropped
        finally:
            # Also when interrupted: what is written stays, and the next call goes on from here.
            for future, _ in waiting:
                future.cancel()
            if state["whole"]:  # not in the middle of a batch
                _note(folder, mark, outs)
            progress.end()
    return mark


def _begin(folder: Path, key: str) -> Mark:
    """Where an earlier call stopped, its files cut to what it noted; or the beginning."""
    try:
        mark = Mark(**json.loads((folder / "mark.json").read_text(encoding="utf-8")))
        same = mark.key == key and all(
            (folder / name).stat().st_size >= size for name, size in mark.sizes.items()
        )
    except (OSError, ValueError, TypeError):
        same = False
    if not same:
        for file in folder.iterdir():
            file.unlink()
        return Mark(key)
    for name, size in mark.sizes.items():
        os.truncate(folder / name, size)
    return mark


def _note(folder: Path, mark: Mark, outs: dict[str, _Out]) -> None:
    for out in outs.values():
        out.flush()
    write_text_whole(folder / "mark.json", json.dumps(vars(mark)))


class _Out:
    """The files of one split, while they are written."""

    def __init__(
        self,
        folder: Path,
        split: str,
        mark: Mark,
        stack: ExitStack,
        *,
        dtype: type[np.integer],
        learnt: bool,
    ) -> None:
        self._split, self._mark, self._dtype = split, mark, dtype
        suffixes = ["bin", "lengths", *(["counts"] if learnt else [])]
        self._files = {
            name: stack.enter_context((folder / f"{split}.{name}").open("ab")) for name in suffixes
        }

    def write(self, parts: list[tuple[np.ndarray, np.ndarray | None, bool]]) -> None:
        """Write (ids, which of them are learnt, whether the document ends) of parts."""
        split, mark, lengths = self._split, self._mark, []
        for ids, _, last in parts:
            mark.tokens[split] += len(ids)
            mark.open[split] += len(ids)
            if last or mark.open[split] > 1 << 30:  # an index counts to 2**31
                lengths.append(mark.open[split])
                mark.open[split] = 0
        mark.documents[split] += len(lengths)
        self._files["lengths"].write(np.array(lengths, np.int32).data)
        arrays = [ids.astype(self._dtype, copy=False) for ids, _, _ in parts]
        self._files["bin"].write(b"".join(array.data for array in arrays))
        if "counts" in self._files:
            self._files["counts"].write(b"".join(c.data for _, c, _ in parts if c is not None))

    def flush(self) -> None:
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            self._mark.sizes[f"{self._split}.{name}"] = file.tell()


class _Batch(NamedTuple):
    """Parts to encode together, and where reading is behind them."""

    parts: list[Part]
    file: int
    row: int
    bytes: int
    dropped: int


def _batches(wanted: Encoding, mark: Mark, *, ends: bool) -> Iterator[_Batch]:
    parts: list[Part] = []
    size, chat = 0, wanted.conversations
    for file, row, own, read in _parts(wanted, mark, ends=ends):
        parts += own
        size += read
        if size >= _BATCH:
            yield _Batch(parts, file, row, size, 0 if chat is None else chat.dropped)
            parts, size = [], 0
    if parts:
        yield _Batch(parts, file, row, size, 0 if chat is None else chat.dropped)


def _parts(
    wanted: Encoding, mark: Mark, *, ends: bool
) -> Iterator[tuple[int, int, list[Part], int]]:
    """(file, row, its parts, bytes of them) of every row and piece of text that is not empty."""
    start, row, taken = mark.file, mark.row, sum(mark.documents.values())
    for index in range(start, len(wanted.files)):
        file, skipped = wanted.files[index], row if index == start else 0
        if file.kind == "text":
            found = _text_parts(wanted, file, skipped, ends=ends)
        elif wanted.conversations is None:
            found = _row_parts(wanted, file, skipped, ends=ends)
        else:
            found = _conversations(wanted, file, skipped, taken, ends=ends)
        for number, parts in found:
            taken += 1
            yield index, number, parts, sum([len(part.text) for part in parts])


def _text_parts(
    wanted: Encoding, file: File, skipped: int, *, ends: bool
) -> Iterator[tuple[int, list[Part]]]:
    size, passed = _size_of_text(file) if ends else 0, 0
    split = _split_of(wanted, file.name)
    for read in read_rows(file, columns=[]):
        content = read.value
        if read.number > skipped:
            if wanted.tokenizer.name != "bytes":
                _check_unicode(file.path, content, passed)
            part = Part(split, content, read.first, read.last)
            yield read.number, _cut(part, passed, size, wanted.held_out) if ends else [part]
        passed += len(content)


def _row_parts(
    wanted: Encoding, file: File, skipped: int, *, ends: bool
) -> Iterator[tuple[int, list[Part]]]:
    nul_ends = wanted.tokenizer.name == "bytes"
    for read in read_rows(file, columns=[wanted.text_field], start=skipped):
        content = _text(read.value, wanted, file, read.number)
        if not content:
            continue
        if nul_ends and b"\0" in content:
            raise BadInput(
                f"{file.path}:{read.number}: `{wanted.text_field}` holds a NUL, which ends "
                "documents of data.tokenizer=bytes: take it out, or take a tokenizer"
            )
        split = "train" if ends else _split_of(wanted, f"{file.name}:{read.number}")
        if len(content) <= PIECE:
            parts = [Part(split, content)]
        else:
            parts = [Part(split, *piece) for piece in cut_text(content)]
        if ends:
            passed, cut = 0, []
            for part in parts:
                cut += _cut(part, passed, len(content), wanted.held_out)
                passed += len(part.text)
            parts = cut
        yield read.number, parts


def _conversations(
    wanted: Encoding, file: File, skipped: int, taken: int, *, ends: bool
) -> Iterator[tuple[int, list[Part]]]:
    assert wanted.conversations is not None
    turn = max(round(1 / wanted.held_out), 2)
    for read in read_rows(file, columns=Conversations.COLUMNS, start=skipped):
        learnt = wanted.conversations.render(read.value, f"{file.path}:{read.number}")
        if learnt is None:
            continue
        taken += 1
        if ends:  # whole conversations in turn: half of one is none
            split = SPLITS[taken % turn == 0]
        else:
            split = _split_of(wanted, f"{file.name}:{read.number}")
        yield read.number, [Part(split, learnt[0], learnt=learnt[1])]


def _split_of(wanted: Encoding, name: str) -> str:
    return SPLITS[_unit_hash(name) < wanted.held_out]


def _cut(part: Part, passed: int, size: int, held_out: float) -> list[Part]:
    """A piece of a document whose end is held out, as parts of both splits."""
    text, place = part.text, int(size * (1 - held_out)) - passed
    if place >= len(text) and not part.last:
        return [Part("train", text, part.first, False), Part("validation", b"", False, False)]
    if place < 0:
        return [Part("validation", text, False, part.last)]
    place = character_start(text, place) if place < len(text) else place
    return [
        Part("train", text[:place], part.first, True),
        Part("validation", text[place:], True, part.last),
    ]


def _size_of_text(file: File) -> int:
    if file.kind != "text":
        return 0
    if file.path.suffix.lower() in (".gz", ".zst"):
        return sum(len(row.value) for row in read_rows(file, columns=[]))
    return file.bytes


def _text(columns: Any, wanted: Encoding, file: File, number: int) -> bytes:
    text = columns.get(wanted.text_field)
    if not isinstance(text, str):
        raise BadInput(
            f"{file.path}:{number}: must have a string `{wanted.text_field}` (data.text_field)"
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        # To replace it would train on something else than the file says.
        half = ascii(text[error.start])[1:-1]
        raise BadInput(
            f"{file.path}:{number}: `{wanted.text_field}` holds {half}, half of a surrogate pair: "
            "must be Unicode"
        ) from None


def _check_unicode(file: Path, text: bytes, passed: int) -> None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        # To replace it would train on something else than the file says.
        raise BadInput(
            f"{file}: byte {passed + error.start} is {text[error.start]:#04x}, no UTF-8: "
            "convert it, or take data.tokenizer=bytes"
        ) from None


def _ids_of(tokenizer: Tokenizer, parts: list[Part]) -> list[tuple[np.ndarray, Any]]:
    """(ids, which of them are learnt) of every part."""
    if parts[0].learnt is not None:
        return tokenizer.encode_learnt([(part.text.decode(), part.learnt or []) for part in parts])
    ids: list[np.ndarray] = []
    group, size = [], 0
    for part in parts:
        group.append((part.text, part.first, part.last))
        size += len(part.text)
        if size >= _BATCH:  # of a row that is longer
            ids += tokenizer.encode_parts(group)
            group, size = [], 0
    if group:
        ids += tokenizer.encode_parts(group)
    return [(one, None) for one in ids]


def _unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    return (
        int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        / 2**64
    )


class _Progress:
    """Says on standard error how far a long encoding is: a line that is redrawn on a terminal."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._begin, self._start = max(total, 1), done, time.monotonic()
        self._redrawn = sys.stderr.isatty()
        self._next, self._shown = self._start + 2, False

    def show(self, done: int, tokens: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.2 if self._redrawn else 10)
        rate = (done - self._begin) / (now - self._start) / 1e6
        # Compressed files hold more than they are.
        share = min(done / self._total, 1)
        bar = "#" * int(share * 20)
        line = f"encoding [{bar:<20}] {share:4.0%}, {tokens:,} tokens, {rate:.1f} MB/s"
        print(
            f"\r{line}" if self._redrawn else line,
            end="" if self._redrawn else "\n",
            file=sys.stderr,
            flush=True,
        )
        self._shown = True

    def end(self) -> None:
        if self._shown and self._redrawn:
            print(file=sys.stderr)
