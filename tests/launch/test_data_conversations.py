"""Conversations: what the assistant says is learnt, nothing else; what is wrong is named by row."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.data import encoding
from launch.data.text import Corpus, TextConfig
from launch.run.errors import BadInput

USER, BOT = {"role": "user", "content": "né?"}, {"role": "assistant", "content": "oui €"}


def corpus(folder: Path, rows: list[Any], **options: Any) -> Corpus:
    file = folder / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"seq_len": 128, "packing": "documents", "conversations": True, **options}
    return Corpus(TextConfig(path=str(file), cache=str(folder / "cache"), **settings))


def learnt(data: Corpus) -> set[bytes]:
    """The text of the learnt targets of every training row's documents."""
    source, found = data.sources[0], set()
    for place in range(source.rows):
        row = source.packed_row("train", place)
        for number in range(row.documents.max() + 1):
            own = row.targets[row.documents == number]
            found.add(bytes(own[own >= 0].tolist()))
    return found


def test_of_plain_conversations_the_answers_and_their_ends_are_learnt(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "system", "content": "s"}, USER, BOT, USER, BOT]}] * 30
    data = corpus(tmp_path, rows)
    assert learnt(data) == {b"oui \xe2\x82\xac\0oui \xe2\x82\xac\0"}
    text = bytes(data.train[: data.sources[0].train.ends[0]])
    assert text.decode() == (
        "system:\ns\n\nuser:\nné?\n\nassistant:\noui €\0\n\nuser:\nné?\n\nassistant:\noui €\0"
    )
    pairs = corpus(tmp_path, [{"prompt": "né?", "response": "oui €"}] * 30)
    assert learnt(pairs) == {b"oui \xe2\x82\xac\0"}
    # As datasets stores a sequence of structs; an answer may be empty.
    columns = {"role": ["user", "assistant"], "content": ["né?", ""]}
    assert learnt(corpus(tmp_path, [{"messages": columns}] * 30)) == {b"\0"}


