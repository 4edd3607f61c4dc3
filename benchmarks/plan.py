"""Seconds of a step of a recipe on 2 ranks, on every mesh: what the planner predicts, and measured.

    python benchmarks/plan.py [--quick]

Trains recipes/mod_lm.yaml for a few steps through `launch.start`, as a user does, and holds the
second half of them against `launch.plan --machine this`, probed before the first run and after the
last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import save
from launch.planning.machines import Machine, between
from launch.planning.plans import plan
from launch.planning.probe import measure
from launch.run.children import Child
from launch.run.config import load_config
from parallel.mesh import Mesh

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
RECIPE = ROOT / "recipes" / "mod_lm.yaml"
WIDTH = ["model.dim=192", "model.num_heads=6"]  # of the recorded steps
MESHES: dict[str, dict[str, Any]] = {
    "data": {"data": RANKS},
    "tensor": {"tensor": RANKS},
    "tensor, sequence parallel": {"tensor": RANKS, "sequence_parallel": True},
    "context (Ulysses)": {"context": RANKS},
    "context (ring)": {"context": RANKS, "context_attention": "ring"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps, nothing is written")
    quick = parser.parse_args().quick
    steps = 4 if quick else 12
    config = load_config(RECIPE, WIDTH)
    before = measure(RANKS, dim=config.model.dim)
    measured = {name: seconds_per_step(axes, steps) for name, axes in MESHES.items()}
    machine = between(before, measure(RANKS, dim=config.model.dim))
    cases = {}
    for name, seconds in measured.items():
        found = predicted(name, machine)
        cases[name] = {
            "seconds": seconds,
            "predicted": found,
            "predicted_of_measured": found / seconds,
        }
        print(f"{name}: {seconds:.3f} s a step, predicted {found:.3f}")
    if not quick:
        save("plan", {"recipe": RECIPE.stem, "probe": machine.record(), "meshes": cases})


def predicted(name: str, machine: Machine) -> float:
    """Seconds of a step."""
    return plan(load_config(RECIPE, WIDTH), Mesh(**MESHES[name]), machine, mixed=False).seconds


def seconds_per_step(axes: dict[str, Any], steps: int) -> float:
    """Of the second half of a run's steps."""
    split = [f"parallel.{axis}={value}" for axis, value in axes.items() if axis != "data"]
    with tempfile.TemporaryDirectory() as folder:
        words = [
            *WIDTH,
            f"output={folder}/run",
            f"train.steps={steps}",
            "monitor.tensorboard=false",
        ]
        words += [f"train.log_every={steps // 2}", f"monitor.every={steps // 2}"]
        words += [
            "monitor.tensorboard=false",
            "train.evaluate_every=0",
            "train.calibrate_rows=0",
            "checkpoint.every=0",
        ]
        command = [sys.executable, "-m", "launch.start", "--ranks", str(RANKS)]
        with Child(
            [*command, "--config", str(RECIPE), *words, *split],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        ) as run:
            if run.wait():
                raise SystemExit("error: a measured run failed")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line).get("throughput/seconds_per_step") for line in lines]
    return [seconds for seconds in found if seconds is not None][-1]


if __name__ == "__main__":
    main()
