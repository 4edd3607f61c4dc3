"""Where tokens lie while attention goes round a ring: where they are, or evened out in zigzag.

Ranks that hold consecutive tokens of a long sequence have uneven work under a causal mask, and at
every step of the ring all wait for the one with most. So rows change ranks before attention and
come back after it, where that saves enough: of every sequence cut into 2n chunks, rank r attends
for chunks r and 2n - 1 - r.

Shape legend: T rows of all ranks, t those of this rank, H heads, h head width, n ranks.

Source of the order: Striped Attention, arXiv 2311.09431, and its zigzag variants.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.ring.layout import RingLayout, Run, partly_seen, runs, unseen
from parallel.rows import even_shards, exchange_rows

SAVED_PAIRS = 400
"""Rows move where the busiest rank then computes, for every row that it holds, so many query-key
pairs less, summed over the steps: measured on a CPU (benchmarks/ring_order.py)."""


@dataclass(frozen=True, eq=False)
class RingOrder:
    """Rows of a pack on their way round a ring and back; made once for all layers of a forward.

    Attributes:
        layout: who holds which tokens during attention.
        positions: int64 [t], of this rank's rows before it.
        moves: how rows get there; None: they stay.
    """

    layout: RingLayout
    positions: Tensor
    moves: Moves | None

    @staticmethod
    def of(
        positions_T: Tensor,
        sequences_T: Tensor,
        sizes: tuple[int, ...],
        group: dist.ProcessGroup,
        *,
        causal: bool = True,
    ) -> RingOrder:
        """For rows that lie over the ranks in this order. Synchronises with the host once."""
        rank, device = dist.get_rank(group), positions_T.device
        own = positions_T.split(list(sizes))[rank]
        on_host = torch.stack([positions_T, sequences_T]).cpu()
        owners = zigzag_if_cheaper(on_host, sizes, causal=causal)
        if owners is None:
            layout = RingLayout.of(
                positions_T, sequences_T, sizes, group, causal=causal, on_host=on_host
            )
            return RingOrder(layout, own, None)
        index = owners.argsort(stable=True)
        there = index.to(device, non_blocking=True)
        layout = RingLayout.of(
            positions_T[there],
            sequences_T[there],
            _held(owners, len(sizes)),
            group,
            causal=causal,
            on_host=on_host[:, index],
        )
        return RingOrder(layout, own, Moves.of(owners, sizes, rank, group, device))

    def to_ring(self, parts: list[Tensor]) -> list[Tensor]:
        """Rows of the same tokens, [t, heads, h] each, to where attention wants them."""
        if self.moves is None:
            return parts
        joined = self.moves.to_ring(torch.cat(parts, 1))
        return list(joined.split([part.shape[1] for part in parts], 1))

    def from_ring(self, x_tHh: Tensor) -> Tensor:
        """Rows where they came from."""
        return x_tHh if self.moves is None else self.moves.from_ring(x_tHh)


@dataclass(frozen=True, eq=False)
class Moves:
    """An exchange of rows: own ones ordered by the rank that they go to, and how many each gets."""

    group: dist.ProcessGroup
    order: Tensor
    inverse: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]

    @staticmethod
    def of(
        owners_T: Tensor,
        sizes: tuple[int, ...],
        rank: int,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> Moves:
        parts = owners_T.split(list(sizes))
        counts = [_held(part, len(sizes)) for part in parts]
        order = parts[rank].argsort(stable=True)
        inverse = order.argsort()
        return Moves(
            group,
            order.to(device, non_blocking=True),
            inverse.to(device, non_blocking=True),
            counts[rank],
            tuple(count[rank] for count in counts),
        )

    def to_ring(self, x: Tensor) -> Tensor:
        x = _Permute.apply(x, self.order, self.inverse)
        return exchange_rows(x, self.group, self.sent, self.received)

    def from_ring(self, x: Tensor) -> Tensor:
        x = exchange_rows(x, self.group, self.received, self.sent)
        return _Permute.apply(x, self.inverse, self.order)


class _Permute(torch.autograd.Function):
    """Rows in another order; backward is a gather too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None


