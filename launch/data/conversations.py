"""Conversations as text, of which what the assistant says is learnt.

A row has `messages`, a list of {role, content}, or `prompt` and `response`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

from launch.data.tokenizer import Tokenizer
from launch.run.errors import BadInput

_ROLES = ("system", "user", "assistant", "tool")


class Conversations:
    """How rows become text.

    Args:
        template: "plain", or "tokenizer": the chat template of the tokenizer's own files.
        tokenizer: whose end of text ends what an assistant says in "plain".

    Attributes:
        dropped: conversations without a word of the assistant so far.

    Raises:
        BadInput: the tokenizer has no template, or one that cannot be read.
    """

    COLUMNS: ClassVar[list[str]] = ["messages", "prompt", "response"]

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        self.dropped = 0
        self._template: str | None = None
        self._settings: dict[str, str] = {}
        self.key = template
        if template == "plain":
            return
        self._template, self._settings = _template_of(tokenizer)
        self.key = hashlib.sha256(self._template.encode()).hexdigest()

    def render(
        self, row: Mapping[str, Any], where: str
    ) -> tuple[bytes, list[tuple[int, int]]] | None:
        """(text, (start, end) of the characters that are learnt), or None if none are.

        Raises:
            BadInput: names the row and what is wrong with it.
        """
        messages = _messages(row, where, calls=self._template is not None)
        if not any(message["role"] == "assistant" for message in messages):
            self.dropped += 1
            return None
        text, spans = (
            self._plain(messages) if self._template is None else self._rendered(messages, where)
        )
        try:
            return text.encode(), spans
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])[1:-1]
            raise BadInput(
                f"{where}: holds {half}, half of a surrogate pair: must be Unicode"
            ) from None

    def ask(self, text: str, *, where: str) -> str:
        """What an answer to a user's text is behind, as `render` writes it."""
        messages = [{"role": "user", "content": text.replace("\0", "")}]
        if self._template is None:
            return self._plain([*messages, {"role": "assistant", "content": ""}])[0][:-1]
        return self._render(messages, where, prompt=True)

    @staticmethod
    def _plain(messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """`role:`, what it says, a blank line; a NUL, which ends texts, after an answer."""
        text, spans = "", []
        for message in messages:
            text += f"{message['role']}:\n"
            start = len(text)
            text += message["content"]
            if message["role"] == "assistant":
                text += "\0"
                spans.append((start, len(text)))
            text += "\n\n"
        # What follows the last answer is never learnt.
        return text[: spans[-1][1]], spans

    def _rendered(
        self, messages: list[dict[str, Any]], where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        spans, text = [], ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], where, prompt=True)
            text = self._render(messages[: index + 1], where, prompt=False)
            if not text.startswith(before):
                raise BadInput(
                    f"{where}: the chat template writes what came before otherwise once the "
                    "assistant has answered: what is learnt cannot be told; use "
                    "data.chat_template=plain"
                )
            spans.append((len(before), len(text)))
        if self._settings["eos_token"] not in text[spans[-1][0] :]:
            # Generation stops there.
            text += "\0"
            spans[-1] = (spans[-1][0], len(text))
        return text, spans

    def _render(self, messages: list[dict[str, Any]], where: str, *, prompt: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), _ = render_jinja_template(
                conversations=[messages],
                chat_template=self._template,
                add_generation_prompt=prompt,
                **self._settings,
            )
        except Exception as error:  # a template is a program
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadInput(f"{where}: the chat template fails: {first}") from None
        return text


def _template_of(tokenizer: Tokenizer) -> tuple[str, dict[str, Any]]:
    if tokenizer.name == "bytes":
        raise BadInput("data.chat_template=tokenizer: must be plain with data.tokenizer=bytes")
    file = tokenizer.path.with_name("chat_template.jinja")
    try:
        own = file.read_text(encoding="utf-8") if file.is_file() else None
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: cannot be read: {error}") from None
    found = tokenizer.setting("chat_template") if own is None else own
    if not isinstance(found, str):
        raise BadInput(
            f"data.chat_template=tokenizer: data.tokenizer={tokenizer.name} has none "
            "(chat_template of tokenizer_config.json, or chat_template.jinja); use plain"
        )
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise BadInput("data.chat_template=tokenizer: needs the package transformers") from None
    names = ("bos_token", "pad_token", "unk_token")
    settings = {name: tokenizer.setting(name) or "" for name in names}
    return found, {**settings, "eos_token": tokenizer.token(tokenizer.needed_end)}


def _messages(row: Mapping[str, Any], where: str, *, calls: bool) -> list[dict[str, Any]]:
    """The messages of a row; with `calls` one of them may call tools and have no content."""
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if messages is None and isinstance(row, Mapping):
        pair = row.get("prompt"), row.get("response")
        if not all(isinstance(text, str) for text in pair):
            raise BadInput(f"{where}: must have `messages`, or strings `prompt` and `response`")
        messages = [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    if isinstance(messages, Mapping) and all(isinstance(m, list) for m in messages.values()):
        # So datasets stores a sequence of structs.
        rows = zip(*messages.values(), strict=False)
        messages = [dict(zip(messages, row, strict=True)) for row in rows]
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{where}: `messages` must be a list of one or more messages")
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if role not in _ROLES:
            known = ", ".join(_ROLES)
            raise BadInput(f"{where}: message {number} has role {role!r}: must be one of {known}")
        if content is None and calls and message.get("tool_calls"):
            continue
        if not isinstance(content, str) or "\0" in content:
            raise BadInput(f"{where}: message {number} must have a string `content` without NUL")
    return messages
