"""Early exit and SkipDecode from the command line."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from adaptive.models import Decoder
from launch import generate, train_exit
from launch.checkpoint.files import save_tensors, write_description
from launch.checkpoint.state import RunState
from launch.run.config import from_mapping
from parallel.checkpoint import save_atomically

GREEDY = ("--prompt", "def f", "--max-tokens", 24, "--temperature", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with one checkpoint of an untrained model on a text of its own."""
    torch.manual_seed(0)
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n\n" * 200)
    plain = {
        "task": "language_model",
        "model": {"dim": 32, "num_layers": 4, "num_heads": 4, "max_seq_len": 64},
        "data": {"seq_len": 32, "path": str(text), "cache": str(tmp_path / "cache")},
    }
    plain["model"]["skip_layer"] = {"density": 0.5}
    config = from_mapping(plain)
    decoder = Decoder(config.model)
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)

    def write(at: Path) -> None:
        save_tensors(dict(decoder.state_dict()), at / "model.safetensors")
        write_description(at, RunState(step=1), config)

    save_atomically(tmp_path / "run" / "checkpoints", 1, write, keep=1)
    return tmp_path / "run"


def run(capsys: pytest.CaptureFixture[str], program: object, *words: object) -> tuple[str, str]:
    program.main([str(word) for word in words])  # type: ignore[attr-defined]
    captured = capsys.readouterr()
    return captured.out, captured.err


def refusal(capsys: pytest.CaptureFixture[str], program: object, *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(capsys, program, *words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_trained_adapter_drafts_the_text_of_greedy_decoding(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(capsys, train_exit, folder, "--exit-layer", 2, "--steps", 3, "--batch-size", 2)
    adapter = folder / "exit-adapter.safetensors"
    assert f"adapter: {adapter}" in out
    plain, _ = run(capsys, generate, folder, *GREEDY)
    out, told = run(capsys, generate, folder, *GREEDY, "--exit-adapter", adapter, "--compare")
    assert out.startswith(plain)
    assert "the same text; speed-up" in out
    assert "drafts accepted" in told
    for draft in ("ngram", "recycling", folder):
        words = ["--draft", draft, "--controller", "fixed"]
        out, _ = run(capsys, generate, folder, *GREEDY, *words)
        assert out == plain
        for rule in ("chain", "k_seq", "recursive"):
            tree = ["--tree", 6, "--max-draft", 2, "--verification", rule]
            out, told = run(capsys, generate, folder, *GREEDY, *words, *tree)
            assert out == plain
    words = [folder, "--max-tokens", 9, "--draft", folder, "--controller", "thompson"]
    assert "tokens a pass" in run(capsys, generate, *words)[1]


def test_skip_decode_at_full_depth_is_plain(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, _ = run(capsys, generate, folder, *GREEDY)
    out, told = run(capsys, generate, folder, *GREEDY, "--skip-decode", "4:4")
    assert out == plain
    assert "4.00 of 4 layers a token" in told
    _, told = run(capsys, generate, folder, *GREEDY, "--skip-decode", "4:2")
    assert "of 4 layers a token" in told


def test_control_characters_do_not_steer_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [folder, "--prompt", "\x1b[2J", "--max-tokens", 3, "--skip-decode", "4:2"]
    out, _ = run(capsys, generate, *words)
    assert out.startswith("\x1b[2J")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out, _ = run(capsys, generate, *words)
    assert out.startswith("\u241b[2J")


def test_wrong_options_are_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = folder / "nothing.safetensors"
    assert "no such file" in refusal(capsys, generate, folder, *GREEDY, "--exit-adapter", nothing)
    for words, rule in (
        (["--draft", "ngram", "--verification", "greedy"], "must be 0 with --verification greedy"),
        (["--draft", "exit"], "--draft exit needs it"),
        (["--draft", "ngram", "--exit-adapter", nothing], "needs --draft exit"),
        (["--draft", "ngram", "--skip-decode", "4:2"], "give one of them"),
        (["--draft", folder / "no-run"], "no-run"),
        (["--draft", "ngram", "--controller", "fixed", "--max-draft", -1], "must be 0 or more"),
        (["--tree", 4], "--tree: needs --draft"),
        (["--draft", "ngram", "--tree", 0], "--tree=0: must be at least 1"),
        (["--draft", "ngram", "--verification", "k_seq"], "--verification=k_seq: needs --tree"),
        (
            ["--draft", "ngram", "--tree", 2, "--verification", "recursive"],
            "--tree=2: must be at least --max-draft",
        ),
        (["--draft", "ngram", "--draft-threshold", 2], "threshold=2.0: must be in [0, 1]"),
    ):
        assert rule in refusal(capsys, generate, folder, *words)
    assert "must be FIRST:LAST" in refusal(capsys, generate, folder, "--skip-decode", "4")
    assert "1 <= last <= first <= 4" in refusal(capsys, generate, folder, "--skip-decode", "9:1")
    assert "needs --draft or" in refusal(capsys, generate, folder, "--compare")
    assert "between 1 and 3" in refusal(capsys, train_exit, folder, "--exit-layer", 4)
    for option, value, rule in (
        ("--output", "/proc/adapter", "/proc cannot be written"),
        ("--learning-rate", "nan", "must be a number above 0"),
        ("--seed", -1, "must be between 0 and"),
    ):
        line = refusal(capsys, train_exit, folder, option, value)
        assert line.startswith(f"error: {option}={value}: {rule}")
    save_file({"a": torch.ones(1)}, nothing, metadata={"exit_adapter": "[2]"})
    assert "is not an adapter" in refusal(
        capsys, generate, folder, *GREEDY, "--exit-adapter", nothing
    )
    (folder / "other.safetensors").write_bytes(b"not one")
    assert "is not an adapter of this model" in refusal(
        capsys, generate, folder, *GREEDY, "--exit-adapter", folder / "other.safetensors"
    )
