"""`launch.start --restarts`: a run that is killed goes on by itself, on ranks that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptive.observe.metric_log import read_metrics
from launch.checkpoint.files import read_state
from launch.run.arguments import parse
from launch.run.config import from_mapping
from launch.run.launcher import launcher_options
from launch.run.restarts import Restarts
from launch.run.training import run
from launch.run.trust import trust
from launch.start import _start
from tests.distributed.runs import tiny_config, write_text
from tests.distributed.started import Started
from tests.ranks import run_ranks

TASK = "tests.distributed.failing:FailingTask"


def small(folder: Path, name: str, **train: Any) -> dict[str, Any]:
    return tiny_config(
        folder,
        task=TASK,
        output=str(folder / name),
        train={"steps": 8, "log_every": 1, **train},
        checkpoint={"every": 2, "resume": "never"},
        monitor={"every": 1},
        deepspeed={"zero_optimization": {"stage": 1}},
    )


def run_tree(tree: dict[str, Any]) -> None:
    trust([TASK])
    run(from_mapping(tree))


@pytest.mark.timeout(300)
def test_a_killed_run_restarts_and_leaves_out_what_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 dies by kill -9 behind step 3, the gradient of step 6 is not finite on rank 1."""
    write_text(tmp_path)
    undisturbed = small(tmp_path, "undisturbed", skip_rows=[[40, 48]])
    run_ranks(run_tree, 2, undisturbed, timeout=120)
    monkeypatch.setenv("DIES", f"1:28:{tmp_path / 'died'}")
    monkeypatch.setenv("POISONS", "45")
    tree = small(tmp_path, "disturbed")
    started = Started(tree, tmp_path, options=("--ranks", "2", "--restarts", "1"))
    try:
        code, said = started.end()
    finally:
        started.close()
    assert code == 0, said
    assert (tmp_path / "died").exists()
    assert "error: rank 1 (process " in said
    assert "\nrestart 1 of 1, after exit code " in said
    assert f"continuing from {tmp_path}/disturbed/checkpoints/step-00000002" in said
    logs = [read_metrics(Path(one["output"]) / "metrics.jsonl") for one in (tree, undisturbed)]
    curves = [[(x["step"], x["loss/train"]) for x in log if "loss/train" in x] for log in logs]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == list(range(1, 9))
    (alarm,) = [line for line in logs[0] if "alarm" in line]
    assert (alarm["alarm"], alarm["step"]) == ("left_out", 6)
    assert alarm["message"].startswith("rows 40 to 47 are left out: their gradient is not finite")
    assert read_state(tmp_path / "disturbed/checkpoints/step-00000008").left_out == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_host_that_does_not_answer_is_left_out(tmp_path: Path) -> None:
    write_text(tmp_path)
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\nno-such-host.invalid slots=1\n")
    tree = small(tmp_path, "fewer", steps=2)
    options = ("--hostfile", str(hosts), "--restarts", "1")
    started = Started(tree, tmp_path, options=options)
    try:
        code, said = started.end()
    finally:
        started.close()
    assert code == 0, said
    assert "left out, since they do not answer: no-such-host.invalid" in said
    assert "on 1 ranks: from the newest intact checkpoint" in said
    assert "1 ranks have met" in said
    assert read_state(tmp_path / "fewer/checkpoints/step-00000002").ranks == 1


def test_a_batch_that_does_not_divide_among_what_is_left_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path)
    trust([TASK])
    hosts, recipe = tmp_path / "hosts", tmp_path / "run.yaml"
    hosts.write_text("localhost slots=3\nno-such-host.invalid slots=1\n")
    recipe.write_text(yaml.safe_dump(small(tmp_path, "odd")))
    words = ["--config", str(recipe), "--hostfile", str(hosts), "--restarts", "1"]
    parsed = parse(words, program="start", launcher=launcher_options())
    assert Restarts(parsed, _start)(1, True) is None
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: no restart: train.batch_size=8: must be a multiple of the 3 data-parallel ranks"
    )
