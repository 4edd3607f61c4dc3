"""Compare the routing of runs: `python -m launch.compare_routing RUN [RUN …]`.

Every run's experts route the same held-out text, that of the first run. For each run: loss,
representation collapse (RC; smaller is more collapsed), spread of the token-expert cosines, and
routing fluctuation, the share of tokens whose experts changed between its last two checkpoints. For
two runs or more: inter-run consistency, the mean correlation of their expert loads.

RUN is the folder of a run (its two newest checkpoints) or one checkpoint (no fluctuation).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from launch.comparison.routing import compare, table
from launch.run.errors import OneLineParser, program
from launch.run.options import check_counts
from launch.run.trust import add_trust_option
from launch.run.writable import check_file


@program
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m launch.compare_routing", description=__doc__)
    add_trust_option(parser)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a checkpoint")
    parser.add_argument("--rows", type=int, default=32, help="rows of held-out text (default 32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    arguments = parser.parse_args(argv)
    check_counts(arguments, "rows")
    if arguments.json is not None:
        check_file("--json", arguments.json, makes_folder=True)
    rows, consistency = compare(arguments.runs, rows=arguments.rows)
    print(table(rows, consistency))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        numbers = {"runs": [asdict(row) for row in rows], "consistency": consistency}
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
