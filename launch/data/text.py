"""A corpus of text as tokens in memory-mapped files, split into training and held-out parts.

Shape legend: B rows, S tokens of a row.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from launch.data.conversations import Conversations
from launch.data.encoding import FORMAT, SPLITS, Encoding, encode_into
from launch.data.mixture import Mixture
from launch.data.packing import PackedRows, Row, load_rows, packed_rows, save_rows
from launch.data.sources import CACHE_TAG, File, check_path, find_files
from launch.data.token_files import (
    Ends,
    JoinedArrays,
    PartOfArray,
    Tokens,
    check_ids,
    read_bin,
    read_npy,
    read_own,
)
from launch.data.tokenizer import Tokenizer
from launch.run.errors import BadInput
from launch.run.plain_data import read_json
from launch.run.terminal import announced
from launch.tasks import row_generator

_SHARES = 30  # that are tried until both splits have a row


@dataclass(frozen=True)
class SourceConfig:
    """One of several sources of text.

    Attributes:
        path: as data.path.
        weight: its share of the rows, in proportion to the others'.
        name: in metrics; null: the last part of the path.
        text_field: as data.text_field; null: that.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    path: str
    weight: float = 1.0
    name: str | None = None
    text_field: str | None = None

    def __post_init__(self) -> None:
        check_path(self.path)
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight={self.weight}: must be above 0")

    @property
    def label(self) -> str:
        return self.name or Path(self.path).name or self.path


