"""Ranks of this machine, started for one function and gone when it returns."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(
    function: Callable[..., Any], ranks: int, *args: Any, cuda: bool = False, timeout: float = 600.0
) -> Any:
    """Call `function(*args)` on new ranks of one process group; return rank 0's result.

    Args:
        function: importable by name; it, its arguments and its result are pickled.
        ranks: how many.
        args: of the function.
        cuda: one GPU a rank and NCCL, else gloo and one thread a rank.
        timeout: seconds after which all are killed.

    Raises:
        ValueError: that of a rank, its message.
        RuntimeError: a rank failed otherwise, with its traceback, or time ran out.
    """
    context = multiprocessing.get_context("spawn")
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        pipes, processes = [], []
        try:
            for rank in range(ranks):
                here, there = context.Pipe(duplex=False)
                given = (function, args, rank, ranks, store, cuda, timeout, there)
                process = context.Process(target=_main, args=given, daemon=True)
                process.start()
                there.close()
                pipes.append(here)
                processes.append(process)
            results: dict[int, Any] = {}
            while len(results) < ranks:
                waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
                ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise RuntimeError(f"no result after {timeout:g} s")
                for rank in [rank for rank, pipe in enumerate(pipes) if pipe in ready]:
                    results[rank] = _received(pipes[rank], rank)
            return results[0]
        finally:
            for process in processes:
                process.kill()
                process.join()


def end_with_parent() -> None:
    """End this process of `multiprocessing` when the one that started it has, in any way."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def _received(pipe: Any, rank: int) -> Any:
    try:
        failure, result = pickle.loads(pipe.recv_bytes())
    except EOFError:
        failure, result = RuntimeError(f"rank {rank}: died"), None
    if failure is not None:
        raise failure
    return result


def _main(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    ranks: int,
    store: str,
    cuda: bool,
    timeout: float,
    pipe: Any,
) -> None:
    end_with_parent()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    if cuda:
        torch.cuda.set_device(rank)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)
    message: tuple[Exception | None, Any]
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout),
        )
        result = function(*args)
        dist.barrier()
        message = (None, result if rank == 0 else None)
    except ValueError as error:
        message = (ValueError(str(error)), None)
    except BaseException:
        message = (RuntimeError(f"rank {rank}:\n{traceback.format_exc()}"), None)
    # By value: a tensor sent through shared memory would die with this process.
    pipe.send_bytes(pickle.dumps(message))
    pipe.close()
