"""Scripts of several stages: a stage that was stopped ends them, and nothing stale is built on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.checkpoint.state import RunState
from launch.run.config import from_mapping
from launch.run.finished import main, unfinished
from tests.distributed.runs import tiny_config, write_text, write_untrained

ROOT = Path(__file__).parents[2]


def test_a_run_is_finished_when_its_last_phase_is(tmp_path: Path) -> None:
    phases = [{"name": "first", "train": {"steps": 10}}, {"name": "second", "train": {"steps": 5}}]
    config = from_mapping({"output": str(tmp_path), "phases": phases})
    assert "stopped at step 0 of 15" in (unfinished(config) or "")
    write_untrained(config, RunState(step=10, phase=0, phase_step=10))
    assert "stopped at step 10 of 15" in (unfinished(config) or "")
    write_untrained(config, RunState(step=15, phase=1, phase_step=5))
    assert unfinished(config) is None


def test_the_words_that_start_a_run_ask_whether_it_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--ranks", "2", f"output={tmp_path}", "train.steps=20"]
    config = from_mapping({"output": str(tmp_path), "train": {"steps": 20}})
    write_untrained(config, RunState(step=20, phase_step=20))
    main(words)
    with pytest.raises(SystemExit, match="1"):
        main([*words, "train.steps=30"])
    assert "stopped at step 20 of 30" in capsys.readouterr().err


# Trains nothing: writes down what it was asked for, and leaves a checkpoint that says TEACHER.
STAND_IN = """#!/bin/bash
echo "$2 ${*: -1}" >> "$LOG"
for word in "$@"; do
  case "$word" in output=*) folder="${word#output=}" ;; esac
done
case "$2 $*" in
  *--help* | *--dry[-_]run*) ;;
  launch.run.finished*) exit "$STOPPED" ;;
  launch.convert*) mkdir -p "${*: -1}/checkpoints" ;;
  *) mkdir -p "$folder/checkpoints/step-1"
    echo "$TEACHER" > "$folder/checkpoints/step-1/manifest.json" ;;
esac
"""


class Script:
    """A script of recipes/ with a stand-in for its Python."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.python = folder / "python"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)

    def __call__(
        self, name: str, *words: str, teacher: str = "first", stopped: int = 0
    ) -> tuple[int, list[str]]:
        """The exit code, and each program with its last word."""
        self.log.write_text("")
        done = subprocess.run(
            [ROOT / "recipes" / name, *words],
            env={
                **os.environ,
                "PYTHON": str(self.python),
                "LOG": str(self.log),
                "TEACHER": teacher,
                "STOPPED": str(stopped),
            },
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        return done.returncode, self.log.read_text().splitlines()


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_a_stopped_stage_ends_the_script(script: Script) -> None:
    code, asked = script("acm_lm.sh", "output=it", stopped=1)
    assert code == 1
    assert asked == ["launch.start output=it/dense", "launch.run.finished output=it/dense"]
    code, asked = script("compare_routers.sh", f"output={script.folder}/routers", stopped=1)
    assert code == 1
    assert [line.split()[0] for line in asked] == ["launch.train", "launch.run.finished"]
    assert asked[0].endswith("/routers/moe_lm-0")


def test_a_conversion_is_repeated_when_its_teacher_is_another(script: Script) -> None:
    whole = [
        "launch.start output=it/dense",
        "launch.run.finished output=it/dense",
        "launch.convert it/tuned",
        "launch.start output=it/tuned",
    ]
    assert script("acm_lm.sh", "output=it") == (0, whole)
    assert script("acm_lm.sh", "output=it") == (0, [*whole[:2], whole[3]])
    assert script("acm_lm.sh", "output=it", teacher="second") == (0, whole)
    # What the first teacher became is kept.
    assert len(list((script.folder / "it").glob("tuned.*/teacher.json"))) == 1


def test_help_and_dry_run_train_and_write_nothing(script: Script) -> None:
    assert script("acm_lm.sh", "--help") == (0, ["launch.start --help"])
    plans = ["launch.start output=it/dense", "launch.start output=it/tuned"]
    assert script("acm_lm.sh", "--dry_run", "output=it") == (0, plans)
    assert script("compare_routers.sh", "--help") == (0, ["launch.train --help"])
    plans = ["launch.start output=it/moe_lm-0", "launch.start output=it/xmoe_lm-0"]
    assert script("compare_routers.sh", "--dry-run", "output=it") == (0, plans)
    assert not (script.folder / "it").exists()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_ctrl_c_in_the_first_stage_leaves_the_second_alone(tmp_path: Path) -> None:
    write_text(tmp_path)
    tree = tiny_config(tmp_path)
    tree["model"].pop("mixture_of_depths")
    words = [
        f"{section}.{key}={value}"
        for section in ("model", "data", "monitor")
        for key, value in tree[section].items()
    ]
    words += ["train.steps=100000", "train.log_every=1", "train.batch_size=8"]
    process = subprocess.Popen(
        [ROOT / "recipes" / "acm_lm.sh", *words, f"output={tmp_path / 'acm'}"],
        env={**os.environ, "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A terminal's Ctrl-C goes to the script and to what it waits for.
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if " 3/100000 " in line:
                os.killpg(process.pid, signal.SIGINT)
        code = process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    assert code == 1, "".join(lines)
    assert "of 100000, so what follows it was not begun" in lines[-1]
    assert not (tmp_path / "acm" / "tuned").exists()
