"""What a run says on the terminal: rates of steps, readable numbers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.run import progress
from launch.run.loop import StepReport
from launch.run.progress import Progress, clock, final_summary, rate
from launch.run.starting import UNBEGUN
from launch.run.terminal import announced, announcing
from launch.tasks.diffusion import DiffusionTask
from launch.tasks.language_model import LanguageModelTask
from tests.launch.test_program_refusals import PROGRAMS, ROOT

REPORT = StepReport(2.0, 100, 4e6, 6e6, False, [])


@pytest.mark.parametrize(
    ("flops", "said"),
    [
        (0, "0 FLOP/s"),
        (999, "999 FLOP/s"),
        (9.997e11, "1 TFLOP/s"),
        (1.5e9, "1.5 GFLOP/s"),
        (7.89e14, "789 TFLOP/s"),
    ],
)
def test_rates_are_readable(flops: float, said: str) -> None:
    assert rate(flops) == said


def test_durations_are_readable() -> None:
    assert [clock(s) for s in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]


def test_an_evaluation_between_two_steps_slows_no_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    said = Progress(steps=8, every=2, name="step", speak=True)
    for step in range(1, 5):
        now[0] += 0.5
        said.step(step, REPORT, 0.5, learning_rate=step * 1e-3, gradient_norm=0.5)
        if step == 2:
            now[0] += 60  # an evaluation
    first, second = capsys.readouterr().out.splitlines()
    for line in (first, second):
        assert "200 tokens/s" in line
        assert "8 MFLOP/s executed, 12 MFLOP/s nominal (67%)" in line
        assert "gradient 0.5" in line
    assert "lr 4.00e-03" in second
    # What is left is told by the clock: there will be evaluations again.
    assert re.search(r"1:02 left$", second)


def test_what_takes_long_is_said_and_what_is_quick_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with announcing(), announced("reading data", after=0.0):
        time.sleep(0.2)
    with announcing(), announced("checking", after=30.0):
        time.sleep(0.01)
    with announced("in a notebook", after=0.0):
        time.sleep(0.01)
    with announcing(False), announced("on another rank", after=0.0):
        time.sleep(0.01)
    assert capsys.readouterr().out == "reading data …\n"


def test_a_run_that_is_asked_to_stop_while_it_imports_torch_is_unbegun(tmp_path: Path) -> None:
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nraise SystemExit(7)"
    (tmp_path / "torch.py").write_text(source)
    command = [sys.executable, "-m", "launch.start", "--config", "mod_lm"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == [UNBEGUN]


def test_every_program_says_that_it_starts_before_it_imports_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    words = {name: (f"launch.{name}", "x") for name in PROGRAMS} | {
        "adaptive": ("launch.run.console", "plan")
    }
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    options = {"cwd": ROOT, "env": environment, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    started = {
        name: subprocess.Popen([sys.executable, "-m", *command], **options)
        for name, command in words.items()
    }
    for name, process in started.items():
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 7, said
        assert said == f"launch.{'plan' if name == 'adaptive' else name}: importing torch …\n"


@pytest.mark.parametrize("task", [LanguageModelTask, DiffusionTask])
def test_the_last_lines_are_commands_whatever_the_folder_is_called(task: type) -> None:
    run = Path("my runs/it's one")
    checkpoint = run / "checkpoints" / "step-00000006"
    this = SimpleNamespace(config=SimpleNamespace(data=SimpleNamespace(conversations=None)))
    generate = task.generation_command(this, checkpoint)
    lines = final_summary(
        checkpoint=checkpoint, output=run, tensorboard=True, generate=generate, seconds=1.0
    ).splitlines()
    words = {line.split()[0]: shlex.split(line)[1:] for line in lines[2:]}
    assert words["TensorBoard"][:2] == words["generate"][:2] == [sys.executable, "-m"]
    assert words["TensorBoard"][-1] == str(run / "tensorboard")
    assert str(checkpoint) in words["generate"]
