"""Documents of any source, each with its tokens and its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from launch.data.sources import File, find_files, read_rows
from launch.data.token_files import Tokens, check_ids, read_bin, read_npy
from launch.data.tokenizer import Tokenizer
from launch.run.errors import BadInput


class Document(NamedTuple):
    """One text.

    Attributes:
        ids: its tokens, as the tokenizer begins a text, without an end.
        bytes: how long the text is in UTF-8.
    """

    ids: list[int]
    bytes: int


def read_documents(path: str, tokenizer: Tokenizer, *, text_field: str) -> Iterator[Document]:
    """The documents of `data.path` that hold a token, in order.

    Args:
        path: what section data takes.
        tokenizer: of the model; that of the source where it holds token ids.
        text_field: the column of rows that is the text.

    Raises:
        BadInput: names the file, and the row where there are rows.
    """
    for file in find_files(path):
        if file.kind == "ids":
            yield from _of_ids(file, tokenizer)
            continue
        for text in _texts(file, text_field):
            ids = tokenizer.encode_prompt(text)
            if text:
                yield Document(ids, len(text))


def _texts(file: File, text_field: str) -> Iterator[bytes]:
    pieces: list[bytes] = []
    for row in read_rows(file, columns=[text_field]):
        if file.kind != "text":
            text = row.value.get(text_field) if isinstance(row.value, dict) else None
            if not isinstance(text, str):
                raise BadInput(
                    f"{file.path}:{row.number}: must have a string `{text_field}` (--text-field)"
                )
            yield text.encode("utf-8", "replace")
            continue
        pieces.append(row.value)
        if row.last:
            yield b"".join(pieces)
            pieces = []


def _of_ids(file: File, tokenizer: Tokenizer) -> Iterator[Document]:
    tokens: Tokens
    if file.path.suffix == ".npy":
        tokens = read_npy(file.path, tokenizer.needed_end)
    else:
        tokens = read_bin(file.path, checked=False)
    check_ids(file.path, tokens, tokenizer.vocab_size)
    start = 0
    for number in range(len(tokens.ends)):
        stop = int(tokens.ends[number])
        ids = tokens.ids[start:stop].tolist()
        start = stop
        if ids and ids[-1] == tokenizer.end:
            ids.pop()
        if ids:
            yield Document(ids, len(tokenizer.decode(ids).encode()))
