"""Text to token ids and back: bytes, or a `tokenizer.json` of the tokenizers library."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from launch.run.errors import BadInput
from launch.run.plain_data import read_json

# What published models call the end of a text, where no tokenizer_config.json says it.
_KNOWN_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class Tokenizer:
    """Text to token ids.

    Args:
        name: "bytes", or a folder or file that holds a `tokenizer.json`.
        end_of_text: the token that ends a document; None: the tokenizer's own.

    Attributes:
        vocab_size: one more than the highest id.
        fingerprint: of everything that decides what a text becomes.

    Raises:
        BadInput: no such file, none that the library reads, or no such token.
    """

    def __init__(self, name: str, end_of_text: str | None = None) -> None:
        self.name, self._end = name, end_of_text
        self._inner: Any = None
        self.vocab_size, self.fingerprint = 256, "bytes"
        if name == "bytes":
            if end_of_text is not None:
                raise BadInput(
                    f"data.end_of_text={end_of_text}: must be null with data.tokenizer=bytes, "
                    "whose documents end in a NUL"
                )
            return
        path = Path(name).expanduser()
        self.path = path = path / "tokenizer.json" if path.is_dir() else path
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
        if end_of_text is not None and self._id(end_of_text) is None:
            raise BadInput(
                f"data.end_of_text={end_of_text}: must be a token of data.tokenizer={name}"
            )

    @property
    def dtype(self) -> type[np.integer]:
        """The smallest that Megatron's token files know too."""
        if self.vocab_size <= 2**8:
            return np.uint8
        return np.uint16 if self.vocab_size <= 2**16 else np.int32

    @cached_property
    def end(self) -> int | None:
        """The id that ends a document, or None where the tokenizer names none."""
        if self._inner is None:
            return 0
        names = [self._end] if self._end is not None else [self.setting("eos_token")]
        if names == [None]:
            added = self._inner.get_added_tokens_decoder().values()
            special = {token.content for token in added if token.special}
            names = [name for name in _KNOWN_ENDS if name in special]
            # What the tokenizer itself puts behind a text ends it.
            behind = self._encoded("a").ids[-1:] if self._suffix_length else []
            names += [self._inner.id_to_token(token) for token in behind]
        found = [self._id(name) for name in names if name is not None]
        return next((token for token in found if token is not None), None)

    @property
    def needed_end(self) -> int:
        """The id that ends a document.

        Raises:
            BadInput: the tokenizer names none.
        """
        if self.end is None:
            raise BadInput(
                f"data.tokenizer={self.name}: says no token that ends a text (eos_token of "
                "tokenizer_config.json); name one of its tokens by data.end_of_text=…"
            )
        return self.end

    def setting(self, key: str) -> Any:
        """An entry of the tokenizer_config.json beside the tokenizer; of a token, its text."""
        found = self._settings.get(key)
        found = found.get("content") if isinstance(found, dict) else found
        if key.endswith("_token") and not isinstance(found, str | None):
            raise BadInput(f"{self._settings_file}: {key}={found!r}: must be text")
        return found

    @property
    def _settings_file(self) -> Path:
        return self.path.with_name("tokenizer_config.json")

    @cached_property
    def _settings(self) -> dict[str, Any]:
        if self._inner is None:
            return {}
        file = self._settings_file
        try:
            found = read_json(file) if file.is_file() else {}
        except (ValueError, OSError) as error:
            raise BadInput(f"{file}: is no tokenizer_config.json: {error}") from None
        if not isinstance(found, dict):
            raise BadInput(f"{file}: is no tokenizer_config.json: must be a JSON object")
        return found

    def encode(self, text: bytes) -> np.ndarray:
        """Ids of a text, [tokens]; a NUL at its end stands for the end of the document."""
        if self._inner is None:
            return np.frombuffer(text, dtype=np.uint8)
        if not text.endswith(b"\0"):
            return np.asarray(self._encoded(_unicode(text)).ids, self.dtype)
        return self.encode_parts([(text[:-1], True, True)])[0]

    def encode_parts(self, parts: Sequence[tuple[bytes, bool, bool]]) -> list[np.ndarray]:
        """Ids of parts of documents, computed together on all cores.

        Args:
            parts: (text, whether a document begins with it, whether it ends with it): what ends is
                followed by the end of text, what goes on is not begun anew.
        """
        end = self.needed_end
        if self._inner is None:
            return [
                np.frombuffer(text + b"\0" if last else text, np.uint8) for text, _, last in parts
            ]
        encode = getattr(self._inner, "encode_batch_fast", self._inner.encode_batch)
        with self._as_bad_input():
            encoded = encode([_unicode(text) for text, _, _ in parts])
        before, behind, out = self._prefix_length, self._suffix_length, []
        for (_, first, last), one in zip(parts, encoded, strict=True):
            ids = one.ids
            if not first or behind:
                ids = ids[0 if first else before : len(ids) - behind]
            if last:
                ids.append(end)
            out.append(np.array(ids, self.dtype))
        return out

    def encode_learnt(
        self, texts: Sequence[tuple[str, list[tuple[int, int]]]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids of texts as they stand, and which of them are learnt, uint8.

        Args:
            texts: (text, (start, end) of the characters that are learnt): a token is, of which one
                character is. A NUL stands for the end of text.
        """
        segments = [text.split("\0") for text, _ in texts]
        encoded = iter(self._encode_offsets([one for parts in segments for one in parts]))
        out = []
        for (_, learnt), parts in zip(texts, segments, strict=True):
            ids: list[np.ndarray] = []
            places: list[np.ndarray] = []
            begin = 0
            for number, part in enumerate(parts, start=1):
                own, offsets = next(encoded)
                ids.append(own)
                places.append(offsets + begin)
                begin += len(part) + 1
                if number < len(parts):
                    ids.append(np.array([self.needed_end], self.dtype))
                    places.append(np.array([[begin - 1, begin]]))
            starts, stops = np.concatenate(places).T
            counts = np.zeros(len(starts), np.uint8)
            for first, last in learnt:
                counts[(stops > first) & (starts < last)] = 1
            out.append((np.concatenate(ids), counts))
        return out

    def _encode_offsets(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids of texts without what a document begins with, and [n, 2] the characters of each."""
        if self._inner is not None:
            with self._as_bad_input():
                made = self._inner.encode_batch(texts, add_special_tokens=False)
            return [
                (np.array(one.ids, self.dtype), np.array(one.offsets, np.int64).reshape(-1, 2))
                for one in made
            ]
        found = []
        for text in texts:
            ids = np.frombuffer(text.encode(), np.uint8)
            place = np.cumsum(ids & 0xC0 != 0x80) - 1
            found.append((ids, np.stack([place, place + 1], axis=1)))
        return found

    def encode_prompt(self, text: bytes) -> list[int]:
        """Tokens of a text to go on from: without those that the tokenizer puts behind a text."""
        if self._inner is None:
            return list(text)
        ids = self._encoded(_unicode(text)).ids
        return ids[: len(ids) - self._suffix_length]

    @cached_property
    def _suffix_length(self) -> int:
        """Tokens put behind a text, counted at one that has some: an empty one tells no ends."""
        added = self._encoded("a").special_tokens_mask
        return len(list(itertools.takewhile(bool, reversed(added))))

    @cached_property
    def _prefix_length(self) -> int:
        return len(list(itertools.takewhile(bool, self._encoded("a").special_tokens_mask)))

    def _encoded(self, text: str) -> Any:
        with self._as_bad_input():
            return self._inner.encode(text)

    def _id(self, token: str) -> int | None:
        with self._as_bad_input():
            return self._inner.token_to_id(token)  # type: ignore[no-any-return]

    @contextmanager
    def _as_bad_input(self) -> Iterator[None]:
        """What a stranger's tokenizer.json makes the library meet, Rust's panics too."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise BadInput(f"data.tokenizer={self.name}: fails: {error}") from None

    def token(self, number: int) -> str:
        """What the vocabulary calls an id."""
        return chr(number) if self._inner is None else self._inner.id_to_token(number)

    def decode(self, ids: list[int]) -> str:
        if self._inner is None:
            return bytes(ids).decode("utf-8", "replace")
        return self._inner.decode(ids)


def _unicode(text: bytes) -> str:
    return text.decode("utf-8", "replace")
