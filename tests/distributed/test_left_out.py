"""A run that leaves rows out goes on as one that was told so from the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive.observe.metric_log import read_metrics
from launch.checkpoint.files import read_state
from launch.checkpoint.state import RunState
from launch.run.config import from_mapping
from launch.run.errors import Failed
from launch.run.finite import Counters
from launch.run.left_out import jump, next_rows, with_loss
from launch.run.training import run
from launch.run.trust import trust
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.ranks import run_ranks

TASK = "tests.distributed.failing:FailingTask"


def test_next_rows_are_whole_and_outside_of_spans() -> None:
    spans = [[40, 48], [20, 21], [48, 50]]
    assert next_rows(0, 8, spans) == range(8)
    assert next_rows(16, 8, spans) == range(21, 29)
    # Behind a span that another one follows.
    assert next_rows(36, 8, spans) == range(50, 58)
    assert next_rows(50, 8, spans) == range(50, 58)


def test_mean_and_variance_are_those_of_all_losses_while_they_are_few() -> None:
    losses = torch.linspace(-3, 5, 40, dtype=torch.float64) ** 2 - 4
    state = RunState()
    for step, loss in enumerate(losses.tolist(), 1):
        state = with_loss(RunState(**{**vars(state), "phase_step": step}), loss)
    assert state.loss_mean == pytest.approx(losses.mean().item())
    assert state.loss_variance == pytest.approx(losses.var(unbiased=False).item())
    limit = state.loss_mean + 4 * state.loss_variance**0.5
    assert jump(state, limit - 1e-6, 4.0) is None
    assert jump(state, limit + 1e-6, 4.0) is not None
    assert jump(state, limit + 1e-6, 0.0) is None
    assert jump(RunState(phase_step=3), 1e9, 4.0) is None


def train_on(tree: dict[str, Any], environment: dict[str, str], stages: list[int]) -> list[Any]:
    trust([TASK])
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        for stage in stages:
            config = from_mapping({**tree, "deepspeed": {"zero_optimization": {"stage": stage}}})
            loop = make_loop(config)
            losses = []
            while loop.state.step < config.train.steps:
                report = loop.step(gradient_norms=True)
                losses += [] if report.left_out else [report.loss]
            weights: dict[str, Tensor] = loop.engine.full_weights()
            moments = loop.engine.full_moments()
            found.append((losses, weights, moments, loop.state))
            loop.close()
            torch.manual_seed(0)
    return found


def test_a_gradient_that_is_not_finite_leaves_no_trace(tmp_path: Path) -> None:
    """Row 13 is of the second rank and the second step; no bit differs but the count."""
    write_text(tmp_path)
    tree = tiny_config(tmp_path, task=TASK, train={"micro_batch_size": 2})
    stages = [0, 1, 2, 3]
    told = {**tree, "train": {**tree["train"], "skip_rows": [[8, 16]]}}
    poisoned = run_ranks(train_on, 2, tree, {"POISONS": "13"}, stages, timeout=120)
    skipped = run_ranks(train_on, 2, told, {}, stages, timeout=120)
    for rank, (ours, theirs) in enumerate(zip(poisoned, skipped, strict=True)):
        for stage, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert one[0] == other[0], (rank, stage)
            for mine, wanted in zip(one[1:3], other[1:3], strict=True):
                assert mine.keys() == wanted.keys()
                assert all(torch.equal(mine[name], wanted[name]) for name in wanted), stage
            assert (one[3].left_out, other[3].left_out) == (1, 0)
            assert {**vars(one[3]), "left_out": 0} == vars(other[3])


def run_tree(tree: dict[str, Any], environment: dict[str, str]) -> str | None:
    trust([TASK])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            run(from_mapping(tree))
        except Failed as error:
            return str(error)
    return None


def test_a_loss_that_jumps_takes_the_run_back_and_on_behind_it(tmp_path: Path) -> None:
    """Twice behind one checkpoint: the log is that of a run which was told, and says why."""
    write_text(tmp_path)
    tree = tiny_config(
        tmp_path,
        task=TASK,
        train={"steps": 30, "log_every": 1, "spike": 8.0},
        checkpoint={"every": 24, "keep": 5},
        monitor={"every": 1},
        model={"num_layers": 1, "mixture_of_depths": None},
    )
    # Steps 25 to 27 are behind the checkpoint of step 24; 26 jumps, and the first behind it again.
    environment = {"SPIKES": "200:216"}
    assert run_ranks(run_tree, 2, tree, environment, timeout=120) == [None, None]
    told = {**tree, "output": str(tmp_path / "told")}
    told["train"] = {**tree["train"], "skip_rows": [[192, 216]]}
    assert run_ranks(run_tree, 2, told, {}, timeout=120) == [None, None]
    ours, theirs = (read_metrics(Path(one["output"]) / "metrics.jsonl") for one in (tree, told))
    curves = [{x["step"]: x["loss/train"] for x in y if "loss/train" in x} for y in (ours, theirs)]
    assert curves[0] == curves[1]
    assert list(curves[0]) == list(range(1, 31))
    said = [line["message"] for line in ours if line.get("alarm") == "rolled_back"]
    assert [line["step"] for line in ours if line.get("alarm") == "rolled_back"] == [25, 25]
    assert said[0].endswith("; back to step 24, rows 192 to 207 are left out"), said
    assert said[1].endswith("; back to step 24, rows 192 to 215 are left out"), said
    newest = "checkpoints/step-00000030"
    states = [read_state(Path(one["output"]) / newest) for one in (tree, told)]
    assert {**vars(states[0]), "rollbacks": 0} == vars(states[1])
    assert states[0].rollbacks == 2
    # Every row from there on: it gives up, in one line.
    endless = {**tree, "output": str(tmp_path / "endless")}
    (failed, also) = run_ranks(run_tree, 2, endless, {"SPIKES": "200:9999"}, timeout=120)
    assert failed == also
    assert failed is not None
    assert failed.endswith("for the 4th time behind step 24: training stopped")


def test_what_a_model_counts_is_taken_back() -> None:
    model = torch.nn.BatchNorm1d(3)
    counters = Counters(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.full((2, 3), torch.inf))
    with torch.no_grad():
        counters.restore()
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
