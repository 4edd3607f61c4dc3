"""run_ranks: run a function on n real ranks over gloo, and get each rank's result.

Ranks are fresh processes, forked from a server that has the heavy imports done, so that starting
them costs a tenth of a second and no state crosses from one test to the next. Nothing that this
module starts outlives the call.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

from parallel import ranks
from parallel.ranks import RankError

__all__ = ["RankError", "fork_programs_ranks", "run_ranks"]

# Kernels that are interpreted take minutes where compiled ones take seconds.
_INTERPRETED = os.environ.get("ADAPTIVE_BACKEND") == "triton" and not torch.cuda.is_available()
_LONGER = 15 if _INTERPRETED else 1


def run_ranks(
    function: Callable[..., Any], n: int, *args: Any, timeout: float = 60.0, **kwargs: Any
) -> list[Any]:
    """`parallel.ranks.run_ranks` from the forkserver, torch seeded with 0; `timeout` in seconds,
    longer where the suite is forced to kernels that are interpreted."""
    timeout *= _LONGER
    call = partial(_seeded, function, **kwargs)
    return ranks.run_ranks(call, n, *args, timeout=timeout, context=_context())


def fork_programs_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks that a program starts, called in this process, come from the forkserver too."""
    monkeypatch.setattr(ranks, "run_ranks", partial(ranks.run_ranks, context=_context()))


def _seeded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return function(*args, **kwargs)


@cache
def _context() -> Any:
    """The forkserver, started once a session with what every rank inherits."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.preloaded"])
        from multiprocessing import forkserver

        forkserver.ensure_running()
        # It answers when it has imported all: no rank's time goes there.
        first = context.Process(target=int, daemon=True)
        first.start()
        first.join()
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads
    return context
