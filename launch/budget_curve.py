"""One trained model at many budgets, without training: quality against executed operations.

    python -m launch.budget_curve runs/vit model.token_merging.kind=bsm,pitome,random \\
        model.token_merging.amount=0.0,0.05,0.1,0.2 --output curve
    python -m launch.budget_curve runs/mod_lm model.mixture_of_depths.capacity=0.05,0.125,0.25,0.5
    python -m launch.budget_curve runs/moe_lm model.mixture_of_experts.top_k=1,2,4

Every combination of the values is measured on held-out rows: the metrics of the run's task, and
the operations that were executed, as a share of the same model's with every token computed. With
--output NAME the numbers go to NAME.json and the curves to NAME.png.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from launch.checkpoint.models import add_checkpoint
from launch.comparison.budgets import Point, budget_curve, settings_of
from launch.run.errors import BadInput, OneLineParser, program
from launch.run.options import check_counts
from launch.run.writable import check_file


@program
def main(arguments: list[str] | None = None) -> None:
    """Measure, print a line a setting, write."""
    options = arguments_parser().parse_args(arguments)
    check_counts(options, "rows", "at_once")
    settings = settings_of(options.settings)
    outputs = [] if options.output is None else [f"{options.output}.{e}" for e in ("json", "png")]
    for path in outputs:
        check_file("--output", path)
    points: list[Point] = []
    for point in budget_curve(
        options.checkpoint, settings, rows=options.rows, at_once=options.at_once
    ):
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in point.metrics.items())
        print(f"{point.share:6.1%} of the operations  {metrics}  {' '.join(point.settings)}")
        points.append(point)
    if not outputs:
        return
    metric = options.metric or next(iter(points[0].metrics))
    if metric not in points[0].metrics:
        raise BadInput(f"--metric={metric}: must be one of {', '.join(points[0].metrics)}")
    told = [dataclasses.asdict(point) for point in points]
    Path(outputs[0]).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    draw(points, metric, Path(outputs[1]))
    print("written " + ", ".join(outputs))


def arguments_parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m launch.budget_curve", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument(
        "settings", nargs="+", metavar="model.KEY=VALUE,VALUE,…", help="every combination is tried"
    )
    parser.add_argument("--rows", type=int, default=256, help="held-out rows (default 256)")
    parser.add_argument("--at-once", type=int, default=32, help="rows of one forward")
    parser.add_argument("--metric", help="drawn against operations; by default the first")
    parser.add_argument("--output", metavar="NAME", help="write NAME.json and NAME.png")
    return parser


def draw(points: list[Point], metric: str, path: Path) -> None:
    """A curve for each setting of all keys but the last, over executed operations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    for name in dict.fromkeys(point.settings[:-1] for point in points):
        curve = sorted((p.share, p.metrics[metric]) for p in points if p.settings[:-1] == name)
        label = ", ".join(setting.rpartition(".")[2] for setting in name) or None
        axes.plot(*zip(*curve, strict=True), marker="o", label=label)
    axes.set_xlabel("executed operations, share of all tokens everywhere")
    axes.set_ylabel(f"held-out {metric}")
    axes.grid(alpha=0.3)
    if any(point.settings[:-1] for point in points):
        axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
