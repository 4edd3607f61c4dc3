"""What a run says on the terminal: rates of steps, readable numbers."""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.run import progress
from launch.run.loop import StepReport
from launch.run.progress import Progress, clock, final_summary, rate
from launch.run.terminal import announced
from launch.tasks.diffusion import DiffusionTask
from launch.tasks.language_model import LanguageModelTask

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
    with announced("reading data", after=0.0):
        time.sleep(0.2)
    with announced("checking"), announced("a rank", speak=False, after=0.0):
        time.sleep(0.01)
    assert capsys.readouterr().out == "reading data …\n"


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
