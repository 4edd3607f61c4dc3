"""`launch.generate`, from a checkpoint on disk to what the user sees."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptive.blocks.calibration import calibrate
from adaptive.models import Decoder
from adaptive.models.decoder.generate import Sampling, generate
from launch.checkpoint.files import load_model, save_tensors, write_description
from launch.checkpoint.models import load_decoder
from launch.checkpoint.state import RunState
from launch.data.prompts import first_tokens
from launch.data.text import TextConfig
from launch.data.tokenizer import Tokenizer
from launch.generate import calibrate_on_held_out, main
from launch.generation.text import TextWriter, streaming_decoder
from launch.run.config import from_mapping
from launch.run.terminal import visible
from parallel.checkpoint import save_atomically

MODEL = {"dim": 32, "num_layers": 4, "num_heads": 4, "max_seq_len": 64}
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def checkpoint(folder: Path, *, end: int = 0, data: Any = None, **routing: object) -> Path:
    """A run's folder with one checkpoint of an untrained model, which says NUL instead of `end`."""
    torch.manual_seed(0)
    model = {**MODEL, "mixture_of_depths": {"capacity": 0.25, **routing}}
    data = {"seq_len": 64, **(data or {})}
    config = from_mapping({"task": "language_model", "model": model, "data": data})
    decoder = Decoder(config.model)
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    decoder.output.weight.data[[0, end]] = decoder.output.weight.data[[end, 0]]

    def write(at: Path) -> None:
        save_tensors(dict(decoder.state_dict()), at / "model.safetensors")
        write_description(at, RunState(step=1), config)

    save_atomically(folder / "checkpoints", 1, write, keep=1)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    main([str(word) for word in arguments])
    captured = capsys.readouterr()
    return captured.out, captured.err


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a refusal."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in arguments])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_a_prompt_is_bytes_whatever_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path, predictor="mlp")
    given = b"\xff\xfeabc"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    piped, _ = run(capsys, folder, "--prompt", "-", "--max-tokens", 3)
    assert piped.startswith("\ufffd\ufffdabc")
    typed, _ = run(capsys, folder, "--prompt", os.fsdecode(given), "--max-tokens", 3)
    assert typed == piped


def test_text_continues_the_prompt_and_a_seed_repeats_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = checkpoint(tmp_path)
    common = (run_folder, "--prompt", "def f", "--max-tokens", 30, "--device", "cpu")
    first, said = run(capsys, *common)
    assert first.startswith("def f")
    assert run(capsys, *common)[0] == first
    assert run(capsys, *common, "--seed", 1)[0] != first
    assert re.search(r"30 tokens in .* tokens/s, .* MFLOP a token executed \(\d+% of dense\)", said)
    layers = re.search(r"([\d.]+) of 4 layers a token", said)
    assert layers is not None
    assert 2 <= float(layers[1]) <= 4


def test_routing_is_shown_by_colour_and_changes_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (checkpoint(tmp_path), "--prompt", "x = 1", "--max-tokens", 40, "--temperature", 0)
    plain, _ = run(capsys, *common)
    coloured, _ = run(capsys, *common, "--show-routing")
    stripped = COLOURS.sub("", coloured).rstrip("\n")
    # The last token drawn has not been through the model: it has no colour and is not shown.
    assert visible(plain).startswith(stripped)
    assert len(set(re.findall(r"48;5;(\d+);", coloured))) > 1


def test_calibration_names_its_thresholds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (checkpoint(tmp_path), "--prompt", "import os", "--max-tokens", 50)
    _, said = run(capsys, *common, "--calibrate")
    assert re.findall(r"calibrated (\S+): threshold", said) == ["layers.1", "layers.3"]


def test_text_ends_where_the_model_ends_it_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load_model(checkpoint(tmp_path / "goes on"))
    drawn = generate(model, [list(b"def")], max_new_tokens=12, sampling=Sampling(0.0))
    tokens = list(drawn)[-1].tokens[0]
    assert 0 not in tokens
    folder = checkpoint(tmp_path / "ends", end=tokens[4])
    common = (folder, "--prompt", "def", "--temperature", 0, "--max-tokens", 12, "--device", "cpu")
    _, said = run(capsys, *common)
    assert said.startswith(f"{tokens.index(tokens[4]) + 1} tokens")
    _, said = run(capsys, *common, "--ignore-end")
    assert said.startswith("12 tokens")


def test_a_prompt_begins_as_training_shows_a_beginning() -> None:
    tokenizer = Tokenizer("bytes")
    for data, ids in (
        (TextConfig(), b"say"),
        (TextConfig(packing="documents"), b"\0say"),
        (TextConfig(packing="documents", conversations=True), b"\0user:\nsay\n\nassistant:\n"),
    ):
        assert bytes(first_tokens(data, tokenizer, b"say")) == ids
    assert first_tokens(TextConfig(), tokenizer, b"") == [0]


def test_calibration_on_packed_rows_sees_each_document_alone(tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    rows = [{"prompt": f"{n}?", "response": "so" * (1 + n % 9)} for n in range(60)]
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(chat), "packing": "documents", "conversations": True}
    saved = load_decoder(checkpoint(tmp_path / "run", data={**data, "cache": str(tmp_path)}))
    found = calibrate_on_held_out(saved)
    alone = []
    for row in range(min(16, saved.task.validation_rows)):
        batch = saved.task.validation_batch(range(row, row + 1))
        ids, of = batch["input_ids"][0], batch["documents"][0]
        assert (of < 0).any(), "no padding that could be met"
        alone += [ids[of == number][None] for number in range(int(of.max()) + 1)]
    assert found == pytest.approx(calibrate(saved.model, alone), abs=1e-5)
    assert len(found) == 2


