"""`launch.generate`, from a checkpoint on disk to what the user sees."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from adaptive.models import Decoder
from launch.checkpoint.files import save_tensors, write_description
from launch.checkpoint.state import RunState
from launch.data.text import Tokenizer
from launch.generate import main
from launch.generation.text import TextWriter, streaming_decoder
from launch.run.config import from_mapping
from launch.run.terminal import visible
from parallel.checkpoint import save_atomically

MODEL = {"dim": 32, "num_layers": 4, "num_heads": 4, "max_seq_len": 64}
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def checkpoint(folder: Path, **routing: object) -> Path:
    """A run's folder with one checkpoint of an untrained model."""
    torch.manual_seed(0)
    model = {**MODEL, "mixture_of_depths": {"capacity": 0.25, **routing}}
    config = from_mapping({"task": "language_model", "model": model, "data": {"seq_len": 64}})
    decoder = Decoder(config.model)
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)

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
