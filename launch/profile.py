"""Where a step's time goes: `python -m launch.profile --config RECIPE section.key=value …`.

Takes a few steps of a run on its ranks, trains nothing that is kept, and prints what every part of
a step cost on rank 0: routers, packing, blocks, optimizer, engine, data, communication. Writes a
trace for https://ui.perfetto.dev, a flame picture and the numbers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from launch.run.arguments import parse
from launch.run.errors import BadInput, OneLineParser, program
from launch.run.launcher import count_ranks
from launch.run.options import check_counts, check_positive
from launch.run.preflight import check_run
from launch.run.profiling import profile_on_rank
from launch.run.supervisor import uses_cuda
from launch.run.writable import check_folder
from parallel.ranks import on_ranks


@program
def main(arguments: list[str] | None = None) -> None:
    options = OneLineParser(add_help=False)
    options.add_argument("--ranks", type=int, metavar="N", help="default: as launch.start")
    options.add_argument("--steps", type=int, default=5, help="that are profiled (5)")
    options.add_argument("--warmup", type=int, default=5, help="steps before (5)")
    options.add_argument("--out", metavar="FOLDER", help="default: OUTPUT/profile")
    options.add_argument("--timeout", type=float, default=600, help="seconds (600)")
    options.set_defaults(hostfile=None)
    parsed = parse(arguments, program="python -m launch.profile", launcher=options)
    given = parsed.options
    check_counts(given, "steps", "warmup")
    check_positive(given, "timeout")
    cuda = uses_cuda()
    ranks = count_ranks(given, gpus=torch.cuda.device_count() if cuda else 0)
    folder = Path(parsed.config.output) / "profile" if given.out is None else Path(given.out)
    check_folder("--out", folder)
    check_run(parsed.config, ranks=ranks, speak=True)
    config = parsed.config.phase_configs()[0]
    work = partial(profile_on_rank, warmup=given.warmup, steps=given.steps)
    try:
        said = on_ranks(work, ranks, config, folder, cuda=cuda, timeout=given.timeout)
    except ValueError as error:
        raise BadInput(str(error)) from None
    print(said)
    for name in ("trace.json.gz", "flame.png", "regions.json"):
        print(folder / name)


if __name__ == "__main__":
    main()
