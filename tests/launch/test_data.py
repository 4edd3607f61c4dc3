"""Text data: rows are a pure function of the seed, and nothing held out is trained on."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.data import encoding, sources
from launch.data.text import Corpus, TextConfig, permuted
from launch.data.tokenizer import Tokenizer
from launch.run.errors import BadInput


def corpus(folder: Path, **options: object) -> Corpus:
    settings = {"path": str(folder / "*.txt"), "seq_len": 16, "cache": str(folder / "cache")}
    return Corpus(TextConfig(**{**settings, **options}))  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for number in range(200):
        words = random.integers(0, 10_000, 10 + number % 7)
        text = f"document {number} " + " ".join(str(word) for word in words)
        (tmp_path / f"{number:03}.txt").write_text(text)
    return tmp_path


@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_permuted_is_a_permutation(size: int, key: int) -> None:
    order = [permuted(index, size, key) for index in range(size)]
    assert sorted(order) == list(range(size))


def test_orders_of_different_keys_are_unrelated() -> None:
    first, second = ([permuted(n, 1000, key) for n in range(1000)] for key in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    assert abs(np.corrcoef(first, range(1000))[0, 1]) < 0.1


def test_an_epoch_shows_every_window_once_and_the_next_in_another_order(folder: Path) -> None:
    data = corpus(folder)
    windows = (len(data.train) - 1) // 16 - 1
    positions = {data.train[n : n + 17].tobytes(): n for n in range(len(data.train) - 16)}
    epochs = []
    for epoch in range(2):
        rows = [data.train_row(0, epoch * windows + n) for n in range(windows)]
        starts = [positions[row.astype(data.train.dtype).tobytes()] for row in rows]
        assert len(set(starts)) == windows
        assert len({start % 16 for start in starts}) == 1
        epochs.append(starts)
    assert [start // 16 for start in epochs[0]] != [start // 16 for start in epochs[1]]


def test_rows_depend_on_seed_and_number_only(folder: Path) -> None:
    one, other = corpus(folder), corpus(folder, cache=str(folder / "other"))
    for row in (0, 7, 10_000):
        assert np.array_equal(one.train_row(3, row), other.train_row(3, row))
    assert not np.array_equal(one.train_row(3, 0), one.train_row(4, 0))


def test_held_out_documents_are_not_in_the_training_part(folder: Path) -> None:
    data = corpus(folder, validation_fraction=0.2)
    train = bytes(data.train).split(b"\0")
    held_out = bytes(data.validation).split(b"\0")
    # About a fifth of 200: the binomial's three standard deviations.
    assert 23 <= len(held_out) - 1 <= 57
    assert not set(train[:-1]) & set(held_out[:-1])
    assert len(train) + len(held_out) - 2 == 200
    # Which documents are held out does not depend on which others there are.
    (folder / "000.txt").unlink()
    again = corpus(folder, validation_fraction=0.2)
    assert set(bytes(again.validation).split(b"\0")) <= set(held_out)


def test_of_few_documents_the_ends_are_held_out(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("".join(f"line {n}\n" for n in range(500)))
    data = corpus(tmp_path, validation_fraction=0.1)
    assert b"line 499" in bytes(data.validation)
    assert b"line 499" not in bytes(data.train)
    assert len(data.validation) == pytest.approx(0.1 * len(data.train), rel=0.2)


@pytest.mark.parametrize("piece", [sources.PIECE, 100])
def test_of_few_rows_the_end_of_each_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Also of rows so long that they are read in pieces, each of them one document."""
    monkeypatch.setattr(sources, "PIECE", piece)
    monkeypatch.setattr(encoding, "PIECE", piece)
    texts = [f"<{n}> " + "".join(f"word{k} " for k in range(30 * (n + 1))) for n in range(5)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    data = corpus(tmp_path, path=str(tmp_path / "a.jsonl"), validation_fraction=0.1)
    halves = [(text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :]) for text in texts]
    assert bytes(data.train) == "".join(first + "\0" for first, _ in halves).encode()
    assert bytes(data.validation) == "".join(last + "\0" for _, last in halves).encode()


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        # Whole conversations are held out, and there is but one.
        (["b" * 400], {"conversations": True, "packing": "documents", "seq_len": 512}),
        # As many bytes as two rows, in characters of four.
        (["\U0001f600" * 5, "\U0001f600"], {"seq_len": 8}),
    ],
)
def test_text_that_cannot_be_divided_is_one_line(
    tmp_path: Path, texts: list[str], options: dict[str, Any]
) -> None:
    rows = [{"text": text, "prompt": "a", "response": text} for text in texts]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadInput, match=rf"no share of its {len(texts)} documents leaves a row"):
        corpus(tmp_path, path=str(file), **options)


