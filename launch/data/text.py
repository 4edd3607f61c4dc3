"""A corpus of text as tokens in one memory-mapped file, split into training and held-out parts.

Shape legend: B rows, S tokens of a row.
"""

from __future__ import annotations

import fcntl
import functools
import glob
import hashlib
import itertools
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from launch.run.errors import BadInput
from launch.tasks import row_generator

_SPLITS = ("train", "validation")
_FORMAT = 3
_FEW = 20  # fewer documents than this are held out in part, not as a whole


@dataclass(frozen=True)
class TextConfig:
    """Text to learn from.

    Attributes:
        path: a text file, a .jsonl file (field `text` of each line), a folder, or a glob of them;
            null: the sources of Python's own standard library.
        seq_len: tokens of a row.
        tokenizer: "bytes" (vocabulary 256), or a folder or file that holds a `tokenizer.json`.
        validation_fraction: share of documents that is held out, chosen by a hash of their name.
        validation_rows: rows of the fixed held-out set, spread evenly over the held-out part.
        cache: folder of encoded corpora.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    path: str | None = None
    seq_len: int = 256
    tokenizer: str = "bytes"
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


class Corpus:
    """The encoded text of a TextConfig: `train` and `validation`, memory-mapped token arrays.

    The first process of a node to ask for a corpus encodes it, under a file lock; the others wait
    and map the same file. A cache that is complete was renamed into place, so a killed encoder
    leaves nothing that is taken for one.

    Raises:
        BadInput: no such file, no text in it, or fewer tokens than one row.
    """

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        tokenizer = Tokenizer(config.tokenizer)
        self.vocab_size = tokenizer.vocab_size
        files = _files(config.path)
        folder = _encoded(config, files, tokenizer)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype = np.dtype(meta["dtype"])
        self.train, self.validation = (
            np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r") for split in _SPLITS
        )

    def train_row(self, seed: int, row: int) -> np.ndarray:
        """int64 [seq_len + 1]: row `row` of the stream; its last token is only a target.

        An epoch visits every window of the corpus once, in an order of its own; windows of
        different epochs start at different offsets.
        """
        span = self.config.seq_len
        # Every epoch has as many windows, so that the epoch of a row is a division.
        windows = (len(self.train) - 1) // span - 1
        epoch, index = divmod(row, windows)
        random = row_generator(seed, epoch, stream=1)
        shift = int(random.integers(span))
        start = shift + span * permuted(index, windows, int(random.integers(2**63)))
        return self.train[start : start + span + 1].astype(np.int64)

    def validation_row(self, row: int) -> np.ndarray:
        """int64 [seq_len + 1]: row `row` of the fixed held-out set."""
        last = len(self.validation) - 1 - self.config.seq_len
        start = row * last // max(self.validation_rows - 1, 1)
        return self.validation[start : start + self.config.seq_len + 1].astype(np.int64)

    @property
    def validation_rows(self) -> int:
        """Rows asked for, or as many as the held-out part has without overlap."""
        fit = (len(self.validation) - 1) // self.config.seq_len
        return min(self.config.validation_rows, fit)


@functools.cache
def open_corpus(config: TextConfig) -> Corpus:
    """The corpus, opened once a process: looking for thousands of files takes a second."""
    return Corpus(config)


class Tokenizer:
    """Text to token ids: bytes, or a `tokenizer.json` of the tokenizers library."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._inner = None
        self.vocab_size, self.fingerprint = 256, "bytes"
        if name == "bytes":
            return
        path = Path(name).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise BadInput(f"data.tokenizer={name}: must be bytes or a tokenizer.json")
        try:
            import tokenizers
        except ImportError:
            raise BadInput(f"data.tokenizer={name}: needs the package tokenizers") from None
        try:
            self._inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise BadInput(f"data.tokenizer={name}: {error}") from None
        # A tokenizer.json may keep the length that a model was once trained with: documents would
        # be cut to it, or padded.
        self._inner.no_truncation()
        self._inner.no_padding()
        # Not the number of entries: a vocabulary may have holes.
        self.vocab_size = max(self._inner.get_vocab().values(), default=-1) + 1
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        if self.vocab_size <= 2**8:
            return np.uint8
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: bytes) -> np.ndarray:
        if self._inner is None:
            return np.frombuffer(text, dtype=np.uint8)
        return np.asarray(self._inner.encode(text.decode("utf-8", "replace")).ids, self.dtype)

    def encode_prompt(self, text: bytes) -> list[int]:
        """Tokens of a text to go on from: without those that the tokenizer puts behind a text."""
        if self._inner is None:
            return list(text)
        ids = self._inner.encode(text.decode("utf-8", "replace")).ids
        # Counted behind some text: of an empty one nothing tells what begins from what ends it.
        added = self._inner.encode("a").special_tokens_mask
        behind = len(list(itertools.takewhile(bool, reversed(added))))
        return ids[: len(ids) - behind]

    def decode(self, ids: list[int]) -> str:
        if self._inner is None:
            return bytes(ids).decode("utf-8", "replace")
        return self._inner.decode(ids)


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


