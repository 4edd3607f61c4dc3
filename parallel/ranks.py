"""Ranks of this machine, started for one function and gone when it returns."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


class RankError(RuntimeError):
    """A rank raised, died or ran past the time limit; the message has its traceback.

    Attributes:
        refusal: where the first to fail raised a ValueError, its message; else None.
    """

    def __init__(self, message: str, refusal: str | None = None) -> None:
        super().__init__(message)
        self.refusal = refusal


def on_ranks(
    function: Callable[..., Any], ranks: int, *args: Any, cuda: bool = False, timeout: float = 600.0
) -> Any:
    """`run_ranks` for a program: rank 0's result alone, and a rank's ValueError as one.

    Raises:
        ValueError: that of a rank, its message.
        RankError: a rank failed otherwise, or time ran out.
    """
    try:
        return run_ranks(_of_first, ranks, function, *args, cuda=cuda, timeout=timeout)[0]
    except RankError as error:
        if error.refusal is None:
            raise
        raise ValueError(error.refusal) from error


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    cuda: bool = False,
    timeout: float = 600.0,
    context: Any = None,
) -> list[Any]:
    """Call `function(*args)` on new ranks of one process group, which meet through a file.

    Args:
        function: importable by name; it, its arguments and its results are pickled. Inside,
            `torch.distributed` is ready, and RANK, LOCAL_RANK and WORLD_SIZE are set.
        ranks: how many.
        args: of the function.
        cuda: one GPU a rank and NCCL, else gloo and one thread a rank.
        timeout: seconds after which all are killed; a collective gives up a little earlier, so
            that the rank that waits shows where.
        context: of `multiprocessing`, which starts them; None: spawn.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankError: with the traceback of the rank that failed first.
    """
    context = multiprocessing.get_context("spawn") if context is None else context
    deadline = time.monotonic() + timeout
    payload = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        try:
            for rank in range(ranks):
                here, there = context.Pipe(duplex=False)
                store = os.path.join(folder, "store")
                given = (rank, ranks, store, cuda, timeout, payload, there)
                process = context.Process(target=_main, args=given, daemon=True)
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


def end_with_parent() -> None:
    """End this process of `multiprocessing` when the one that started it has, in any way."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def _of_first(function: Callable[..., Any], *args: Any) -> Any:
    result = function(*args)
    return result if dist.get_rank() == 0 else None


def _collect(pipes: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())}: no result after {timeout:g} s")
        # An exception is worth more than the news that another rank's connection closed.
        failures, refusals, died = [], [], []
        for pipe in pipes:
            if pipe not in ready:
                continue
            rank = waiting.pop(pipe)
            try:
                succeeded, value, refusal = pickle.loads(pipe.recv_bytes())
            except EOFError:
                died.append(f"rank {rank}: died without a result")
                continue
            if not succeeded:
                failures.append(f"rank {rank}:\n{value}")
                refusals.append(refusal)
            results[rank] = value
        if failures or died:
            raise RankError("\n".join(failures or died), refusals[0] if refusals else None)
    return [results[rank] for rank in range(len(pipes))]


def _main(
    rank: int,
    ranks: int,
    store: str,
    cuda: bool,
    timeout: float,
    payload: bytes,
    pipe: Connection,
) -> None:
    end_with_parent()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    if cuda:
        torch.cuda.set_device(rank)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)
    try:
        function, args = pickle.loads(payload)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=max(1.0, timeout * 0.8)),
        )
        # By value: a tensor sent through shared memory would die with this process.
        message = pickle.dumps((True, function(*args), None))
        # Gloo's pairs break under a rank that still receives; all leave together.
        dist.barrier()
    except BaseException as error:
        refusal = str(error) if isinstance(error, ValueError) else None
        message = pickle.dumps((False, traceback.format_exc(), refusal))
    sys.stdout.flush()
    pipe.send_bytes(message)
    pipe.close()
    os._exit(0)
