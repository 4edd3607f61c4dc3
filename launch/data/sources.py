"""Where documents come from: the files below a path, and the rows in each of them.

What a file is, its name says: rows of .jsonl, .parquet and saved Hugging Face datasets, token ids
in .bin with .idx and in .npy, and text otherwise. What is none of them is refused, not read as
text.
"""

from __future__ import annotations

import ast
import fnmatch
import glob
import gzip
import io
import itertools
import json
import os
import stat
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from pydantic_core import from_json

from launch.run.errors import BadInput

CACHE_TAG = "CACHEDIR.TAG"
"""Marks a folder of caches, for backup programs too (bford.info/cachedir)."""

PIECE = 1 << 19
"""Bytes of a long text that are read and encoded together; several are on several cores."""
_LINE = 1 << 28  # bytes of a row
_OPENED = {".gz": "gzip", ".zst": "zstandard"}
_REFUSED = {
    ".json": "one JSON document: write one object a line into a .jsonl",
    ".arrow": "part of a dataset: name the folder that datasets.save_to_disk wrote",
    ".tar": "an archive: unpack it",
    ".tgz": "an archive: unpack it",
    ".zip": "an archive: unpack it",
    ".bz2": "compressed: unpack it, or use .gz or .zst",
    ".xz": "compressed: unpack it, or use .gz or .zst",
    ".pt": "a file of torch: write its text into a .jsonl",
    ".npz": "an archive: save token ids as .npy",
}


class File(NamedTuple):
    """A file of documents, or a folder that is one dataset.

    Attributes:
        name: its place below the path, which decides what is held out.
        path: where it lies.
        kind: "text", "rows" (.jsonl), "parquet", "dataset", "ids" (.bin or .npy), "functions" (of
            a Python file, as conversations).
    """

    name: str
    path: Path
    kind: str

    @property
    def identity(self) -> list[Any]:
        """What changes when the file does."""
        parts = sorted(self.path.glob("*")) if self.kind == "dataset" else [self.path]
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in parts]
        if self.kind != "dataset":
            return [self.name, str(self.path.absolute()), *stats[0][1:]]
        return [self.name, str(self.path.absolute()), stats]

    @property
    def bytes(self) -> int:
        """Its size on the disk."""
        parts = self.path.glob("*") if self.kind == "dataset" else [self.path]
        return sum(part.stat().st_size for part in parts)


class Row(NamedTuple):
    """Something that a file holds.

    Attributes:
        number: its number in the file, from 1; of text, that of the piece.
        value: bytes of text, or the columns of the row.
        first, last: of text, whether it begins and ends the document.
    """

    number: int
    value: Any
    first: bool = True
    last: bool = True


def check_path(path: str | None) -> None:
    """Refuse a path of no characters, which is what an unset shell variable leaves.

    Raises:
        ValueError: one line, without the section.
    """
    if path is not None and not path.strip():
        raise ValueError(f"path={path!r}: must name a file or folder, or be null for the default")


def files_below(folder: Path, *, keep_ways: bool = False) -> list[Path]:
    """Every file below a folder, each once, links followed; datasets are one entry each.

    Left out are hidden files and folders, and what these programs wrote: runs, caches. Of several
    ways to a file the one without a link is kept, else the first by name.

    Args:
        folder: where to look.
        keep_ways: give a file in each of the folders directly below that lead to it.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    # Folders that are links come last: what they lead to may lie below the folder itself.
    waiting = [folder]
    while waiting:
        here = waiting.pop(0)
        try:
            status = here.stat()
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise BadInput(f"data.path={here}: {error.strerror}") from None
        if (status.st_dev, status.st_ino) in seen or (here != folder and is_own_folder(here)):
            continue
        seen.add((status.st_dev, status.st_ino))
        if _is_dataset(here):
            found.append(here)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link that leads to itself is one that leads nowhere
                continue
            if is_folder:
                place = len(waiting) if entry.is_symlink() else 0
                waiting.insert(place, Path(entry.path))
            elif is_file:
                found.append(Path(entry.path))
    if not keep_ways:
        return each_once(found)
    groups: dict[str, list[Path]] = {}
    for file in found:
        groups.setdefault(file.relative_to(folder).parts[0], []).append(file)
    return sorted(file for group in groups.values() for file in each_once(group))


def each_once(files: list[Path]) -> list[Path]:
    """Files without those that are links, of either kind, to others of them; sorted."""
    ways: dict[tuple[int, int], Path] = {}
    for file in sorted(files, key=lambda file: (file.is_symlink(), _by_link(file), file)):
        status = file.stat()
        ways.setdefault((status.st_dev, status.st_ino), file)
    return sorted(ways.values())


def is_own_folder(folder: Path) -> bool:
    """Whether programs wrote a folder for themselves: a run's, or a cache."""
    if (folder / CACHE_TAG).is_file():
        return True
    return (folder / "run.yaml").is_file() and any(
        (folder / name).exists()
        for name in ("checkpoints", "metrics.jsonl", "origin.json", ".lock")
    )


