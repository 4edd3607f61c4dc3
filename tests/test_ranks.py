"""The harness of multi-process tests must itself be trusted: results, failures, time limits."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks


def _sum_of_ranks(offset: float) -> tuple[int, torch.Tensor, int]:
    total = torch.full((3,), dist.get_rank() + offset)
    dist.all_reduce(total)
    return os.getpid(), total, torch.get_num_threads()


def _raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("capacity=0: the message of the failing rank")
    dist.barrier()


def _exit_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def _hang() -> None:
    time.sleep(600)


def _alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def test_every_rank_returns_its_result_and_leaves() -> None:
    results = run_ranks(_sum_of_ranks, 3, 1.0)
    assert [total.tolist() for _, total, _ in results] == [[6.0] * 3] * 3
    assert {threads for _, _, threads in results} == {1}
    pids = [pid for pid, _, _ in results]
    assert len(set(pids)) == 3
    assert not any(_alive(pid) for pid in pids)


def test_traceback_of_the_failing_rank_is_shown() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1:.*message of the failing rank"):
        run_ranks(_raise_on, 2, 1, timeout=20)


def test_rank_that_dies_ends_the_run() -> None:
    with pytest.raises(RankError, match="rank"):
        run_ranks(_exit_on, 2, 1, timeout=20)


def test_time_limit_kills_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.ranks._LONGER", 1)
    start = time.monotonic()
    with pytest.raises(RankError, match="no result after 1 s"):
        run_ranks(_hang, 2, timeout=1)
    assert time.monotonic() - start < 30
