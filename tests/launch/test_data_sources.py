"""Which files are read, each once, as what they are; what is no text is refused in one line."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.data import sources
from launch.data.images import ImageConfig, ImageData
from launch.data.text import Corpus, TextConfig
from launch.data.tokenizer import Tokenizer
from launch.run.errors import BadInput


def corpus(path: Path, cache: Path, **options: Any) -> Corpus:
    settings = {"seq_len": 8, "validation_fraction": 0.1, **options}
    return Corpus(TextConfig(path=str(path), cache=str(cache), **settings))


def documents(data: Corpus) -> tuple[list[bytes], list[bytes]]:
    train, held_out = (
        [bytes(d) for d in bytes(ids).split(b"\0") if d] for ids in (data.train, data.validation)
    )
    return train, held_out


def write_rows(file: Path, count: int = 400, start: int = 0) -> None:
    rows = [{"text": f"<{n:04d}> number {n} of some lines"} for n in range(start, start + count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("link", ["folder", "file", "loop", "hard", "pattern"])
def test_a_document_that_two_paths_lead_to_is_one(tmp_path: Path, link: str) -> None:
    top, cache = tmp_path / "top", tmp_path / "cache"
    (top / "v2").mkdir(parents=True)
    write_rows(top / "v2" / "a.jsonl")
    before = documents(corpus(top, cache))
    assert (len(before[0]), len(before[1])) == (360, 40)
    if link == "folder":
        (top / "latest").symlink_to("v2")
    elif link == "loop":
        (top / "v2" / "again").symlink_to("..")
    elif link == "hard":
        os.link(top / "v2" / "a.jsonl", top / "v2" / "b.jsonl")
    else:
        (top / "v2" / "b.jsonl").symlink_to("a.jsonl")
    path = top / "v2" / "*.jsonl" if link == "pattern" else top
    after = documents(corpus(path, cache))
    assert len(set(after[0])) == len(after[0])
    assert not set(after[0]) & set(after[1])
    assert len(after[0]) + len(after[1]) == 400
    if link != "pattern":
        assert after == before


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    write_rows(tmp_path / "elsewhere.jsonl", 200)
    (tmp_path / "deep").mkdir()
    write_rows(tmp_path / "deep" / "more.jsonl", 200, start=200)
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "one.jsonl").symlink_to("../elsewhere.jsonl")
    (tmp_path / "top" / "other").symlink_to("../deep")
    assert sum(map(len, documents(corpus(tmp_path / "top", tmp_path / "cache")))) == 400


def test_what_these_programs_wrote_below_the_path_is_no_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl")
    first = corpus(tmp_path, tmp_path / "cache")
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    for name in ("run.yaml", "metrics.jsonl", "checkpoints/README.md"):
        (tmp_path / "runs" / "a" / name).write_text("written by a run")
    for path in (tmp_path, tmp_path, tmp_path / "**"):
        again = corpus(path, tmp_path / "cache")
        assert np.array_equal(again.train, first.train)


def test_pictures_behind_links_have_their_classes(tmp_path: Path) -> None:
    from PIL import Image

    from adaptive.models import DiffusionConfig

    for name in ("cat", "dog"):
        (tmp_path / "all" / name).mkdir(parents=True)
        for number in range(3):
            picture = Image.new("L", (8, 8), number)
            picture.save(tmp_path / "all" / name / f"{number}.png")
    (tmp_path / "sub").mkdir()
    shutil.copytree(tmp_path / "all" / "cat", tmp_path / "sub" / "cat")
    (tmp_path / "sub" / "dog").symlink_to(tmp_path / "all" / "dog")
    model = DiffusionConfig(image_size=8, channels=1, num_classes=2)
    data = ImageData(ImageConfig(path=str(tmp_path / "sub")), model)
    assert data.source.classes == ["cat", "dog"]
    (tmp_path / "sub" / "cat" / "9.png").symlink_to(tmp_path / "all" / "dog" / "0.png")
    with pytest.raises(BadInput, match=r"is in the classes cat and dog"):
        ImageData(ImageConfig(path=str(tmp_path / "sub")), model)


def test_rows_are_read_from_every_format_alike(tmp_path: Path) -> None:
    """jsonl, also compressed and however it is spelt, parquet, a saved dataset: the same tokens."""
    datasets, parquet = pytest.importorskip("datasets"), pytest.importorskip("pyarrow.parquet")
    zstandard, arrow = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
    rows = [{"body": f"text number {n} é", "id": n} for n in range(300)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.JSONL").write_bytes(text)
    (tmp_path / "c.json").write_bytes(text)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(text, mtime=0))
    # Frames end to end, the second with the window of `zstd --long=31`, uncompressed.
    long = b"\x28\xb5\x2f\xfd\0\xa8" + (len(text[999:]) << 3 | 1).to_bytes(3, "little") + text[999:]
    (tmp_path / "e.jsonl.zst").write_bytes(zstandard.compress(text[:999]) + long)
    (tmp_path / "k.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n \n"))
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "f.parquet", row_group_size=70)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "g")
    tokens = {}
    for file in [*tmp_path.glob("?.*"), tmp_path / "g"]:
        data = corpus(file, tmp_path / "cache", text_field="body")
        train, held_out = documents(data)
        tokens[file.name] = sorted(train + held_out)
    assert len(tokens) == 8
    expected = sorted(row["body"].encode() for row in rows)  # type: ignore[attr-defined]
    for name, found in tokens.items():
        assert found == expected, name
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "h")
    half = zstandard.compress(text) + zstandard.compress(text)[:-5]
    (tmp_path / "i.jsonl.zst").write_bytes(half)
    with pytest.raises(BadInput, match=r"i.jsonl.zst: is no intact .zst: cut short"):
        corpus(tmp_path / "i.jsonl.zst", tmp_path / "cache", text_field="body")
    with pytest.raises(BadInput, match=r"/h: holds the splits train: name one, .*/h/train"):
        corpus(tmp_path / "h", tmp_path / "cache", text_field="body")
    (shard,) = (tmp_path / "g").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-500])
    with pytest.raises(BadInput, match=r"/g: is no whole dataset: [^\n]*$"):
        corpus(tmp_path / "g", tmp_path / "cache", text_field="body")
    damaged = bytearray((tmp_path / "f.parquet").read_bytes())
    group = parquet.ParquetFile(tmp_path / "f.parquet").metadata.row_group(1)
    place = group.column(0).dictionary_page_offset
    damaged[place : place + 9] = b"\xff" * 9
    (tmp_path / "f.parquet").write_bytes(damaged)
    with pytest.raises(BadInput, match=r"f.parquet, behind row 70: is no intact parquet [^\n]*$"):
        corpus(tmp_path / "f.parquet", tmp_path / "cache", text_field="body")


LINES = [
    b'{"text": "a", "text": "b"}',
    b' {"a": [1, -0, 1e400, 1E-7, 0.1, 123456789012345678901234567890], "b": null}\r\n',
    b'{"a": NaN, "b": -Infinity}',
    b'{"a": "\\ud83d\\ude00 \\u0000 \\/ \xf0\x9f\x98\x80"}',
    b'{"a": "\\ud800"}',
    b'{"a": "\xed\xa0\x80"}',
    b'\xef\xbb\xbf{"a": 1}',
    b'{"a": "\xff"}',
    b'{"a": "\t"}',
    b'{"a": 01}',
    b'{"a": +1}',
    b'{"a": .5}',
    b'{"a": 1,}',
    b'{"a": 1} x',
    b"{'a': 1}",
    b"nan",
    b"[" * 9000,
    b'{"a": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_line_is_what_json_says(line: bytes) -> None:
    try:
        expected = json.loads(line)
    except (ValueError, RecursionError):
        expected = None
    assert repr(sources._parsed(line)) == repr(expected)  # a NaN is not equal to itself


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.bin", b"\0\1", r"a.bin: has no a.idx beside it"),
        ("a.idx", b"MMIDIDX", r"a.idx: is the index of a .bin: name that"),
        ("a.json", b'[{"text": "x"}]\n', r"a.json: is one JSON document: write one object a line"),
        ("a.txt", b"some\0text", r"a.txt: byte 4 is a NUL, so it is no text"),
        ("a.zip", b"PK", r"a.zip: is an archive: unpack it"),
        ("a.tar.gz", b"x", r"a.tar.gz: is an archive: unpack it"),
        ("a.jsonl.gz", b"no gzip", r"a.jsonl.gz: is no intact .gz"),
        ("a.jsonl.zst", b"no zstd", r"a.jsonl.zst: is no intact .zst"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}' * 99, mtime=0)[:-9],
            r"a.jsonl.gz: is no intact .gz",
        ),
        ("a.parquet", b"no parquet", r"a.parquet: is no intact parquet file"),
        ("a.npy", b"no array", r"a.npy: is no .npy array"),
        ("a.jsonl", b'{"text": "fine"}\n[1]\n', r"a.jsonl:2: must be a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1: must have a string `text` \(data.text_field\)"),
        ("a.jsonl", b'{"text": "a\\u0000b"}\n', r"a.jsonl:1: `text` holds a NUL"),
    ],
)
def test_what_is_no_text_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=said) as error:
        corpus(tmp_path, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("text-*/meta.json"))


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.Table.from_pylist([{"body": "x", "id": 1}]), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"a.parquet: has no column text: must be one of body, id"):
        corpus(tmp_path, tmp_path / "cache")
    rows = [{"text": "x"}] * 30 + [{"text": None}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=10)
    with pytest.raises(BadInput, match=r"a.parquet:31: must have a string `text`"):
        corpus(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("count", [1, 2, 5, 19, 20, 21, 30, 60, 100, 150])
@pytest.mark.parametrize("spelling", ["{}.txt", "part-{:05d}.txt", "z{}"])
def test_something_is_held_out_and_something_learnt_whatever_files_are_called(
    tmp_path: Path, count: int, spelling: str
) -> None:
    """From 20 to about 100 documents a corpus was refused or not depending on their names."""
    for number in range(count):
        text = f"document {number} with its words " * 3
        (tmp_path / spelling.format(number)).write_text(text)
    data = corpus(tmp_path, tmp_path / "cache", seq_len=16, validation_fraction=0.02)
    total = len(data.train) + len(data.validation)
    assert len(data.train) >= 2 * 16 + 1
    assert len(data.validation) >= 16 + 1
    if total > 2000 and not _held_by_name(tmp_path, 0.02):
        assert 0.01 <= len(data.validation) / total <= 0.04
    assert f"{len(data.validation):,} held out" in data.describe()[0]


def _held_by_name(folder: Path, share: float) -> list[str]:
    """The files whose names' hash is below the share."""
    names = [file.name for file in sorted(folder.iterdir()) if file.is_file()]
    hashes = [hashlib.sha256(name.encode()).digest()[:8] for name in names]
    limit = int(share * 2**64)
    return [n for n, h in zip(names, hashes, strict=True) if int.from_bytes(h, "big") < limit]


