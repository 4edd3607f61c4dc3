"""A profile of a run's steps: takes them on every rank, writes and says what rank 0's cost.

FOLDER/trace.json.gz   for https://ui.perfetto.dev or chrome://tracing
FOLDER/flame.png       the regions, as wide as they took long
FOLDER/regions.json    the numbers of the table
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces every profile

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from adaptive.observe.monitor import Monitor
from adaptive.observe.regions import OTHER, Cost, Costs, costs_by_region, named_regions, region
from launch.checkpoint.state import RunState
from launch.run.engine import Engine
from launch.run.flame import draw_flame
from launch.run.loop import Loop
from launch.run.ranks import StopRequest, is_first, join_ranks
from launch.run.sections import RunConfig
from launch.tasks.registry import task_class
from parallel.mesh import Mesh

# What a loop calls around a model: DeepSpeed's part of them is the engine's.
ENGINE = ("forward", "backward", "step")


def profile_run(
    config: RunConfig, folder: Path | None, *, warmup: int, steps: int
) -> tuple[Costs, dict[str, float]]:
    """Train `warmup` steps, then `steps` under the profiler. Every rank calls it.

    Args:
        config: of the phase; its folder is not touched, no checkpoint is read.
        folder: where rank 0 writes; None: nothing is written.
        warmup: steps before, which are timed: at least 1.
        steps: that are profiled.

    Returns:
        What this rank's steps cost, and seconds of a step (the median) by the clock:
        "undisturbed", "profiled".
    """
    device = join_ranks()
    mesh = Mesh.create(**vars(config.parallel))
    task = task_class(config.task)(config, mesh=mesh, device=device)
    engine = Engine(config, task, mesh=mesh, device=device)
    # As in a run, but for what is written.
    monitor = Monitor(engine.model, every=config.monitor.every, group=mesh.token_group)
    state, stop = RunState(), StopRequest()
    loop = Loop(config, task, engine, state=state, stop=stop, monitor=monitor)
    task.start_phase(engine)

    def step() -> float:
        begun = time.perf_counter()
        report = loop.step()
        with region("monitor"):
            operations = report.executed_flops, report.nominal_flops
            scalars = {"loss/train": report.loss}
            seconds = time.perf_counter() - begun
            number = loop.state.step
            monitor.end_step(
                number, scalars, tokens=report.tokens, seconds=seconds, operations=operations
            )
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    undisturbed = [step() for _ in range(warmup)]
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    # The first step under a profiler pays for its beginning.
    phases = schedule(wait=0, warmup=1, active=steps, repeat=1)
    with (
        named_regions(engine.model),
        profile(activities=activities, schedule=phases, profile_memory=True) as profiler,
    ):
        profiled = []
        for _ in range(1 + steps):
            profiled.append(step())
            profiler.step()
    costs = costs_by_region(profiler)
    if folder is not None and is_first():
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    loop.close()
    return costs, {
        "undisturbed": statistics.median(undisturbed[1:] or undisturbed),
        "profiled": statistics.fmean(profiled[1:]),
    }


def profile_on_rank(config: RunConfig, folder: Path, *, warmup: int, steps: int) -> str:
    """`profile_run` on one rank of a process group; the table of its costs."""
    costs, clock = profile_run(config, folder, warmup=warmup, steps=steps)
    if is_first():
        (folder / "regions.json").write_text(json.dumps(numbers(costs, clock), indent=1) + "\n")
        draw_flame(costs, folder / "flame.png")
    return table(costs, clock)


def by_part(costs: Costs) -> dict[str, tuple[Cost, Cost]]:
    """`Costs.by_name`, the engine's three parts as one."""
    rows: dict[str, tuple[Cost, Cost]] = {}
    for name, (first, second) in costs.by_name().items():
        row = "engine" if name in ENGINE else name
        old = rows.get(row, (Cost(), Cost()))
        rows[row] = (old[0] + first, old[1] + second)
    return rows


def numbers(costs: Costs, clock: dict[str, float]) -> dict[str, Any]:
    """The table as plain data, seconds and bytes of a step."""
    regions = {
        name: {
            "forward": first.seconds / costs.steps,
            "backward": second.seconds / costs.steps,
            "device": (first.device_seconds + second.device_seconds) / costs.steps,
            "calls": first.calls / costs.steps,
            "kept_bytes": first.kept / costs.steps,
        }
        for name, (first, second) in by_part(costs).items()
    }
    return {
        "seconds_of_a_step": clock,
        "steps": costs.steps,
        "peak_bytes": costs.peak,
        "regions": regions,
    }


def table(costs: Costs, clock: dict[str, float]) -> str:
    """One line a region, the dearest first; what no region covers; the sum."""
    rows = by_part(costs)
    other = rows.pop(OTHER, (Cost(), Cost()))
    device = any(a.device_seconds + b.device_seconds for a, b in rows.values())
    order = sorted(rows.items(), key=lambda row: -sum(c.seconds for c in row[1]))
    order.append((OTHER, other))
    total = sum(a.seconds + b.seconds for _, (a, b) in order)
    width = max(len(name) for name, _ in order)
    head = f"{'region':{width}} {'forward':>9} {'backward':>9} {'all, ms':>9} {'share':>6}"
    head += f" {'calls':>6} {'keeps, MiB':>11}" + (f" {'device, ms':>11}" if device else "")
    lines = [head]
    for name, (first, second) in order:
        both = first + second
        a, b, c = (1e3 * x.seconds / costs.steps for x in (first, second, both))
        line = f"{name:{width}} {a:9.2f} {b:9.2f} {c:9.2f} {both.seconds / total:6.1%}"
        line += f" {both.calls / costs.steps:6.0f} {first.kept / costs.steps / 2**20:11.2f}"
        if device:
            line += f" {1e3 * both.device_seconds / costs.steps:11.2f}"
        lines.append(line)
    taken, clocked = total / costs.steps, clock["profiled"]
    lines.append(
        f"{'sum':{width}} {1e3 * taken:29.2f}   of {1e3 * clocked:.2f} by the clock "
        f"({taken / clocked:.1%}); without a profiler {1e3 * clock['undisturbed']:.2f}"
    )
    lines.append(f"at most {costs.peak / 2**20:.1f} MiB beyond what a step begins with")
    return "\n".join(lines)