def test_jsonl_is_read_line_by_line(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text number {n} " * 20, "id": n}) for n in range(50)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    data = corpus(tmp_path, path=str(tmp_path / "texts.jsonl"), validation_fraction=0.2)
    documents = bytes(data.train).split(b"\0")[:-1] + bytes(data.validation).split(b"\0")[:-1]
    assert sorted(documents) == sorted((f"text number {n} " * 20).encode() for n in range(50))


def test_a_file_name_that_is_no_utf8_has_a_place_in_the_split(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / os.fsdecode(b"\xff%d.txt" % number)).write_text(f"document {number} " * 30)
    assert len(corpus(tmp_path, path=str(tmp_path / "*.txt"), validation_fraction=0.2).train)


def test_a_tokenizer_file_encodes(tmp_path: Path, folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"[UNK]": 0, "document": 1, ".": 2}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    options = {"tokenizer": str(tmp_path), "validation_fraction": 0.2, "end_of_text": "."}
    data = corpus(folder, **options)
    assert data.vocab_size == 3
    # "document N" begins each of them; every other word is unknown.
    assert data.train[0] == 1
    ids = np.concatenate([data.train, data.validation])
    assert ((ids == 1).sum(), (ids == 2).sum()) == (200, 200)


NUL = "\u0100"  # what byte-level tokenizers call the byte 0


def byte_level_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({character: n for n, character in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("kept", ["truncation", "padding"])
def test_a_length_kept_in_a_tokenizer_file_cuts_and_pads_no_document(
    tmp_path: Path, folder: Path, kept: str
) -> None:
    tokenizer = byte_level_tokenizer()
    if kept == "truncation":
        tokenizer.enable_truncation(8)
    else:
        tokenizer.enable_padding(length=1000)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = corpus(folder, tokenizer=str(tmp_path), end_of_text=NUL)
    # A token a byte, and one that ends each document.
    written = sum(len(file.read_bytes()) + 1 for file in folder.glob("*.txt"))
    assert len(data.train) + len(data.validation) == written


def test_a_vocabulary_with_holes_is_as_large_as_its_highest_number(
    tmp_path: Path, folder: Path
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"[UNK]": 0, "document": 70_000, ".": 1}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    options = {"tokenizer": str(tmp_path), "validation_fraction": 0.2, "end_of_text": "."}
    data = corpus(folder, **options)
    assert data.vocab_size == 70_001
    assert data.train[0] == 70_000


def test_text_that_is_no_utf8_is_refused_by_a_tokenizer_and_taken_as_bytes(
    tmp_path: Path, folder: Path
) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (folder / "007.txt").write_bytes("caf\u00e9".encode("latin-1") * 50)
    with pytest.raises(BadInput, match=r"007.txt: byte 3 is 0xe9, no UTF-8: convert it, or take"):
        corpus(folder, tokenizer=str(tmp_path), end_of_text=NUL)
    assert corpus(folder).vocab_size == 256


def test_the_end_of_a_document_is_held_out_from_a_whole_character_on(tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    text = "aé€😀" * 100
    for shift in range(10):
        (tmp_path / "one.txt").write_text("." * shift + text, encoding="utf-8")
        options = {"tokenizer": str(tmp_path), "validation_fraction": 0.3, "end_of_text": NUL}
        data = corpus(tmp_path, **options)
        tokenizer = Tokenizer(str(tmp_path))
        parts = [tokenizer.decode(part.tolist()) for part in (data.train, data.validation)]
        assert "".join(part.removesuffix("\0") for part in parts) == "." * shift + text


def test_a_tokenizer_that_cuts_pads_and_ends_texts_does_so_to_no_corpus_and_no_prompt(
    tmp_path: Path,
) -> None:
    """Files of published models often say `truncation`: of each document a beginning was left."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<s>": 0, "</s>": 1, "[UNK]": 2, "a": 3, "b": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    made.enable_truncation(4)
    made.enable_padding(length=8, pad_id=2, pad_token="[UNK]")
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.encode(b"a b a b a").tolist() == [0, 3, 4, 3, 4, 3, 1]
    # A prompt that ends as a document does would be answered by another document.
    assert tokenizer.encode_prompt(b"a b") == [0, 3, 4]
    assert tokenizer.encode_prompt(b"a </s>") == [0, 3, 1]
    assert tokenizer.encode_prompt(b"") == [0]
    assert Tokenizer("bytes").encode_prompt(b"ab") == [97, 98]


def encode(folder: Path) -> int:
    return int(corpus(folder).train.astype(np.int64).sum())


def test_processes_that_start_together_share_one_cache(folder: Path) -> None:
    with ProcessPoolExecutor(3) as pool:
        sums = list(pool.map(encode, [folder] * 3))
    assert len(set(sums)) == 1
    assert len(list((folder / "cache").glob("text-*/meta.json"))) == 1
    assert not list((folder / "cache").glob("*.part"))


def test_what_is_held_out_does_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    held_out = []
    for place in ("here", "there/deep[er]"):
        folder = tmp_path / place
        (folder / "part").mkdir(parents=True)
        for number in range(100):
            (folder / "part" / f"{number}.txt").write_text(f"document {number} " * 30)
        options = {"cache": str(tmp_path / "cache"), "validation_fraction": 0.2}
        held_out.append(bytes(corpus(folder, path=str(folder), **options).validation))
    assert held_out[0] == held_out[1]
    # Written as a pattern the names are the same: from the first part with a wildcard on.
    pattern = str(tmp_path / "here" / "*" / "*.txt")
    assert bytes(corpus(folder, path=pattern, **options).validation) == held_out[0]


def test_a_changed_file_is_encoded_anew(folder: Path) -> None:
    before = encode(folder)
    (folder / "000.txt").write_text("quite another text " * 30)
    assert encode(folder) != before


def test_the_standard_library_is_the_default_text() -> None:
    data = Corpus(TextConfig())
    assert len(data.train) > 5_000_000
    assert b"def " in bytes(data.train[:100_000])
    assert data.validation_rows == 64
    assert len(data.validation_row(63)) == 257
