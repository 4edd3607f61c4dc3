"""Every program refuses a command line in one line and exit code 2, before it does any work."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from launch.run.errors import BadInput, OneLineParser

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(
    path.stem
    for path in (ROOT / "launch").glob("*.py")
    if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")
)
RECIPE = ["--config", str(ROOT / "recipes" / "mod_lm.yaml")]
LARGE = "12345678901234567890123"


def refusal(capsys: pytest.CaptureFixture[str], program: str, *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        import_module(f"launch.{program}").main([str(word) for word in words])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


def test_programs_are_found() -> None:
    assert {"train", "start", "plan", "generate", "convert"} <= set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_begins_with_what_one_types(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        import_module(f"launch.{program}").main(["--help"])
    assert stop.value.code == 0
    usage = " ".join(capsys.readouterr().out.split())
    # train is a file for DeepSpeed's launcher.
    assert usage.startswith((f"usage: python -m launch.{program} ", "usage: launch/train.py "))


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_unknown_option_is_one_line(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, program, "--no-such-option").startswith("error: ")


@pytest.mark.parametrize("program", PROGRAMS)
def test_options_are_spelt_with_hyphens(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        import_module(f"launch.{program}").main(["--help"])
    assert not re.findall(r"--\w+_\w+", capsys.readouterr().out.split("deepspeed.*")[0])


def test_underscores_are_taken_for_hyphens_and_options_are_not_abbreviated() -> None:
    parser = OneLineParser()
    parser.add_argument("--num-heads", type=int)
    parser.add_argument("words", nargs="*")
    for words in (["--num_heads", "4"], ["--num_heads=4"], ["--num-heads", "4"]):
        assert parser.parse_args(words).num_heads == 4
    mixed = parser.parse_intermixed_args(["a_b=1", "--num_heads", "4", "c_d"])
    assert (mixed.num_heads, mixed.words) == (4, ["a_b=1", "c_d"])
    assert parser.parse_args(["--", "--num_heads"]).words == ["--num_heads"]
    with pytest.raises(BadInput, match="unrecognized arguments: --num=4"):
        parser.parse_args(["--num=4"])


@pytest.mark.parametrize(
    ("program", "words", "line"),
    [
        ("convert", ["upcycling"], "the following arguments are required: source, out"),
        (
            "convert",
            ["upcycling", "a", "b", "--experts", "x"],
            "argument --experts: invalid int value: 'x'",
        ),
        (
            "convert",
            ["upcycling", "a", "b", "--seed", LARGE],
            f"--seed={LARGE}: must be between 0 and",
        ),
        ("compare_routing", [], "the following arguments are required: RUN"),
        ("compare_routing", ["a", "--json", "/proc/x.json"], "--json=/proc/x.json: /proc cannot"),
        ("plan", [], "the following arguments are required: --config, --gpus"),
        ("plan", [*RECIPE, "--gpus", "-4"], "--gpus=-4: must be at least 1"),
        ("plan", [*RECIPE, "--gpus", "4", "--memory", "nan"], "--memory=nan: must be a number abo"),
        ("plan", [*RECIPE, "--gpus", "4", "--efficiency", "0"], "--efficiency=0.0: must be a numb"),
        ("plan", [*RECIPE, "data.path=", "--gpus", "4"], "data.path=: has no value"),
        ("parity", [], "the following arguments are required: --meshes"),
        ("parity", [*RECIPE, "--meshes", "data=2", "--micro-batches", "0"], "--micro-batches=0: m"),
        ("parity", [*RECIPE, "--meshes", "data=2", "--seed", LARGE], f"--seed={LARGE}: must be"),
        ("parity", [*RECIPE, "data.path=", "--meshes", "data=2"], "data.path=: has no value"),
        ("reshard", [], "the following arguments are required: checkpoint, --output"),
        ("reshard", ["a", "--output", "/proc/x"], "--output=/proc/x: /proc cannot be written"),
        (
            "reshard",
            ["a", "--output", "/tmp/x", "--to", "data=2", "--zero", "7"],
            "deepspeed.zero_optimization.stage=7: must be 0, 1, 2 or 3",
        ),
        ("generate", ["a", "--seed", LARGE], f"--seed={LARGE}: must be between 0 and 9223372036"),
        ("generate", ["a", "--seed", "-1"], "--seed=-1: must be between 0 and 9223372036"),
        ("sample", ["a", "--seed", LARGE], f"--seed={LARGE}: must be between 0 and 9223372036"),
        ("quality", ["a", "--seed", LARGE], f"--seed={LARGE}: must be between 0 and 9223372036"),
        ("quality", ["a", "--batch-size", "0"], "--batch-size=0: must be at least 1"),
        # The parent folder is looked at before a checkpoint is.
        ("oracle", ["a", "--output", "/nope/x.json"], "--output=/nope/x.json: its folder does not"),
        ("quality", ["a", "--json", "/nope/x.json"], "--json=/nope/x.json: its folder does not"),
        ("sample", ["a", "--npz", "/proc/x.npz"], "--npz=/proc/x.npz: /proc cannot be written"),
    ],
)
def test_refusals(
    program: str, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, program, *words).startswith(f"error: {line}")
