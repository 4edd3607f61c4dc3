"""What a comparison found: a table, a plot and the numbers."""

from __future__ import annotations

import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from launch.comparison.config import Comparison
from launch.comparison.figures import mean_and_deviation
from launch.comparison.isoflop import isoflop_plot, isoflop_table


def write_results(comparison: Comparison, outcomes: list[dict[str, Any]]) -> None:
    """Write the numbers (.json), the table (.md) and the plot (.png); print the table."""
    results = Path(comparison.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    kept = [{k: v for k, v in outcome.items() if k != "config"} for outcome in outcomes]
    numbers = {
        "title": comparison.title,
        "operations": comparison.operations,
        "machine": platform.node(),
        "processor": _processor(),
        "torch": torch.__version__,
        "runs": kept,
    }
    results.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    make_table, make_plot = (isoflop_table, isoflop_plot) if comparison.sizes else (table, plot)
    text = make_table(comparison, outcomes)
    results.with_suffix(".md").write_text(text, encoding="utf-8")
    make_plot(comparison, outcomes, results.with_suffix(".png"))
    print(text)


def table(comparison: Comparison, outcomes: list[dict[str, Any]]) -> str:
    """A Markdown table: one row an arm, mean and standard deviation over seeds."""
    lines = [f"# {comparison.title}", ""]
    if comparison.about:
        lines += [comparison.about.strip(), ""]
    lines += [
        "| arm | steps | tokens | executed FLOPs | executed / nominal | validation loss | "
        "with the choice of training | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in comparison.arms:
        runs = [outcome for outcome in outcomes if outcome["arm"] == arm]
        executed = statistics.mean(run["executed_flops"] for run in runs)
        nominal = statistics.mean(run["nominal_flops"] for run in runs)
        cells = [
            arm,
            f"{runs[0]['steps']}",
            f"{runs[0]['tokens']:,}",
            f"{executed:.3g}",
            f"{executed / nominal:.3f}",
            mean_and_deviation([run["validation_loss"] for run in runs]),
            mean_and_deviation([run["validation_loss_training_choice"] for run in runs]),
            f"{statistics.mean(run['seconds'] for run in runs):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = ", ".join(str(seed) for seed in comparison.seeds)
    picture = Path(comparison.results).with_suffix(".png").name
    lines += [
        "",
        f"Nats per token, mean ± standard deviation over seeds {seeds}. {_verdict(outcomes)}",
        "",
        f"![{comparison.title}]({picture})",
        "",
    ]
    return "\n".join(lines)


def _verdict(outcomes: list[dict[str, Any]]) -> str:
    """Which arm is lowest, and how far the others are, seed by seed."""
    by_arm: dict[str, dict[int, float]] = {}
    for outcome in outcomes:
        by_arm.setdefault(outcome["arm"], {})[outcome["seed"]] = outcome["validation_loss"]
    best = min(by_arm, key=lambda arm: statistics.mean(by_arm[arm].values()))
    said = []
    for arm, losses in by_arm.items():
        if arm != best:
            shared = [seed for seed in losses if seed in by_arm[best]]
            gaps = [losses[seed] - by_arm[best][seed] for seed in shared]
            worse = sum(gap > 0 for gap in gaps)
            said.append(
                f"{arm} {statistics.mean(gaps):+.3f} (worse in {worse} of {len(gaps)} seeds)"
            )
    return f"Lowest: {best}" + (f"; against it {', '.join(said)}." if said else ".")


def plot(comparison: Comparison, outcomes: list[dict[str, Any]], path: Path) -> None:
    """Validation loss against executed operations, every run a line, arms by colour."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, arm in enumerate(comparison.arms):
        for index, run in enumerate(o for o in outcomes if o["arm"] == arm):
            flops, losses = zip(*run["curve"], strict=True)
            label = arm if index == 0 else None
            axes.plot(flops, losses, color=f"C{number}", label=label, alpha=0.8, marker=".")
    axes.set(xscale="log", xlabel="executed FLOPs", ylabel="validation loss, nats per token")
    axes.set_title(comparison.title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
