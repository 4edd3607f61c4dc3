"""`python -m launch.parity`: exit codes, tables, one-line errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from launch.parity import main
from launch.run.options import parse_mesh
from tests.ranks import fork_programs_ranks

ROOT = Path(__file__).parents[2]
SMALL = ["model.dim=16", "model.num_layers=2", "model.num_heads=2", "data.seq_len=16"]


class Said(NamedTuple):
    code: int
    out: str


Run = Callable[..., Said]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The program in this process; its ranks come from the tests' server, which has imported."""
    monkeypatch.chdir(ROOT)
    fork_programs_ranks(monkeypatch)

    def call(*words: str) -> Said:
        capsys.readouterr()
        try:
            main(list(words))
        except SystemExit as ended:
            return Said(int(ended.code or 0), capsys.readouterr().out)
        return Said(0, capsys.readouterr().out)

    return call


def test_what_one_types_says_what_it_does_and_ends_with_the_verdict() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "launch.parity"]
    words = ["--config", "recipes/mod_lm.yaml", *SMALL, "--meshes", "tensor=2", "--steps", "1"]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("launch.parity: importing torch …")
    assert "tensor=2: agrees with one rank" in done.stdout


def test_a_model_of_ones_own_that_disagrees_ends_in_exit_code_1(run: Run) -> None:
    subject = ["--subject", "tests.distributed.subjects:mixture_of_depths"]
    broken = ["--steps", "1", "--fault", "detach_routers", "--limit", "3"]
    own = run(*subject, "--meshes", "data=2", *broken)
    assert own.code == 1
    lines = own.out.strip().splitlines()
    assert lines[0] == "data=2: DISAGREES with one rank (tolerance 1e-05)"
    assert lines[2].split()[:3] == ["DISAGREES", "gradient", "layers.1.router.weight"]


@pytest.mark.parametrize(
    "method",
    [
        ["model.skip_layer.density=0.5"],
        ["model.pattention.tokens=16", "model.pattention.dropout=0.3"],
    ],
    ids=["gumbel", "dropout"],
)
def test_noise_is_drawn_by_row_however_the_batch_is_split(method: list[str], run: Run) -> None:
    """Choices and masks, and so the loss, would differ by rank."""
    words = ["model.mixture_of_depths=null", *method, "train.seed=3"]
    meshes = ["--meshes", "data=2", "--micro-batches", "2", "--steps", "1"]
    noisy = run("--config", "recipes/mod_lm.yaml", *SMALL, *words, *meshes)
    assert noisy.code == 0, noisy.out[:600]
    assert "data=2: agrees with one rank" in noisy.out


def test_a_tie_within_rounding_is_told_from_a_gradient_that_differs(
    tmp_path: Path, run: Run
) -> None:
    """Of tokens that are all alike, the last bit of a sum decides who is chosen."""
    (tmp_path / "alike.txt").write_text("a" * 20_000)
    words = [*SMALL[:1], "model.num_layers=3", *SMALL[2:], f"data.path={tmp_path}/alike.txt"]
    meshes = ["--meshes", "tensor=2", "--steps", "1"]
    tied = run("--config", "recipes/mod_lm.yaml", *words, f"data.cache={tmp_path}/cache", *meshes)
    assert tied.code == 0, tied.out
    assert "step 0, layers.1: token " in tied.out
    assert ": a tie within rounding; " in tied.out
    assert "not compared" in tied.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--meshes", "tensor=two"], "'tensor=two' must be data, tensor, context or expert=NUMBER"),
        (["--meshes", "tensor=2,expert=3,data=2"], "expert=3: must divide"),
        (["--meshes", "tensor=2", "--zero", "3"], "parallel.tensor=2: must be 1 with ZeRO 3"),
        (["--subject", "nowhere:x", "--meshes", "tensor=2"], "subject=nowhere:x: cannot be"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--subject" not in words:
        words = ["--config", str(ROOT / "recipes/mod_lm.yaml"), *words]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_mesh_as_it_is_written() -> None:
    mesh = parse_mesh("tensor=2,sequence_parallel=true,data=4")
    assert mesh == {"tensor": 2, "sequence_parallel": True, "data": 4}
