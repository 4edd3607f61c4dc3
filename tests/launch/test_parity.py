"""`python -m launch.parity`: exit codes, tables, one-line errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.parity import main
from launch.run.options import parse_mesh

ROOT = Path(__file__).parents[2]
SMALL = ["model.dim=16", "model.num_layers=2", "model.num_heads=2", "data.seq_len=16"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "launch.parity", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_recipe_and_own_model_end_with_the_verdict_as_exit_code() -> None:
    recipe = run("--config", "recipes/mod_lm.yaml", *SMALL, "--meshes", "tensor=2", "--steps", "1")
    assert recipe.returncode == 0, recipe.stderr
    assert "tensor=2: agrees with one rank" in recipe.stdout
    own = run(
        "--subject",
        "tests.distributed.subjects:mixture_of_depths",
        *("--meshes", "data=2", "--steps", "1", "--fault", "detach_routers", "--limit", "3"),
    )
    assert own.returncode == 1, own.stderr
    said, verdict = own.stdout.split("\n\n", 1)
    assert said.startswith("launch.parity: importing torch …")
    lines = verdict.splitlines()
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
def test_noise_is_drawn_by_row_however_the_batch_is_split(method: list[str]) -> None:
    """Choices and masks, and so the loss, would differ by rank."""
    words = ["model.mixture_of_depths=null", *method, "train.seed=3"]
    meshes = ["--meshes", "data=2", "--micro-batches", "2", "--steps", "1"]
    noisy = run("--config", "recipes/mod_lm.yaml", *SMALL, *words, *meshes)
    assert noisy.returncode == 0, noisy.stdout[:600] + noisy.stderr
    assert "data=2: agrees with one rank" in noisy.stdout


def test_a_tie_within_rounding_is_told_from_a_gradient_that_differs(tmp_path: Path) -> None:
    """Of tokens that are all alike, the last bit of a sum decides who is chosen."""
    (tmp_path / "alike.txt").write_text("a" * 20_000)
    words = [*SMALL[:1], "model.num_layers=3", *SMALL[2:], f"data.path={tmp_path}/alike.txt"]
    meshes = ["--meshes", "tensor=2", "--steps", "1"]
    tied = run("--config", "recipes/mod_lm.yaml", *words, f"data.cache={tmp_path}/cache", *meshes)
    assert tied.returncode == 0, tied.stdout + tied.stderr
    assert "step 0, layers.1: token " in tied.stdout
    assert ": a tie within rounding; " in tied.stdout
    assert "not compared" in tied.stdout


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
