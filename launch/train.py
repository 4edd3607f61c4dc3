"""Train a task: `deepspeed launch/train.py --config recipes/NAME.yaml section.key=value …`.

Every rank runs this program. `python -m launch.start` checks the configuration, then starts them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file by a launcher: make the project importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import errno
import os
import threading
import warnings

import torch.distributed as dist

from launch.run.arguments import parse
from launch.run.children import stop_with_script
from launch.run.errors import BadInput, Failed, exit_on_bad_input
from launch.run.failures import report
from launch.run.marks import ENDS, FAILED, Marks
from launch.run.preflight import check_run
from launch.run.ranks import is_first
from launch.run.terminal import announced, announcing
from launch.run.training import run

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: list[str] | None = None) -> None:
    """One rank of a run."""
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
    threading.excepthook = _thread_exception_hook
    with exit_on_bad_input(speak=is_first()):
        config = parse(arguments, program="launch/train.py").config
        # On every rank: they end together, rank 0 says why.
        with announced("checking on the ranks, which import DeepSpeed", speak=is_first()):
            check_run(config, ranks=int(os.environ.get("WORLD_SIZE", "1")))
        marks = Marks()
        try:
            with announcing(is_first()):
                run(config, marks)
        except (BadInput, Failed):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                # Of the log, on rank 0 alone; of checkpoints `Loop.save` says more.
                why = f"{error.strerror}: the run cannot write its log"
                raise Failed(f"{config.output}: {why}") from None
            if not marks.opened:
                raise
            report(error, output=Path(config.output), rank=dist.get_rank(), mark=marks.last)
            raise SystemExit(1) from None
        finally:
            if marks.last.at not in ENDS:
                marks(FAILED)
            if dist.is_initialized():
                dist.destroy_process_group()


def _thread_exception_hook(args: threading.ExceptHookArgs) -> None:
    """What TensorBoard's thread cannot write, `MetricLog` raises again where it can be told."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


if __name__ == "__main__":
    stop_with_script()
    main()
