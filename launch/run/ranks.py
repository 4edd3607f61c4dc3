"""The ranks of a run: joining them, and agreeing on when to stop."""

from __future__ import annotations

import os
import signal
import socket
import types

import torch
import torch.distributed as dist

from launch.run.builds import build_no_collectives


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

    build_no_collectives()
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if _on_one_node() and not dist.is_initialized():
        _join_on_loopback(backend)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return device


def _on_one_node() -> bool:
    """Whether a launcher started all ranks here and left it to rank 0 to be where they meet."""
    here = os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    elastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return here == os.environ["WORLD_SIZE"] and not elastic


def _join_on_loopback(backend: str) -> None:
    """Meet where no other machine reaches: torch's own rendezvous listens on every interface.

    Whoever reaches a rank's socket may take part, without a password.
    """
    from deepspeed.constants import default_pg_timeout

    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    port, listening = int(os.environ["MASTER_PORT"]), None
    if rank == 0:
        with socket.create_server(("127.0.0.1", port), backlog=2048) as listener:
            listening = listener.detach()  # the store closes it
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        ranks,
        is_master=rank == 0,
        timeout=default_pg_timeout,
        master_listen_fd=listening,
    )
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=ranks, timeout=default_pg_timeout
    )


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
