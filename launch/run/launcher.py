"""DeepSpeed's launcher: how many ranks it starts, where they meet, what it is called with."""

from __future__ import annotations

import argparse
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from launch.run.arguments import Parsed
from launch.run.engine import batch_split
from launch.run.errors import BadInput, Failed, OneLineParser
from launch.run.preflight import meta_model
from launch.run.ranks import free_port
from parallel.mesh import data_degree

TRAIN = Path(__file__).parents[1] / "train.py"


def count_ranks(options: argparse.Namespace, *, gpus: int) -> int:
    """Ranks to start: as asked, those of the hostfile, one a GPU, or 2 without GPUs.

    Args:
        options: of the command line.
        gpus: of this node; 0: train on the CPU.

    Raises:
        BadInput: more ranks than GPUs, or an unreadable hostfile.
    """
    if options.hostfile is not None:
        return sum(host_slots(Path(options.hostfile)))
    if options.ranks is None:
        return gpus or 2
    if options.ranks < 1:
        raise BadInput(f"--ranks={options.ranks}: must be at least 1")
    if gpus and options.ranks > gpus:
        raise BadInput(f"--ranks={options.ranks}: must be at most the {gpus} GPUs of this node")
    return int(options.ranks)


def choose_port(port: int | None) -> int:
    """The port that ranks meet at: the one asked for, or one that is free.

    Raises:
        BadInput: something listens there.
    """
    if port is None:
        return free_port()
    if not 0 < port < 65536:
        raise BadInput(f"--port={port}: must be between 1 and 65535")
    with socket.socket() as listener:
        try:
            listener.bind(("", port))
        except OSError as error:
            raise BadInput(
                f"--port={port}: {error.strerror}; leave it out for a free one"
            ) from None
    return port


def launcher_command(parsed: Parsed, *, ranks: int, port: int) -> list[str]:
    """What `deepspeed` is called with."""
    if find_spec("deepspeed") is None:
        raise Failed("deepspeed: not installed; pip install '.[train]'")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    if parsed.options.hostfile is not None:
        command += ["--hostfile", parsed.options.hostfile]
    else:
        command += ["--num_gpus", str(ranks)]
    return [*command, "--master_port", str(port), str(TRAIN), *parsed.words]


def plan(parsed: Parsed, *, ranks: int) -> str:
    """What would run, phase by phase."""
    lines = []
    for number, config in enumerate(parsed.config.phase_configs()):
        axes = config.parallel
        data = data_degree(ranks, tensor=axes.tensor, context=axes.context, expert=axes.expert)
        micro, accumulation = batch_split(config, data)
        parameters = sum(p.numel() for p in meta_model(config).parameters())
        name = parsed.config.phases[number].name if parsed.config.phases else "run"
        lines.append(
            f"{name}: {parameters:,} parameters, {config.train.steps} steps of "
            f"{config.train.batch_size} rows: {data} data ranks x {accumulation} micro-batches "
            f"x {micro} rows"
        )
    return "\n".join(lines)


def host_slots(path: Path) -> list[int]:
    """Ranks of each host of a hostfile."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BadInput(f"--hostfile={path}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"--hostfile={path}: {error}") from None
    slots = []
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        count = words[-1].removeprefix("slots=")
        if len(words) != 2 or not words[-1].startswith("slots=") or not count.isdigit():
            raise BadInput(f"{path}:{number}: must be HOST slots=COUNT")
        slots.append(int(count))
    if sum(slots) == 0:
        raise BadInput(f"--hostfile={path}: names no host")
    return slots


def launcher_options() -> argparse.ArgumentParser:
    parser = OneLineParser(add_help=False)
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="ranks to start; default: one a GPU, 2 without GPUs"
    )
    parser.add_argument("--port", type=int, help="port that ranks meet at; default: a free one")
    parser.add_argument("--hostfile", metavar="FILE", help="several nodes: lines `HOST slots=N`")
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="times that a run which failed is started again from its newest checkpoint, without "
        "hosts and GPUs that are gone; default: 0",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and say what would run")
    return parser
