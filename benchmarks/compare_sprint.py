"""Is SPRINT's recipe worth its parts? Five variants at equal executed operations, three seeds.

dense       every token everywhere
structured  SPRINT: a quarter of the middle's tokens, one of each 2x2 cell; then all of them
random      the same with the quarter taken anywhere
sparse      the middle's path alone: the fusion sees [MASK] in the encoder's place
dense path  no middle: the encoder's path alone

Sparse stages get `--sparse-share` of the operations, a dense stage the rest; single-stage variants
get everything. Measured with the averaged weights: validation loss (all tokens kept), and of 500
samples the accuracy and the Fréchet distance of `launch.quality`.

Finished runs are kept in --output and not repeated.

    recipes/compare_sprint.sh [--jobs N] [--tera-operations N] [--seeds N] [--quick]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from measure import machine

from adaptive.flops import planned_flops
from adaptive.models import DiffusionTransformer
from launch.data.images import ImageData
from launch.generation.images import draw_samples, load_diffusion
from launch.generation.quality import Judge
from launch.run.config import load_config
from launch.run.finished import unfinished
from launch.run.sections import RunConfig
from launch.run.training import run
from launch.tasks.diffusion import DiffusionTask
from parallel.mesh import Mesh
from parallel.ranks import end_with_parent

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
SPARSE: dict[str, Any] = {"keep": 0.25}
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "dense": ({"keep": 1.0}, False),
    "structured": ({**SPARSE, "keeping": "structured"}, True),
    "random": ({**SPARSE, "keeping": "random"}, True),
    "sparse": ({**SPARSE, "paths": "sparse"}, True),
    "dense path": ({"keep": 1.0, "paths": "dense", "middle_depth": 0}, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--tera-operations", type=float, default=1.0, help="of every run")
    parser.add_argument("--sparse-share", type=float, default=0.8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--output", default="runs/compare_sprint", help="folder of finished runs")
    parser.add_argument("--quick", action="store_true", help="a smoke test; writes nothing")
    options = parser.parse_args()
    if options.quick:
        options.tera_operations, options.seeds, options.samples = 0.01, 1, 64
        options.output = tempfile.mkdtemp(prefix="compare-sprint-")
    wanted = [(name, seed) for seed in range(options.seeds) for name in VARIANTS]
    # Fresh processes: a process group and an engine belong to one run at a time.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=end_with_parent) as pool:
        rows = list(pool.map(partial(finished, options=options), wanted))
    if options.quick:
        shutil.rmtree(options.output)
    else:
        write(rows, options)


def finished(which: tuple[str, int], *, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one variant and seed, from its file or from training it now."""
    name, seed = which
    torch.set_num_threads(1)
    file = Path(options.output) / f"{name.replace(' ', '_')}-{seed}.json"
    setting = {key: getattr(options, key) for key in ("tera_operations", "sparse_share", "samples")}
    setting["recipe"] = Path(options.config).read_text(encoding="utf-8")
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["setting"] == setting:
            return kept["row"]
    row = measured(name, seed, options)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"setting": setting, "row": row}, indent=1), encoding="utf-8")
    print(json.dumps(row), flush=True)
    return row