@dataclass(frozen=True)
class TextConfig:
    """Text to learn from; docs/data.md has every format.

    Attributes:
        path: a file, a folder, or a glob: text, .jsonl, .parquet, a saved dataset, or token ids in
            .bin with .idx, .npy, or what launch.encode wrote; null: the sources of Python's own
            standard library.
        sources: a list of {path, weight, name, text_field} instead of one path.
        text_field: the column of rows that is the text.
        seq_len: tokens of a row.
        packing: "windows" of the text end to end, or whole "documents" packed into rows, which see
            nothing of one another.
        conversations: rows are conversations (`messages`, or `prompt` and `response`), of which
            what the assistant says is learnt; needs packing=documents. Without a path: functions
            of the standard library, asked for by what they say of themselves.
        chat_template: how conversations are written: "plain", or the "tokenizer"'s own.
        too_long: conversations longer than a row: "cut" at its end, or "drop".
        tokenizer: "bytes" (vocabulary 256), or a folder or file that holds a `tokenizer.json`.
        end_of_text: the token between documents; null: the tokenizer's own.
        validation_fraction: share of documents that is held out, chosen by a hash of their name.
        validation_rows: rows of the fixed held-out set of each source, spread evenly over it.
        cache: folder of encoded corpora.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    path: str | None = None
    sources: tuple[SourceConfig, ...] = ()
    text_field: str = "text"
    seq_len: int = 256
    packing: Literal["windows", "documents"] = "windows"
    conversations: bool = False
    chat_template: Literal["plain", "tokenizer"] = "plain"
    too_long: Literal["cut", "drop"] = "cut"
    tokenizer: str = "bytes"
    end_of_text: str | None = None
    validation_fraction: float = 0.02
    validation_rows: int = 64
    cache: str = "~/.cache/adaptive-transformers"

    def __post_init__(self) -> None:
        check_path(self.path)
        for name in ("seq_len", "validation_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction}: must be between 0 and 1"
            )
        if self.sources and self.path is not None:
            raise ValueError(f"path={self.path}: must be null beside data.sources")
        labels = [source.label for source in self.sources]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"sources: two are called {label}: give them a name each")
        if self.conversations and self.packing != "documents":
            raise ValueError(f"packing={self.packing}: must be documents with data.conversations")

    def each(self) -> list[TextConfig]:
        """The configuration of every source alone."""
        if not self.sources:
            return [self]
        return [
            replace(self, path=one.path, sources=(), text_field=one.text_field or self.text_field)
            for one in self.sources
        ]

    @property
    def names(self) -> list[str]:
        """What the sources are called."""
        if self.sources:
            return [source.label for source in self.sources]
        return ["default" if self.path is None else Path(self.path).name or self.path]


class Source:
    """The encoded text of one path: `train` and `validation`.

    The first process of a node to ask for it encodes it, under a file lock; the others wait and map
    the same files. A cache that is complete was renamed into place, so a killed encoder leaves
    nothing that is taken for one.

    Raises:
        BadInput: no such file, no text in it, or fewer tokens than one row.
    """

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.dropped = 0
        self._identity: list[str] = []  # of all documents, in their order
        self.train, self.validation = self._open()
        self._packed: dict[str, PackedRows] = {}
        if config.packing == "documents":
            for split in SPLITS:
                self._packed[split] = self._rows(split)

    def _open(self) -> tuple[Tokens, Tokens]:
        config = self.config
        given = Path(config.path or "").expanduser()
        if config.path is not None and (given / "meta.json").is_file():
            splits = self._read_folder(given)
            for split, tokens in zip(SPLITS, splits, strict=True):
                file = File(split, given / f"{split}.bin", "ids")
                self._check_once(file, tokens, self._ids_key(file))
            return splits
        utf8 = config.tokenizer != "bytes"
        files = find_files(config.path, conversations=config.conversations, utf8=utf8)
        held = [file for file in files if file.kind == "ids"]
        if held and len(held) < len(files):
            other = next(file for file in files if file.kind != "ids")
            raise BadInput(
                f"data.path={config.path}: {held[0].name} holds token ids and {other.name} does "
                "not: give them as two of data.sources"
            )
        if held:
            return self._held_out(self._read_ids(held))
        chat = Conversations(config.chat_template, self.tokenizer) if config.conversations else None
        wanted = Encoding(
            files, self.tokenizer, config.text_field, chat, config.validation_fraction
        )
        for _ in range(_SHARES):
            folder = _encoded(wanted, config)
            train, validation = self._read_folder(folder)
            share = self._larger_share(train, validation, wanted.held_out)
            if share is None:
                return train, validation
            if share >= 1:
                break
            wanted = replace(wanted, held_out=share, ends=True)
        raise BadInput(
            f"data.path={config.path}: no share of its {len(train.ends):,} documents leaves a row "
            f"of data.seq_len={config.seq_len} to train on and one to validate: give more of them"
        )

    def _needed(self) -> tuple[int, int]:
        """Tokens that training and validation need."""
        if self.config.packing == "documents":
            return 2, 2
        return 2 * self.config.seq_len + 1, self.config.seq_len + 1

    def _larger_share(self, train: Tokens, validation: Tokens, share: float) -> float | None:
        """What to hold out where so far a split has less than a row; None: both have one."""
        needed, total = self._needed(), len(train) + len(validation)
        if len(train) >= needed[0] and len(validation) >= needed[1]:
            return None
        # Half of what is left over goes to each.
        wanted = (needed[1] + (total - sum(needed)) / 2 * 0.1) / max(total, 1)
        if total < sum(needed):
            raise BadInput(
                f"data.path={self.config.path}: {total} tokens in all, must be at least "
                f"{sum(needed)} with data.seq_len={self.config.seq_len}: give more text, or a "
                "smaller data.seq_len"
            )
        return max(wanted, share * 1.25) if len(validation) < needed[1] else share / 2

    def _read_folder(self, folder: Path) -> tuple[Tokens, Tokens]:
        """What `encode_into` wrote."""
        try:
            meta = read_json(folder / "meta.json")
            made = meta["tokenizer"]
            if meta["format"] != FORMAT:
                raise BadInput(f"{folder}: was encoded by another version: encode it anew")
            if made != {
                "fingerprint": self.tokenizer.fingerprint,
                "end": self.tokenizer.needed_end,
            }:
                raise BadInput(
                    f"{folder}: was encoded with another data.tokenizer or data.end_of_text"
                )
            self.dropped, self._identity = int(meta["dropped"]), [meta["key"]]
            splits = []
            for split in SPLITS:
                tokens = read_own(folder / split)
                counts = folder / f"{split}.counts"
                if self.config.conversations != counts.is_file():
                    raise BadInput(
                        f"{folder}: holds {'conversations' if counts.is_file() else 'text'}: "
                        f"data.conversations={str(self.config.conversations).lower()} is for other "
                        "data"
                    )
                if counts.is_file():
                    tokens = replace(tokens, counts=_bytes(counts, len(tokens)))
                if (
                    len(tokens) != meta["tokens"][split]
                    or len(tokens.ends) != (meta["documents"][split])
                ):
                    raise BadInput(f"{folder}: {split}.bin is not whole: encode it anew")
                splits.append(tokens)
        except BadInput:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{folder}: is no encoded text: {error}") from None
        return splits[0], splits[1]

    def _read_ids(self, files: list[File]) -> Tokens:
        """Files of token ids, end to end, each looked through once."""
        if self.config.conversations:
            raise BadInput(
                f"{files[0].path}: holds token ids, which do not tell what is learnt: must be rows "
                "with data.conversations"
            )
        parts = []
        for file in files:
            key = self._ids_key(file)
            checked = self._has_marker(f"ids-{key}")
            if file.path.suffix.lower() == ".bin":
                tokens = read_bin(file.path, checked=checked)
            else:
                tokens = read_npy(file.path, self.tokenizer.needed_end)
            if not len(tokens):
                continue
            self._check_once(file, tokens, key)
            self._identity.append(key)
            parts.append(tokens)
        if not parts:
            raise BadInput(f"data.path={self.config.path}: no text in it")
        begins = np.cumsum([0, *map(len, parts)]).tolist()
        ends = [
            part.ends.part(0, len(part.ends), shift=begin)
            for part, begin in zip(parts, begins, strict=False)
        ]
        return Tokens(JoinedArrays([part.ids for part in parts]), Ends.of(JoinedArrays(ends)))

    def _ids_key(self, file: File) -> str:
        identity = [FORMAT, file.identity, self.tokenizer.vocab_size]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]

    def _check_once(self, file: File, tokens: Tokens, key: str) -> None:
        """Look through the ids of a file that no run with this cache has looked through."""
        if not self._has_marker(f"ids-{key}"):
            check_ids(file.path, tokens, self.tokenizer.vocab_size)
            self._write_marker(f"ids-{key}")

    def _has_marker(self, name: str) -> bool:
        return (Path(self.config.cache).expanduser() / name).is_file()

    def _write_marker(self, name: str) -> None:
        """Note in the cache that something was looked at; where it cannot, it is again."""
        done = Path(self.config.cache).expanduser() / name
        with suppress(OSError):
            make_cache(done.parent)
            done.touch()

    def _held_out(self, tokens: Tokens) -> tuple[Tokens, Tokens]:
        """The last documents are held out: nothing is copied of what may be terabytes."""
        total, needed = len(tokens), self._needed()
        if total < sum(needed):
            self._larger_share(tokens, Tokens(tokens.ids[:0], tokens.ends.part(0, 0)), 1.0)
        held = max(int(total * self.config.validation_fraction), needed[1])
        ends = tokens.ends
        place = bisect_right(ends, total - held)
        cut = ends[place - 1] if place else 0
        if not needed[0] <= cut <= total - needed[1] or total - cut > max(2 * held, needed[1] * 2):
            cut = total - held  # inside a document: there are too few of them
        before = JoinedArrays([ends.part(0, bisect_left(ends, cut)), np.array([cut])])
        behind = ends.part(bisect_right(ends, cut), len(ends), shift=-cut)
        return (
            Tokens(PartOfArray(tokens.ids, 0, cut), Ends.of(before)),
            Tokens(PartOfArray(tokens.ids, cut, total), behind),
        )

    def _rows(self, split: str) -> PackedRows:
        """The packed rows of a split, made by the first process to ask for them."""
        tokens, config = getattr(self, split), self.config
        long = config.too_long if config.conversations else "split"
        identity = [FORMAT, split, config.seq_len, long, len(tokens), self._identity]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
        folder = Path(config.cache).expanduser() / f"rows-{key}"
        if folder.is_dir():
            return load_rows(folder)
        try:
            with cache_lock(folder):
                if not folder.is_dir():
                    save_rows(packed_rows(tokens, config.seq_len, long=long), folder)
        except OSError:  # a cache that cannot be written: everybody packs
            return packed_rows(tokens, config.seq_len, long=long)
        return load_rows(folder)

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        if self._packed:
            return len(self._packed["train"])
        # Every epoch has as many windows, so that the epoch of a row is a division.
        return (len(self.train) - 1) // self.config.seq_len - 1

    def train_row(self, seed: int, row: int) -> np.ndarray:
        """int64 [S + 1]: row `row` of the stream of windows; its last token is only a target.

        An epoch visits every window of the corpus once, in an order of its own; windows of
        different epochs start at different offsets.
        """
        span = self.config.seq_len
        windows = max((len(self.train) - 1) // span - 1, 1)
        epoch, index = divmod(row, windows)
        random = row_generator(seed, epoch, stream=1)
        shift = int(random.integers(span))
        start = shift + span * permuted(index, windows, int(random.integers(2**63)))
        return self.train.ids[start : start + span + 1].astype(np.int64)

    def packed_place(self, seed: int, row: int) -> int:
        """Which of the packed rows is row `row` of the stream; every epoch has its own order."""
        epoch, index = divmod(row, self.rows)
        key = int(row_generator(seed, epoch, stream=1).integers(2**63))
        return permuted(index, self.rows, key)

    def packed_tokens(self, place: int) -> int:
        """Tokens of a packed training row that are no padding."""
        return self._packed["train"].tokens(place)

    def packed_targets(self, place: int) -> int:
        """Targets of a packed training row that are learnt."""
        return self._packed["train"].targets(place, self.train)

    def packed_row(self, split: str, place: int) -> Row:
        tokens, packed = getattr(self, split), self._packed[split]
        return packed.row(place, tokens, span=self.config.seq_len, end=self.tokenizer.needed_end)

    def validation_row(self, row: int) -> np.ndarray:
        """int64 [S + 1]: row `row` of the fixed held-out windows."""
        last = len(self.validation) - 1 - self.config.seq_len
        start = row * max(last, 0) // max(self.validation_windows - 1, 1)
        return self.validation.ids[start : start + self.config.seq_len + 1].astype(np.int64)

    @property
    def validation_windows(self) -> int:
        """Rows asked for, or as many as the held-out part has without overlap."""
        fit = (len(self.validation) - 1) // self.config.seq_len
        return min(self.config.validation_rows, fit)

    @property
    def held_out_rows(self) -> int:
        if self._packed:
            return min(self.config.validation_rows, len(self._packed["validation"]))
        return self.validation_windows

    def held_out_row(self, row: int) -> np.ndarray | Row:
        """Row `row` of the fixed held-out set, as training packs rows."""
        if not self._packed:
            return self.validation_row(row)
        return self.packed_row(
            "validation", row * len(self._packed["validation"]) // self.held_out_rows
        )

    def describe(self) -> str:
        """What there is to learn from and what is held out, in one line."""
        total = len(self.train) + len(self.validation)
        said = (
            f"{len(self.train):,} tokens to train on ({self.rows:,} rows an epoch), "
            f"{len(self.validation):,} held out ({len(self.validation) / total:.1%})"
        )
        if self._packed:
            packed = self._packed["train"]
            said += f", {packed.padding(self.config.seq_len):.2%} padding"
            if packed.cut:
                said += f", {packed.cut:,} documents longer than a row cut"
            dropped = packed.dropped + self.dropped
            if dropped:
                said += f", {dropped:,} dropped"
        return said


class Corpus:
    """The encoded text of a TextConfig: its sources, and the order of their rows.

    Raises:
        BadInput: what a Source raises.
    """

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.tokenizer = Tokenizer(config.tokenizer, config.end_of_text)
        self.vocab_size = self.tokenizer.vocab_size
        self.sources = [Source(one, self.tokenizer) for one in config.each()]
        for name, source in zip(config.names, self.sources, strict=True):
            if not source.rows or not source.held_out_rows:
                raise BadInput(f"data.path={source.config.path}: no row of {name} is left to learn")
        self.train, self.validation = self.sources[0].train.ids, self.sources[0].validation.ids

    def mixture(self) -> Mixture:
        """The order of the sources' rows, from the first on."""
        weights = [source.weight for source in self.config.sources] or [1.0]
        return Mixture(dict(zip(self.config.names, weights, strict=True)))

    def train_row(self, seed: int, row: int) -> np.ndarray:
        """int64 [S + 1]: row `row` of the stream of windows of the first source."""
        return self.sources[0].train_row(seed, row)

    def validation_row(self, row: int) -> np.ndarray:
        """int64 [S + 1]: row `row` of the fixed held-out windows of the first source."""
        return self.sources[0].validation_row(row)

    @property
    def validation_rows(self) -> int:
        return max(self.sources[0].validation_windows, 1)

    @property
    def held_out_rows(self) -> int:
        """Rows of the held-out sets of all sources."""
        return sum(source.held_out_rows for source in self.sources)

    def held_out_row(self, row: int) -> tuple[int, np.ndarray | Row]:
        """(number of its source, row): the sources one after the other."""
        for number, source in enumerate(self.sources):
            if row < source.held_out_rows:
                return number, source.held_out_row(row)
            row -= source.held_out_rows
        raise IndexError(row)

    def describe(self) -> list[str]:
        """A line on each source."""
        return [
            f"{name}: {source.describe()}"
            for name, source in zip(self.config.names, self.sources, strict=True)
        ]


