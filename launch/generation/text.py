"""Generated text on a terminal, as it comes; coloured by the layers that computed each token."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import TextIO

from adaptive.models.decoder.generate import Generation
from launch.data.text import Tokenizer
from launch.run.terminal import shown, visible


class TextWriter:
    """Writes tokens as soon as they are whole characters: what is written is always valid UTF-8."""

    def __init__(
        self, tokenizer: Tokenizer, out: TextIO, *, layers: int, end: int | None = None
    ) -> None:
        self._out, self._layers, self._end = out, layers, end
        self._decode = streaming_decoder(tokenizer)
        self._shown = 0

    def show(self, made: Generation) -> None:
        """Write what is new of the first sequence."""
        tokens = made.prompts[0] + made.tokens[0]
        while self._shown < self._ready(made):
            if tokens[self._shown] != self._end:  # it ends texts, and is none itself
                self._write(self._decode(tokens[self._shown], False), made)
            self._shown += 1
        self._out.flush()

    def close(self) -> None:
        """Write what was held back of an unfinished character."""
        if self._shown:
            self._out.write(self._decode(None, True) + "\n")
            self._out.flush()

    def _ready(self, made: Generation) -> int:
        return len(made.prompts[0]) + len(made.tokens[0])

    def _write(self, text: str, made: Generation) -> None:
        self._out.write(shown(text, self._out))


class RoutingWriter(TextWriter):
    """Colours tokens by the number of layers that computed them: from blue, few, to red, all.

    That is known only when the token has gone through the model, so the last one drawn is missing.
    """

    # Of the 256-colour terminal palette: as distinct as backgrounds under black text can be.
    _COLOURS = (39, 45, 50, 48, 83, 118, 190, 226, 220, 214, 208, 203)

    def _ready(self, made: Generation) -> int:
        return len(made.layers[0])

    def _write(self, text: str, made: Generation) -> None:
        if not text:
            return
        computed = made.layers[0][self._shown]
        place = (computed - made.always) / max(self._layers - made.always, 1)
        colour = self._COLOURS[round(place * (len(self._COLOURS) - 1))]
        for part in text.splitlines(keepends=True):
            body = visible(part.rstrip("\r\n"))
            coloured = f"\x1b[48;5;{colour};30m{body}\x1b[0m" if body else ""
            self._out.write(coloured + ("\n" if part.endswith("\n") else ""))


def streaming_decoder(tokenizer: Tokenizer) -> Callable[[int | None, bool], str]:
    """(token or None, whether it is the last) -> text that is complete by then."""
    if tokenizer.name == "bytes":
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token, last: decoder.decode(b"" if token is None else bytes([token]), last)
    # A tokenizer may write a token otherwise at the beginning of a text: what was written last is
    # decoded again before what is new.
    context: list[int] = []
    waiting: list[int] = []

    def decode(token: int | None, last: bool) -> str:
        nonlocal context, waiting
        waiting += [] if token is None else [token]
        before = tokenizer.decode(context)
        text = tokenizer.decode(context + waiting)
        # A character cut short shows as a replacement: it waits for the token that completes it.
        if not last and (text.endswith("\ufffd") or len(text) <= len(before)):
            return ""
        context, waiting = waiting or context, []
        return text[len(before) :]

    return decode
