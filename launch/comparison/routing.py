"""What the experts of several runs do with the same held-out text."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from adaptive.blocks.mixture_of_experts import MixtureOfExperts
from adaptive.routing.collapse import (
    experts_of_all_tokens,
    inter_run_consistency,
    measuring_collapse,
    routing_fluctuation,
)
from adaptive.routing.tape import RoutingTape
from launch.checkpoint.files import find_checkpoint, load_model
from launch.comparison.figures import mean_and_deviation
from launch.data.text import TextConfig
from launch.run.errors import BadInput
from launch.tasks import Batch
from launch.tasks.registry import make_task
from parallel.checkpoint import problem_with, step_of

_ROWS_A_BATCH = 8


@dataclass
class Routing:
    """What one checkpoint did with the held-out text.

    Attributes:
        loss: nats per token.
        rc, cosine_spread: means over layers; NaN where a layer has none.
        choices: for each layer whose experts every token reaches, by its name, int64 [T, K].
        loads: float64 [L, E].
    """

    loss: float
    rc: float
    cosine_spread: float
    choices: dict[str, Tensor]
    loads: Tensor


@dataclass
class RunRow:
    """One line of the table."""

    run: str
    step: int
    loss: float
    rc: float
    cosine_spread: float
    fluctuation: float


def compare(runs: list[str], *, rows: int) -> tuple[list[RunRow], float]:
    """The table's lines, and inter-run consistency (NaN for one run).

    Raises:
        BadInput: a run has no checkpoint, no experts, or others than the runs before it.
    """
    lines, loads = [], []
    data = None
    for run in runs:
        newest, before = _last_two(run)
        now, data = route(newest, rows=rows, data=data)
        fluctuation = math.nan
        if before is not None:
            earlier, _ = route(before, rows=rows, data=data)
            changed = [
                routing_fluctuation(before_TK, now.choices[name])
                for name, before_TK in earlier.choices.items()
                if name in now.choices
            ]
            fluctuation = float(torch.stack(changed).mean()) if changed else math.nan
        if loads and loads[0].shape != now.loads.shape:
            raise BadInput(
                f"{run}: has [layers, experts] {list(now.loads.shape)}, "
                f"{runs[0]} has {list(loads[0].shape)}"
            )
        loads.append(now.loads)
        lines.append(RunRow(run, step_of(newest), now.loss, now.rc, now.cosine_spread, fluctuation))
    consistency = float(inter_run_consistency(loads)) if len(loads) > 1 else math.nan
    return lines, consistency


def route(
    checkpoint: Path, *, rows: int, data: TextConfig | None = None
) -> tuple[Routing, TextConfig]:
    """What a checkpoint does with the first held-out rows of `data`, by default its own.

    Raises:
        BadInput: the model has no experts.
    """
    model, config = load_model(checkpoint)
    if not any(isinstance(module, MixtureOfExperts) for module in model.modules()):
        raise BadInput(f"{checkpoint}: this model has no experts")
    if data is not None and (data.tokenizer, data.seq_len) != (
        config.data.tokenizer,
        config.data.seq_len,
    ):
        raise BadInput(f"{checkpoint}: has another tokenizer or sequence length than the first run")
    if data is not None:
        config = replace(config, data=data)
    task = make_task(config)
    batch = _held_out(task.validation_batch, min(rows, task.validation_rows))
    # One batch: the scatter matrices of RC are those of all tokens together.
    with torch.no_grad(), measuring_collapse(model), RoutingTape(model) as tape:
        sums = task.validation_sums(model, batch)
    total, count = sums["loss"]
    records = [record for record in tape.records if record.load is not None]
    choices = {
        r.name: r.chosen for r in experts_of_all_tokens(tape.records) if r.chosen is not None
    }
    loads = torch.stack([record.load.double() for record in records if record.load is not None])

    def mean_of(name: str) -> float:
        found = [float(r.statistics[name]) for r in records if name in r.statistics]
        return statistics.fmean(found) if found else math.nan

    routing = Routing(
        float(total) / float(count),
        mean_of("collapse/rc"),
        mean_of("collapse/cosine_spread"),
        choices,
        loads,
    )
    return routing, config.data


def table(rows: list[RunRow], consistency: float) -> str:
    """The lines, then their mean and standard deviation, in Markdown."""
    lines = [
        "| run | step | loss | RC | cosine spread | fluctuation |",
        "|---|---|---|---|---|---|",
    ]
    columns = ("loss", "rc", "cosine_spread", "fluctuation")
    for row in rows:
        cells = " | ".join(f"{getattr(row, name):.4g}" for name in columns)
        lines.append(f"| {row.run} | {row.step} | {cells} |")
    if len(rows) > 1:
        form = "{:.4g} ± {:.2g}"
        cells = " | ".join(mean_and_deviation([getattr(r, n) for r in rows], form) for n in columns)
        lines.append(f"| mean ± standard deviation | | {cells} |")
        lines.append(f"\ninter-run consistency {consistency:.4f}")
    return "\n".join(lines)


def _last_two(run: str) -> tuple[Path, Path | None]:
    newest = find_checkpoint(run)
    if newest == Path(run):
        return newest, None
    others = [
        folder
        for folder in sorted(newest.parent.glob("step-*"))
        if folder < newest and problem_with(folder) is None
    ]
    return newest, others[-1] if others else None


def _held_out(batch_of: object, rows: int) -> Batch:
    assert callable(batch_of)
    parts = [
        batch_of(range(start, min(start + _ROWS_A_BATCH, rows)))
        for start in range(0, rows, _ROWS_A_BATCH)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
