"""The runs of a comparison: planned at equal operations, trained, measured."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
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
    """One run of a comparison: an arm, a size ("" where there is one), a budget and a seed."""

    arm: str
    size: str
    operations: float
    seed: int
    recipe: Path
    config: RunConfig
    overrides: list[str]

    def __str__(self) -> str:
        size = f" {self.size} at {self.operations:g}" if self.size else ""
        return f"{self.arm}{size} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def labels(self) -> dict[str, Any]:
        """What tells the run from others, and, with the recipe, all that it depends on."""
        return {
            "arm": self.arm,
            "size": self.size,
            "operations": self.operations,
            "seed": self.seed,
            "overrides": self.overrides,
        }


def plan_runs(comparison: Comparison, folder: Path) -> list[Run]:
    """Every arm, size, budget and seed, with as many steps as the operations allow."""
    # Seed by seed, and cheap ones first: an interrupted comparison has the same of every arm.
    return [
        _plan(comparison, folder, arm, size, operations, seed)
        for seed in comparison.seeds
        for operations in comparison.budgets
        for size in comparison.sizes or [""]
        for arm in comparison.arms
    ]


def runs_at_optimum(
    comparison: Comparison, folder: Path, outcomes: list[dict[str, Any]]
) -> list[Run]:
    """The further seeds of each arm's best size at each budget, and of the sizes beside it."""
    sizes = list(comparison.sizes)
    planned = []
    for seed in comparison.optimum_seeds:
        for operations in comparison.budgets:
            for arm in comparison.arms:
                known = of_seeds(outcomes, comparison.seeds, arm=arm, operations=operations)
                best = min(sizes, key=lambda size, known=known: mean_loss(known, size=size))
                place = sizes.index(best)
                for size in sizes[max(place - 1, 0) : place + 2]:
                    planned.append(_plan(comparison, folder, arm, size, operations, seed))
    return planned


def of_seeds(
    outcomes: list[dict[str, Any]], seeds: list[int], **labels: Any
) -> list[dict[str, Any]]:
    """The outcomes of some seeds whose labels (arm, size, operations) are those given."""
    return [
        outcome
        for outcome in outcomes
        if outcome["seed"] in seeds and all(outcome[key] == labels[key] for key in labels)
    ]


def mean_loss(outcomes: list[dict[str, Any]], **labels: Any) -> float:
    """Of the outcomes with these labels; a diverged run's is infinite."""
    losses = [
        outcome["validation_loss"]
        for outcome in outcomes
        if all(outcome[key] == labels[key] for key in labels)
    ]
    mean = statistics.fmean(losses)
    return mean if math.isfinite(mean) else math.inf


def _plan(
    comparison: Comparison, folder: Path, arm: str, size: str, operations: float, seed: int
) -> Run:
    recipe = folder / comparison.recipe
    several = len(comparison.budgets) > 1
    parts = [folder_name(arm), folder_name(size), f"{operations:g}" if several else "", f"{seed}"]
    output = Path(comparison.output) / "-".join(filter(None, parts))
    overrides = [*comparison.common, *comparison.sizes.get(size, []), *comparison.arms[arm]]
    overrides.append(f"train.seed={seed}")
    refuse_empty_values(overrides)
    steps = steps_within(load_config(recipe, overrides), operations)
    every = max(steps // comparison.points, 1)
    overrides += [f"train.steps={steps}", f"train.evaluate_every={every}"]
    config = load_config(recipe, [*overrides, f"output={output}"])
    run = Run(arm, size, operations, seed, recipe, config, overrides)
    with announced(f"checking {run}"):
        check_run(_beginning(run.config), ranks=1)
    return run


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


def known_runs(path: Path) -> list[dict[str, Any]]:
    """The outcomes in the numbers that a comparison wrote, maybe on another machine.

    Raises:
        BadInput: the file holds none.
    """
    try:
        numbers = read_json(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"known={path}: {getattr(error, 'strerror', None) or error}") from None
    runs = numbers.get("runs") if isinstance(numbers, dict) else None
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise BadInput(f"known={path}: must be the .json of a comparison's results")
    return runs


def finish(
    run: Run, *, threads: int, children: Children, known: Sequence[dict[str, Any]] = ()
) -> dict[str, Any] | None:
    """The outcome of a run, which is trained now unless it was; None when it failed.

    One of `known` that had the same overrides is as good as the run's own.
    """
    if children.ended:
        return None
    outcome = _recorded(run.result)
    if isinstance(outcome, dict) and is_same(outcome.get("config"), run.config):
        return outcome | run.labels
    for outcome in known:
        if all(outcome.get(key) == value for key, value in run.labels.items()):
            return outcome
    if _holds_another(run):
        try:
            earlier = _set_aside(run.folder)
        except BadInput as error:  # it is being trained
            print(error, flush=True)
            return None
        print(f"{run.folder}: was trained with another configuration, is now {earlier}", flush=True)
    print(f"{run}: {run.config.train.steps} steps", flush=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begun = time.perf_counter()
    with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
        words = ["--config", str(run.recipe), *run.overrides, f"output={run.folder}"]
        command = [sys.executable, str(TRAIN), *words]
        train = run.config.train
        watched = Supervised(run.folder, train.hang_seconds, train.stop_seconds)
        wait = partial(follow, run=watched, ended=lambda: children.ended)
        code = children.run(command, wait=wait, env=environment, stdout=log, stderr=log)
    seconds = _add_leg(run, time.perf_counter() - begun)
    if code or not _is_complete(run):
        return None
    outcome = {
        **run.labels,
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