def measured(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one variant and measure it."""
    with tempfile.TemporaryDirectory(prefix="compare-sprint-") as folder:
        config = configured(name, seed, folder, options)
        begun = time.perf_counter()
        run(config)
        # A run that was stopped as asked returns as well, and must not be measured.
        if unfinished(config) is not None:
            raise SystemExit(f"error: {name} seed {seed}: stopped; the same command continues")
        seconds = time.perf_counter() - begun
        model, saved = load_diffusion(folder)
        row: dict[str, Any] = {"variant": name, "seed": seed, "train_seconds": round(seconds, 1)}
        row["steps"] = [phase.train["steps"] for phase in config.phases]
        row["validation_loss"] = validation_loss(model, saved)
        judge = judge_of(options.config)
        labels = torch.arange(options.samples) % 10
        guided = ["classifier_free"] + ([] if name == "dense path" else ["path_drop"])
        for guidance in guided:
            sampling = dataclasses.replace(saved.sampling, guidance=guidance)
            samples = draw_samples(model, labels, sampling, seed=seed)
            row[guidance] = judge.of_samples(samples.images, labels)
        return row


@cache
def judge_of(config: str) -> Judge:
    """The classifier of the real images: one for all runs of a process."""
    read = load_config(config, [])
    return Judge(ImageData(read.data, read.model), num_classes=read.model.num_classes)


def configured(name: str, seed: int, folder: str, options: argparse.Namespace) -> RunConfig:
    """The run of one variant: as many steps as its operations allow."""
    changes, two_stages = VARIANTS[name]
    overrides = [f"output={folder}", f"train.seed={seed}", "train.log_every=1000000"]
    overrides += [f"model.{key}={value}" for key, value in changes.items()]
    base = load_config(options.config, overrides)
    budget = options.tera_operations * 1e12
    stages = [("sparse", options.sparse_share), ("dense", 1 - options.sparse_share)]
    phases = []
    for stage, share in stages if two_stages else [("dense", 1.0)]:
        model = {"keep": 1.0} if stage == "dense" else {}
        with torch.device("meta"):
            network = DiffusionTransformer(base.model)
        network.trunk.keep = model.get("keep", base.model.keep)
        batch = base.train.batch_size
        step = planned_flops(network, batch, base.model.tokens, backward=True)
        train: dict[str, Any] = {"steps": max(round(budget * share / step), 1)}
        if stage == "dense" and two_stages:
            train["learning_rate"] = base.train.learning_rate / 2
        phases.append(f"{{name: {stage}, model: {json.dumps(model)}, train: {json.dumps(train)}}}")
    return load_config(options.config, [*overrides, f"phases=[{', '.join(phases)}]"])


@torch.no_grad()
def validation_loss(model: DiffusionTransformer, config: RunConfig) -> float:
    """Of the averaged weights, every token kept."""
    task = DiffusionTask(config, mesh=Mesh.single(), device=torch.device("cpu"))
    batch = task.validation_batch(range(task.validation_rows))
    value, count = task.validation_sums(model, batch)["loss"]
    return float(value) / count


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Table and figure, means over seeds with their range."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    setting = {**machine(), "tera_operations": options.tera_operations, "jobs": options.jobs}
    result = {"setting": setting, "rows": rows}
    (RESULTS / "compare_sprint.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "# SPRINT against dense, random keeping and its single paths",
        "",
        f"Shapes, 32x32 (data.rendered), {options.tera_operations:g}e12 executed operations a run "
        "(forward and backward), "
        f"{options.seeds} seeds: mean (lowest to highest). Averaged weights; "
        f"{options.samples:,} samples. By `recipes/compare_sprint.sh` on {setting['machine']}, "
        f"one thread a run, torch {setting['torch']}, {setting['date']}.",
        "",
        "Classifier-free (cf) and path-drop (pd) guidance.",
        "",
        "| variant | steps | validation loss | accuracy, cf | Fréchet, cf | accuracy, pd "
        "| Fréchet, pd | train s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        own = [row for row in rows if row["variant"] == name]
        cells = [name, " + ".join(str(n) for n in own[0]["steps"])]
        cells.append(_spread([row["validation_loss"] for row in own], 4))
        for guidance in ("classifier_free", "path_drop"):
            for key, digits in (("accuracy", 3), ("frechet_distance", 1)):
                values = [row[guidance][key] for row in own if guidance in row]
                cells.append(_spread(values, digits) if values else "none")
        cells.append(_spread([row["train_seconds"] for row in own], 0))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "![losses and distances](compare_sprint.png)", ""]
    (RESULTS / "compare_sprint.md").write_text("\n".join(lines), encoding="utf-8")
    _plot(rows)


def _spread(values: list[float], digits: int) -> str:
    mean = statistics.mean(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _plot(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    panels = (
        ("validation loss", lambda row: row["validation_loss"]),
        ("Fréchet distance", lambda row: row["classifier_free"]["frechet_distance"]),
    )
    for axis, (title, value) in zip(axes, panels, strict=True):
        for place, name in enumerate(VARIANTS):
            own = [value(row) for row in rows if row["variant"] == name]
            axis.plot([place] * len(own), own, "o", color="tab:blue", alpha=0.6)
            axis.plot([place - 0.2, place + 0.2], [statistics.mean(own)] * 2, color="black")
        axis.set_xticks(range(len(VARIANTS)), list(VARIANTS), rotation=20)
        axis.set_title(title)
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(RESULTS / "compare_sprint.png", dpi=120)


if __name__ == "__main__":
    main()
