"""Compare ways to train at equal executed operations: `python -m launch.compare COMPARISON.yaml`.

A comparison names a recipe, some arms (lists of overrides) and seeds. Every run may execute the
same number of floating-point operations, forward and backward; the steps follow from what its
model plans for a step. Finished runs are kept and not repeated, so an interrupted comparison goes
on where it was. With `sizes` every arm is trained at each of them, at every budget, and the arms'
best sizes are compared: IsoFLOP curves. Writes a table, a plot and the numbers.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from launch.comparison.config import load_comparison
from launch.comparison.report import write_results
from launch.comparison.runs import Run, finish, known_runs, plan_runs, runs_at_optimum
from launch.run.children import Children
from launch.run.errors import Failed, OneLineParser, program
from launch.run.options import check_counts
from launch.run.recipes import recipe_file
from launch.run.trust import add_trust_option


@program
def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m launch.compare", description=__doc__)
    add_trust_option(parser)
    parser.add_argument("comparison", help="YAML file, or a name: compare_isoflop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument(
        "--known",
        type=Path,
        metavar="RESULTS.json",
        help="take runs with the same overrides from these results, maybe of another machine",
    )
    parser.add_argument("overrides", nargs="*", help="keys of the comparison, as key=value")
    options = parser.parse_intermixed_args(arguments)
    check_counts(options, "jobs", "threads")
    path = recipe_file(options.comparison)
    comparison = load_comparison(path, options.overrides)
    known = known_runs(options.known) if options.known else []
    runs = plan_runs(comparison, path.parent)
    with ThreadPoolExecutor(options.jobs) as pool, Children() as children:
        given = {"threads": options.threads, "children": children, "known": known}

        def finish_all(runs: list[Run]) -> list[dict[str, Any]]:
            outcomes = list(pool.map(partial(finish, **given), runs))
            failed = [str(run) for run, of in zip(runs, outcomes, strict=True) if of is None]
            if failed:
                raise Failed(f"not finished: {', '.join(failed)}; see log.txt in their folders")
            return [outcome for outcome in outcomes if outcome is not None]

        outcomes = finish_all(runs)
        outcomes += finish_all(runs_at_optimum(comparison, path.parent, outcomes))
    write_results(comparison, outcomes)


if __name__ == "__main__":
    main()