def find_files(path: str | None, *, conversations: bool = False, utf8: bool = False) -> list[File]:
    """The files of `data.path`, sorted by name; of the default, as texts or as conversations.

    Args:
        path: see TextConfig.
        conversations: of the default: functions.
        utf8: leave out what of the default is in other encodings, which a tokenizer cannot take.

    Raises:
        BadInput: there is none, or one that holds no text.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "__pycache__"}
        sources = [(p.relative_to(root), p) for p in root.rglob("*.py") if p.is_file()]
        names = sorted((r.as_posix(), p) for r, p in sources if not skip & set(r.parts))
        if conversations:  # its modules: packages are large, and mostly tests
            return [File(name, p, "functions") for name, p in names if "/" not in name]
        return [File(name, p, "text") for name, p in names if not utf8 or _is_utf8(p)]
    pattern = os.path.expanduser(path)
    try:
        is_folder = Path(pattern).is_dir()
    except OSError as error:
        raise BadInput(f"data.path={path}: {error.strerror}") from None
    if is_folder:
        root = Path(pattern)
        if root.resolve() == Path(root.resolve().anchor):
            raise BadInput(f"data.path={path}: must be a folder of text, not a whole file system")
        found = [root] if _is_dataset(root) else files_below(root)
    else:
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts[:-1])
        root = Path(*fixed)
        if "**" in Path(pattern).parts and root.is_dir():
            # Not by `glob`, which follows links round and round.
            wanted = Path(pattern).relative_to(root).parts
            found = [p for p in files_below(root) if _fits(p.relative_to(root).parts, wanted)]
        else:
            found = [Path(p) for p in glob.glob(pattern)]
            found = found or [Path(f"{pattern}.bin")]  # Megatron names its datasets so
            found = [p for p in found if p.is_file() or _is_dataset(p)]
            found = each_once([p for p in found if not _below_own_folder(p, root)])
    if not found:
        raise BadInput(f"data.path={path}: no such file")
    # Names decide what is held out: the same wherever the folder lies.
    files = [File(p.relative_to(root).as_posix(), p, _kind(p)) for p in found]
    if all(file.kind == "index" for file in files):
        raise BadInput(f"{files[0].path}: is the index of a .bin: name that")
    return sorted(file for file in files if file.kind != "index")


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _fits(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether a path is one that a pattern means; `**` is any number of folders."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return not wanted[1:] or any(_fits(parts[n:], wanted[1:]) for n in range(len(parts)))
    fits = bool(parts) and fnmatch.fnmatch(parts[0], wanted[0])
    return fits and _fits(parts[1:], wanted[1:])


def _below_own_folder(file: Path, root: Path) -> bool:
    above = itertools.takewhile(lambda folder: folder != root, file.parents)
    return any(is_own_folder(folder) for folder in above)


def _by_link(file: Path) -> bool:
    """Whether a folder above is a link."""
    return Path(os.path.realpath(file.parent)) != file.parent.absolute()


def _is_dataset(path: Path) -> bool:
    names = ("dataset_info.json", "state.json"), ("dataset_dict.json",)
    return path.is_dir() and any(all((path / n).is_file() for n in group) for group in names)


def _kind(file: Path) -> str:
    if file.is_dir():
        return "dataset"
    suffixes = [suffix.lower() for suffix in file.suffixes]
    last = suffixes[-1] if suffixes else ""
    inner = suffixes[-2] if last in _OPENED and len(suffixes) > 1 else last
    if inner in (".jsonl", ".ndjson") or (inner == ".json" and _is_rows(file)):
        return "rows"
    if last in (".parquet", ".pq"):
        return "parquet"
    if last in (".bin", ".npy"):
        return "ids"
    if last == ".idx":
        return "index"
    for suffix in (inner, last):
        if suffix in _REFUSED:
            raise BadInput(f"{file}: is {_REFUSED[suffix]}")
    return "text"


def _is_rows(file: Path) -> bool:
    """Whether the first line of a .json is an object by itself, as programs write them too."""
    with _opened(file) as stream:
        first = stream.readline(1 << 26)
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def read_rows(file: File, *, columns: list[str], start: int = 0) -> Iterator[Row]:
    """The rows of a file, without the first `start`; constant memory.

    Args:
        file: any but of kind "ids".
        columns: to read, where a file has columns; those that it lacks are left out.
        start: rows to leave out.

    Raises:
        BadInput: names the file, and the row where there are rows.
    """
    try:
        if file.kind == "rows":
            rows = _json_rows(file.path, start)
        elif file.kind == "parquet":
            rows = _parquet_rows(file.path, columns, start)
        elif file.kind == "dataset":
            rows = _dataset_rows(file.path, columns, start)
        elif file.kind == "functions":
            rows = itertools.islice(_functions(file.path), start, None)
        else:
            rows = itertools.islice(_text_pieces(file.path), start, None)
        yield from rows
    except OSError as error:
        said = error.strerror or str(error).splitlines()[0]
        raise BadInput(f"data.path={file.path}: {said}") from None


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed where its name says so."""
    suffix = file.suffix.lower()
    try:
        if suffix == ".gz":
            with gzip.open(file, "rb") as stream:
                yield stream  # type: ignore[misc]
        elif suffix == ".zst":
            with open(file, "rb") as source:
                yield io.BufferedReader(_ZstdFrames(source, _needed("zstandard", file)))
        else:
            with open(file, "rb", buffering=1 << 20) as stream:
                yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"{file}: is no intact {suffix}: {error}") from None
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise BadInput(f"{file}: is no intact {suffix}: {error}") from None
        raise


