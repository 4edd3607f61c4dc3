"""run_ranks: run a function on n real ranks over gloo, and get each rank's result.

Ranks are fresh processes, forked from a server that has the heavy imports done, so that starting
them costs a tenth of a second and no state crosses from one test to the next. They meet through a
file, not a port. Nothing that this module starts outlives the call.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

_PRELOAD = [
    "pytest",
    "torch.distributed",
    "torch.distributed.nn.functional",
    "numpy",
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "deepspeed",
    "adaptive",
    "adaptive.models.decoder.model",
]


# Kernels that are interpreted take minutes where compiled ones take seconds.
_INTERPRETED = os.environ.get("ADAPTIVE_BACKEND") == "triton" and not torch.cuda.is_available()
_LONGER = 15 if _INTERPRETED else 1


class RankError(AssertionError):
    """A rank raised, died or ran past the time limit; the message has its traceback."""


def run_ranks(
    function: Callable[..., Any], n: int, *args: Any, timeout: float = 60.0, **kwargs: Any
) -> list[Any]:
    """Call `function(*args, **kwargs)` on n ranks of one gloo process group.

    Args:
        function: importable by name (a top-level function); it, its arguments and its results
            are pickled. Inside, `torch.distributed` is ready, with one thread a rank, RANK,
            LOCAL_RANK and WORLD_SIZE set, and torch seeded with 0.
        n: ranks.
        timeout: seconds after which every rank is killed; a collective gives up a little earlier,
            so that the rank that waits shows where. Longer where the suite is forced to kernels
            that are interpreted.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankError: with the traceback of the rank that failed first.
    """
    context = _context()
    timeout *= _LONGER
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        payload = pickle.dumps((function, args, kwargs))
        pipes, processes = [], []
        try:
            for rank in range(n):
                here, there = context.Pipe(duplex=False)
                rank_args = (rank, n, os.path.join(folder, "store"), timeout, payload, there)
                process = context.Process(target=_rank_main, args=rank_args, daemon=True)
                process.start()
                there.close()
                pipes.append(here)
                processes.append(process)
            return _collect(pipes, deadline, timeout)
        finally:
            for process in processes:
                process.kill()
            for process, pipe in zip(processes, pipes, strict=True):
                process.join()
                pipe.close()


def _collect(pipes: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes:
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(open_pipes.values())}: no result after {timeout:g} s")
        # An exception is worth more than the news that another rank's connection closed.
        failures = []
        for pipe in ready:
            rank = open_pipes.pop(pipe)
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank}: died without a result") from None
            if not succeeded:
                failures.append(f"rank {rank}:\n{value}")
            results[rank] = value
        if failures:
            raise RankError("\n".join(failures))
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    rank: int, world: int, store: str, timeout: float, payload: bytes, pipe: Connection
) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    try:
        function, args, kwargs = pickle.loads(payload)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=max(1.0, timeout * 0.8)),
        )
        torch.manual_seed(0)
        result = function(*args, **kwargs)
        # Pickled here, by value: a tensor sent through shared memory would die with this process.
        message = pickle.dumps((True, result))
        # Gloo's pairs break under a rank that still receives; all leave together.
        dist.barrier()
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(message)
    pipe.close()
    os._exit(0)


def _context() -> Any:
    """The forkserver, started once a session with what every rank inherits."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        from multiprocessing import forkserver

        forkserver.ensure_running()
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads
    return context
