"""One trained model at many budgets: held-out quality against executed operations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adaptive.flops import Work, executed_flops, nominal_flops
from adaptive.routing.tape import RoutingTape
from launch.checkpoint.files import WEIGHTS, check_weights, find_checkpoint
from launch.run.config import load_config, load_saved
from launch.run.errors import BadInput
from launch.tasks import Task
from launch.tasks.registry import make_task


@dataclass(frozen=True)
class Point:
    """A setting of the model and what came of it.

    Attributes:
        settings: the overrides of this point.
        metrics: means over held-out rows.
        operations: executed, forward, a row.
        share: of the operations of the same model with every token computed.
    """

    settings: tuple[str, ...]
    metrics: dict[str, float]
    operations: float
    share: float


def settings_of(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of `KEY=VALUE,VALUE,…`, the last key changing fastest.

    Raises:
        BadInput: a word that is none, or of another section than `model`.
    """
    choices = []
    for word in words:
        key, equals, values = word.partition("=")
        if not equals or not key.startswith("model.") or not all(values.split(",")):
            raise BadInput(f"{word!r}: must be model.KEY=VALUE,VALUE,…")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*choices))


def budget_curve(
    path: str | Path, settings: Sequence[tuple[str, ...]], *, rows: int, at_once: int
) -> Iterator[Point]:
    """Measure a checkpoint at every setting, on its first `rows` held-out rows.

    Args:
        path: a checkpoint, or the folder of a run.
        settings: overrides of the configuration it was trained with.
        rows, at_once: held-out rows; how many of them in one forward.

    Raises:
        BadInput: a setting makes a model of other weights.
    """
    folder = find_checkpoint(path)
    check_weights(load_saved(folder), folder)
    weights = load_file(folder / WEIGHTS)
    for setting in settings:
        task = make_task(load_config(folder / "run.yaml", setting))
        model = task.build_model().eval()
        _load(model, weights, setting)
        yield _measure(model, task, setting, min(rows, task.validation_rows), at_once)


def _load(model: nn.Module, weights: dict[str, Tensor], setting: tuple[str, ...]) -> None:
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    try:
        missing, unknown = model.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:  # a shape that differs; the last line names it
        raise BadInput(f"{' '.join(setting)}: {str(error).splitlines()[-1].strip()}") from None
    for name in [*unknown, *(name for name in missing if name not in tied)]:
        raise BadInput(f"{' '.join(setting)}: makes another model: {name} is in one of them only")


@torch.no_grad()
def _measure(
    model: nn.Module, task: Task, setting: tuple[str, ...], rows: int, at_once: int
) -> Point:
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    executed = nominal = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for start in range(0, rows, at_once):
            batch = task.validation_batch(range(start, min(start + at_once, rows)))
            with RoutingTape(model) as tape:
                found = task.validation_sums(model, batch)
            for name, (value, count) in found.items():
                sums[name] = sums.get(name, 0.0) + float(value)
                counts[name] = counts.get(name, 0) + count
            work = Work.of(torch.cat(tape.lengths))
            executed += float(executed_flops(model, tape.records, work))
            nominal += float(nominal_flops(model, work))
    metrics = {name: sums[name] / counts[name] for name in sums}
    return Point(setting, metrics, executed / rows, executed / nominal)