def zigzag_owners(sequences_T: Tensor, ranks: int) -> Tensor:
    """int64 [T]: the rank that attends for each token, of sequences laid one after another.

    Of 2n chunks of a sequence, as even as can be, rank r gets chunks r and 2n - 1 - r.
    """
    counts = torch.unique_consecutive(sequences_T, return_counts=True)[1]
    lengths = counts.repeat_interleave(counts)
    place = torch.arange(len(sequences_T)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    each, odd = lengths // (2 * ranks), lengths % (2 * ranks)
    # The first `odd` chunks have a token more.
    long = odd * (each + 1)
    chunk = torch.where(
        place < long, place // (each + 1), odd + (place - long) // each.clamp(min=1)
    )
    return torch.minimum(chunk, 2 * ranks - 1 - chunk)


def zigzag_if_cheaper(
    on_host: Tensor, sizes: tuple[int, ...], *, causal: bool = True
) -> Tensor | None:
    """`zigzag_owners`, or None where rows had better stay.

    Args:
        on_host: int64 [2, T], positions and sequences in the order of the ranks.
        sizes: rows of each rank.
        causal: whether there is a causal mask.
    """
    stays, mean = ring_pairs(on_host, sizes, causal=causal)
    most = stays - SAVED_PAIRS * on_host.shape[1] / len(sizes)
    if mean > most or not mean:  # nothing could save enough
        return None
    owners = zigzag_owners(on_host[1], len(sizes))
    evened = on_host[:, owners.argsort(stable=True)]
    moved, _ = ring_pairs(evened, _held(owners, len(sizes)), causal=causal)
    return owners if moved <= most else None


def moved_share(sequences: int, length: int, ranks: int) -> float:
    """Of the rows of equally long sequences, which lie evenly, the share that moves."""
    return _moved_share(sequences, length, ranks, SAVED_PAIRS)


@functools.cache
def _moved_share(sequences: int, length: int, ranks: int, _: float) -> float:
    positions = torch.arange(length).repeat(sequences)
    on_host = torch.stack([positions, torch.arange(sequences).repeat_interleave(length)])
    sizes = even_shards(sequences * length, ranks)
    owners = zigzag_if_cheaper(on_host, sizes)
    if owners is None:
        return 0.0
    holders = torch.arange(ranks).repeat_interleave(torch.tensor(sizes))
    return float((owners != holders).double().mean())


def ring_pairs(on_host: Tensor, sizes: tuple[int, ...], *, causal: bool) -> tuple[float, float]:
    """Query-key pairs of the busiest rank, summed over the steps of the ring, and of the mean one.

    Half the pairs of two runs count where some are hidden from each other.
    """
    bounds, _ = runs(on_host, sizes)
    ranks = len(sizes)
    flat = torch.tensor([run for own in bounds for run in own]).view(-1, len(Run._fields))
    counts = torch.tensor([len(own) for own in bounds])
    rank_of = torch.arange(ranks).repeat_interleave(counts)
    # Exact, so that all ranks decide alike whatever their processors are.
    between = torch.zeros(ranks, ranks, dtype=torch.float64)
    for rank, queries in enumerate(flat.split(counts.tolist())):
        q, k = Run._make(queries.T[:, :, None]), Run._make(flat.T[:, None])
        pairs = (q.stop - q.start) * (k.stop - k.start) * ~unseen(q, k, causal)
        pairs = pairs * (1 - 0.5 * partly_seen(q, k, causal).double())
        between[rank].index_add_(0, rank_of, pairs.sum(0))
    steps = torch.arange(ranks)
    busiest = sum(between[steps, (steps - step) % ranks].max() for step in range(ranks))
    return float(busiest), float(between.sum()) / ranks


def _held(owners: Tensor, ranks: int) -> tuple[int, ...]:
    return tuple(owners.bincount(minlength=ranks).tolist())
