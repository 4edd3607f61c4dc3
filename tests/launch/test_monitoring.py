"""What a run writes about itself, through the program that users start."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptive.observe.metric_log import read_metrics
from launch.checkpoint.files import load_model
from launch.run.config import load_config
from launch.run.errors import Failed
from launch.run.training import run
from tests.ranks import run_ranks

RECIPE = {
    "task": "language_model",
    "model": {
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "max_seq_len": 32,
        "mixture_of_depths": {"capacity": 0.25},
    },
    "data": {"seq_len": 32, "validation_rows": 4},
    "train": {
        "steps": 6,
        "batch_size": 4,
        "warmup_steps": 2,
        "evaluate_every": 3,
        "calibrate_rows": 4,
    },
    "checkpoint": {"every": 4},
    "monitor": {"every": 2, "tensorboard": False},
}


def start(arguments: list[str], rate: float | None = None) -> tuple[str, str]:
    """Why a run on this rank failed ("" if it did not), and everything it printed."""
    printed, failure = io.StringIO(), ""
    config = load_config(arguments[0], arguments[1:])
    if rate is not None:  # that no configuration allows
        object.__setattr__(config.train, "learning_rate", rate)
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            run(config)
        except Failed as error:
            failure = str(error)
    return failure, printed.getvalue()


def recipe(folder: Path, **changes: Any) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "output": str(folder / "run"), **changes}))
    return [str(path)]


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    return [
        {
            name: value
            for name, value in line.items()
            if not re.search("second|memory|waiting", name)
        }
        for line in read_metrics(folder / "run" / "metrics.jsonl")
    ]


def test_a_resumed_run_leaves_the_log_of_an_undisturbed_one(tmp_path: Path) -> None:
    arguments = recipe(tmp_path)
    ((failure, printed),) = run_ranks(start, 1, arguments)
    assert not failure, printed
    undisturbed = timeless(tmp_path)
    assert [line["step"] for line in undisturbed] == [2, 3, 4, 6, 6]
    # As after a kill: the newest checkpoint is that of step 4, and what came after is in the log.
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step-*6")
    newest.rename(tmp_path / "elsewhere")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    ((failure, printed),) = run_ranks(start, 1, arguments)
    assert not failure, printed
    assert "continuing from" in printed
    assert "other settings" not in printed
    assert timeless(tmp_path) == undisturbed
    # Calibrated on the same rows before each evaluation: it executes the trained share.
    for line in (undisturbed[1], undisturbed[-1]):
        share = line["validation_routing/layers.1/executed_share"]
        assert share == pytest.approx(0.25, abs=0.01)
    model, _ = load_model(tmp_path / "run")
    assert model.state_dict()["layers.1.threshold"] != 0


def test_a_run_that_continues_otherwise_than_it_began_says_so(tmp_path: Path) -> None:
    arguments = recipe(tmp_path)
    ((failure, printed),) = run_ranks(start, 1, arguments)
    assert not failure, printed
    changes = ["train.steps=8", "model.mixture_of_depths.capacity=0.5", "monitor.every=3"]
    ((failure, printed),) = run_ranks(start, 1, arguments + changes)
    assert not failure, printed
    (line,) = [line for line in printed.splitlines() if "other settings" in line]
    assert "model.mixture_of_depths.capacity: 0.5, was 0.25" in line
    assert "train.steps: 8, was 6" in line
    assert "monitor" not in line


def test_an_alarm_is_one_line_and_may_end_the_run(tmp_path: Path) -> None:
    """A learning rate that ruins the model: the loss stops being finite."""
    train = {**RECIPE["train"], "warmup_steps": 0, "gradient_clip": 0}
    ((failure, printed),) = run_ranks(start, 1, recipe(tmp_path, train=train), 1e30)
    assert "not finite" in failure
    alarms = [line for line in printed.splitlines() if line.startswith("alarm at step")]
    assert len(alarms) == 4, printed  # three are left out, the fourth in a row ends the run
    assert all("are left out: their gradient is not finite" in line for line in alarms), printed
    assert {"left_out"} <= {line.get("alarm") for line in timeless(tmp_path)}
