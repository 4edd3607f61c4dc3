"""Start a run: check everything, then have DeepSpeed's launcher start the ranks.

    python -m launch.start --config recipes/NAME.yaml section.key=value …

is `deepspeed --num_gpus N launch/train.py --config recipes/NAME.yaml section.key=value …`, except
that bad input ends in one line before any rank starts, N and a free port are found, SIGTERM or
Ctrl-C reach the ranks, which save and exit 0, and nothing that was started outlives this program.
It exits 0 when the run finished, or stopped as asked, and says what happened otherwise. With
`--restarts N` a run that failed, hung or was killed is started again up to N times.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import torch

from launch.run.arguments import Parsed, parse
from launch.run.children import stop_with_script
from launch.run.errors import BadInput, program
from launch.run.launcher import (
    choose_port,
    count_ranks,
    host_slots,
    launcher_command,
    launcher_options,
    plan,
)
from launch.run.preflight import check_run
from launch.run.restarts import Restarts
from launch.run.starting import end_when_asked
from launch.run.supervisor import Start, Supervised, supervise, uses_cuda


@program
def main(arguments: list[str] | None = None) -> int:
    parsed = parse(arguments, program="python -m launch.start", launcher=launcher_options())
    if parsed.options.restarts < 0:
        raise BadInput(f"--restarts={parsed.options.restarts}: must be at least 0")
    ranks, (command, run) = _start(parsed)
    check_run(parsed.config, ranks=ranks, speak=True)
    print(shlex.join(command), flush=True)
    if parsed.options.dry_run:
        print(plan(parsed, ranks=ranks))
        return 0
    print(f"starting {ranks} ranks: a launcher, then each of them, imports torch …", flush=True)
    again = Restarts(parsed, _start) if parsed.options.restarts else None
    return supervise(command, run, again)


def _start(parsed: Parsed) -> tuple[int, Start]:
    """Ranks of a run, the launcher's command and how it is supervised."""
    ranks = count_ranks(parsed.options, gpus=torch.cuda.device_count() if uses_cuda() else 0)
    port = choose_port(parsed.options.port)
    hostfile = parsed.options.hostfile
    run = Supervised(
        output=Path(parsed.config.output),
        hang_seconds=parsed.config.train.hang_seconds,
        stop_seconds=parsed.config.train.stop_seconds,
        several_nodes=hostfile is not None and len(host_slots(Path(hostfile))) > 1,
    )
    return ranks, (launcher_command(parsed, ranks=ranks, port=port), run)


if __name__ == "__main__":
    end_when_asked(sys.exit)  # while the checks run
    stop_with_script()
    main()
