"""The runs of a comparison: planned at equal operations, trained, measured."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from adaptive.blocks.protocol import RoutedBlock
from adaptive.flops import planned_flops
from adaptive.observe.metric_log import read_metrics
from launch.checkpoint.files import find_checkpoint, load_model, read_state
from launch.checkpoint.models import held_out_loss
from launch.comparison.config import Comparison, folder_name
from launch.run.children import Children
from launch.run.config import is_same, load_config, load_saved
from launch.run.errors import BadInput
from launch.run.folder import free_name, only_run_in
from launch.run.launcher import TRAIN
from launch.run.options import refuse_empty_values
from launch.run.plain_data import read_json
from launch.run.preflight import check_run, meta_model
from launch.run.sections import RunConfig
from launch.run.supervisor import Supervised, follow
from launch.run.terminal import announced
from launch.run.writable import write_text_whole
from launch.tasks.registry import make_task


@dataclass(frozen=True)
class Run:
    """One run of a comparison: an arm and a seed."""

    arm: str
    seed: int
    config: RunConfig
    words: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def result(self) -> Path:
        return self.folder / "result.json"


def plan_runs(comparison: Comparison, folder: Path) -> list[Run]:
    """Every arm and seed, with as many steps as the operations allow."""
    recipe = folder / comparison.recipe
    runs = []
    # Seed by seed: an interrupted comparison has the same seeds of every arm.
    for seed in comparison.seeds:
        for arm, overrides in comparison.arms.items():
            output = Path(comparison.output) / f"{folder_name(arm)}-{seed}"
            words = [*comparison.common, *overrides, f"train.seed={seed}", f"output={output}"]
            refuse_empty_values(words)
            steps = steps_within(load_config(recipe, words), comparison.operations)
            every = max(steps // comparison.points, 1)
            words += [f"train.steps={steps}", f"train.evaluate_every={every}"]
            config = load_config(recipe, words)
            with announced(f"checking {arm} seed {seed}"):
                check_run(_beginning(config), ranks=1)
            runs.append(Run(arm, seed, config, ["--config", str(recipe), *words]))
    return runs


def _beginning(config: RunConfig) -> RunConfig:
    """The run without what its folder holds: a changed one starts in an empty folder."""
    checkpoint = config.checkpoint
    resume = "never" if checkpoint.resume == "auto" else checkpoint.resume
    return dataclasses.replace(config, checkpoint=dataclasses.replace(checkpoint, resume=resume))


def steps_within(config: RunConfig, operations: float) -> int:
    """Steps whose planned operations come nearest to `operations`; at least one in each phase.

    Phases but the last keep their steps: a run that grows reaches its full size with what is left.
    """
    *before, last = config.phase_configs()
    rest = operations - sum(phase.train.steps * step_operations(phase) for phase in before)
    taken = sum(phase.train.steps for phase in before)
    return taken + max(round(rest / step_operations(last)), 1)


def step_operations(config: RunConfig) -> int:
    """Planned operations of one step, forward and backward."""
    task = make_task(config, device="meta")
    work = task.work(task.batch(range(config.train.batch_size)))
    if work is None:
        raise BadInput(f"task={config.task}: does not count its operations")
    return planned_flops(meta_model(config), work, backward=True)


def finish(run: Run, *, threads: int, children: Children) -> dict[str, Any] | None:
    """The outcome of a run, which is trained now unless it was; None when it failed."""
    if children.ended:
        return None
    outcome = _recorded(run.result)
    if isinstance(outcome, dict) and is_same(outcome.get("config"), run.config):
        return outcome
    if _holds_another(run):
        try:
            earlier = _set_aside(run.folder)
        except BadInput as error:  # it is being trained
            print(error, flush=True)
            return None
        print(f"{run.folder}: was trained with another configuration, is now {earlier}", flush=True)
    print(f"{run.arm} seed {run.seed}: {run.config.train.steps} steps", flush=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begun = time.perf_counter()
    with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
        command = [sys.executable, str(TRAIN), *run.words]
        train = run.config.train
        watched = Supervised(run.folder, train.hang_seconds, train.stop_seconds)
        wait = partial(follow, run=watched, ended=lambda: children.ended)
        code = children.run(command, wait=wait, env=environment, stdout=log, stderr=log)
    seconds = _add_leg(run, time.perf_counter() - begun)
    if code or not _is_complete(run):
        return None
    outcome = {
        "arm": run.arm,
        "seed": run.seed,
        "seconds": round(seconds, 1),
        **measure(run),
        "config": run.config.resolved(),
    }
    write_text_whole(run.result, json.dumps(outcome, indent=1))
    return outcome


def _recorded(path: Path) -> Any:
    """What an earlier call wrote; None: nothing that can be read, so that it is done again."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _holds_another(run: Run) -> bool:
    """Whether the run's folder has something that this run must not continue."""
    if not (run.folder / "run.yaml").is_file():
        return run.result.is_file()
    try:
        return load_saved(run.folder) != run.config
    except BadInput:  # of another version
        return True


def _set_aside(folder: Path) -> Path:
    with only_run_in(folder):
        return folder.rename(free_name(folder.with_name(f"{folder.name}-earlier")))


def _add_leg(run: Run, seconds: float) -> float:
    """Seconds that the run took until now; a leg that was killed with this program is not in it."""
    path = run.folder / "seconds.json"
    legs = _recorded(path) or []
    legs.append(round(seconds, 1))
    write_text_whole(path, json.dumps(legs))
    return float(sum(legs))


def _is_complete(run: Run) -> bool:
    """Whether the run took its steps, not fewer (one that was asked to stop exits 0) nor more."""
    steps = sum(config.train.steps for config in run.config.phase_configs())
    taken = read_state(find_checkpoint(run.folder)).step
    if taken != steps:
        print(f"{run.folder}: is at step {taken}, {steps} are planned", flush=True)
    return taken == steps


def measure(run: Run) -> dict[str, Any]:
    """What a finished run reached."""
    folder = find_checkpoint(run.folder)
    state = read_state(folder)
    curve = [
        [line["progress/executed_flops"], line["validation/loss"]]
        for line in read_metrics(run.folder / "metrics.jsonl")
        if line.get("validation/loss") is not None
    ]
    model, config = load_model(folder)
    task = make_task(config)
    routed = [module for module in model.modules() if isinstance(module, RoutedBlock)]
    for module in routed:
        module.causal = False
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": state.step,
        "tokens": state.tokens,
        "executed_flops": state.executed_flops,
        "nominal_flops": state.nominal_flops,
        "validation_loss": curve[-1][1],
        # As in training: the choice sees the whole sequence.
        "validation_loss_training_choice": held_out_loss(model, task) if routed else curve[-1][1],
        "curve": curve,
    }