@pytest.mark.parametrize("count", [20, 40, 60, 100])
def test_names_decide_what_is_held_out_wherever_they_leave_some_for_both(
    tmp_path: Path, count: int
) -> None:
    """A run of an earlier version that is resumed must find the split that it began with."""
    text = {f"part-{n}.txt": f"document {n:03d} and its words " * (1 + n % 7) for n in range(count)}
    for name, content in text.items():
        (tmp_path / name).write_text(content)
    for share in (0.02, 0.1, 0.5, 0.9):
        held = _held_by_name(tmp_path, share)
        data = corpus(tmp_path, tmp_path / "cache", seq_len=16, validation_fraction=share)
        train, validation = documents(data)
        if 0 < len(held) < count:
            assert validation == [text[name].encode() for name in held]
            assert train == [text[name].encode() for name in sorted(set(text) - set(held))]
        else:
            assert len(train) == len(validation) == count  # the end of every document


def test_the_tokenizers_own_end_of_text_ends_documents(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    levels = tokenizers.pre_tokenizers.ByteLevel
    alphabet = sorted(levels.alphabet())
    ends = ["<|begin_of_text|>", "<|end_of_text|>", "<stop>"]
    words = {text: number for number, text in enumerate([*alphabet, *ends])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    made.pre_tokenizer = levels(add_prefix_space=False)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    with pytest.raises(BadInput, match=r"says no token that ends a text .* data.end_of_text="):
        _ = Tokenizer(str(folder)).needed_end
    assert Tokenizer(str(folder), "<stop>").end == words["<stop>"]
    with pytest.raises(BadInput, match=r"data.end_of_text=<x>: must be a token of data.tokenizer"):
        Tokenizer(str(folder), "<x>")
    with pytest.raises(BadInput, match=r"data.end_of_text=x: must be null with data.tokenizer=byt"):
        Tokenizer("bytes", "x")
    made.add_special_tokens(ends[:2])
    made.save(str(folder / "tokenizer.json"))
    assert Tokenizer(str(folder)).end == words["<|end_of_text|>"]
    said = {"eos_token": {"content": "<stop>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    assert Tokenizer(str(folder)).end == words["<stop>"]
    write_rows(tmp_path / "a.jsonl", 30)
    data = corpus(tmp_path / "a.jsonl", tmp_path / "cache", tokenizer=str(folder))
    ids = np.concatenate([data.train, data.validation])
    assert (ids == words["<stop>"]).sum() == 30
    assert data.train[-1] == data.validation[-1] == words["<stop>"]


def as_nobody(call: Callable[[], None], root: Path) -> None:
    """`call()` as another user, where this one may become one."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            if os.getuid() == 0:
                for folder in (root, *list(root.parents)[:-1]):
                    os.chmod(folder, os.stat(folder).st_mode | 0o005)
                os.setgid(65534)
                os.setuid(65534)
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_a_cache_serves_another_user(tmp_path: Path, packing: str) -> None:
    """A lock of another's was opened for writing; a whole cache is read where nothing can be."""
    if os.getuid():
        pytest.skip("needs root to become another user")
    texts, cache = tmp_path / "texts", tmp_path / "cache"
    for folder in (texts, cache):
        folder.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"document {number} and its words " * 9)
    options = {"packing": packing}
    corpus(texts, cache, **options)
    modes = {oct(p.stat().st_mode & 0o777) for p in cache.rglob("*") if p.is_file()}
    assert modes == {"0o644"}
    cache.chmod(0o555)
    as_nobody(lambda: corpus(texts, cache, **options), tmp_path)
    # Made by another user once more, where both may write: its lock is the first one's.
    for made in cache.glob("*-*"):
        if made.is_dir():
            shutil.rmtree(made)
    cache.chmod(0o777)
    assert [*cache.glob("*.lock")]
    as_nobody(lambda: corpus(texts, cache, **options), tmp_path)
    assert {p.stat().st_uid for p in cache.glob("text-*") if p.is_dir()} == {65534}