def check_path(path: str | None) -> None:
    """Refuse a path of no characters, which is what an unset shell variable leaves.

    Raises:
        ValueError: one line, without the section.
    """
    if path is not None and not path.strip():
        raise ValueError(f"path={path!r}: must name a file or folder, or be null for the default")


def _files(path: str | None) -> list[tuple[str, Path]]:
    """(name, file) of every file of text, sorted by name."""
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "__pycache__"}
        found = [(p.relative_to(root), p) for p in root.rglob("*.py") if p.is_file()]
        return sorted((r.as_posix(), p) for r, p in found if not skip & set(r.parts))
    pattern = os.path.expanduser(path)
    if Path(pattern).is_dir():
        root, pattern = Path(pattern), os.path.join(glob.escape(pattern), "**", "*")
    else:
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts[:-1])
        root = Path(*fixed)
    files = [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
    if not files:
        raise BadInput(f"data.path={path}: no such file")
    # Names decide what is held out: the same wherever the folder lies.
    return sorted((p.relative_to(root).as_posix(), p) for p in files)


def _documents(files: list[tuple[str, Path]]) -> Iterator[tuple[str, bytes]]:
    """(name, text) of every document that is not empty, one in memory at a time."""
    for name, file in files:
        try:
            if file.suffix == ".jsonl":
                with open(file, "rb") as lines:
                    yield from _lines(name, file, lines)
            else:
                content = file.read_bytes()
                if content:
                    yield name, content
        except OSError as error:
            raise BadInput(f"data.path={file}: {error.strerror}") from None


def _lines(name: str, file: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise BadInput(f"{file}:{number}: must be a JSON object with a string `text`")
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            # To replace it would train on something else than the file says.
            half = ascii(text[error.start])[1:-1]
            raise BadInput(
                f"{file}:{number}: `text` holds {half}, half of a surrogate pair: must be Unicode"
            ) from None
        if encoded:
            yield f"{name}:{number}", encoded


def _encoded(config: TextConfig, files: list[tuple[str, Path]], tokenizer: Tokenizer) -> Path:
    """The folder that holds the encoded corpus, made now if it is not there."""
    stats = [(name, str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for name, p in files]
    identity = [_FORMAT, stats, tokenizer.fingerprint, config.validation_fraction]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    root = Path(config.cache).expanduser()
    folder = root / f"text-{key}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / f"text-{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                building = Path(tempfile.mkdtemp(dir=root, prefix="building-"))
                try:
                    _encode(config, files, tokenizer, building)
                    building.rename(folder)
                finally:
                    shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise BadInput(f"data.cache={config.cache}: {error.strerror}") from None
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    for split, rows in (("train", 2), ("validation", 1)):
        needed = rows * config.seq_len + 1
        if meta[split] < needed:
            raise BadInput(
                f"data.path={config.path}: {meta[split]} {split} tokens, "
                f"must be at least {needed} with data.seq_len={config.seq_len}"
            )
    return folder


def _encode(
    config: TextConfig, files: list[tuple[str, Path]], tokenizer: Tokenizer, folder: Path
) -> None:
    documents = _documents(files)
    first = list(itertools.islice(documents, _FEW))
    if not first:
        raise BadInput(f"data.path={config.path}: no text in it")
    share = config.validation_fraction
    counts = dict.fromkeys(_SPLITS, 0)
    with ExitStack() as stack:
        outs = {
            split: stack.enter_context(open(folder / f"{split}.bin", "wb")) for split in _SPLITS
        }
        for name, text in itertools.chain(first, documents):
            if tokenizer.name != "bytes":
                _check_unicode(name, text)
            if len(first) < _FEW:
                # Too few to hold any out: hold out the end of each.
                cut = _character_start(text, int(len(text) * (1 - share)))
                parts = {"train": text[:cut], "validation": text[cut:]}
            else:
                parts = {"validation" if _unit_hash(name) < share else "train": text}
            for split, part in parts.items():
                # A NUL ends each document; it occurs in no text.
                ids = tokenizer.encode(part + b"\0").astype(tokenizer.dtype)
                outs[split].write(ids.tobytes())
                counts[split] += len(ids)
        for out in outs.values():
            out.flush()
            os.fsync(out.fileno())
    meta = {"dtype": np.dtype(tokenizer.dtype).name, **counts}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _check_unicode(name: str, text: bytes) -> None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        # To replace it would train on something else than the file says.
        raise BadInput(
            f"{name}: byte {error.start} is {text[error.start]:#04x}, no UTF-8: convert it, "
            "or take data.tokenizer=bytes"
        ) from None


def _character_start(text: bytes, place: int) -> int:
    """`place`, or where the UTF-8 character begins whose bytes it would cut apart."""
    for start in range(place, max(place - 4, 0), -1):
        if text[start] & 0xC0 != 0x80:  # no continuation byte
            return start
    return place


def _unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64