def test_bytes_that_are_no_text_become_valid_utf8() -> None:
    """Characters come when they are whole; what is left unfinished is replaced, never lost."""
    decode = streaming_decoder(Tokenizer("bytes"))
    raw = "né→😀".encode() + b"\xff" + b"a" + "→".encode()[:2]
    pieces = [decode(byte, False) for byte in raw] + [decode(None, True)]
    assert "".join(pieces) == "né→😀\ufffda\ufffd"
    assert pieces[1] == ""
    assert pieces[2] == "é"
    "".join(pieces).encode("utf-8")


def test_tokens_of_a_tokenizer_stream_as_the_whole_text(tmp_path: Path) -> None:
    """Byte-level pairs cut characters in the middle; nothing is lost, doubled or replaced."""
    tokenizers = pytest.importorskip("tokenizers")
    text = "né→😀 def read(self):\n\treturn 'naïve 日本語'  # 😀😀\n" * 3
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["def return self read"], vocab_size=300, show_progress=False)
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    tokenizer = Tokenizer(str(path))
    ids = [int(token) for token in tokenizer.encode(text.encode())]
    decode = streaming_decoder(tokenizer)
    pieces = [decode(token, False) for token in ids] + [decode(None, True)]
    assert "".join(pieces) == text
    assert "" in pieces[:-1], "or no character was cut"


def test_control_characters_do_not_steer_the_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    writer = TextWriter(Tokenizer("bytes"), out, layers=1)
    writer._write("a\x1b[2J\x07\tb\n\x7f\x9b", None)  # type: ignore[arg-type]
    assert out.getvalue() == "a\u241b[2J\u2407\tb\n\u2421"


def test_a_model_that_looks_ahead_is_refused_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path, predictor="none")
    assert "layers.1 chooses tokens by looking at later ones" in fail(capsys, folder)
    text, said = run(capsys, folder, "--allow-non-causal", "--max-tokens", 5)
    assert text.startswith("def ")
    # Expert choice over the prefix keeps its share: with a cache of one token it would keep all.
    assert "(100% of dense)" not in said
    assert "cache" not in said


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--temperature", "-1"], "--temperature=-1.0: must be 0 or more"),
        (["--top-k", "0"], "--top-k=0: must be at least 1"),
        (["--top-p", "1.5"], "--top-p=1.5: must be in (0, 1]"),
        (["--max-tokens", "0"], "--max-tokens=0: must be at least 1"),
        (["--prompt", "x" * 65], "--prompt of 65 tokens: must be at most max_seq_len=64"),
        (["--device", "nonsense"], "--device=nonsense: "),
        (["--temprature", "1"], "unrecognized arguments: --temprature 1"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], rule: str
) -> None:
    assert rule in fail(capsys, checkpoint(tmp_path), *arguments)


def test_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no intact checkpoint" in fail(capsys, tmp_path)


def lines_of(path: Path) -> dict[int, dict[str, Any]]:
    """By index; each only once."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len({row["index"] for row in rows}) == len(rows)
    return {row["index"]: row for row in rows}


def test_a_file_of_prompts_goes_on_where_it_was_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing twice, nothing lost, wherever a writer is killed; texts are those of each alone."""
    folder = checkpoint(tmp_path / "run")
    given, out = tmp_path / "given.jsonl", tmp_path / "out.jsonl"
    texts = ["def f", "x", "import os\nimport", "é→", "class A:", "def f", "a\u2028b"]
    given.write_text(
        "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts)
    )
    common = [folder, "--prompts", given, "--output", out, "--batch-size", 3, "--max-tokens", 9]
    common += ["--device", "cpu"]
    _, said = run(capsys, *common)
    assert re.search(r"7 prompts, \d+ tokens in .* tokens/s", said)
    whole, raw = lines_of(out), out.read_bytes()
    assert [whole[index]["prompt"] for index in range(7)] == texts
    assert all(row["tokens"] == 9 or row["ended"] for row in whole.values())
    assert whole[0]["text"] != whole[5]["text"], "draws of their own"
    for cut in (
        0,
        1,
        len(raw) // 2,
        raw.index(b"\n"),
        raw.index(b"\n") + 1,
        len(raw) - 1,
        len(raw),
    ):
        out.write_bytes(raw[:cut])
        run(capsys, *common)
        assert lines_of(out) == whole
    greedy = [*common, "--temperature", 0, "--ignore-end"]
    assert "was written with other options" in fail(capsys, *greedy)
    out.unlink()
    run(capsys, *greedy)
    alone = (folder, "--temperature", 0, "--ignore-end", "--max-tokens", 9, "--device", "cpu")
    for row in list(lines_of(out).values())[:2]:
        assert (
            run(capsys, *alone, "--prompt", row["prompt"])[0] == row["prompt"] + row["text"] + "\n"
        )
    given.write_text('{"prompt": "other"}\n')
    assert "line 1 is not of these prompts" in fail(capsys, *greedy)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ('{"prompt": 3}\n', ':1: must be an object with a text "prompt"'),
        ('{"prompt": "a"}\n[]\n', ':2: must be an object with a text "prompt"'),
        (json.dumps({"prompt": "x" * 65}), ":1: prompt of 65 tokens: must be at most"),
    ],
)
def test_a_file_that_is_not_of_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, rule: str
) -> None:
    folder, given = checkpoint(tmp_path / "run"), tmp_path / "given.jsonl"
    given.write_text(content)
    assert rule in fail(capsys, folder, "--prompts", given, "--output", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert "give both or neither" in fail(capsys, folder, "--prompts", given)
    assert "--draft: cannot be combined with --prompts" in fail(
        capsys, folder, "--prompts", given, "--output", "o", "--draft", "ngram"
    )
