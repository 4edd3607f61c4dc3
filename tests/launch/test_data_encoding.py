"""Token files: Megatron's both ways, continued where they were interrupted, never half taken."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.data import encoding
from launch.data.text import Corpus, TextConfig
from launch.encode import main as encode
from launch.run.errors import BadInput
from parallel.megatron import indexed_dataset


def write_rows(file: Path, count: int = 300) -> list[bytes]:
    texts = [f"<{n:04d}> text number {n} é " * (1 + n % 3) for n in range(count)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [text.encode() for text in texts]


def megatron_builder(prefix: Path, dtype: Any, documents: list[list[int]]) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def corpus(path: Path, cache: Path, **options: Any) -> Corpus:
    settings = {"seq_len": 8, "validation_fraction": 0.1, **options}
    return Corpus(TextConfig(path=str(path), cache=str(cache), **settings))


def test_megatron_reads_what_we_encode_and_training_reads_it_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_rows(tmp_path / "a.jsonl")
    words = [str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out")]
    encode([*words, "--validation-fraction", "0.1"])
    said = capsys.readouterr().out
    assert f"data.path={tmp_path / 'out'} data.tokenizer=bytes" in said
    documents = []
    for split in ("train", "validation"):
        dataset = indexed_dataset(tmp_path / "out" / split)
        assert len(dataset.document_indices) == len(dataset) + 1
        documents += [bytes(dataset[n].astype(np.uint8)) for n in range(len(dataset))]
    assert sorted(documents) == sorted(text + b"\0" for text in texts)
    direct = corpus(tmp_path / "a.jsonl", tmp_path / "cache")
    through = corpus(tmp_path / "out", tmp_path / "cache")
    assert np.array_equal(direct.train, through.train)
    assert np.array_equal(direct.validation, through.validation)
    encode([*words, "--validation-fraction", "0.1"])  # again: it is there
    assert capsys.readouterr().out == said
    with pytest.raises(SystemExit):
        encode([*words, "--validation-fraction", "0.5"])
    assert "holds something else: give another folder" in capsys.readouterr().err
    with (tmp_path / "out" / "train.bin").open("ab") as file:
        file.truncate(100)
    with pytest.raises(BadInput, match=r"out: .*train.bin is not whole: encode it anew"):
        corpus(tmp_path / "out", tmp_path / "cache")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_what_megatron_wrote_is_read_to_the_token(tmp_path: Path, dtype: Any) -> None:
    random = np.random.default_rng(0)
    documents = [
        [*random.integers(1, 256, int(random.integers(1, 40))).tolist(), 0] for _ in range(60)
    ]
    whole = list(itertools.chain(*documents))
    megatron_builder(tmp_path / "a", dtype, documents[:30])
    megatron_builder(tmp_path / "b", dtype, documents[30:])
    for packing in ("windows", "documents"):
        data = corpus(tmp_path, tmp_path / "cache", packing=packing)
        tokens = [*data.train[:].tolist(), *data.validation[:].tolist()]
        assert tokens == whole
        source = data.sources[0]
        ends = [*source.train.ends[:], *(source.validation.ends[:] + len(data.train))]
        assert ends == np.cumsum([len(ids) for ids in documents]).tolist()
    # Named as Megatron names it, too.
    assert np.array_equal(corpus(tmp_path / "a", tmp_path / "cache").train[:9], whole[:9])
    # Rows lie across the border of the two files.
    border = sum(map(len, documents[:30]))
    assert data.train[border - 5 : border + 5].tolist() == whole[border - 5 : border + 5]


def test_npy_of_ids_is_read_in_one_axis_or_two(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(1, 256, 400).astype(np.uint16)
    ids[9::10] = 0
    np.save(tmp_path / "a.npy", ids)
    np.save(tmp_path / "b.npy", ids.reshape(40, 10))
    for name in ("a.npy", "b.npy"):
        source = corpus(tmp_path / name, tmp_path / "cache", packing="documents").sources[0]
        assert np.array_equal(source.train.ids[:], ids[: len(source.train)])
        assert source.train.ends[:].tolist() == list(range(10, len(source.train) + 1, 10))
        assert len(source.train) + len(source.validation) == 400


def test_token_files_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    documents = [[5, 6, 7, 0]] * 50
    documents[33] = [5, 300, 0]
    megatron_builder(tmp_path / "a", np.int32, documents)
    with pytest.raises(BadInput, match=r"a.bin: document 34 has id 300: must be below 256"):
        corpus(tmp_path, tmp_path / "cache")
    megatron_builder(tmp_path / "a", np.int32, [[5, 6, 7, 0]] * 50)
    whole = {suffix: (tmp_path / f"a.{suffix}").read_bytes() for suffix in ("bin", "idx")}
    (tmp_path / "a.bin").write_bytes(whole["bin"][:-4])
    with pytest.raises(BadInput, match=r"a.bin: has 796 bytes, its a.idx speaks of 800"):
        corpus(tmp_path, tmp_path / "cache")
    (tmp_path / "a.bin").write_bytes(whole["bin"])
    (tmp_path / "a.idx").write_bytes(whole["idx"][:-8])
    with pytest.raises(BadInput, match=r"a.idx: has 1034 bytes, must have 1042: cut short"):
        corpus(tmp_path, tmp_path / "cache")
    (tmp_path / "a.idx").write_bytes(whole["idx"][:18] + bytes(16))
    with pytest.raises(BadInput, match=r"a.idx: is no intact index: index -1 is out of bounds"):
        corpus(tmp_path, tmp_path / "cache")
    disordered = whole["idx"][:-24] + whole["idx"][-16:-8] + whole["idx"][-24:-16]
    (tmp_path / "a.idx").write_bytes(disordered + whole["idx"][-8:])
    with pytest.raises(BadInput, match=r"a.idx: its documents do not follow one another"):
        corpus(tmp_path, tmp_path / "cache")
    (tmp_path / "a.idx").write_bytes(whole["idx"][:9] + b"\2" + whole["idx"][10:])
    with pytest.raises(BadInput, match=r"a.idx: has version 2 and dtype 4: must be 1, and 1 to 8"):
        corpus(tmp_path, tmp_path / "cache")
    (tmp_path / "a.idx").write_bytes(b"no index")
    with pytest.raises(BadInput, match=r"a.idx: is no index of Megatron's"):
        corpus(tmp_path, tmp_path / "cache")
    (tmp_path / "b.npy").write_bytes(b"")
    np.save(tmp_path / "b.npy", np.zeros(8))
    with pytest.raises(BadInput, match=r"b.npy: is 8 of float64, must be one or two axes of integ"):
        corpus(tmp_path / "b.npy", tmp_path / "cache")


def test_an_interrupted_encoding_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at every batch in turn, it ends in the files of an undisturbed one."""
    write_rows(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("".join(f"line {n} of one document\n" for n in range(400)))
    monkeypatch.setattr(encoding, "_BATCH", 1500)
    monkeypatch.setattr("launch.data.sources.PIECE", 1000)
    path = tmp_path / "[ab].*"
    whole = corpus(path, tmp_path / "cache")
    turns, read = 0, [0]
    encode_batch = encoding._ids_of

    def interrupted(*given: Any) -> Any:
        read[0] += 1
        if read[0] % 4 == 0:
            raise KeyboardInterrupt
        return encode_batch(*given)

    monkeypatch.setattr(encoding, "_ids_of", interrupted)
    for _ in range(50):
        try:
            again = corpus(path, tmp_path / "other")
            break
        except KeyboardInterrupt:
            turns += 1
            assert not list((tmp_path / "other").glob("text-*/meta.json"))
    assert turns > 2
    assert np.array_equal(whole.train, again.train)
    assert np.array_equal(whole.validation, again.validation)
    assert np.array_equal(whole.sources[0].train.ends[:], again.sources[0].train.ends[:])
    # Of 12 batches none was encoded more than twice.
    assert read[0] < 50


HELD = """
import sys, threading
from launch.data import encoding
encoding._MARK_SECONDS, encoding._BATCH = -1.0, 1 << 14
batches, encode_batch = [], encoding._ids_of
def held(*given):
    batches.append(given)
    if len(batches) > 5:
        threading.Event().wait()
    return encode_batch(*given)
encoding._ids_of = held
from launch.encode import main
main(sys.argv[1:])
"""


def test_a_killed_encoding_goes_on_and_nothing_of_it_is_taken_for_whole(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 3000)
    words = [str(tmp_path / "a.jsonl"), "--output"]
    first = [sys.executable, "-c", HELD, *words, str(tmp_path / "out")]
    process = subprocess.Popen(first, stderr=subprocess.DEVNULL)
    mark = tmp_path / "out.part" / "mark.json"
    limit = time.monotonic() + 100
    while time.monotonic() < limit and not mark.is_file():
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    assert 0 < json.loads(mark.read_text())["row"] < 3000
    with pytest.raises(BadInput, match=r"out.part: "):
        corpus(tmp_path / "out.part", tmp_path / "cache")
    for name in ("train.bin", "train.lengths"):  # written, and not yet noted
        with (tmp_path / "out.part" / name).open("ab") as file:
            file.write(b"half")
    for name in ("out", "whole"):
        encode([*words, str(tmp_path / name)])
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx", "meta.json"):
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("out", "whole"))
        assert one == other, name


def test_a_large_text_is_cut_at_lines_and_is_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {n} é\n" for n in range(900))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    whole = corpus(tmp_path / "a.txt", tmp_path / "cache")
    monkeypatch.setattr("launch.data.sources.PIECE", 64)
    pieces = corpus(tmp_path / "a.txt", tmp_path / "other")
    assert np.array_equal(whole.train, pieces.train)
    assert np.array_equal(whole.validation, pieces.validation)
    assert len(pieces.sources[0].train.ends) == 1


def test_a_complete_cache_is_read_without_writing(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl")
    before = corpus(tmp_path / "a.jsonl", tmp_path / "cache", packing="documents")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    os.chmod(tmp_path / "cache", 0o555)
    try:
        again = corpus(tmp_path / "a.jsonl", tmp_path / "cache", packing="documents")
    finally:
        os.chmod(tmp_path / "cache", 0o755)
    assert np.array_equal(before.train, again.train)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")} == stamps
    for file in (tmp_path / "cache").glob("rows-*/lengths.npy"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadInput, match=r"/rows-\w+: is damaged, delete it: "):
        corpus(tmp_path / "a.jsonl", tmp_path / "cache", packing="documents")