class _ZstdFrames(io.RawIOBase):
    """Decompressed frames, one after the other; unlike zstandard's own, refuses half a frame."""

    def __init__(self, source: IO[bytes], zstandard: Any) -> None:
        # As `zstd --long=31` asks for, which large dumps are written with.
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._source, self._start = source, decompressor.decompressobj
        self._frame, self._held = None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            if self._frame is not None and self._frame.eof:
                rest, self._frame = self._frame.unused_data, None
            else:
                rest = b""
            read = rest or self._source.read(1 << 16)
            if not read:
                if self._frame is not None:
                    raise EOFError("cut short")
                return 0
            self._frame = self._frame or self._start()
            self._held = self._frame.decompress(read)
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count


def _needed(package: str, file: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise BadInput(
            f"{file}: needs the package {package}: pip install 'adaptive-transformers[data]'"
        ) from None


def _text_pieces(file: Path) -> Iterator[Row]:
    """A document in pieces that end at a line, or at least at a whole character."""
    with _opened(file) as stream:
        if stat.S_ISREG(file.stat().st_mode) and not file.stat().st_size:
            return
        held, number, passed = b"", 0, 0
        while True:
            read = stream.read(PIECE)
            nul = read.find(b"\0")
            if nul >= 0:
                raise BadInput(
                    f"{file}: byte {passed + nul} is a NUL, so it is no text; "
                    "take it out of data.path, or convert it to .jsonl"
                )
            passed += len(read)
            if not read:
                break
            held += read
            # Something is held back, so that the last piece is known for the last.
            if len(held) >= PIECE:
                cut = _place_to_cut(held)
                number += 1
                yield Row(number, held[:cut], number == 1, False)
                held = held[cut:]
        if held or number:
            yield Row(number + 1, held, number == 0, True)


def cut_text(text: bytes) -> Iterator[tuple[bytes, bool, bool]]:
    """(piece, whether it is the first, whether the last) of a text, cut as files of text are."""
    start = 0
    while len(text) - start > PIECE:
        stop = start + _place_to_cut(text[start : start + PIECE])
        yield text[start:stop], start == 0, False
        start = stop
    yield text[start:], start == 0, True


def _place_to_cut(text: bytes) -> int:
    """Behind a line or else before a blank, in the second half; or at least between characters."""
    half, last = len(text) // 2, len(text) - 1
    line = text.rfind(b"\n", half, last)
    if line >= 0:
        return line + 1
    blank = text.rfind(b" ", half, last)
    return blank if blank > 0 else max(character_start(text, last), 1)


def character_start(text: bytes, place: int) -> int:
    """`place`, or where the UTF-8 character begins whose bytes it would cut apart."""
    for start in range(place, max(place - 4, 0), -1):
        if text[start] & 0xC0 != 0x80:  # no continuation byte
            return start
    return place


def _functions(file: Path) -> Iterator[Row]:
    """What functions say of themselves, and how they are written: prompt and response."""
    try:
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return  # the standard library holds files that are to be wrong
    number, lines = 0, source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            said = ast.get_docstring(node)
            text = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
            if said and "\0" not in text + said:
                number += 1
                yield Row(number, {"prompt": said.splitlines()[0], "response": text})


def _json_rows(file: Path, start: int) -> Iterator[Row]:
    with _opened(file) as lines:
        for number, line in enumerate(iter(lambda: lines.readline(_LINE), b""), start=1):
            if len(line) == _LINE:
                raise BadInput(f"{file}:{number}: has {_LINE:,} bytes or more, must have less")
            if number <= start or line.isspace():
                continue
            value = _parsed(line)
            if not isinstance(value, dict):
                raise BadInput(f"{file}:{number}: must be a JSON object")
            yield Row(number, value)


def _parsed(line: bytes) -> Any:
    """What `json.loads` makes of a line, None where it refuses it."""
    try:
        return from_json(line)  # twice as fast, and refuses more
    except ValueError:
        pass
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _parquet_rows(file: Path, columns: list[str], start: int) -> Iterator[Row]:
    parquet = _needed("pyarrow.parquet", file)
    arrow = _needed("pyarrow", file)
    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            there = [name for name in columns if name in opened.schema_arrow.names]
            _check_columns(file, columns, there, opened.schema_arrow.names)
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                if number + rows <= start:
                    number += rows
                    continue
                for batch in opened.iter_batches(1024, row_groups=[group], columns=there):
                    for value in batch.to_pylist():
                        number += 1
                        if number > start:
                            yield Row(number, value)
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        where = f"{file}, behind row {number}" if number else str(file)
        raise BadInput(
            f"{where}: is no intact parquet file: {str(error).splitlines()[0]}"
        ) from None


def _dataset_rows(folder: Path, columns: list[str], start: int) -> Iterator[Row]:
    datasets = _needed("datasets", folder)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise BadInput(f"{folder}: is no whole dataset: {str(error).splitlines()[0]}") from None
    if isinstance(loaded, dict):
        names = ", ".join(loaded)
        raise BadInput(
            f"{folder}: holds the splits {names}: name one, {folder / next(iter(loaded))}"
        )
    there = [name for name in columns if name in loaded.column_names]
    _check_columns(folder, columns, there, loaded.column_names)
    loaded = loaded.select_columns(there)
    for first in range(start, len(loaded), 1024):
        batch = loaded[first : first + 1024]
        for offset in range(len(next(iter(batch.values())))):
            yield Row(first + offset + 1, {name: batch[name][offset] for name in there})


def _check_columns(file: Path, asked: list[str], there: list[str], names: list[str]) -> None:
    if not there:
        raise BadInput(
            f"{file}: has no column {' or '.join(asked)}: must be one of {', '.join(names)}; "
            "name it by data.text_field"
        )
