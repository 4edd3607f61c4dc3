"""Rows of one pack, spread over ranks: who holds which, and how to bring them together.

Shape legend: T rows of the whole pack, t rows of this rank, R chosen rows, D width.

A pack of T rows lies over n ranks in order, `sizes[i]` rows on rank i. Dense packs lie evenly;
the chosen rows of a routed layer lie wherever the choice fell, some ranks may hold none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh


def even_shards(rows: int, ranks: int) -> tuple[int, ...]:
    """Rows of each rank when they are spread evenly; the first ranks get the odd ones."""
    each, odd = divmod(rows, ranks)
    return tuple(each + (rank < odd) for rank in range(ranks))


def all_gather_rows(x_tD: Tensor, group: dist.ProcessGroup, sizes: tuple[int, ...]) -> Tensor:
    """The rows of every rank of `group`, in rank order: [t, …] -> [T, …]. Not differentiable."""
    _check_rows(x_tD.shape[0], group, sizes)
    shape = (sum(sizes), *x_tD.shape[1:])
    out = x_tD.new_empty(shape)
    if len(set(sizes)) == 1:
        _all_gather_even(out, x_tD.contiguous(), group=group)
        return out
    # Uneven all-gathers exist on NCCL only; this sends the same bytes.
    ranks = len(sizes)
    copies = x_tD.repeat(ranks, *[1] * (x_tD.dim() - 1))
    dist.all_to_all_single(out, copies, list(sizes), [x_tD.shape[0]] * ranks, group=group)
    return out


def gather_rows(x_tD: Tensor, group: dist.ProcessGroup, sizes: tuple[int, ...]) -> Tensor:
    """`all_gather_rows`, differentiable: backward sums the ranks' gradients of own rows."""
    return _GatherRows.apply(x_tD, group, sizes)


def reduce_scatter_rows(x_TD: Tensor, group: dist.ProcessGroup, sizes: tuple[int, ...]) -> Tensor:
    """Own rows of the sum over `group`: [T, …] -> [t, …]. Not differentiable."""
    own = sizes[dist.get_rank(group)]
    if len(set(sizes)) == 1:
        out = x_TD.new_empty((own, *x_TD.shape[1:]))
        _reduce_scatter_even(out, x_TD.contiguous(), group=group)
        return out
    ranks = len(sizes)
    parts = x_TD.new_empty((ranks * own, *x_TD.shape[1:]))
    dist.all_to_all_single(parts, x_TD.contiguous(), [own] * ranks, list(sizes), group=group)
    return parts.view(ranks, own, *x_TD.shape[1:]).sum(0)


def gather_over_shards(x_t: Tensor, mesh: Mesh, shard_sizes: tuple[int, ...] | None) -> Tensor:
    """Every rank's rows of a pack that lies over ranks, detached; on any other mesh `x_t` itself.

    What a router calls on its scores, so that the choice is made over the whole sequence:
    one number a token.
    """
    if mesh.shard_group is None:
        return x_t
    sizes = (x_t.shape[0],) * mesh.shards if shard_sizes is None else shard_sizes
    return all_gather_rows(x_t.detach(), mesh.shard_group, sizes)


def exchange_rows(
    x: Tensor, group: dist.ProcessGroup, sent: tuple[int, ...], received: tuple[int, ...]
) -> Tensor:
    """Send `sent[i]` rows to rank i, get `received[i]` rows from it, in order; differentiable."""
    return _Exchange.apply(x, group, sent, received)


def rows_of_rank(
    indices_R: Tensor, sizes: tuple[int, ...], rank: int
) -> tuple[Tensor, tuple[int, ...]]:
    """Which of the chosen rows this rank holds, and how many each rank does.

    Args:
        indices_R: int64 [R], ascending, into the whole pack.
        sizes: rows of the whole pack on each rank.
        rank: this one.

    Returns:
        int64 [r], places among this rank's own rows, ascending; and the chosen rows of each rank.
        Synchronises with the host once.
    """
    ends = torch.tensor(sizes).cumsum(0).to(indices_R.device)
    counts = torch.searchsorted(indices_R, ends).tolist()
    first = counts[rank - 1] if rank else 0
    own = indices_R[first : counts[rank]] - sum(sizes[:rank])
    return own, tuple(b - a for a, b in zip([0, *counts[:-1]], counts, strict=True))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_tD: Tensor, group: dist.ProcessGroup, sizes: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        return all_gather_rows(x_tD, group, sizes)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter_rows(grad_TD, ctx.group, ctx.sizes), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: dist.ProcessGroup,
        sent: tuple[int, ...],
        received: tuple[int, ...],
    ) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        out = x.new_empty((sum(received), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grad, ctx.group, ctx.received, ctx.sent), None, None, None


def _check_rows(rows: int, group: dist.ProcessGroup, sizes: tuple[int, ...]) -> None:
    rank = dist.get_rank(group)
    if len(sizes) != dist.get_world_size(group) or rows != sizes[rank]:
        raise ValueError(f"shard_sizes={sizes}: rank {rank} holds {rows} rows")


# torch 2.13 renamed both; 2.11 has the old names only.
_all_gather_even = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_even = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
