"""Files of strangers, damaged, endless or made to hurt: each ends in one line, at once."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launch.data import sources
from launch.data.arrays import mapped_array
from launch.data.conversations import Conversations
from launch.data.sources import find_files
from launch.data.text import Corpus, TextConfig
from launch.data.token_files import read_npy
from launch.data.tokenizer import Tokenizer
from launch.encode import main as encode
from launch.run.errors import BadInput
from tests.launch.test_data_conversations import chat_tokenizer
from tests.launch.test_images import data_of, write_pictures


def corpus(path: Path, **options: Any) -> Corpus:
    cache = path.parent / "cache"
    return Corpus(TextConfig(path=str(path), cache=str(cache), seq_len=16, **options))


def npy(header: str, data: bytes = b"1234") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\3\4",
        b"\x80\4.",
        npy("{'descr': '<i4'"),
        npy("(" * 99),
        npy(
            "{'descr': '<i4', 'fortran_order': False, 'shape': (10**12,), }".replace(
                "10**12", "9" * 20
            )
        ),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (True,), }"),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (-1,), }"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"),
        npy("{'descr': '<U1', 'fortran_order': False, 'shape': (1,), }"),
        npy("{'descr': '<m8[s]', 'fortran_order': False, 'shape': (1,), }", b"12345678"),
    ],
)
def test_an_array_of_any_content_is_one_line(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "class" / "a.npy"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(BadInput, match=r"a.npy: (is no .npy array|holds .*, must hold numbers)"):
        read_npy(file, 0)
    with pytest.raises(BadInput, match=r"a.npy: (is no .npy array|holds .*, must hold numbers)"):
        data_of(tmp_path, channels=1)
    with pytest.raises(BadInput, match=r"^data.features=x: (is no|holds)"):
        mapped_array(file, named="data.features=x")


def test_encoded_text_that_was_changed_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_tokenizer(tmp_path, None)
    (tmp_path / "text.txt").write_text("of some text " * 400)
    words = ["--output", str(tmp_path / "made"), "--tokenizer", str(tmp_path)]
    encode([str(tmp_path / "text.txt"), *words])
    options = {"tokenizer": str(tmp_path)}
    assert len(corpus(tmp_path / "made", **options).train)
    index, ids, meta = (tmp_path / "made" / n for n in ("train.idx", "train.bin", "meta.json"))
    whole = index.read_bytes()
    for damaged, said in (
        (b"", "is no index"),
        (whole[:17] + b"\7" + whole[18:], "train.idx is not whole"),
        (whole[:18] + b"\xff" * 6 + whole[24:], "train.idx is not whole"),
        (whole[:-8], "train.idx is not whole"),
    ):
        index.write_bytes(damaged)
        with pytest.raises(BadInput, match=f"made: is no encoded text: {said}"):
            corpus(tmp_path / "made", **options)
    index.write_bytes(whole)
    ids.write_bytes(b"\xff" * len(ids.read_bytes()))
    with pytest.raises(BadInput, match=r"train.bin: document 1 has id 65535: must be below 257"):
        corpus(tmp_path / "made", **options)
    meta.write_text("[" * 100_000)
    with pytest.raises(BadInput, match="made: is no encoded text: nested too deeply"):
        corpus(tmp_path / "made", **options)


def test_links_that_lead_in_circles_end(tmp_path: Path) -> None:
    root = tmp_path / "above" / "text"
    root.mkdir(parents=True)
    (root / "a.txt").write_text("text")
    for name, target in {"b": "b", "c": "d", "d": "c", "e": ".", "f": "..", "g": "."}.items():
        (root / name).symlink_to(target)
    for path in (root, root / "**" / "*.txt", root / "**", root / "**" / "a.*"):
        assert [file.path for file in find_files(str(path))] == [root / "a.txt"]
    with pytest.raises(BadInput, match="no such file"):
        find_files(str(root / "**" / "b" / "*.txt"))
    with pytest.raises(BadInput, match="File name too long"):
        find_files("a" * 5000)


def test_a_row_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_LINE", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n{"text": "' + "x" * 200)
    with pytest.raises(BadInput, match=r"a.jsonl:2: has 100 bytes or more, must have less"):
        corpus(tmp_path / "a.jsonl")


@pytest.mark.parametrize("count", [1, 60])
def test_documents_of_a_letter_are_answered(count: int, tmp_path: Path) -> None:
    """Looking for a share that leaves both splits a row went on for ever."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * count)
    if count == 1:
        with pytest.raises(BadInput, match=r"give more text, or a smaller data.seq_len"):
            corpus(tmp_path / "a.jsonl")
    else:
        data = corpus(tmp_path / "a.jsonl")
        assert len(data.train)
        assert len(data.validation)


def test_a_tokenizer_that_fails_is_one_line(tmp_path: Path) -> None:
    chat_tokenizer(tmp_path, None)
    settings = tmp_path / "tokenizer_config.json"
    for token in ("5", '["a"]', '{"content": 5}', "true"):
        settings.write_text(f'{{"eos_token": {token}}}')
        with pytest.raises(BadInput, match=r"tokenizer_config.json: eos_token=.*: must be text"):
            Tokenizer(str(tmp_path)).needed_end  # noqa: B018
    settings.write_text('{"eos_token": "\\ud800"}')
    with pytest.raises(BadInput, match=r"data.tokenizer=.*: fails: "):
        Tokenizer(str(tmp_path)).needed_end  # noqa: B018
    settings.write_text("[" * 100_000)
    with pytest.raises(BadInput, match=r"is no tokenizer_config.json: nested too deeply"):
        Tokenizer(str(tmp_path)).needed_end  # noqa: B018
    # A pattern that tries every way to part a text: the library panics, which is no Exception.
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated"}
    tree["pre_tokenizer"] = split | {"invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    settings.unlink()
    with pytest.raises(BadInput, match=r"data.tokenizer=.*: fails: "):
        Tokenizer(str(tmp_path)).encode(b"x" * 40)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_a_chat_template_that_fails_is_one_line(template: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    chat = Conversations("tokenizer", Tokenizer(str(chat_tokenizer(tmp_path, template))))
    with pytest.raises(BadInput, match=r"--prompt: the chat template fails: .+"):
        chat.ask("hello", where="--prompt")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(BadInput, match=r"chat_template.jinja: cannot be read"):
        Conversations("tokenizer", Tokenizer(str(tmp_path)))


def test_what_is_in_a_picture_is_what_its_name_may_be(tmp_path: Path) -> None:
    """Pillow hands some formats, such as PostScript, to other programs."""
    write_pictures(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "ants" / "0.png", format="EPS")
    with pytest.raises(BadInput, match=r"ants/0.png: is no intact picture: cannot identify"):
        data_of(tmp_path, channels=3)
