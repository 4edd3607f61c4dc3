"""The byte counter against arithmetic on each collective."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable

from parallel.checks.traffic import Traffic
from parallel.rows import all_gather_rows, reduce_scatter_rows
from tests.ranks import run_ranks


def _count() -> list[tuple[str, int, int]]:
    rank, world = dist.get_rank(), dist.group.WORLD
    assert world is not None
    with Traffic() as traffic:
        dist.all_reduce(torch.ones(12))
        all_gather_rows(torch.ones(4, 2), world, (4, 4, 4, 4))
        reduce_scatter_rows(torch.ones(16, 2), world, (4, 4, 4, 4))
        all_gather_rows(torch.ones(rank, 2), world, (0, 1, 2, 3))
        reduce_scatter_rows(torch.ones(6, 2), world, (0, 1, 2, 3))
    return [(t.operation, t.ranks, t.sent) for t in traffic.transfers]


def test_bytes_of_each_collective() -> None:
    for rank, seen in enumerate(run_ranks(_count, 4)):
        assert seen == [
            ("all_reduce", 4, 2 * 12 * 4 * 3 // 4),
            ("all_gather", 4, 4 * 2 * 4 * 3),
            ("reduce_scatter", 4, 16 * 2 * 4 * 3 // 4),
            # Own rows to three others; of six rows, all but own.
            ("all_to_all", 4, rank * 2 * 4 * 3),
            ("all_to_all", 4, (6 - rank) * 2 * 4),
        ]


def _backward() -> list[str]:
    x = torch.ones(3, requires_grad=True)
    with Traffic() as traffic:
        differentiable.all_reduce(x * 2).sum().backward()
    return [t.operation for t in traffic.transfers]


def test_collectives_of_the_backward_are_counted() -> None:
    assert run_ranks(_backward, 2)[0] == ["all_reduce", "all_reduce"]