def chat_tokenizer(folder: Path, template: str | None) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    levels = tokenizers.pre_tokenizers.ByteLevel
    words = {text: n for n, text in enumerate([*sorted(levels.alphabet()), "<|im_end|>"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    made.pre_tokenizer = levels(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|im_end|>"])
    made.save(str(folder / "tokenizer.json"))
    said = {"eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


CHAT_ML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_of_a_tokenizers_template_the_same(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = chat_tokenizer(tmp_path, CHAT_ML)
    options = {"tokenizer": str(folder), "chat_template": "tokenizer"}
    data = corpus(tmp_path, [{"messages": [USER, BOT, USER, BOT]}] * 30, **options)
    source = data.sources[0]
    row = source.packed_row("train", 0)
    own = row.targets[(row.documents == 0) & (row.targets >= 0)]
    end = data.tokenizer.needed_end
    assert (own == end).sum() == 2
    said = data.tokenizer.decode(own[own != end].tolist())
    assert said == "oui €\noui €\n"
    # Who calls a tool may say nothing.
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    tool = {"role": "tool", "content": "42"}
    data = corpus(tmp_path, [{"messages": [USER, call, tool, BOT]}] * 30, **options)
    own = data.sources[0].packed_row("train", 0).targets[: data.sources[0].train.ends[0]]
    said = data.tokenizer.decode(own[(own >= 0) & (own != end)].tolist())
    assert said == "None\noui €\n"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "`messages` must be a list of one or more messages"),
        (
            {"messages": [{"role": "boss", "content": "x"}]},
            "message 1 has role 'boss': must be one",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 must have a string `content`"),
        ({"text": "x"}, "must have `messages`, or strings `prompt` and `response`"),
        ({"prompt": "x", "response": 3}, "must have `messages`, or strings `prompt` and"),
        ({"messages": "x"}, "`messages` must be a list of one or more messages"),
        ({"prompt": "x", "response": "\ud800"}, "holds \\ud800, half of a surrogate pair"),
    ],
)
def test_a_conversation_that_is_none_is_named(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(BadInput) as error:
        corpus(tmp_path, [{"messages": [USER, BOT]}, row])
    assert str(error.value).startswith(f"{tmp_path}/chat.jsonl:2: {said}")
    assert not list((tmp_path / "cache").glob("text-*/meta.json"))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            "the chat template fails: roles must alt",
        ),
        ("{% for %}", "the chat template fails: "),
        (
            "{{ messages|length }}{{ messages[-1]['content'] }}",
            "the chat template writes what came",
        ),
        (None, "data.chat_template=tokenizer: data.tokenizer="),
    ],
)
def test_a_template_that_fails_is_named_with_its_row(
    tmp_path: Path, template: str | None, said: str
) -> None:
    pytest.importorskip("transformers")
    folder = chat_tokenizer(tmp_path, template)
    options = {"tokenizer": str(folder), "chat_template": "tokenizer"}
    with pytest.raises(BadInput) as error:
        corpus(tmp_path, [{"messages": [USER, BOT]}] * 3, **options)
    where = "" if template is None else f"{tmp_path}/chat.jsonl:1: "
    assert str(error.value).startswith(where + said)
    assert "\n" not in str(error.value)


def test_conversations_without_an_answer_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"messages": [USER, BOT]}] * 30 + [{"messages": [USER]}] * 4
    with pytest.raises(BadInput, match=r"chat.jsonl: no conversation with an answer in it"):
        corpus(tmp_path, rows[30:])
    data = corpus(tmp_path, rows)
    source = data.sources[0]
    assert len(source.train.ends) + len(source.validation.ends) == 30
    assert ", 4 dropped" in data.describe()[0]
    long = [{"messages": [USER, {"role": "assistant", "content": "x" * 200}]}] * 10
    cut = corpus(tmp_path, [*rows[:30], *long])
    assert " longer than a row cut" in cut.describe()[0]
    dropped = corpus(tmp_path, [*rows[:30], *long], too_long="drop")
    assert " dropped" in dropped.describe()[0]
    assert max(dropped.sources[0].packed_tokens(n) for n in range(dropped.sources[0].rows)) <= 128
    with pytest.raises(BadInput, match=r"no row of chat.jsonl is left to learn"):
        corpus(tmp_path, long, too_long="drop")


def test_interrupted_conversations_hold_out_what_undisturbed_ones_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So few that they are held out in turn, over several files, one of which has no answer."""
    for name in "abc":
        rows = [
            {"messages": [USER]},
            *[{"prompt": f"{name}{n}", "response": "x"} for n in range(5)],
        ]
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    settings: dict[str, Any] = {"seq_len": 32, "packing": "documents", "conversations": True}
    settings |= {"path": str(tmp_path / "*.jsonl"), "validation_fraction": 0.3}
    whole = Corpus(TextConfig(**settings, cache=str(tmp_path / "cache")))
    monkeypatch.setattr(encoding, "_BATCH", 1)
    encode_batch, left = encoding._ids_of, iter(range(1000))

    def interrupted(*given: Any) -> Any:
        if next(left) % 5 == 4:
            raise KeyboardInterrupt
        return encode_batch(*given)

    monkeypatch.setattr(encoding, "_ids_of", interrupted)
    for _ in range(20):
        with suppress(KeyboardInterrupt):
            again = Corpus(TextConfig(**settings, cache=str(tmp_path / "other")))
            break
    assert next(left) > 15
    assert bytes(again.train) == bytes(whole.train)
    assert bytes(again.validation) == bytes(whole.validation)
    assert ", 3 dropped" in again.describe()[0]


def test_functions_of_the_standard_library_are_the_default(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seq_len": 64, "packing": "documents", "conversations": True}
    data = Corpus(TextConfig(**settings, validation_rows=4))
    assert len(data.sources[0].train.ends) > 500
    row = data.sources[0].packed_row("train", data.sources[0].packed_place(0, 0))
    assert (row.targets >= 0).any()
    assert np.isin(row.documents, range(-1, 64)).all()
