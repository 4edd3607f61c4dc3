"""The ranks of a run: joining them, and agreeing on when to stop."""

from __future__ import annotations

import os
import signal
import socket
import types

import torch
import torch.distributed as dist


def join_ranks() -> torch.device:
    """Join the process group that the launcher prepared; returns this rank's device.

    Without a launcher this process is the only rank.
    """
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    # It needs a compiler and a minute to build, and gains nothing at this project's CPU sizes.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return device


def free_port() -> int:
    """A TCP port of this machine that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class StopRequest:
    """Remembers that this process was asked to end; the run then saves at the next step boundary.

    SIGTERM, SIGINT and SIGUSR1 ask. A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: types.FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def is_first() -> bool:
    """Whether this is rank 0, also before the ranks have joined."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0
