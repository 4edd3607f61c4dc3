"""What a sweep of sizes found: IsoFLOP curves and their optima."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from launch.comparison.config import Comparison
from launch.comparison.figures import mean_and_deviation
from launch.comparison.runs import mean_loss, of_seeds

Outcomes = list[dict[str, Any]]


def optimum(comparison: Comparison, outcomes: Outcomes, arm: str, operations: float) -> Outcomes:
    """The runs of an arm's best size at a budget, seed by seed.

    The best has the lowest mean over all seeds, among the sizes that were trained with all.
    """
    seeds = [*comparison.seeds, *comparison.optimum_seeds]
    found = of_seeds(outcomes, seeds, arm=arm, operations=operations)
    by_size = [[run for run in found if run["size"] == size] for size in comparison.sizes]
    whole = [runs for runs in by_size if len(runs) == len(seeds)]
    return min(whole, key=mean_loss)


def isoflop_table(comparison: Comparison, outcomes: Outcomes) -> str:
    """A Markdown table of the optima: one row an arm and budget."""
    seeds = [*comparison.seeds, *comparison.optimum_seeds]
    lines = [f"# {comparison.title}", ""]
    if comparison.about:
        lines += [comparison.about.strip(), ""]
    lines += [
        "| operations | arm | best size | parameters | steps | tokens | seconds | "
        "validation loss | with the choice of training | lower than the first arm |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for operations in comparison.budgets:
        first = {
            run["seed"]: run["validation_loss"]
            for run in optimum(comparison, outcomes, next(iter(comparison.arms)), operations)
        }
        for arm in comparison.arms:
            runs = optimum(comparison, outcomes, arm, operations)
            lower = sum(run["validation_loss"] < first[run["seed"]] for run in runs)
            best = runs[0]
            cells = [
                f"{operations:.3g}",
                arm,
                best["size"],
                f"{best['parameters']:,}",
                f"{best['steps']:,}",
                f"{best['tokens']:,}",
                f"{statistics.mean(run['seconds'] for run in runs):.0f}",
                mean_and_deviation([run["validation_loss"] for run in runs]),
                mean_and_deviation([run["validation_loss_training_choice"] for run in runs]),
                "" if arm == next(iter(comparison.arms)) else f"{lower} of {len(runs)} seeds",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Nats per token, mean ± standard deviation over seeds {', '.join(map(str, seeds))}, "
        "of the size that is best for the arm at that budget.",
        "",
        f"![{comparison.title}]({Path(comparison.results).with_suffix('.png').name})",
        "",
        "Every size:",
        "",
        f"| operations | arm | {' | '.join(comparison.sizes)} |",
        f"|---:|---|{'---:|' * len(comparison.sizes)}",
    ]
    for operations in comparison.budgets:
        for arm in comparison.arms:
            found = of_seeds(outcomes, seeds, arm=arm, operations=operations)
            losses = [mean_loss(found, size=size) for size in comparison.sizes]
            cells = [f"{operations:.3g}", arm, *(f"{loss:.3f}" for loss in losses)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def isoflop_plot(comparison: Comparison, outcomes: Outcomes, path: Path) -> None:
    """Loss against parameters, tokens and seconds at each budget; the optima against operations."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    seeds = [*comparison.seeds, *comparison.optimum_seeds]
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained", sharey=True)
    parameters, tokens, seconds, optima = grid.flat
    for number, arm in enumerate(comparison.arms):
        for operations in comparison.budgets:
            found = of_seeds(outcomes, seeds, arm=arm, operations=operations)
            sizes = [[run for run in found if run["size"] == size] for size in comparison.sizes]
            losses = [mean_loss(runs) for runs in sizes]
            for axes, key in ((parameters, "parameters"), (tokens, "tokens"), (seconds, "seconds")):
                means = [statistics.mean(run[key] for run in runs) for runs in sizes]
                label = arm if operations == comparison.budgets[0] else None
                axes.plot(means, losses, color=f"C{number}", marker=".", label=label, alpha=0.8)
        best = [optimum(comparison, outcomes, arm, budget) for budget in comparison.budgets]
        losses = [[run["validation_loss"] for run in runs] for runs in best]
        means = [statistics.mean(of) for of in losses]
        ends = [
            [mean - min(of) for mean, of in zip(means, losses, strict=True)],
            [max(of) - mean for mean, of in zip(means, losses, strict=True)],
        ]
        optima.errorbar(
            comparison.budgets, means, ends, color=f"C{number}", marker="o", capsize=3, label=arm
        )
    parameters.set(xlabel="parameters", ylabel="validation loss, nats per token")
    tokens.set(xlabel="training tokens")
    seconds.set(xlabel="seconds of training", ylabel="validation loss, nats per token")
    optima.set(xlabel="executed FLOPs; best size of each arm, lowest to highest seed")
    for axes in grid.flat:
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    parameters.legend()
    figure.suptitle(comparison.title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