@functools.cache
def open_corpus(config: TextConfig) -> Corpus:
    """The corpus, opened once a process: looking for thousands of files takes a second."""
    with announced(f"reading data.path={config.path}"):
        return Corpus(config)


def permuted(index: int, size: int, key: int) -> int:
    """Where `index` goes in a pseudo-random permutation of `range(size)` that `key` names.

    A four-round Feistel network over the next even power of two, walked until it lands inside.
    """
    half = max(((size - 1).bit_length() + 1) // 2, 1)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            mixed = (right * 0x9E3779B97F4A7C15 + key + turn * 0xD1B54A32D192ED03) % 2**64
            mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) % 2**64
            left, right = right, left ^ ((mixed >> 32) & mask)
        index = left << half | right
        if index < size:
            return index


def make_cache(folder: Path) -> None:
    """A folder of caches, marked as such: it is no text of anybody's.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tag = folder / CACHE_TAG
    if not tag.is_file():
        tag.write_text("Signature: 8a477f597d28d172789f06886806bc55\n", encoding="utf-8")


@contextmanager
def cache_lock(folder: Path) -> Iterator[None]:
    """One process at a time makes that folder of a cache.

    Raises:
        OSError: the cache cannot be written.
    """
    make_cache(folder.parent)
    name = folder.with_name(f"{folder.name}.lock")
    # Locking needs no writing, which another user's file does not allow; nor may it be "created"
    # where it lies in a folder like /tmp.
    try:
        lock = os.open(name, os.O_RDONLY)
    except FileNotFoundError:
        lock = os.open(name, os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _encoded(wanted: Encoding, config: TextConfig) -> Path:
    """The folder that holds the encoded corpus, made now if it is not there."""
    folder = Path(config.cache).expanduser() / f"text-{wanted.key}"
    if folder.is_dir():
        return folder
    try:
        with cache_lock(folder):
            if not folder.is_dir():
                encode_into(wanted, folder)
    except OSError as error:
        raise BadInput(f"data.cache={config.cache}: {error.strerror}") from None
    return folder


def _bytes(file: Path, length: int) -> np.ndarray:
    if not length:
        return np.zeros(0, np.uint8)
    return np.memmap(file, dtype=np.uint8, mode="r", shape=(length,))
